"""Implementations in other languages: a program that answers JSON Lines on stdin and stdout.

It is started once. Every line it reads is a request, every line it writes the answer to it:

    {"request": "hello", "protocol": 1, "device": null}
    {"name": "mine", "version": "1.0", "capabilities": {"unsupported": {}}}

    {"request": "run", "op": "causal_conv1d_fn", "arrays": {"x": {...}, "bias": null, ...}, "options": {"activation": "silu"}}
    {"out": {...}, "conv_states": {...}}      or      {"error": "ValueError", "message": "x: expected ..."}

What else an answer may hold is in `adapter`: "window_out", "parents", gradients, and a list of arrays as "out". Arrays are encoded as `codec` says, without strides. The errors are ValueError, TypeError, Unsupported, or anything
else for a failure of its own. `oracle/examples/other_process.py` is such a program.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping
from typing import Any

from oracle.conformance import codec
from oracle.conformance.adapter import GRADIENTS
from oracle.conformance.arrays import Array
from oracle.contract import Unsupported

PROTOCOL = 1
ERRORS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "Unsupported": Unsupported,
}


class ProtocolError(RuntimeError):
    """The program ended, or its answer is not one."""


class ProcessAdapter:
    """An adapter for a program."""

    def __init__(self, command: list[str], device: str | None = None):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        hello = self._ask({"request": "hello", "protocol": PROTOCOL, "device": device})
        missing = {"name", "version", "capabilities"} - set(hello)
        if missing:
            raise ProtocolError(f"hello: expected name, version and capabilities, got no {sorted(missing)}")
        self.name, self.version = str(hello["name"]), str(hello["version"])
        self._capabilities = dict(hello["capabilities"])

    def capabilities(self) -> Mapping[str, Any]:
        return self._capabilities

    def run(
        self, op: str, arrays: Mapping[str, Array | None], options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        encoded = {name: codec.encode(None if a is None else a.typed) for name, a in arrays.items()}
        answer = self._ask({"request": "run", "op": op, "arrays": encoded, "options": dict(options)})
        if "error" in answer:
            kind = ERRORS.get(answer["error"], ProtocolError)
            raise kind(str(answer.get("message", answer["error"])))
        result: dict[str, Any] = {
            name: codec.decode(answer[name])
            for name in ("conv_states", "window_out", *GRADIENTS)
            if name in answer
        }
        if "parents" in answer:
            result["parents"] = codec.decode(answer["parents"]).data
        if "out" in answer:
            out = answer["out"]
            result["out"] = (
                [codec.decode(part) for part in out] if isinstance(out, list) else codec.decode(out)
            )
        return result

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            raise ProtocolError(f"the program ended with exit status {self.process.wait()}")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError as error:
            raise ProtocolError(f"expected a JSON object on one line, got {line[:80]!r}") from error
        if not isinstance(answer, dict):
            raise ProtocolError(f"expected a JSON object, got {line[:80]!r}")
        return answer

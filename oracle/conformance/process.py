"""Implementations in other languages: a program that answers JSON Lines on stdin and stdout.

It is started once. Every line it reads is a request, every line it writes the answer to it, with the request's number:

    {"id": 0, "request": "hello", "protocol": 2, "device": null}
    {"id": 0, "name": "mine", "version": "1.0", "capabilities": {"unsupported": {}}}

    {"id": 1, "request": "run", "op": "causal_conv1d_fn", "arrays": {"x": {...}, "bias": null, ...}, "options": {"activation": "silu"}}
    {"id": 1, "out": {...}, "conv_states": {...}}      or      {"id": 1, "error": "ValueError", "message": "x: expected ..."}

Anything else on its stdout is an error of the request that it came with, and so is its end; the next request then meets a
fresh process. (A program that answers "hello" without "id" speaks protocol 1, in which nothing is numbered.)

What else an answer may hold is in `adapter`: "window_out", "parents", "q" to "beta", gradients, and a list of arrays as "out". Arrays are encoded as `codec` says, without strides. The errors are ValueError, TypeError, Unsupported, or anything
else for a failure of its own. `oracle/examples/other_process.py` is such a program.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
from collections.abc import Mapping
from typing import Any

from oracle.conformance import codec
from oracle.conformance.adapter import GRADIENTS
from oracle.conformance.arrays import Array
from oracle.contract import Unsupported

PROTOCOL = 2
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
        self.command, self.device = command, device
        self.process: subprocess.Popen[bytes] | None = None
        hello = self._start()
        missing = {"name", "version", "capabilities"} - set(hello)
        if missing:
            raise ProtocolError(f"hello: expected name, version and capabilities, got no {sorted(missing)}")
        self.name, self.version = str(hello["name"]), str(hello["version"])
        self._capabilities = dict(hello["capabilities"])

    def _start(self) -> dict[str, Any]:
        """Starts the program, again after it has broken the protocol; returns its hello."""
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.number, self.numbered, self.read = 0, False, b""
        hello = self._ask({"request": "hello", "protocol": PROTOCOL, "device": self.device})
        self.numbered = "id" in hello
        return hello

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
            for name in ("conv_states", "window_out", "q", "k", "v", "g", "beta", *GRADIENTS.get(op, ()))
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
        if self.process is None:
            self._start()
        try:
            return self._answer(request)
        except ProtocolError:
            self.process.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            self.process.wait()
            self.process = None
            raise

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        number, self.number = self.number, self.number + 1
        if line := self._line(wait=False):
            raise ProtocolError(f"expected nothing on stdout before a request, got {_shown(line)}")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"id": number, **request}).encode() + b"\n")
            self.process.stdin.flush()
            line = self._line()
        if not line:
            raise ProtocolError(f"the program ended with exit status {self.process.wait()}")
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise ProtocolError(f"expected a JSON object on one line, got {_shown(line)}") from error
        if not isinstance(answer, dict):
            raise ProtocolError(f"expected a JSON object, got {_shown(line)}")
        if (self.numbered or "id" in answer) and answer.get("id") != number:
            raise ProtocolError(f"expected the answer to request {number}, got {_shown(line)}")
        return answer

    def _line(self, wait: bool = True) -> bytes:
        """The next line; nothing at the end of the file, or if there is none yet and it shall not wait."""
        pipe = self.process.stdout.fileno()
        while b"\n" not in self.read and (wait or select.select([pipe], [], [], 0)[0]):
            if not (more := os.read(pipe, 2**20)):
                line, self.read = self.read, b""
                return line
            self.read += more
        line, end, rest = self.read.partition(b"\n")
        if not end:
            return b""
        self.read = rest
        return line or b" "


def _shown(line: bytes) -> str:
    return f"the line {line[:80].decode(errors='replace')!r}"

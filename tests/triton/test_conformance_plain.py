"""The conformance suite through the adapters' signatures: SGLang's two pairs, vLLM's, causal-conv1d's and FLA's."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from oracle.conformance import runner, worker
from oracle.conformance.commands import main
from oracle.conformance.judge import promises_of
from oracle.conformance.loading import load_adapter

ROOT = Path(__file__).resolve().parents[2]
# adapter: cases that its peer's signature can express, at least
ADAPTERS = {"sglang": 480, "sglang_dispatcher": 460, "vllm": 475, "causal_conv1d": 390, "fla": 295}


def judge(impl, device):
    """Runs `python -m oracle run`; returns its exit status, its counts by status, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "oracle", "run", "--impl", impl, "--device", device],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done.returncode, counts_of(done.stdout), done.stdout + done.stderr


def counts_of(text):
    summary = re.findall(r"^\d+ cases in .*", text, re.MULTILINE)
    return {status: int(count) for count, status in re.findall(r"(\d+) (\w+)(?:,|$)", "".join(summary))}


class WorkerHere:
    """The runner's worker without a process: to import PyTorch takes as long as half of an adapter's cases."""

    alive = True

    def __init__(self, arguments, environment):
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        self.adapter = load_adapter(given["--impl"], given["--device"])
        self.promises = promises_of(self.adapter)
        hello = dict(name=self.adapter.name, version=str(self.adapter.version))
        self.hello = {
            "hello": {**hello, "capabilities": dict(self.adapter.capabilities())},
            "environment": {},
        }

    def ask(self, case, limit):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in a process of its own
            verdict = worker.run_case(self.adapter, case, self.promises)
        return {"status": verdict.status, "detail": verdict.detail, "seconds": 0.0, **verdict.numbers()}

    def finish(self):
        pass

    stop = kill = finish


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter(adapter, device, monkeypatch, capsys):
    assert device == "cpu" or torch.cuda.is_available()
    impl = f"triton_impl.compat.adapters:{adapter}"
    if adapter == "sglang" or device == "cuda":
        code, counts, text = judge(impl, device)
    else:  # what the command does besides is the same for all of them
        monkeypatch.setattr(runner, "_Worker", WorkerHere)
        code = main(["run", "--impl", impl, "--device", device])
        text = "".join(capsys.readouterr())
        counts = counts_of(text)
    assert code == 0, text
    assert counts.keys() == {"passed", "unsupported"}, text
    assert counts["passed"] >= ADAPTERS[adapter], text


def test_a_wrong_adapter_fails(tmp_path):
    """An adapter that takes conv_states and query_start_loc in the other order of the two call styles."""
    (tmp_path / "swapped.py").write_text(
        "from triton_impl.compat import adapters, sglang\n"
        "def adapter(device=None):\n"
        "    made = adapters.sglang(device)\n"
        "    right = made.functions['causal_conv1d_fn']\n"
        "    def wrong(x, weight, bias, conv_states, *rest, **options):\n"
        "        return sglang.causal_conv1d_fn(x.mT, weight, bias, conv_states.mT, *rest, **options).mT\n"
        "    made.functions['causal_conv1d_fn'] = lambda **arguments: wrong(*arguments.values())\n"
        "    return made\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "oracle", "run", "--impl", "swapped:adapter", "--device", "cpu", "--cases", "fn/width-4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 wrong_error" in done.stdout or "1 crashed" in done.stdout, done.stdout

"""The JAX operations over several processes, one a device: on a CPU with gloo, on GPUs by `make test-multi-gpu`."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("processes", Path(__file__).parents[1] / "tools/processes.py")
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)


def test_same_bits_as_one_process_on_a_cpu():
    codes, texts = processes.run_processes(
        "sharded_jax.py", [2, processes.free_port(), "cpu"], 2, {"JAX_PLATFORMS": "cpu"}
    )
    assert codes == [0, 0], "\n".join(texts)
    assert all("agreed: 5" in text for text in texts)


@pytest.mark.gpu
def test_same_bits_as_one_gpu_and_timings(tmp_path):
    """NCCL, one process and one communicator a GPU, NVLink multicast off. RESULTS=FILE keeps the timings."""
    ranks = processes.count_gpus()
    if ranks < 2:
        pytest.fail(f"expected at least 2 GPUs, got {ranks}", pytrace=False)
    file = Path(os.environ.get("RESULTS", tmp_path / "timings.json"))
    codes, texts = processes.run_processes(
        "sharded_jax.py",
        [ranks, processes.free_port(), "cuda", "--timings", file],
        ranks,
        {"NCCL_NVLS_ENABLE": "0"},
    )
    assert codes == [0] * ranks, "\n".join(texts)
    assert all("agreed: 5" in text for text in texts)
    timings = json.loads(file.read_text())
    print(json.dumps(timings, indent=1))
    assert timings["devices"] == ranks

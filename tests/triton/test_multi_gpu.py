"""Context parallel prefill in Torch on all GPUs of this machine, two or more: `make test-multi-gpu`."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("processes", Path(__file__).parents[1] / "tools/processes.py")
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)


def test_the_command_counts_gpus(monkeypatch):
    """Runs anywhere: fewer than two GPUs are a failure, never a skip."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert processes.count_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes.count_gpus() == 0
    with pytest.raises(pytest.fail.Exception, match="expected at least 2 GPUs, got 0"):
        gpus()


def gpus():
    found = processes.count_gpus()
    if found < 2:
        pytest.fail(f"expected at least 2 GPUs, got {found}", pytrace=False)
    return found


@pytest.mark.gpu
def test_same_bits_as_one_gpu(tmp_path):
    """NCCL, one process and one communicator a GPU, NVLink multicast off."""
    ranks = gpus()
    codes, texts = processes.run_processes(
        "context_parallel_torch.py",
        [ranks, tmp_path / "rendezvous", "cuda", "triton"],
        ranks,
        {"NCCL_NVLS_ENABLE": "0"},
    )
    assert codes == [0] * ranks, "\n".join(texts)
    assert all("agreed: 13" in text for text in texts)


@pytest.mark.gpu
def test_gradients_of_one_gpu(tmp_path):
    ranks = gpus()
    codes, texts = processes.run_processes(
        "context_parallel_gradients_torch.py",
        [ranks, tmp_path / "rendezvous", "cuda", "triton"],
        ranks,
        {"NCCL_NVLS_ENABLE": "0"},
    )
    assert codes == [0] * ranks, "\n".join(texts)
    assert all("agreed: 18" in text for text in texts)

"""The JAX operations over several devices: on a CPU with gloo, on GPUs by `make test-multi-gpu`."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("processes", Path(__file__).parents[1] / "tools/processes.py")
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)

CHECKS = 11  # of each process; one that has all devices makes one more


@pytest.mark.parametrize("ranks", [2, 1])
def test_same_bits_as_one_device_on_a_cpu(ranks):
    """A process a device, or one with two."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(3 - ranks),
    }
    codes, texts = processes.run_processes(
        "sharded_jax.py", [ranks, processes.free_port(), "cpu"], ranks, environment
    )
    assert codes == [0] * ranks, "\n".join(texts)
    assert all(f"agreed: {CHECKS + (ranks == 1)}" in text for text in texts)


@pytest.mark.gpu
@pytest.mark.parametrize("together", [False, True], ids=["a process a GPU", "one process"])
def test_same_bits_as_one_gpu(together):
    """NCCL, a communicator a GPU, NVLink multicast off."""
    gpus = processes.count_gpus()
    if gpus < 2:
        pytest.fail(f"expected at least 2 GPUs, got {gpus}", pytrace=False)
    ranks = 1 if together else gpus
    codes, texts = processes.run_processes(
        "sharded_jax.py", [ranks, processes.free_port(), "cuda"], ranks, {"NCCL_NVLS_ENABLE": "0"}
    )
    assert codes == [0] * ranks, "\n".join(texts)
    assert all(f"agreed: {CHECKS + together}" in text for text in texts)

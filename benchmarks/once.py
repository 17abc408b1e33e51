"""A few calls of one contender, for a profiler: bytes that really move, occupancy, stalls.

    ncu --profile-from-start off --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
        python -m benchmarks.once main/8x2048-d8192 triton

The answer is judged first. Profiling is switched on for the calls only; before each, the L2 is flushed with
profiling off.
"""

from __future__ import annotations

import argparse
import ctypes
import sys

from benchmarks.gate import Gate, make_inputs
from benchmarks.providers import PROVIDERS, open_backend
from benchmarks.workloads import WORKLOADS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.once", description=__doc__.partition("\n")[0])
    parser.add_argument("workload", choices=WORKLOADS, metavar="WORKLOAD")
    parser.add_argument("provider", choices=PROVIDERS, metavar="PROVIDER")
    parser.add_argument("--calls", type=int, default=2)
    options = parser.parse_args(argv)
    workload, provider = WORKLOADS[options.workload], PROVIDERS[options.provider]
    backend = open_backend(provider.framework)
    if not backend.is_gpu:
        print(f"device: expected a GPU, got {backend.device_name}", file=sys.stderr)
        return 2
    inputs = make_inputs(workload)
    prepared = backend.prepare(provider.name, backend.load(inputs))
    if provider.role != "floor":
        verdict = Gate(inputs).judge(*prepared.answer(), provider.rule)
        if verdict.status != "passed":
            print(f"{verdict.status}: {verdict.reason}", file=sys.stderr)
            return 1
    prepared.call()
    driver = ctypes.CDLL("libcuda.so.1")
    for _ in range(options.calls):
        backend.flush()
        backend.synchronize()
        driver.cuProfilerStart()
        prepared.call()
        backend.synchronize()
        driver.cuProfilerStop()
    print(
        f"{workload.name} {provider.name}: least bytes read {workload.bytes_read}, written {workload.bytes_written}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

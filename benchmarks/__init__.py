"""Benchmarks: named workloads, contenders, one timing policy, typed records. See README.md."""

"""The Torch twin, its kernel and its plain path, through the conformance suite."""

from tests.tools.conformance_of_twins import (  # noqa: F401  (pytest finds them here)
    pytest_generate_tests,
    test_capabilities_are_true,
    test_case,
    test_little_is_unsupported,
)

IMPLEMENTATIONS = ("triton", "triton-short", "eager")

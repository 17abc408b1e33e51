"""The JAX twin, its kernel and its plain path, through the conformance suite.

With KERNELS_ONLY=1, as the second run under another JAX has it, the kernel alone.
"""

import os

from tests.conformance_of_twins import (  # noqa: F401  (pytest finds them here)
    pytest_generate_tests,
    test_capabilities_are_true,
    test_case,
    test_little_is_unsupported,
)

IMPLEMENTATIONS = ("pallas",) if os.environ.get("KERNELS_ONLY") == "1" else ("pallas", "xla")

"""The JAX twin, its kernel and its plain path, through the conformance suite.

With SECOND_JAX=1 the kernel alone, and of its cases one for every feature.
"""

import os

from tests.tools.conformance_of_twins import (  # noqa: F401  (pytest finds them here)
    pytest_generate_tests,
    test_capabilities_are_true,
    test_case,
    test_little_is_unsupported,
)

IMPLEMENTATIONS = (
    "pallas",
    "pallas-exact",
    *(() if os.environ.get("SECOND_JAX") == "1" else ("pallas-short", "xla", "xla-quick")),
)

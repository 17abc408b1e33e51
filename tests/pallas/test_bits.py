"""Bits and copies that rest on how XLA compiles, as users compile: tests of the Pallas files, whose processes
compile quickly, once more without that."""

from tests.pallas.test_operations import (  # noqa: F401  (pytest finds them here)
    test_a_donated_pool_is_not_copied,
    test_chunks_equal_the_whole_bit_for_bit,
    test_rows_alone_equal_rows_in_a_batch_in_xla,
)
from tests.pallas.test_serving_jit import (  # noqa: F401
    test_donated_states_and_windows_are_written_in_place,
    test_residual_is_one_rounding_after_the_activation,
)

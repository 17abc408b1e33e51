"""The signatures of other JAX projects, served by the operations of this one: `sglang_jax`, `tpu_inference`.

No code of those projects is needed or imported. Each module says where results differ on purpose.
"""

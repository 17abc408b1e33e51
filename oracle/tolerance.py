"""How far an output may lie from the reference: derived, element by element, and never tuned to pass.

With u = 2**-24 (float32 unit roundoff), M = |bias| + sum |w x| and z the exact pre-activation, an
implementation that follows the contract makes these errors:

  sum        2 * width * u * M. A tap costs one rounding as a fused multiply-add and two as a product and a
             sum; each is at most u times a partial sum that M bounds.
  SiLU       the error e so far times the slope of SiLU, which within e of z is at most 1.0999 and at most
             sigmoid(z + e) * (1 + |z| + e), the small one for negative z.
  argument   exp(-z) is taken of a float32 product z * log2(e): the product and the constant are rounded, each
             moving the result by |z| * u * (1 - sigmoid(z)) relative to it.
  exp        EXP_ULPS float32 ulps of the result for exp2, the reciprocal, the division and the products.
  residual   u times the sum with it: one more float32 addition.
  store      half an ulp of the output dtype, at the far end of the interval so far.
  flush      2**-126: results below the smallest normal float32 may be flushed to zero.
"""

from __future__ import annotations

import numpy as np

from oracle.numerics import FORMATS, SMALLEST_NORMAL_FLOAT32, UNIT_ROUNDOFF_FLOAT32, silu, ulp

SILU_MAX_SLOPE = 1.0999
EXP_ULPS = 8  # two approximations of at most 2 ulp each, and three rounded products and sums


def error_bound(
    pre: np.ndarray,
    magnitude: np.ndarray,
    width: int,
    dtype: str,
    activation: str | None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """The largest allowed |out - reference| for every element.

    Args:
      pre: float64 pre-activations, from `reference.preactivation`.
      magnitude: |bias| + sum |w x|, from `reference.preactivation(..., order="magnitude")`.
      width: taps.
      dtype: the output's dtype.
      activation: None, "silu" or "swish".
      residual: what is added after the activation, in float64, or None.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        error = 2 * width * UNIT_ROUNDOFF_FLOAT32 * magnitude
        out = pre
        if activation:
            out = silu(pre)
            error = error * np.minimum(SILU_MAX_SLOPE, _sigmoid(pre + error) * (1 + np.abs(pre) + error))
            error += np.abs(out) * 2 * np.abs(pre) * UNIT_ROUNDOFF_FLOAT32 * _sigmoid(-pre)
            error += EXP_ULPS * 2 * UNIT_ROUNDOFF_FLOAT32 * np.abs(out)
        if residual is not None:
            out = out + residual
            error = error + UNIT_ROUNDOFF_FLOAT32 * (np.abs(out) + error)
        error += SMALLEST_NORMAL_FLOAT32
        return error + 0.5 * ulp(np.abs(out) + error, dtype)


def fraction_of_bound(got: np.ndarray, expected: np.ndarray, bound: np.ndarray, dtype: str) -> np.ndarray:
    """|got - expected| / bound for every element; at most 1 where the element is right.

    A NaN or an infinity is right only where the reference has the same; a finite value that rounds to
    infinity in `dtype` may be either. What is wrong in this way counts as infinitely far.
    """
    fraction_bits, _, emax, _ = FORMATS[dtype]
    largest = np.ldexp(2.0 - 2.0**-fraction_bits, emax)
    with np.errstate(invalid="ignore", over="ignore"):
        fraction = np.abs(got - expected) / bound
        special = ~(np.isfinite(got) & np.isfinite(expected))
        overflows = np.isinf(got) & (np.sign(got) == np.sign(expected)) & (np.abs(expected) + bound > largest)
        same = (np.isnan(got) & np.isnan(expected)) | (got == expected) | overflows
    return np.where(special, np.where(same, 0.0, np.inf), fraction)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    decay = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, decay) / (1.0 + decay)

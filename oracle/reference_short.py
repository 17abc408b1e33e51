"""The reference of `short_conv`, by its definition: every tap of every token, in float64, rounded once.

A tap counts where what it meets lies in the token's document; entries of the cache lie in the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from oracle.contract import ConvOutput
from oracle.contract_short import ShortConvCall, check_lengths
from oracle.numerics import TypedArray, rounded, silu, typed
from oracle.reference import like
from oracle.reference_grad import float64


def short_conv(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    cache: Any = None,
    segment_ids: Any = None,
    lengths: Any = None,
    weight_layout: Any = "dim_width",
    cache_layout: Any = "time",
    want_cache: Any = True,
    activation: Any = None,
    backend: Any = "auto",
) -> ConvOutput:
    """The convolution as models call it; see `ShortConvCall`. Arrays are NumPy's or TypedArrays; `backend` is ignored."""
    call = ShortConvCall(
        x, weight, bias, cache, segment_ids, lengths, weight_layout, cache_layout, want_cache, activation, backend
    )  # fmt: skip
    sizes = call.check()
    tokens = float64(x).reshape(-1, sizes.seqlen, sizes.dim)
    batch, history = len(tokens), sizes.width - 1
    taps, offset = float64(weight), np.zeros(sizes.dim) if bias is None else float64(bias)
    taps = taps.squeeze(1) if taps.ndim == 3 else taps
    taps = taps.T if weight_layout in ("width_dim", "flax") else taps
    given = x if cache is None else cache
    if cache is None:
        old = np.zeros((batch, sizes.columns, sizes.dim))
    else:
        time = float64(cache) if cache_layout == "time" else np.moveaxis(float64(cache), -1, -2)
        old = time.reshape(batch, sizes.columns, sizes.dim)
    ends = np.full(batch, sizes.seqlen) if lengths is None else np.reshape(typed(lengths).data, -1)
    check_lengths(ends.tolist(), sizes.seqlen)
    ids = (
        np.zeros((batch, sizes.seqlen))
        if segment_ids is None
        else np.reshape(typed(segment_ids).data, (batch, -1))
    )

    out, new = np.zeros_like(tokens), np.zeros_like(old)
    for row, end in enumerate(ends.tolist()):
        entries = np.concatenate([old[row], tokens[row, :end]])
        number = np.zeros(len(entries), int)
        number[sizes.columns + 1 :] = np.cumsum(ids[row, 1:end] != ids[row, : end - 1]) if end else ()
        for token in range(end):
            meets = range(sizes.columns + token - history, sizes.columns + token + 1)
            same = [j for j, entry in enumerate(meets) if number[entry] == number[meets[-1]]]
            out[row, token] = offset + sum(taps[:, j] * entries[meets[j]] for j in same)
        last = entries[len(entries) - sizes.columns :]
        new[row] = np.where((number == number[-1:])[len(entries) - sizes.columns :, None], last, 0)
    out = silu(out) if activation is not None else out
    out[np.arange(sizes.seqlen) >= ends[:, None]] = 0
    found = like(x, rounded(out.reshape(np.shape(float64(x))), typed(x).dtype))
    if not want_cache:
        return ConvOutput(found, None)
    new = new.reshape(*float64(x).shape[:-2], sizes.columns, sizes.dim)
    new = new if cache_layout == "time" else np.moveaxis(new, -1, -2)
    return ConvOutput(found, like(given, rounded(new, typed(given).dtype)))


def as_rows(given: Mapping[str, Any]) -> dict[str, Any]:
    """A call with x of three axes and a cache of width-1 columns in the usual layouts as one of `causal_conv1d_fn`.

    Documents are rows, padding is rows of no slot. The pool holds the cache twice, since a row of several documents reads
    its slot in the first and writes it in the last: the second half is the new cache.
    """
    x, cache = typed(given["x"]), typed(given["cache"])
    ids, lengths = (
        None if given.get(name) is None else typed(given[name]) for name in ("segment_ids", "lengths")
    )
    batch, seqlen, dim = x.shape
    ends = np.full(batch, seqlen) if lengths is None else lengths.data
    begins = np.arange(seqlen) == np.minimum(ends, seqlen)[:, None]
    begins[:, :1] = True
    if ids is not None:
        begins[:, 1:] |= ids.data[:, 1:] != ids.data[:, :-1]
    row, token = np.nonzero(begins)
    real = token < ends[row]
    last = real & np.append((row[1:] != row[:-1]) | ~real[1:], True)[: len(row)]
    return {name: given.get(name) for name in ("weight", "bias", "activation")} | {
        "x": TypedArray(x.dtype, x.data.reshape(-1, dim)),
        "conv_states": TypedArray(cache.dtype, np.concatenate([cache.data, cache.data])),
        "query_start_loc": TypedArray("int32", np.append(row * seqlen + token, batch * seqlen).astype(np.int32)),
        "cache_indices": TypedArray("int32", np.where(real, row, -1).astype(np.int32)),
        "write_indices": TypedArray("int32", np.where(last, batch + row, -1).astype(np.int32)),
        "has_initial_state": TypedArray("bool", token == 0),
    }  # fmt: skip

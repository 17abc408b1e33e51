"""Cases of `short_conv`, which the oracle answers; in `tests/oracle/test_reference_short.py` so does `causal_conv1d`."""

import numpy as np

BATCH, SEQLEN, DIM = 2, 7, 8
IDS = np.array(
    [[5, 5, 6, 5, 5, 5, 5], [1, 2, 3, 3, 3, 3, 4]], np.int32
)  # an id comes back; one token; the last is short
LENGTHS = np.array([5, 1], np.int32)
ROWS = {"dense": {}, "documents": {"segment_ids": IDS}, "padding": {"lengths": LENGTHS}}
# (rows, cache, weight_layout, cache_layout, columns more than width-1): every two of them meet
CASES = [
    ("dense", True, "dim_width", "time", 0), ("dense", False, "flax", "channels", 0),
    ("documents", True, "torch", "channels", 1), ("documents", False, "dim_width", "time", 0),
    ("padding", True, "width_dim", "time", 1), ("padding", False, "torch", "time", 0),
    ("documents", True, "flax", "time", 0), ("padding", True, "flax", "channels", 0),
    ("dense", True, "torch", "channels", 1), ("documents", True, "width_dim", "channels", 0),
]  # fmt: skip


def inputs(width=4, cached=True, extra=0, seqlen=SEQLEN, dim=DIM):
    """float32 arrays by name, in the operation's own layouts."""
    rng = np.random.default_rng(width)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    arrays = dict(x=draw(BATCH, seqlen, dim), weight=draw(dim, width), bias=draw(dim))
    return arrays | ({"cache": draw(BATCH, width - 1 + extra, dim)} if cached else {})


def in_layout(arrays, weight_layout, cache_layout):
    weight = arrays["weight"]
    weight = {"dim_width": weight, "width_dim": weight.T, "torch": weight[:, None], "flax": weight.T[:, None]}
    arrays = arrays | {"weight": weight[weight_layout]}
    if "cache" in arrays and cache_layout == "channels":
        arrays["cache"] = arrays["cache"].swapaxes(1, 2)
    return arrays


def cuts(row, rows, seqlen):
    """Where the documents of a row begin and end."""
    if "segment_ids" in rows:
        return [0, *(np.flatnonzero(np.diff(rows["segment_ids"][row])) + 1), seqlen]
    return [0, int(rows["lengths"][row]) if "lengths" in rows else seqlen]


# Documents that begin at the borders of a kernel's blocks of 8 and 16 tokens, beside them, and one after another;
# ids come back behind another document. In the second row the last token is one, and one begins just behind a group of 8.
LONG = 37
CUTS = [0, 1, 2, 8, 15, 16, 17, 30, LONG], [0, 9, LONG - 1, LONG]
LONG_IDS = np.stack([np.repeat(np.arange(len(cuts) - 1, dtype=np.int32) % 2, np.diff(cuts)) for cuts in CUTS])


def reached_from(damage):
    """The tokens [rows, tokens] of LONG_IDS whose document holds a token (row, place), or has the "cache" before it."""
    documents = np.cumsum(np.diff(LONG_IDS, prepend=LONG_IDS[:, :1]) != 0, axis=1)
    if damage == "cache":
        return documents == 0
    return (documents == documents[damage]) & (np.arange(len(documents)) == damage[0])[:, None]


def starts_alone(cuts=CUTS, seqlen=LONG):
    """Offsets of the documents as packed rows of their own, and of each whether it is a row's first, hence its row."""
    starts = [row * seqlen + cut for row, edges in enumerate(cuts) for cut in edges[:-1]]
    return (
        np.array([*starts, len(cuts) * seqlen], np.int32),
        [start // seqlen for start in starts],
        [start % seqlen == 0 for start in starts],
    )


# What is refused: (what differs from a valid call, error, a part of its text).
REFUSED = [
    (dict(segment_ids=IDS[:, :-1]), ValueError, "segment_ids: expected shape [batch=2, seqlen=7], got [2, 6]"),
    (dict(lengths=np.array([8, 1], np.int32)), ValueError, "lengths: expected 0 to seqlen = 7, got 8 in row 0"),
    (dict(lengths=np.array([3, -1], np.int32)), ValueError, "lengths: expected 0 to seqlen = 7, got -1 in row 1"),
    (dict(segment_ids=IDS, lengths=LENGTHS), ValueError, "lengths: expected None, since segment_ids is given"),
    (dict(cache=np.zeros((2, 5, 8), np.float32)), ValueError, "cache: expected width-1 = 3 or width = 4 columns"),
    (dict(weight_layout="flax"), ValueError, "weight: expected shape [width, 1=1, dim=8], got [8, 4]"),
    (dict(cache_layout="slots"), ValueError, "cache_layout: expected one of ('time', 'channels'), got 'slots'"),
    (dict(want_cache=1), TypeError, "want_cache: expected True or False, got 1"),
]  # fmt: skip

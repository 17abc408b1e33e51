"""An implementation in another process, as another language would write it: standard library, no NumPy, no oracle.

    python -m oracle run --impl "process:python oracle/examples/other_process.py"

Numbers are Python floats; float32 rounding goes through `struct`.
"""

import json
import math
import struct
import sys
from typing import Any

CAPABILITIES = {
    "device": "cpu",
    "unsupported": {
        "expect:error": "an example: arguments are trusted",
        "tier:large": "pure Python",
    },
}
FRACTION_EMIN_EMAX = {"float32": (23, -126, 127), "float16": (10, -14, 15), "bfloat16": (7, -126, 127)}


def float32(value: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def to_float(bits: int, dtype: str) -> float:
    if dtype == "float16":
        return struct.unpack("e", struct.pack("H", bits))[0]
    return struct.unpack("f", struct.pack("I", bits << 16 if dtype == "bfloat16" else bits))[0]


def to_bits(value: float, dtype: str) -> int:
    """Rounds a float once, to nearest even."""
    fraction, emin, emax = FRACTION_EMIN_EMAX[dtype]
    infinity = (emax - emin + 2) << fraction
    sign = (math.copysign(1.0, value) < 0) << (31 if dtype == "float32" else 15)
    if math.isnan(value):
        return sign | infinity | 1 << (fraction - 1)
    if math.isinf(value):
        return sign | infinity
    if value == 0:
        return sign
    exponent = max(math.frexp(abs(value))[1] - 1, emin)
    kept = round(math.ldexp(abs(value), fraction - exponent))  # exact scaling, ties to even
    return sign | min(((exponent - emin) << fraction) + kept, infinity)


def decode(array: Any) -> Any:
    """An array as (dtype, shape, flat list): floats as bits."""
    if array is None:
        return None
    if "bits" in array:
        return array["dtype"], array["shape"], [int(word, 16) for word in array["bits"].split()]
    return array["dtype"], array["shape"], array["values"]


def encode(dtype: str, shape: list[int], bits: list[int]) -> dict[str, Any]:
    digits = 8 if dtype == "float32" else 4
    return {"dtype": dtype, "shape": shape, "bits": " ".join(f"{b:0{digits}x}" for b in bits)}


def silu(z: float) -> float:
    if z >= 0:
        return z / (1.0 + math.exp(-z))
    return z * math.exp(z) / (1.0 + math.exp(z)) if z > -700 else z * 0.0


def run(op: str, arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    x_type, x_shape, x = decode(arrays["x"])
    w_type, (dim, width), weight = decode(arrays["weight"])
    taps = [to_float(bits, w_type) for bits in weight]
    bias = [0.0] * dim
    if arrays["bias"] is not None:
        b_type, _, bits = decode(arrays["bias"])
        bias = [to_float(b, b_type) for b in bits]
    tokens = len(x) // dim
    if arrays["query_start_loc"] is not None:
        ends = [min(max(end, 0), tokens) for end in decode(arrays["query_start_loc"])[2]]
        ends[0] = 0
    else:
        seqlen = x_shape[1] if len(x_shape) == 3 else 1
        ends = [i * seqlen for i in range(x_shape[0] + 1)]
    batch = len(ends) - 1
    has = [True] * batch
    if op == "causal_conv1d_fn":
        has = arrays["has_initial_state"]
        has = [False] * batch if has is None else decode(has)[2]
    counts = decode(arrays.get("num_accepted_tokens"))
    pool = decode(arrays["conv_states"])
    slots = arrays["cache_indices"]
    slots = list(range(batch)) if slots is None else decode(slots)[2]
    pad, activation = options.get("pad_slot_id", -1), options.get("activation")

    out = [0] * len(x)
    states = pool and list(pool[2])
    for row in range(batch):
        start, end, slot = ends[row], ends[row + 1], slots[row]
        if start >= end or (pool and (slot == pad or not 0 <= slot < pool[1][0])):
            continue
        for d in range(dim):
            column = [x[t * dim + d] for t in range(start, end)]
            window = [0] * (width - 1)
            if pool:
                state_len = pool[1][1]
                at = [(slot * state_len + j) * dim + d for j in range(state_len)]
                if has[row]:
                    first = 0 if counts is None else min(max(counts[2][row] - 1, 0), state_len - width + 1)
                    window = [states[i] for i in at[first : first + width - 1]]
                arrived = (
                    column if x_type == pool[0] else [to_bits(to_float(b, x_type), pool[0]) for b in column]
                )
                entries = window + arrived
                left = entries[len(arrived) :] if counts is None else entries[1:] if width > 1 else []
                for i, bits in zip(at, left, strict=False):
                    states[i] = bits
            e = [to_float(b, pool[0]) if pool else 0.0 for b in window] + [
                to_float(b, x_type) for b in column
            ]
            for t in range(end - start):
                acc = bias[d]
                for j in range(width):
                    acc = float32(acc + taps[d * width + j] * e[t + j])
                out[(start + t) * dim + d] = to_bits(silu(acc) if activation else acc, x_type)
    return {"out": encode(x_type, x_shape, out), "conv_states": pool and encode(pool[0], pool[1], states)}


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if request["request"] == "hello":
            answer = {"name": "pure-python", "version": "1", "capabilities": CAPABILITIES}
        else:
            try:
                answer = run(request["op"], request["arrays"], request["options"])
            except Exception as error:
                answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps({"id": request["id"], **answer}), flush=True)


if __name__ == "__main__":
    main()

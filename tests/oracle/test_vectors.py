"""Frozen vectors: intact, inside the reference, judged by a program that shares no code with it, and guarded."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from oracle import numerics
from oracle.conformance import codec, flags, schema, vectors
from oracle.conformance.catalogue import catalogue
from oracle.conformance.commands import main
from oracle.examples import other_process

OPS = ("causal_conv1d_fn", "causal_conv1d_update")
# Seen only by several calls, by memory, by layout or by size; a vector is one call on logical arrays.
NOT_IN_ONE_CALL = {
    "fast-path-writes-input", "grid-dimension-limit", "hang-on-specific-lengths", "indices-read-with-unit-stride",
    "initial-state-ignored-by-layout", "int32-slot-offset", "int32-token-offset", "layout-axes-swapped",
    "offsets-trusted", "result-depends-on-batch", "stale-strides-after-copy", "state-length-from-stride",
    "stride-restriction-surprises", "uint32-silent-wrap", "wrong-arch-binary", "wrong-only-at-scale",
}  # fmt: skip


def load(op):
    return json.loads((vectors.FOLDER / f"{op}.json").read_text())


def test_the_frozen_vectors_verify(capsys):
    assert main(["verify-vectors"]) == 0
    assert "hashes, structure and reference agree" in capsys.readouterr().out
    assert vectors.verify() >= 100


def test_failure_modes_of_a_single_call_are_covered():
    carried = {flag for op in OPS for vector in load(op)["vectors"] for flag in vector["flags"]}
    serving = set(flags.FLAGS) - {flag for case in catalogue() if not case.serving for flag in case.flags}
    assert set(flags.FLAGS) - carried <= NOT_IN_ONE_CALL | serving


@pytest.mark.parametrize("op", OPS)
def test_a_program_without_numpy_agrees(op):
    """The other process of the examples, its rounding and its loops are its own."""
    judged = 0
    for vector in load(op)["vectors"]:
        expect = vector["expect"]
        if "error" in expect:
            continue
        result = other_process.run(op, vector["arguments"], vector["options"])
        out, low, high = (
            codec.decode(result["out"]),
            codec.decode(expect["low"]),
            codec.decode(expect["high"]),
        )
        with np.errstate(invalid="ignore"):
            inside = (low.values() <= out.values()) & (out.values() <= high.values())
        inside |= np.isnan(low.values()) & np.isnan(out.values())
        assert inside.all(), vector["id"]
        if expect["exact"]:
            exact = codec.decode(expect["exact"])
            same = (numerics.ulp_distance(exact.bits, out.bits) == 0) | np.isnan(low.values())
            assert same.all(), vector["id"]
        states = expect["conv_states"]
        assert (states and states["bits"]) == (result["conv_states"] and result["conv_states"]["bits"]), (
            vector["id"]
        )
        judged += 1
    assert judged >= 30


@pytest.mark.parametrize("dtype", numerics.FORMATS)
def test_intervals_hold_every_right_value_and_no_other(dtype):
    rng = np.random.default_rng(3)
    edges = np.concatenate([rng.standard_normal(4000), [0.0, -0.0, 1e-40, -1e-40]])
    for up in (True, False):
        inward = vectors.inward(edges, dtype, up=up).values()
        outward = vectors.inward(edges, dtype, up=not up).values()
        assert ((inward >= edges) if up else (inward <= edges)).all()
        exact = inward == edges
        gap = np.abs(inward - outward)
        assert (exact == (outward == edges)).all()
        assert (gap[~exact] > 0).all(), "the next number outside is on the other side of the edge"
        assert (gap <= numerics.ulp(np.maximum(np.abs(inward), np.abs(outward)), dtype)).all()


def test_freezing_never_overwrites(tmp_path, capsys):
    folder = tmp_path / "v2"
    assert main(["freeze", "--folder", str(folder)]) == 0
    assert main(["verify-vectors", "--folder", str(folder)]) == 0
    assert main(["freeze", "--folder", str(folder)]) == 2
    assert "never rewritten" in capsys.readouterr().err


def damaged(tmp_path, change, *, fix_hash):
    """A copy of the vectors with one change, and its hash mended or not."""
    folder = tmp_path / "v1"
    shutil.copytree(vectors.FOLDER, folder)
    path = folder / "causal_conv1d_fn.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    if fix_hash:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def first_value(data):
    return next(v for v in data["vectors"] if "low" in v["expect"] and v["expect"]["exact"])


def set_status(data):
    data["vectors"][0]["status"] = 1


def drop_options(data):
    del data["vectors"][0]["options"]


def bad_bits(data):
    data["vectors"][0]["arguments"]["x"]["bits"] = "xyz"


def short_bits(data):
    first_value(data)["arguments"]["x"]["bits"] = "3f80"


def raise_low(data):
    expect = first_value(data)["expect"]
    expect["low"]["bits"] = expect["low"]["bits"].replace(expect["low"]["bits"][:4], "4700", 1)


def change_exact(data):
    expect = first_value(data)["expect"]
    expect["exact"]["bits"] = "4700" + expect["exact"]["bits"][4:]


def change_state(data):
    vector = next(
        v for v in data["vectors"] if "low" in v["expect"] and (v["expect"]["conv_states"] or {}).get("bits")
    )
    vector["expect"]["conv_states"]["bits"] = "1234" + vector["expect"]["conv_states"]["bits"][4:]


def unknown_flag(data):
    data["vectors"][0]["flags"].append("typo")


def drop_vector(data):
    data["vectors"].pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [(set_status, r"vectors\[0\].status: unknown field"), (drop_options, r"vectors\[0\].options: missing"),
     (bad_bits, r"vectors\[0\].arguments.x: expected one of 3 forms"), (short_bits, "cannot reshape"),
     (raise_low, "expect.low, expect.high: the reference is outside"), (change_exact, "expect.exact"),
     (change_state, "expect.conv_states"), (unknown_flag, r"notes: nothing about \['typo'\]"),
     (drop_vector, "vectors: expected")],
)  # fmt: skip
def test_damage_is_named(tmp_path, change, message):
    with pytest.raises(vectors.VectorError, match=rf"causal_conv1d_fn.json: .*{message}"):
        vectors.verify(damaged(tmp_path, change, fix_hash=True))


def test_an_edit_by_hand_is_found(tmp_path, capsys):
    folder = damaged(tmp_path, lambda data: data["vectors"].reverse(), fix_hash=False)
    assert main(["verify-vectors", "--folder", str(folder)]) == 1
    assert "frozen files are never edited" in capsys.readouterr().err
    (folder / "stray.json").write_text("{}")
    with pytest.raises(vectors.VectorError, match="stray"):
        vectors.verify(folder)


def test_arrays_round_trip_as_json():
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    for array in (
        numerics.from_bits(bits, "bfloat16"),
        numerics.from_bits(bits.copy(), "float16"),
        numerics.TypedArray("int64", np.array([[-1, 2**40]])),
        numerics.TypedArray("bool", np.array([True, False])),
        numerics.TypedArray("float32", np.zeros((0, 3), np.float32)),
    ):
        again = codec.decode(json.loads(json.dumps(codec.encode(array))))
        assert again.dtype == array.dtype
        assert again.shape == array.shape
        assert again.data.tobytes() == array.data.tobytes()
    for wrong in (
        {"dtype": "bfloat16", "shape": [1], "bits": "3f8"},
        {"dtype": "int32", "shape": [1]},
        [1, 2],
    ):
        with pytest.raises(ValueError, match="array:"):
            codec.decode(wrong)


def test_the_validator_refuses_what_it_does_not_know():
    with pytest.raises(NotImplementedError, match="oneOf"):
        list(schema.errors_at(1, {"oneOf": []}, {}, ""))
    assert list(schema.errors_at(True, {"type": "integer"}, {}, "n")) == ["n: expected integer, got true"]

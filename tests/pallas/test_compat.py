"""The adapters: signatures as the peers have them, and their semantics, written out here token by token in NumPy."""

import enum
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_impl
from oracle.contract import Unsupported
from pallas_impl.compat import sglang_jax, tpu_inference

SIGNATURES = {
    sglang_jax.short_convolution: "(x, weight, cache, cu_seqlens, forward_mode, bias=None, activation='silu')",
    sglang_jax.jax_causal_conv1d_prefill: (
        "(x, weight, bias=None, cu_seqlens=None, conv_state=None, state_indices=None, has_initial_state=None, "
        "activation=None, track_indices=None, track_mask=None, dilation=1)"
    ),
    sglang_jax.jax_causal_conv1d_update: (
        "(x, conv_state, state_indices, weight, bias=None, activation=None, has_initial_state=None, "
        "track_indices=None, track_mask=None, dilation=1)"
    ),
    tpu_inference.ragged_conv1d: (
        "(x, conv_state, conv_weight, conv_bias, query_start_loc, state_indices, distribution, has_initial_state, "
        "*, kernel_size, decode_only_bucket=False)"
    ),
    tpu_inference.ragged_causal_conv1d: (
        "(x, conv_state, conv_weight, conv_bias, query_start_loc, state_indices, distribution, has_initial_state, "
        "*, kernel_size, tile_size=64)"
    ),
    tpu_inference.ragged_conv1d_mixed_prefill: (
        "(x, conv_state, conv_weight, conv_bias, query_start_loc, state_indices, distribution, has_initial_state, "
        "*, kernel_size)"
    ),
    tpu_inference.ragged_conv1d_decode_only: (
        "(x, conv_state, conv_weight, conv_bias, query_start_loc, state_indices, distribution, has_initial_state, "
        "*, kernel_size)"
    ),
}  # sglang-jax cddbf6f, tpu-inference 0.32.0


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signature(function):
    assert str(inspect.signature(function)) == SIGNATURES[function]


class ForwardMode(enum.IntEnum):
    EXTEND = 1
    DECODE = 2
    IDLE = 4


DIM, WIDTH, SLOTS = 12, 4, 7
RNG = np.random.default_rng(0)
# Small integers: every sum is exact, so nothing here needs a tolerance.
WEIGHT = RNG.integers(-4, 5, (DIM, WIDTH)).astype(np.float32)
BIAS = RNG.integers(-9, 10, DIM).astype(np.float32)
POOL = RNG.integers(-9, 10, (SLOTS, DIM, WIDTH - 1)).astype(np.float32)
STARTS = np.array([0, 5, 5, 7, 16], np.int32)
X = RNG.integers(-9, 10, (20, DIM)).astype(np.float32)  # four tokens of padding


def convolve(window, x):
    """(out, new window) of one sequence: window [dim, width-1], x [tokens, dim]."""
    entries = np.concatenate([window.T, x])
    out = (
        np.stack([BIAS + (WEIGHT.T * entries[t : t + WIDTH]).sum(0) for t in range(len(x))]) if len(x) else x
    )
    return out, entries[len(x) :].T


def rows(windows):
    """(out [tokens, dim], new windows) of the packed batch from `windows` [batch, dim, width-1]."""
    out, new = np.zeros_like(X), np.array(windows)
    for i, (a, b) in enumerate(itertools.pairwise(STARTS)):
        out[a:b], new[i] = convolve(windows[i], X[a:b])
    return out, new


def check(got, *wanted):
    for array, value in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(array), value)


class TestShortConvolution:
    def test_extend(self):
        out, new = rows(POOL[:4])
        for weight in (WEIGHT, WEIGHT[:, None]):
            check(
                sglang_jax.short_convolution(X, weight, POOL[:4], STARTS, ForwardMode.EXTEND, BIAS, None),
                out,
                new,
            )

    def test_decode(self):
        pairs = [convolve(POOL[i], X[i : i + 1]) for i in range(5)]
        out, new = np.concatenate([p[0] for p in pairs]), np.stack([p[1] for p in pairs])
        check(
            sglang_jax.short_convolution(X[:5], WEIGHT, POOL[:5], None, ForwardMode.DECODE, BIAS, None),
            out,
            new,
        )

    @pytest.mark.parametrize("activation", ["gelu", "relu", "sigmoid", "tanh", jnp.sin])
    def test_activations_after_the_operation(self, activation):
        plain = sglang_jax.short_convolution(X, WEIGHT, POOL[:4], STARTS, "extend", BIAS, None)
        function = activation
        if isinstance(activation, str):
            function = getattr(jax.nn, activation, None) or getattr(jnp, activation)
        got = sglang_jax.short_convolution(X, WEIGHT, POOL[:4], STARTS, "extend", BIAS, activation)
        check(got, function(plain[0]), plain[1])

    @pytest.mark.parametrize("activation", ["silu", "swish"])
    def test_silu(self, activation):
        got = sglang_jax.short_convolution(X, WEIGHT, POOL[:4], STARTS, "extend", BIAS, activation)
        every = np.ones(4, bool)
        pool = jnp.asarray(POOL[:4].swapaxes(1, 2))
        wanted = pallas_impl.causal_conv1d_fn(X, WEIGHT, BIAS, pool, STARTS, None, every, activation="silu")
        check(got, wanted.out, wanted.conv_states.swapaxes(1, 2))

    def test_silu_is_the_default(self):
        got = sglang_jax.short_convolution(X, WEIGHT, POOL[:4], STARTS, "extend", BIAS)
        check(got, *sglang_jax.short_convolution(X, WEIGHT, POOL[:4], STARTS, "extend", BIAS, "silu"))

    def test_errors(self):
        with pytest.raises(ValueError, match="forward_mode: expected DECODE, EXTEND or MIXED, got"):
            sglang_jax.short_convolution(X, WEIGHT, POOL[:4], STARTS, ForwardMode.IDLE)
        with pytest.raises(ValueError, match="activation: expected None, a function or one of"):
            sglang_jax.short_convolution(X, WEIGHT, POOL[:4], STARTS, ForwardMode.EXTEND, None, "elu")
        with pytest.raises(ValueError, match=r"cu_seqlens: expected \[batch\+1\] with EXTEND, got None"):
            sglang_jax.short_convolution(X, WEIGHT, POOL[:4], None, ForwardMode.EXTEND)
        with pytest.raises(ValueError, match=re.escape("cache: expected shape [slots, dim=12, width-1=3]")):
            sglang_jax.short_convolution(X, WEIGHT, POOL[:4, :, :2], STARTS, ForwardMode.EXTEND)


SLOT = np.array([3, 5, 0, 6], np.int32)  # row 1 has no tokens, row 2 the null slot
HAS = np.array([True, False, True, False])


class TestGatedDelta:
    @pytest.mark.parametrize("has", [None, HAS])
    def test_prefill(self, has):
        windows = POOL[SLOT] * (True if has is None else has[:, None, None])
        out, new = rows(windows)
        pool = POOL.copy()
        pool[[3, 5, 6]] = new[[0, 1, 3]]  # an empty row without a state is zeroed
        got = sglang_jax.jax_causal_conv1d_prefill(X.T, WEIGHT, BIAS, STARTS, POOL, SLOT, has)
        check(got, out.T, pool)

    def test_prefill_keeps_nan_of_fresh_rows_out(self):
        dirty = POOL.copy()
        dirty[[5, 6]] = np.nan
        got = sglang_jax.jax_causal_conv1d_prefill(X.T, WEIGHT, BIAS, STARTS, dirty, SLOT, HAS)
        check(got, *sglang_jax.jax_causal_conv1d_prefill(X.T, WEIGHT, BIAS, STARTS, POOL, SLOT, HAS))

    def test_prefill_without_a_pool(self):
        out, new = rows(np.zeros_like(POOL[:4]))
        check(sglang_jax.jax_causal_conv1d_prefill(X.T, WEIGHT, BIAS, STARTS), out.T, new)

    def test_tracking(self):
        _, new = rows(POOL[SLOT] * HAS[:, None, None])
        pool = POOL.copy()
        pool[[3, 5, 6]] = new[[0, 1, 3]]
        pool[1] = new[3]
        track, mask = np.array([2, 0, 4, 1], np.int32), np.array([0, 1, 0, 1], np.int32)
        options = dict(track_indices=track, track_mask=mask)
        got = sglang_jax.jax_causal_conv1d_prefill(X.T, WEIGHT, BIAS, STARTS, POOL, SLOT, HAS, **options)
        check(got[1:], pool)

    @pytest.mark.parametrize("has", [None, HAS])
    def test_update(self, has):
        windows = POOL[SLOT] * (True if has is None else has[:, None, None])
        pairs = [convolve(windows[i], X[i : i + 1]) for i in range(4)]
        pool = POOL.copy()
        for i in (0, 1, 3):
            pool[SLOT[i]] = pairs[i][1]
        pool[4] = pairs[1][1]
        options = dict(
            track_indices=np.array([0, 4, 1, 2], np.int32), track_mask=np.array([True, True, False, False])
        )
        got = sglang_jax.jax_causal_conv1d_update(X[:4], POOL, SLOT, WEIGHT, BIAS, None, has, **options)
        check(got, np.concatenate([p[0] for p in pairs]), pool)

    @pytest.mark.parametrize("activation", ["silu", "swish"])
    def test_silu(self, activation):
        got = sglang_jax.jax_causal_conv1d_prefill(X.T, WEIGHT, BIAS, STARTS, activation=activation)
        wanted = pallas_impl.causal_conv1d_fn(X, WEIGHT, BIAS, None, STARTS, activation="silu")
        check(got[:1], wanted.out.T)

    def test_under_jit_with_the_pool_donated(self):
        step = jax.jit(sglang_jax.jax_causal_conv1d_update, donate_argnames="conv_state")
        pool = jnp.negative(POOL)
        address = pool.unsafe_buffer_pointer()
        got = step(X[:4], pool, SLOT, WEIGHT)
        assert pool.is_deleted()
        assert got[1].unsafe_buffer_pointer() == address
        check(got, *sglang_jax.jax_causal_conv1d_update(X[:4], -POOL, SLOT, WEIGHT))

    @pytest.mark.parametrize("name", ["prefill", "update"])
    def test_nothing_is_written_to_the_pool_before_it_is_read(self, name):
        """sglang-jax's barrier: its caller donates the pool, and a scatter that came first would corrupt a reused slot."""
        call = {
            "prefill": lambda pool: sglang_jax.jax_causal_conv1d_prefill(
                X.T, WEIGHT, BIAS, STARTS, pool, SLOT
            ),
            "update": lambda pool: sglang_jax.jax_causal_conv1d_update(X[:4], pool, SLOT, WEIGHT),
        }[name]
        equations = jax.make_jaxpr(call)(jnp.asarray(POOL)).eqns
        (barrier,) = [e for e in equations if e.primitive.name == "optimization_barrier"]
        assert [v.aval.shape for v in barrier.invars] == [POOL.shape, (4, WIDTH - 1, DIM)]

    def test_errors(self):
        prefill = sglang_jax.jax_causal_conv1d_prefill
        with pytest.raises(ValueError, match="cu_seqlens: expected"):
            prefill(X.T, WEIGHT)
        with pytest.raises(ValueError, match="state_indices: expected them with conv_state and only then"):
            prefill(X.T, WEIGHT, BIAS, STARTS, POOL)
        with pytest.raises(ValueError, match="track_mask: expected"):
            prefill(X.T, WEIGHT, BIAS, STARTS, POOL, SLOT, track_indices=SLOT)
        with pytest.raises(ValueError, match="track_indices: expected None without conv_state"):
            prefill(X.T, WEIGHT, BIAS, STARTS, track_indices=SLOT, track_mask=HAS)
        with pytest.raises(
            ValueError, match=re.escape("conv_state: expected shape [slots, dim=12, width-1=3]")
        ):
            prefill(X.T, WEIGHT, BIAS, STARTS, POOL.swapaxes(1, 2), SLOT)
        with pytest.raises(Unsupported, match="dilation: expected 1, got 3"):
            prefill(X.T, WEIGHT, BIAS, STARTS, dilation=3)
        with pytest.raises(ValueError, match="activation: expected None, 'silu' or 'swish', got 'gelu'"):
            prefill(X.T, WEIGHT, BIAS, STARTS, activation="gelu")


class TestRagged:
    """Pools are [slots, width-1, dim]; the last two rows are padding by `distribution`."""

    def arguments(self):
        return dict(
            x=jnp.asarray(X),
            conv_state=jnp.asarray(POOL.swapaxes(1, 2)),
            conv_weight=jnp.asarray(WEIGHT[:, None]),
            conv_bias=jnp.asarray(BIAS),
            query_start_loc=jnp.asarray([*STARTS, 16, 16]),
            state_indices=jnp.asarray([3, 5, 1, 6, 3, 0, 2, 4], jnp.int32),
            distribution=jnp.asarray([0, 0, 4], jnp.int32),
            has_initial_state=jnp.asarray([True, False, True, False, True, True, True]),
            kernel_size=WIDTH,
        )

    @pytest.mark.parametrize("options", [{}, {"tile_size": 8}, {"decode_only_bucket": True}])
    def test_values(self, options):
        slots = np.array([3, 5, 1, 6])
        out, new = rows(POOL[slots] * HAS[:, None, None])
        pool = POOL.copy()
        pool[[3, 1, 6]] = new[[0, 2, 3]]  # the padding row leaves slot 3 alone
        pool[5] = 0  # the empty row has no state
        function = (
            tpu_inference.ragged_causal_conv1d if "tile_size" in options else tpu_inference.ragged_conv1d
        )
        check(function(**self.arguments(), **options), out, pool.swapaxes(1, 2))

    def test_fewer_valid_rows(self):
        arguments = self.arguments() | {"distribution": jnp.asarray([0, 0, 1], jnp.int32)}
        out, pool = tpu_inference.ragged_conv1d(**arguments)
        assert not np.asarray(out)[STARTS[1] :].any()
        wanted = POOL.swapaxes(1, 2).copy()
        wanted[3] = rows(POOL[[3, 5, 1, 6]])[1][0].T
        check([pool], wanted)

    @pytest.mark.parametrize("padding", [[1, 1], [0, 0], [-7, 2**30], [16, 3]])
    @pytest.mark.parametrize(
        "function", [tpu_inference.ragged_conv1d, tpu_inference.ragged_conv1d_mixed_prefill]
    )
    def test_offsets_of_padding_rows_may_be_anything(self, function, padding):
        """The offset at distribution[2] ends the last row, whatever stands behind it."""
        wanted = tpu_inference.ragged_conv1d(**self.arguments())
        offsets = jnp.asarray([*STARTS, *padding], jnp.int32)
        check(function(**self.arguments() | {"query_start_loc": offsets}), *wanted)

    @pytest.mark.parametrize("valid", [0, 2, 6])
    def test_offsets_past_the_valid_rows(self, valid):
        arguments = self.arguments() | {"distribution": jnp.asarray([0, 0, valid], jnp.int32)}
        fixed = np.asarray(arguments["query_start_loc"]).copy()
        fixed[valid + 1 :] = fixed[valid]
        wanted = tpu_inference.ragged_conv1d(**arguments | {"query_start_loc": jnp.asarray(fixed)})
        fixed[valid + 1 :] = 1
        arguments = self.arguments() | {"distribution": jnp.asarray([0, 0, valid], jnp.int32)}
        check(tpu_inference.ragged_conv1d(**arguments | {"query_start_loc": jnp.asarray(fixed)}), *wanted)

    def test_rows_of_one_token(self):
        """Token i is row i; a captured batch has offsets and slots of more rows than tokens."""
        every = dict(
            x=jnp.asarray(X[:5]),
            query_start_loc=jnp.asarray([0, 1, 2, 3, 1, 1, 1], jnp.int32),
            state_indices=jnp.asarray([3, 5, 1, 6, 2, 0, 4], jnp.int32),
            has_initial_state=jnp.ones(7, bool),
            distribution=jnp.asarray([3, 3, 3], jnp.int32),
        )
        pairs = [convolve(POOL[slot], X[i : i + 1]) for i, slot in enumerate((3, 5, 1))]
        pool = POOL.copy()
        pool[[3, 5, 1]] = [p[1] for p in pairs]
        out = np.concatenate([*[p[0] for p in pairs], np.zeros((2, DIM))])
        for function in (tpu_inference.ragged_conv1d_decode_only, tpu_inference.ragged_conv1d):
            check(function(**self.arguments() | every), out, pool.swapaxes(1, 2))

    def test_the_pool_is_donated(self):
        arguments = self.arguments()
        pool = arguments["conv_state"] = jnp.negative(arguments["conv_state"])
        tpu_inference.ragged_conv1d(**arguments)
        assert pool.is_deleted()

    def test_errors(self):
        with pytest.raises(
            ValueError, match=re.escape("conv_weight: expected shape [dim, 1, kernel_size=3]")
        ):
            tpu_inference.ragged_conv1d(**self.arguments() | {"kernel_size": 3})
        with pytest.raises(ValueError, match=re.escape("distribution: expected shape [3], got [2]")):
            tpu_inference.ragged_conv1d(**self.arguments() | {"distribution": jnp.zeros(2, jnp.int32)})
        with pytest.raises(ValueError, match="tile_size: expected at least 1, got 0"):
            tpu_inference.ragged_causal_conv1d(**self.arguments(), tile_size=0)
        with pytest.raises(ValueError, match="cache_indices: expected shape"):
            tpu_inference.ragged_conv1d(**self.arguments() | {"state_indices": jnp.zeros(3, jnp.int32)})

"""The adapters as the oracle's runner sees them: the conformance suite through each peer's own signature.

    python -m oracle run --impl triton_impl.compat.adapters:vllm
    python -m oracle run --impl triton_impl.compat.adapters:sglang --device cuda

What a signature cannot express is declared unsupported. Errors are compared under the contract's names.
"""

import contextlib
import inspect

import torch

from oracle.contract import Unsupported
from triton_impl import adapter as own
from triton_impl.compat import causal_conv1d as dao
from triton_impl.compat import fla as peer
from triton_impl.compat import layout
from triton_impl.compat import sglang as sg
from triton_impl.compat import vllm as vl

_NO_CHOICE = {
    "backend:*": "the peer's signature has no backend",
    "schedule:*": "the peer's signature has no schedule",
    "relation:schedules": "the peer's signature has no schedule",
    "activation:True": "the peer takes True for silu",
}
_NO_PACKED = {
    "update:packed": "the peer's update takes no packed rows",
    "relation:packed_steps": "the peer's update takes no packed rows",
    "relation:serving": "the peer's update takes no packed rows",
}
_NO_COUNTS = {"update:rolling": "the peer's update takes no counts"}


class PeerAdapter(own.TorchAdapter):
    """Runs a peer's two functions, given as functions of the contract's arguments, on the kernels or on a CPU."""

    def __init__(self, name, fn, update, unsupported, device, supports=()):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__("auto", device)
        self.name = f"triton_impl-compat-{name}"
        self.functions = {"causal_conv1d_fn": fn, "causal_conv1d_update": update}
        self.unsupported, self.supports = unsupported, list(supports)

    def capabilities(self):
        return {**super().capabilities(), "unsupported": self.unsupported, "supports": self.supports}

    def run(self, op, arrays, options):
        given = {name: a for name, a in arrays.items() if a is not None}
        bases = {name: self._base(a) for name, a in given.items()}
        tensors = dict.fromkeys(arrays)
        tensors |= {name: bases[name].as_strided(a.shape, a.strides, a.offset) for name, a in given.items()}
        function = self.functions[op]
        known = inspect.signature(function).parameters
        if op == "causal_conv1d_update" and options.get("max_seqlen") is not None:
            if tensors["query_start_loc"] is None:
                raise ValueError(
                    f"max_seqlen: expected None without packed rows, got {options['max_seqlen']}"
                )
        for name in [name for name in tensors if name not in known]:
            if tensors.pop(name) is not None:
                raise Unsupported(f"{name}: expected None, the peer's function has no such argument")
        _refuse_what_engines_pass(tensors)
        options = dict(options)
        checks = layout.validated() if options.pop("validate", False) else contextlib.nullcontext()
        try:
            with checks:
                out = function(**tensors, **options)
        except (ValueError, TypeError, Unsupported) as error:
            raise type(error)(_contract_names(str(error))) from error
        memory = {name: own.to_numpy(bases[name]) for name, a in given.items() if not a.sparse}
        result = {"out": out, "conv_states": tensors["conv_states"]}
        if "window_out" in given:
            result["window_out"] = tensors["window_out"]
        return {name: own.typed(value) for name, value in result.items()} | {"memory": memory}


def _refuse_what_engines_pass(tensors):
    """Arrays longer than the batch, and buffers that go unused: engines pass them, the contract wants an error."""
    x, starts = tensors.get("x"), tensors.get("query_start_loc")
    rows = x.shape[0] if starts is None else starts.shape[0] - 1
    for name in ("cache_indices", "has_initial_state", "num_accepted_tokens", "window_indices"):
        given = tensors.get(name)
        if given is not None and given.dim() == 1 and given.shape[0] > rows >= 0:
            raise ValueError(f"{name}: expected shape [batch={rows}], got {list(given.shape)}")
    if tensors.get("window_indices") is not None and tensors.get("window_out") is None:
        raise ValueError("window_indices: expected None, since window_out is None")


def _contract_names(text):
    theirs, colon, rest = text.partition(":")
    ours = {
        "conv_state": "conv_states",
        "conv_state_indices": "cache_indices",
        "seq_lens_cpu": "max_seqlen",
        "null_block_id": "pad_slot_id",
        "max_query_len": "max_seqlen",
        "num_accept_tokens": "num_accepted_tokens",
        "intermediate_conv_window": "window_out",
        "intermediate_state_indices": "window_indices",
    }
    return ours.get(theirs, theirs) + colon + rest


def _channel_first(tensor):
    """[.., tokens, dim] to [.., dim, tokens]; the same for a pool."""
    return tensor if tensor is None or tensor.dim() < 2 else tensor.transpose(-1, -2)


def _step(x):
    """[batch, seqlen, dim] to [batch, dim, seqlen]; [batch, dim] as it is."""
    return x.transpose(1, 2) if x.dim() == 3 else x


def sglang(device=None):
    """SGLang's Triton pair."""

    def fn(
        x,
        weight,
        bias,
        conv_states,
        query_start_loc,
        cache_indices,
        has_initial_state,
        activation=None,
        pad_slot_id=-1,
        max_seqlen=None,
    ):
        lengths = None if max_seqlen is None else [max_seqlen]
        return sg.causal_conv1d_fn_triton(
            _channel_first(x),
            weight,
            bias,
            _channel_first(conv_states),
            query_start_loc,
            lengths,
            cache_indices,
            has_initial_state,
            activation,
            pad_slot_id,
        ).t()

    def update(
        x,
        weight,
        bias,
        conv_states,
        cache_indices,
        num_accepted_tokens=None,
        activation=None,
        pad_slot_id=-1,
        window_out=None,
        window_indices=None,
    ):
        out = sg.causal_conv1d_update_triton(
            _step(x),
            _channel_first(conv_states),
            weight,
            bias,
            activation,
            None,
            cache_indices,
            num_accepted_tokens,
            _channel_first(window_out),
            window_indices,
            pad_slot_id=pad_slot_id,
        )
        return _step(out)

    return PeerAdapter("sglang", fn, update, _NO_CHOICE | _NO_PACKED, device, ("window_out",))


def sglang_dispatcher(device=None):
    """SGLang's dispatcher pair, which overwrites x: it is given a copy."""

    def fn(
        x,
        weight,
        bias,
        conv_states,
        query_start_loc,
        cache_indices,
        has_initial_state,
        activation=None,
        pad_slot_id=-1,
        max_seqlen=None,
    ):
        lengths = {} if max_seqlen is None else {"seq_lens_cpu": [max_seqlen]}
        return sg.causal_conv1d_fn(
            _channel_first(x.clone()),
            weight,
            bias,
            query_start_loc,
            cache_indices,
            has_initial_state,
            _channel_first(conv_states),
            activation,
            pad_slot_id,
            **lengths,
        ).t()

    def update(x, weight, bias, conv_states, cache_indices, activation=None, pad_slot_id=-1):
        mine = _step(x.clone())
        out = sg.causal_conv1d_update(
            mine, _channel_first(conv_states), weight, bias, activation, None, cache_indices, pad_slot_id
        )
        if out is not mine:
            raise RuntimeError("x: expected the very tensor that was passed in")
        return _step(out)

    unsupported = {
        "state_len:wider": "the dispatcher's update has its window at the back of a wide slot",
    }
    unsupported |= _NO_CHOICE | _NO_PACKED | _NO_COUNTS
    return PeerAdapter("sglang-dispatcher", fn, update, unsupported, device)


def vllm(device=None):
    """vLLM's pair, with the padding slot as its null block."""

    def fn(
        x,
        weight,
        bias,
        conv_states,
        query_start_loc,
        cache_indices,
        has_initial_state,
        activation=None,
        pad_slot_id=-1,
    ):
        return vl.causal_conv1d_fn(
            _channel_first(x),
            weight,
            bias,
            _channel_first(conv_states),
            query_start_loc,
            cache_indices,
            has_initial_state,
            activation,
            null_block_id=pad_slot_id,
        ).t()

    def update(
        x,
        weight,
        bias,
        conv_states,
        cache_indices,
        query_start_loc=None,
        num_accepted_tokens=None,
        max_seqlen=None,
        activation=None,
        pad_slot_id=-1,
    ):
        if cache_indices is not None and cache_indices.dim() != 1:
            # Two axes are a block table to vLLM, and what the contract refuses could not be told from one.
            raise ValueError(f"cache_indices: expected shape [batch], got {list(cache_indices.shape)}")
        x = _step(x)
        out = vl.causal_conv1d_update(
            x,
            _channel_first(conv_states),
            weight,
            bias,
            activation,
            cache_indices,
            num_accepted_tokens,
            query_start_loc,
            -1 if max_seqlen is None else max_seqlen,
            pad_slot_id,
            False,
            torch.empty_like(x),
        )
        return _step(out)

    unsupported = {"max_seqlen:*": "the prefill takes no host lengths"}
    return PeerAdapter("vllm", fn, update, _NO_CHOICE | unsupported, device)


def causal_conv1d(device=None):
    """causal-conv1d's pair. Its prefill is dense: each packed row is a batch of one, its state carried by hand."""

    def fn(x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, activation=None):
        out = torch.zeros_like(x)
        starts = query_start_loc.tolist()
        slots = range(len(starts) - 1) if cache_indices is None else cache_indices.tolist()
        for row, (slot, start, end) in enumerate(zip(slots, starts[:-1], starts[1:], strict=True)):
            state = None
            if conv_states is not None:
                if not 0 <= slot < conv_states.shape[0] or start == end:
                    continue
                state = conv_states[slot, : weight.shape[1] - 1].t()[None]
            goes_on = has_initial_state is not None and bool(has_initial_state[row])
            result = dao.causal_conv1d_fn(
                x[start:end].t()[None],
                weight,
                bias,
                None,
                state if goes_on else None,
                state is not None,
                state,
                activation,
            )
            out[start:end] = (result if state is None else result[0])[0].t()
        return out

    def update(x, weight, bias, conv_states, cache_indices, activation=None):
        state = _channel_first(conv_states)
        return _step(dao.causal_conv1d_update(_step(x), state, weight, bias, activation, None, cache_indices))

    unsupported = {
        "max_seqlen:*": "the prefill takes no host lengths",
        "pad_slot_id:[0-9]*": "padding is a slot outside the pool",
        "state_len:wider": "the update has its window at the back of a wide slot",
        "expect:*": "packed rows are carried by this adapter, which reads their data",
    }
    unsupported |= _NO_CHOICE | _NO_PACKED | _NO_COUNTS
    return PeerAdapter("causal-conv1d", fn, update, unsupported, device)


def fla(device=None):
    """FLA's pair. It has caches of `width` columns by row instead of a pool: this adapter carries them by hand."""

    def cache_of(conv_states, slots, weight, keep):
        """Caches [rows, dim, width] of the slots; zeros where `keep` says that a row has no state."""
        width = weight.shape[1]
        cache = conv_states.new_zeros(len(slots), conv_states.shape[2], width)
        for row, slot in enumerate(slots):
            if keep[row]:
                cache[row, :, 1:] = conv_states[slot, : width - 1].t()
        return cache

    def fn(x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, activation=None):
        starts, rows = query_start_loc.tolist(), query_start_loc.shape[0] - 1
        slots = list(range(rows)) if cache_indices is None else cache_indices.tolist()
        given = None if has_initial_state is None else has_initial_state.tolist()
        if conv_states is None:
            return peer.causal_conv1d(
                x[None], weight, bias, activation=activation, cu_seqlens=query_start_loc
            )[0][0]
        live = [0 <= slot < conv_states.shape[0] for slot in slots]
        keep = [is_live and given is not None and given[row] for row, is_live in enumerate(live)]
        initial = cache_of(conv_states, slots, weight, keep)
        y, final = peer.causal_conv1d(
            x[None], weight, bias, None, initial, True, activation, cu_seqlens=query_start_loc
        )
        out = y[0].clone()
        for row, slot in enumerate(slots):
            if not live[row]:
                out[starts[row] : starts[row + 1]] = 0
            elif starts[row] < starts[row + 1]:
                conv_states[slot, : weight.shape[1] - 1] = final[row, :, 1:].t()
        return out

    def update(x, weight, bias, conv_states, cache_indices, activation=None):
        slots = list(range(x.shape[0])) if cache_indices is None else cache_indices.tolist()
        live = [0 <= slot < conv_states.shape[0] for slot in slots]
        cache = cache_of(conv_states, slots, weight, live)
        out, _ = peer.causal_conv1d_update(x, cache, None, weight, bias, activation)
        for row, slot in enumerate(slots):
            if live[row]:
                conv_states[slot, : weight.shape[1] - 1] = cache[row, :, 1:].t()
            else:
                out[row] = 0
        return out

    unsupported = {
        "max_seqlen:*": "this adapter hands on no host lengths",
        "pad_slot_id:[0-9]*": "padding is a slot outside the pool",
        "update:multi_token": "one token a row",
        "expect:*": "states are carried by this adapter, which reads the index data",
        "dtypes:mixed": "the peer returns final states in x's dtype",
    }
    unsupported |= _NO_CHOICE | _NO_PACKED | _NO_COUNTS
    return PeerAdapter("fla", fn, update, unsupported, device)

"""Launches prepared for calls already checked, found again by all that a check or a launch depends on.

The call before is compared first, by PyTorch's own guard of compiled code, which looks at the type, dispatch keys, dtype,
device, sizes and strides of every tensor in a fraction of a microsecond: the layers of a model call alike. Other calls
are looked up by a key of the same facts.
"""

from operator import itemgetter

import torch

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it has no public name; without it every call is looked up
    TensorGuards = None

_KEPT = 4096  # calls; then all are forgotten
_calls = {}  # launches by key
_patterns = {}  # by key, what `_pattern` returned
_last = {}  # by operation, the pattern of the call before, if it has one


def recall(name, tensors, options):
    """Finds the launch prepared for such a call of operation `name`.

    Args:
      tensors: all tensor arguments in their order, each a tensor or None; the second one is the weight.
      options: the other arguments.

    Returns:
      (the key to `remember` a launch by, the launch or None). No key if an argument is odd: a check says how.
    """
    try:
        low = tensors[1].data_ptr() & 15  # `taps.word_bits` reads the weight's address
        if (last := _last.get(name)) is not None:
            launch, same_low, same_options, like, present, absent, nones = last
            if (
                like(*present(tensors))
                and absent(tensors) == nones
                and low == same_low
                and options == same_options
            ):
                return None, launch
        key = [name, options, low]
        for t in tensors:
            key += (None,) if t is None else (t.shape, t.is_contiguous() or t.stride(), t.dtype, t.device)
        key = tuple(key)
        if (launch := _calls.get(key)) is not None and TensorGuards is not None:
            pattern = _patterns.get(key)
            if pattern is None or (
                pattern and not pattern[3](*pattern[4](tensors))
            ):  # inference mode, say, is new
                pattern = _patterns[key] = _pattern(launch, low, options, tensors)
            if pattern:
                _last[name] = pattern
        return key, launch
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None, None


def remember(key, launch):
    """Keeps a launch for the calls that `recall` gives this key, if any."""
    if key is None:
        return
    if len(_calls) >= _KEPT:
        forget()
    _calls[key] = launch


def forget():
    """Drops every launch."""
    for kept in (_calls, _patterns, _last):
        kept.clear()


def _pattern(launch, low, options, tensors):
    """The launch and what recognises its call: guard of the tensors, which arguments those are, and which are None.

    Empty if the guard does not accept these tensors themselves: two of them are one.
    """
    given = [i for i, t in enumerate(tensors) if t is not None]
    missing = [i for i, t in enumerate(tensors) if t is None]
    present, absent = _getter(given), _getter(missing)
    like = _guard(present(tensors))
    return (launch, low, options, like, present, absent, absent(tensors)) if like(*present(tensors)) else ()


def _getter(places):
    """A function from a sequence to the tuple of its items at these places."""
    return itemgetter(*places) if len(places) > 1 else lambda items: tuple(items[i] for i in places)


def _guard(tensors):
    """A function of as many tensors: whether each is like these in all but its data, and no two are one."""
    return TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    ).check


def _guard_works():
    """Whether a guard tells apart what a key does: it is no public interface, so this is tried once."""
    others = [
        torch.empty(2, 4),
        torch.empty(3, 2).mT,
        torch.empty(2, 3, dtype=torch.float64),
        torch.empty(2, 3, device="meta"),
        torch.empty(6),
        torch.nn.Parameter(torch.empty(2, 3)),
        None,
    ]
    try:
        like = _guard([torch.empty(2, 3)])
        return bool(like(torch.empty(2, 3))) and not any(map(like, others))
    except (AttributeError, RuntimeError, SystemError, TypeError, ValueError):
        return False


if TensorGuards is not None and not _guard_works():
    TensorGuards = None

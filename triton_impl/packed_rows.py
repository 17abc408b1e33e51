"""Dense or packed rows of a differentiable call: where they and documents start, states of their own, results of their own."""

import torch
from torch.nn.functional import pad

from triton_impl.call import launch_on, unit_stride


def row_starts(x, sizes, query_start_loc, max_seqlen):
    """Where the rows start in packed tokens, and a bound of the longest."""
    if query_start_loc is not None:
        return unit_stride(query_start_loc), max_seqlen
    seqlen = x.shape[1]
    return torch.arange(sizes.batch + 1, dtype=torch.int32, device=x.device) * seqlen, seqlen


MARKED = 8  # tokens that a mark of documents stands for; blocks are multiples of it


def document_marks(segment_ids):
    """[batch, seqlen // 8 + 2] int32, where documents begin: bit j of mark i, from the highest, is token 8 * (i - 1) + j.

    So the mark of any 8 tokens knows the 8 tokens before and behind them, which width-1 of a window never exceed. A row's
    first token continues what is before the row, and is no beginning. The last mark stands for no token: two and more are
    what tracers take for a length of any size.
    """
    seqlen = segment_ids.shape[1]
    marks = seqlen // MARKED + 2
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = pad(changes, (MARKED + 1, MARKED * (marks + 1) - seqlen))
    bits = 1 << (31 - torch.arange(3 * MARKED, dtype=torch.int32, device=segment_ids.device))
    return (begins.unfold(1, 3 * MARKED, MARKED) * bits).sum(2, dtype=torch.int32)


def rows_of_documents(x, window, marks):
    """Dense rows as packed rows of no state, one for each document: (tokens, [batch, entries, dim], where they start).

    A window is the first entries of its row. So many starts as there are entries, since nothing waits for their number: those
    behind the last are rows of no tokens.
    """
    batch, seqlen, _ = x.shape
    history = 0 if window is None else window.shape[1]
    tokens = x if window is None else torch.cat([window, x], dim=1)
    own = MARKED + torch.arange(MARKED, device=x.device)
    begins = (marks[..., None] >> (31 - own) & 1).reshape(batch, -1)[:, :seqlen] != 0
    begins = pad(begins, (history, 0))
    begins[:, :1] = True
    entries = begins.numel()
    place = torch.arange(entries + 1, dtype=torch.int32, device=x.device)
    starts = torch.where(begins.reshape(-1), place[:-1], entries).sort().values
    return tokens, torch.cat([starts, place[-1:]])


def folds(x):
    """Whether dense x is a view of one row of batch * dim channels ([batch, dim, seqlen] memory), not of packed rows."""
    if x.dim() == 2 or x.shape[0] == 1 or x.shape[1] == 1:
        return False
    return x.stride(0) == x.shape[2] * x.stride(2) and x.stride(0) != x.shape[1] * x.stride(1)


def fresh_states(x, initial_states, sizes):
    """Final states, still as the initial ones or zeros, which rows of zero tokens keep; they fold if x does."""
    like = x if initial_states is None else initial_states
    if folds(x):
        states = like.new_zeros(sizes.width - 1, sizes.batch, sizes.dim).transpose(0, 1)
    else:
        states = like.new_zeros(sizes.batch, sizes.width - 1, sizes.dim)
    return states if initial_states is None else states.copy_(initial_states)


def owned(result):
    """A tensor of its own on the memory of `result`: autograd lets nobody change a view among several results in place."""
    return result.new_empty(0).set_(result) if result._is_view() else result


def launch_backward(prepared, tensors, dx, needs, marks=()):
    """Runs what `backward.prepare` prepared, into dx.

    Args:
      tensors: what the first Launch takes up to `query_start_loc`.
      needs: whether the gradients of weight and bias, and of the initial states, are wanted.
      marks: those of documents, if any, in a tuple.

    Returns:
      (dx, dweight, dbias, dinitial), None for what is not wanted.
    """
    places, walk, reduce = prepared
    (need_sums, need_initial), (x, weight, bias, initial_states, _) = needs, tensors[-5:]
    dim, width = weight.shape
    dinitial = initial_states.new_empty(initial_states.shape) if need_initial else None
    dweight = dbias = workspace = None
    if need_sums:
        workspace = x.new_empty(places, width + (bias is not None), dim, dtype=torch.float32)
        dweight = weight.new_empty(dim, width)
        dbias = None if bias is None else bias.new_empty(dim)
    launch_on(x.device, walk, *tensors, dx, dinitial, workspace, *marks)
    if need_sums:
        launch_on(x.device, reduce, workspace, dweight, dbias)
    return dx, dweight, dbias, dinitial

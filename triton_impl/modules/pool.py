"""A pool of conv states: who owns which slot is known on the host, the windows stay on the device."""

import heapq
import operator
from collections.abc import Iterable
from typing import SupportsIndex

import torch


def host_integer(name: str, value: object) -> int:
    """`value` as an int.

    Raises:
      TypeError: it is no integer.
    """
    try:
        if isinstance(value, bool | torch.Tensor):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


class PoolExhausted(RuntimeError):
    """There are fewer free slots than were asked for."""


class ConvStatePool:
    """Conv states of many sequences and layers, one slot a sequence.

    Slots are host integers. A fresh or freed slot may hold anything: a sequence's first prefill runs without
    `has_initial_state`, and then nothing is read from it; `reset` zeroes it for programs that always read.

    Attributes:
      states: [layers, num_slots, state_len, dim], oldest input first; state_len is width-1 unless it is given. Wider
        slots hold drafts that may be rejected (`num_accepted_tokens`), or shift or turn (`state_layout`).
      pad_slot_id: marks padding rows in `indices`; if it lies in [0, num_slots), that slot is never handed out.
    """

    def __init__(
        self,
        num_slots: SupportsIndex,
        dim: SupportsIndex,
        width: SupportsIndex,
        *,
        layers: SupportsIndex = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | int | None = None,
        pad_slot_id: SupportsIndex = -1,
        state_len: SupportsIndex | None = None,
    ) -> None:
        sizes = {"num_slots": num_slots, "dim": dim, "width": width, "layers": layers}
        num_slots, dim, width, layers = (host_integer(name, size) for name, size in sizes.items())
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected a positive integer, got {size}")
        state_len = width - 1 if state_len is None else host_integer("state_len", state_len)
        if state_len < width - 1:
            raise ValueError(f"state_len: expected at least width-1 = {width - 1}, got {state_len}")
        self.states = torch.zeros(layers, num_slots, state_len, dim, dtype=dtype, device=device)
        self.pad_slot_id = host_integer("pad_slot_id", pad_slot_id)
        self._free = [slot for slot in range(num_slots) if slot != self.pad_slot_id]
        self._owned = set()

    def __repr__(self) -> str:
        layers, num_slots, state_len, dim = self.states.shape
        return (
            f"ConvStatePool(num_slots={num_slots}, dim={dim}, layers={layers}, state_len={state_len}, "
            f"dtype={self.states.dtype}, device={self.states.device}, free={self.num_free})"
        )

    @property
    def num_slots(self) -> int:
        """All slots, the padding slot included."""
        return self.states.shape[1]

    @property
    def num_free(self) -> int:
        """Slots that `allocate` can still hand out."""
        return len(self._free)

    def layer(self, index: SupportsIndex = 0) -> torch.Tensor:
        """The `conv_states` argument of one layer: a view [num_slots, state_len, dim]."""
        layers = self.states.shape[0]
        if not -layers <= host_integer("layer", index) < layers:
            raise ValueError(f"layer: expected one of {layers} layers, from 0, got {index}")
        return self.states[index]

    def allocate(self, count: SupportsIndex = 1) -> list[int]:
        """Takes `count` free slots, lowest numbers first.

        Raises:
          PoolExhausted: fewer are free; none is taken.
        """
        count = host_integer("count", count)
        if count < 0:
            raise ValueError(f"count: expected an integer >= 0, got {count}")
        if count > len(self._free):
            raise PoolExhausted(
                f"count: expected at most {len(self._free)} slots, which are free, got {count}"
            )
        slots = [heapq.heappop(self._free) for _ in range(count)]
        self._owned.update(slots)
        return slots

    def free(self, slots: Iterable[int]) -> None:
        """Gives slots back. Their contents stay until a new owner writes them.

        Raises:
          ValueError: a slot that is not allocated (freed twice, never handed out, outside the pool) or is named
            twice; none is freed.
        """
        slots = self._check(slots)
        self._owned.difference_update(slots)
        for slot in slots:
            heapq.heappush(self._free, slot)

    def reset(self, slots: Iterable[int]) -> None:
        """Zeroes the windows of allocated slots, in all layers."""
        self.states.index_fill_(1, self._index(self._check(slots)), 0)

    def gather(self, slots: Iterable[int]) -> torch.Tensor:
        """A copy [layers, len(slots), state_len, dim] of the states of allocated slots."""
        return self.states.index_select(1, self._index(self._check(slots)))

    def scatter(self, slots: Iterable[int], windows: torch.Tensor) -> None:
        """Puts states [layers, len(slots), state_len, dim], as `gather` returns them, into allocated slots."""
        slots = self._check(slots)
        shape = (self.states.shape[0], len(slots), *self.states.shape[2:])
        if windows.shape != shape:
            raise ValueError(f"windows: expected shape {list(shape)}, got {list(windows.shape)}")
        self.states.index_copy_(1, self._index(slots), windows.to(self.states))

    def copy(self, sources: Iterable[int], targets: Iterable[int]) -> None:
        """Copies windows between allocated slots, in all layers: a fork of a sequence, or a shared prefix.

        A source may serve several targets, and may be a target itself: all are read before any is written.
        """
        sources, targets = _listed(sources, "sources"), self._check(targets, "targets")
        self._check(set(sources), "sources")
        if len(sources) != len(targets):
            raise ValueError(
                f"targets: expected {len(sources)} slots, as many as sources, got {len(targets)}"
            )
        windows = self.states.index_select(1, self._index(sources))
        self.states.index_copy_(1, self._index(targets), windows)

    def indices(self, slots: Iterable[int], batch: SupportsIndex | None = None) -> torch.Tensor:
        """`cache_indices` for allocated slots: [batch] int32 on the pool's device, padded with `pad_slot_id`.

        Args:
          slots: one a row.
          batch: rows of the call, at least len(slots); None: as many as there are slots.
        """
        slots = self._check(slots)
        rows = len(slots) if batch is None else host_integer("batch", batch)
        if rows < len(slots):
            raise ValueError(f"batch: expected at least {len(slots)}, the number of slots, got {batch}")
        return self._index(slots + [self.pad_slot_id] * (rows - len(slots)), torch.int32)

    def _check(self, slots, name="slots"):
        """Returns `slots` as a list of distinct allocated slots."""
        checked = _listed(slots, name)
        seen = set()
        for slot in checked:
            if not 0 <= slot < self.num_slots:
                raise ValueError(f"{name}: expected slots of this pool, in [0, {self.num_slots}), got {slot}")
            if slot not in self._owned:
                raise ValueError(f"{name}: expected allocated slots, got {slot}, which is free")
            if slot in seen:
                raise ValueError(f"{name}: expected distinct slots, got {slot} twice")
            seen.add(slot)
        return checked

    def _index(self, slots, dtype=torch.int64):
        return torch.tensor(slots, dtype=dtype, device=self.states.device)


def _listed(slots, name):
    """`slots` as a list of ints."""
    if isinstance(slots, torch.Tensor | str) or not isinstance(slots, Iterable):
        raise TypeError(f"{name}: expected a list of host integers, got {type(slots).__name__}")
    return [host_integer(name, slot) for slot in slots]

"""Properties that hold bit for bit between calls, without any expected value: path invariance.

A relation is a generator: it takes a problem and a `call`, which runs and judges another problem, and yields a
text for every difference it finds. It works on rows, so that the same code serves both operations.
"""

from oracle.conformance.relations import backward, fronts, models, paths, slots

RELATIONS = {
    f.__name__: f
    for f in (
        paths.split, paths.chain, paths.tokens_one_by_one, paths.separate, paths.schedules, paths.permute_slots,
        paths.reorder_rows, paths.add_padding, paths.packed_steps, paths.serving, paths.repeat, slots.layouts,
        slots.prefixes, slots.verify_windows, slots.verify_trees, backward.backward_schedules, backward.backward_repeat,
        fronts.separate_norm, fronts.front_schedules, fronts.front_split, fronts.front_steps,
        models.short_documents, models.short_padding,
    )
}  # fmt: skip

FROM_BITS = ("separate_norm",)
"""Relations that only an implementation can keep that promises the contract's float32 bits."""

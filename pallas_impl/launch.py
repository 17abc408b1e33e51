"""How every kernel is run: one warpgroup a program; arrays, results and shared memory reach it by name."""

from types import SimpleNamespace

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from oracle.contract import Unsupported
from pallas_impl.tracing import beside_shard_map

COMPILER_PARAMS = plgpu.CompilerParams(
    # Every thread rereads only what it wrote itself, in one layout.
    unsafe_no_auto_barriers=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
)


class Refs(SimpleNamespace):
    """Arrays, results and shared memory of a program by name; what a call does not have is None."""

    def __getattr__(self, name):  # reached where there is no such attribute
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def parts(dtype, tokens, dim, split_sizes):
    """The results of a call by name, [tokens, size] for each of `split_sizes`, or one of `dim` channels."""
    sizes = (dim,) if split_sizes is None else split_sizes
    return {f"out{i}": jax.ShapeDtypeStruct((tokens, size), dtype) for i, size in enumerate(sizes)}


def joined(outs, split_sizes):
    """What `parts` named, as an operation returns it."""
    return outs[0] if split_sizes is None else tuple(outs)


def run(body, name, programs, operands, results, scratch, *, written=(), interpret=False, tokens=0):
    """Runs `body(refs)` in every program.

    Args:
      body: reads and writes the attributes of `Refs`: operands and results as arrays in global memory, those of
        `parts` together as the tuple `outs`, and scratch.
      name: of the kernel, behind "causal_conv1d_".
      programs: how many; tokens: how many they cover, if these are counted too.
      operands: arrays by name; None: absent.
      results: `jax.ShapeDtypeStruct`s by name.
      scratch: shared memory and barriers by name.
      written: operands that are written in place where XLA owns them; else it copies them first.
      interpret: False, or the parameters of Pallas' GPU interpreter.

    Returns:
      The results in their order, then the written operands, None where absent.

    Raises:
      Unsupported: the kernel's 32-bit counters cannot hold the programs or the tokens.
    """
    if max(programs, tokens) >= 2**31:
        raise Unsupported(
            "backend: 'mosaic_gpu' needs fewer than 2**31 programs covering fewer than 2**31 tokens, "
            f"these sizes take {programs} programs covering {tokens} tokens"
        )
    names = [name for name, operand in operands.items() if operand is not None]

    def kernel(*refs):
        named = dict(zip((*names, *results), refs, strict=True))
        named["outs"] = tuple(ref for name, ref in named.items() if name[:3] == "out" and name[3:].isdigit())
        pl.run_scoped(lambda **scratch: body(Refs(**named, **scratch)), **scratch)

    def call(arrays):
        given = dict(zip(names, arrays, strict=True))
        given |= {
            name: jax.new_ref(_apart(given[name]), memory_space=plgpu.GMEM)
            for name in written
            if name in given
        }
        found = pl.kernel(
            kernel,
            out_type=tuple(results.values()),
            mesh=plgpu.Mesh(grid=(programs,), grid_names=("program",)),
            compiler_params=COMPILER_PARAMS,
            interpret=interpret,
            name="causal_conv1d_" + name,
        )(*given.values())
        return _apart((*found, *(jax.freeze(given[name]) if name in given else None for name in written)))

    return beside_shard_map(call, [operands[name] for name in names])


def _apart(arrays):
    """The arrays as arrays of their own, at no cost where they are: what a kernel writes in place, and what it gives.

    XLA makes a kernel and a slice beside it, of an operand or into a larger array, one operation (its DynamicSliceFusion,
    seen in JAX 0.11) and forgets then that an operand and a result are one: of a pool that is a layer's slice the new
    windows were lost. It does not look through a barrier.
    """
    return jax.lax.optimization_barrier(arrays)

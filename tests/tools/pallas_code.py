"""What a call of the JAX twin lowers to for CUDA, without a GPU: operations of the host's program, and Mosaic kernels."""

import hashlib
import re
from collections import Counter

import jax
import jax.numpy as jnp
from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect
from jax._src.lib.mlir import ir
from jax.experimental.mosaic import gpu as _  # noqa: F401  registers what kernels are written in

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", '"': '"'}


def lowered(call):
    """The module of a `code_calls.Call`, as text."""
    import pallas_impl

    arrays = {n: jax.ShapeDtypeStruct(a.shape, jnp.dtype(a.dtype)) for n, a in call.arrays.items()}
    options = call.options_on("mosaic_gpu")

    def run(arrays):
        operation = getattr(pallas_impl, call.operation.removeprefix("gradient "))
        if not call.operation.startswith("gradient "):
            return operation(**arrays, **options)
        floats = {n: a for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        others = {n: a for n, a in arrays.items() if n not in floats}
        result, back = jax.vjp(lambda floats: tuple(operation(**floats, **others, **options)), floats)
        return back(result)

    return jax.jit(run).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text):
    """The Mosaic kernels of a lowered module: text without locations and names of functions, and its operations."""
    return [_decode(found) for found in re.findall(r'\bmodule = "((?:[^"\\]|\\.)*)"', text)]


def _decode(escaped):
    def unescape(match):
        code = match.group(1)
        return ESCAPES[code] if code in ESCAPES else chr(int(code, 16))

    raw = re.sub(r"\\([0-9A-Fa-f]{2}|.)", unescape, escaped).encode("latin-1")
    found = Counter()

    def count(operation):
        found[_name(operation)] += 1
        return ir.WalkResult.ADVANCE

    with mlir.make_ir_context() as context:
        mosaic_gpu_dialect.register_dialect(context)
        context.load_all_available_dialects()
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(raw)
        module.operation.walk(count)
        text = module.operation.get_asm(enable_debug_info=False)
    return re.sub(r"@\w+", "@name", text), found


def _name(operation):
    """Its name as Mosaic keeps it, without the prefix of the stable dialect; inline assembly by what it says."""
    name = operation.name.removeprefix("stable_mosaic_gpu.")
    if name == "llvm.inline_asm":
        name = "asm " + ir.StringAttr(operation.attributes["asm_string"]).value.split()[0]
    return name


def host_operations(text):
    """How often the host's program holds each operation; a custom call counts under what it calls."""
    found = re.findall(r"(?<!#)stablehlo\.(\w+)(?: @(\w+))?", text)
    return Counter(called or name for name, called in found)


def facts(call):
    """The host's operations and aliases, and of each kernel a hash and how often each operation occurs."""
    text = lowered(call)
    found = []
    for kernel, operations in kernels(text):
        found.append(
            dict(
                kernel="mosaic", hash=hashlib.sha256(kernel.encode()).hexdigest()[:16],
                lines=len(kernel.splitlines()), opcodes=operations,
            )
        )  # fmt: skip
    host = host_operations(text)
    host["aliases"] = len(re.findall("output_operand_alias<", text))
    return [dict(kernel="host", opcodes=host), *found]

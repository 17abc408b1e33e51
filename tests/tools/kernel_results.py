"""Finds slices that a lowered program writes into a kernel's result, which XLA for GPUs refuses to compile."""

WRITES = ("stablehlo.dynamic_update_slice", "stablehlo.scatter")
SAME_MEMORY = ("stablehlo.reshape", "stablehlo.bitcast_convert", "stablehlo.optimization_barrier")


def written_into_kernels(lowered):
    """Of a `jax.stages.Lowered`: the written slices, as text, whose target is a Mosaic GPU kernel's result.

    Looks through calls, shard_map, reshapes and barriers; a loop's or branch's own results are not followed.
    """
    module = lowered.compiler_ir("stablehlo")
    functions, callers, writes = {}, {}, []

    def walk(operation):
        name = operation.operation.name
        if name == "func.func":
            functions[operation.attributes["sym_name"].value] = operation
        if name == "func.call":
            callers.setdefault(operation.attributes["callee"].value, []).append(operation)
        if name in WRITES:
            writes.append(operation)
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    walk(inner)

    walk(module.operation)

    def returned(region, index):
        return list(region.blocks[0].operations)[-1].operands[index]

    def of_kernel(value):
        from jaxlib.mlir import ir

        if isinstance(value.owner, ir.Block):
            index, owner = ir.BlockArgument(value).arg_number, value.owner.owner
            if owner.name == "func.func":
                calls = callers.get(owner.attributes["sym_name"].value, [])
                return any(of_kernel(call.operands[index]) for call in calls)
            return owner.name == "sdy.manual_computation" and of_kernel(owner.operands[index])
        owner, index = value.owner, ir.OpResult(value).result_number
        name = owner.name
        if name == "stablehlo.custom_call":
            return "mosaic" in owner.attributes["call_target_name"].value
        if name in SAME_MEMORY:
            return of_kernel(owner.operands[index])
        if name in WRITES:
            return of_kernel(owner.operands[0])
        if name == "func.call":
            return of_kernel(returned(functions[owner.attributes["callee"].value].regions[0], index))
        if name == "sdy.manual_computation":
            return of_kernel(returned(owner.regions[0], index))
        return False

    return [str(operation) for operation in writes if of_kernel(operation.operands[0])]

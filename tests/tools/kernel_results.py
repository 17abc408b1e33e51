"""What a lowered program for GPUs does with a kernel's results, and hands it to write to: nothing that XLA makes one with it."""

import re

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


def beside_kernels(text):
    """(kernels, what touches them but a barrier): the operations that make an operand which a kernel of this lowered module writes
    to, and those that use a kernel's results, by name; a function's argument is called "argument".
    """
    kernels, touching = 0, []
    for body in re.split(r"func\.func ", text)[1:]:
        lines = body.splitlines()
        made = {found[1]: line for line in lines if (found := re.match(r"\s*(%\w+)(?::\d+)? = ", line))}

        def operation(line):
            found = re.search(r"= \"?(?:stablehlo\.)?([\w.]+)|(return)", line)
            return found[1] or found[2]

        for line in lines:
            found = re.match(r"\s*(%\w+)(?::\d+)? = stablehlo\.custom_call @mosaic_gpu_v2\(([^)]*)\)", line)
            if found is None:
                continue
            kernels += 1
            operands = found[2].split(", ")
            for index in re.findall(r"operand_index = (\d+)", line):
                maker = made.get(operands[int(index)].split("#")[0])
                touching.append("argument" if maker is None else operation(maker))
            touching += [
                operation(user)
                for user in lines
                if user is not line and re.search(rf"{found[1]}\b", user.split("=", 1)[-1])
            ]
    return kernels, [name for name in touching if name != "optimization_barrier"]

"""Triton's pass Coalesce without its searches, which are half of the time of compiling a kernel and nine tenths of a long one.

Coalesce gives every load and store of blocks a layout, by what is known of its pointers and by the widest access of those
that depend on one another. To find these it walks, for each access, from each operation that it reaches to all others
again: accesses times the square of operations. Here the pass sees accesses whose pointers come out of loops, from where it
does not search, and all accesses of a shape count as dependent: constants make them so. The layouts found are then
written into the kernel as the pass does. `tests/triton/test_compile.py` compares the two.
"""

import contextlib
import re
import tempfile

import triton
from triton._C.libtriton import ir, passes
from triton.backends.amd.compiler import HIPBackend
from triton.backends.nvidia.compiler import CUDABackend

ACCESS = re.compile(
    r"^ *(?:(?P<result>%[\w-]+) = )?tt\.(?P<kind>load|store) (?P<operands>%[\w#-]+(?:, %[\w#-]+)*)(?P<attributes>[^:]*)"
    r" : tensor<(?P<shape>(?:\d+x)+)!tt\.ptr<(?P<element>\w+)>, (?P<layout>#.+)>(?P<place> loc\(.*\))$"
)
MEMORY = re.compile(r"\btt\.(?:load|store|atomic\w+|descriptor\w+)\b|\bttg\.async\w+|\bttng\.")
LAYOUT = re.compile(r"^(#\w+) = (#ttg\.blocked<.*>)$", re.MULTILINE)
NAME = re.compile(r"%[\w-]+")
coalesce = passes.ttgpuir.add_coalesce


class Unfamiliar(Exception):
    """The kernel accesses memory in another way than by loads and stores."""


def of_block(access, what, layout=None):
    """The type of an access' blocks of `what`."""
    return f"tensor<{access['shape']}{what}, {layout or access['layout']}>"


def types(access, layout=None):
    """The types of an access' operands."""
    pointer, mask, value = (
        of_block(access, what, layout) for what in (f"!tt.ptr<{access['element']}>", "i1", access["element"])
    )
    order = (pointer, value, mask) if access["kind"] == "store" else (pointer, mask, value)
    return order[: len(access["operands"].split(", "))]


def lonely(access, number):
    """An access as lines whose pointer a loop hands on, so that there is no operation to search from."""
    pointers, block = types(access)[0], of_block(access, access["element"])
    pointer, value, given = f"%pointer${number}", f"%value${number}", access["operands"].split(", ")[0]
    yield (
        f"%done${number} = scf.for %step${number} = %first$ to %end$ step %end$ iter_args({pointer} = {given})"
        f" -> ({pointers}) : i32 {{"
    )
    if access["kind"] == "store":
        yield f"tt.store {pointer}, {value} : {pointers}"
    else:
        yield f"%loaded${number} = tt.load {pointer} : {pointers}"
    yield f"scf.yield {pointer} : {pointers}"
    yield "}"
    if access["kind"] == "load":
        yield f"{access['result']} = ttg.convert_layout {value} : {block} -> {block}"


def converted(access, number, layout):
    """An access as lines in a layout of its own: what Coalesce leaves."""
    operands, place = [], access["place"]
    pairs = zip(types(access), types(access, layout), strict=True)
    for i, (operand, (old, new)) in enumerate(zip(access["operands"].split(", "), pairs, strict=True)):
        operands.append(f"%access${number}${i}")
        yield f"{operands[-1]} = ttg.convert_layout {operand} : {old} -> {new}{place}"
    text = (
        f"tt.{access['kind']} {', '.join(operands)}{access['attributes']} : {types(access, layout)[0]}{place}"
    )
    if access["kind"] == "store":
        yield text
        return
    if layout == access["layout"]:
        yield f"{access['result']} = {text}"
        return
    old, new = (of_block(access, access["element"], where) for where in (None, layout))
    yield f"%access${number} = {text}"
    yield f"{access['result']} = ttg.convert_layout %access${number} : {new} -> {old}{place}"


def parsed(lines, context):
    with tempfile.NamedTemporaryFile("w", suffix=".mlir") as file:
        file.write("\n".join(lines))
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    module.context = context
    return module


def run(module, add, *arguments):
    """Runs one pass."""
    manager = ir.pass_manager(module.context)
    add(manager, *arguments)
    manager.run(module, "quick_coalesce")
    return module


def layouts(lines, accesses, context):
    """Returns the layout of each access."""
    replaced, values = [], (f"%value${i}: {of_block(a, a['element'])}, " for i, a in accesses.items())
    for i, line in enumerate(lines):
        if "tt.func public @" in line:
            line = line.replace("(", f"({''.join(values)}%first$: i32, %end$: i32, ", 1)
        replaced += lonely(accesses[i], i) if i in accesses else [line]
    found = str(run(parsed(replaced, context), coalesce))
    by_name = dict(LAYOUT.findall(found))
    matches = [match for match in map(ACCESS.match, found.split("\n")) if match]
    if [m["kind"] for m in matches] != [a["kind"] for a in accesses.values()]:
        raise Unfamiliar
    own = [by_name[match["layout"]] for match in matches]

    def width(layout):
        order = int(re.search(r"order = \[(\d+)", layout).group(1))
        return int(re.search(r"sizePerThread = \[([^]]*)\]", layout).group(1).split(", ")[order])

    widest = {}
    for match, layout in zip(matches, own, strict=True):
        alike = match["shape"], layout.partition("order")[2]
        widest[alike] = max(widest.get(alike, layout), layout, key=width)
    # A load is as wide as the widest of its shape; not so through a pointer that a loop carries.
    searched = pointers_of_operations(lines, accesses)
    for place, (match, access) in enumerate(zip(matches, accesses.values(), strict=True)):
        if access["kind"] == "load" and searched[place]:
            own[place] = widest[match["shape"], own[place].partition("order")[2]]
    return own


def pointers_of_operations(lines, accesses):
    """Whether the pointer of each access is an operation's result: the last definition of its name, where a block hides none."""
    results, found = {}, []
    for i, line in enumerate(lines):
        if i in accesses:
            found.append(results.get(NAME.match(accesses[i]["operands"]).group(), True))
        if line.lstrip().startswith("%"):
            results |= dict.fromkeys(NAME.findall(line.partition(" = ")[0]), True)
        if re.search(r"scf\.(for|while)|\^bb", line):
            results |= dict.fromkeys(blocks_names(line), False)
    return found


def blocks_names(line):
    """The arguments of the block that begins behind a line."""
    if "^bb" in line:
        return NAME.findall(line)
    return re.findall(r"(%[\w-]+) = ", line.partition("scf.")[2])


def coalesced(module):
    """Returns the module behind Coalesce."""
    text = str(module)
    if text.count("tt.func ") != 1:
        raise Unfamiliar
    lines, accesses = text.split("\n"), {}
    for i, line in enumerate(lines):
        if match := ACCESS.match(line):
            accesses[i] = match.groupdict()
        elif MEMORY.search(line.partition(" loc(")[0]):
            if not re.search(r"tt\.(load|store) .* : !tt\.ptr<\w+>( loc|$)", line):  # of one element
                raise Unfamiliar
    wanted = layouts(lines, accesses, module.context)
    names = {layout: name for name, layout in LAYOUT.findall(text)}
    result = []
    for layout in wanted:
        if layout not in names:
            names[layout] = f"#coalesced{len(names)}"
            result.append(f"{names[layout]} = {layout}")
    chosen = dict(zip(accesses, wanted, strict=True))
    for i, line in enumerate(lines):
        result += converted(accesses[i], i, names[chosen[i]]) if i in accesses else [line]
    return parsed(result, module.context)


@contextlib.contextmanager
def without(*names):
    """Within, these passes do nothing."""
    kept = [(place, name, getattr(place, name)) for place, name in names]
    for place, name in names:
        setattr(place, name, lambda *_: None)
    try:
        yield
    finally:
        for place, name, value in kept:
            setattr(place, name, value)


def quick(make_ttgir, family):
    def make(module, metadata, options, *rest):
        target = f"{family}:{rest[0] if rest else options.arch}"
        shape = options.num_warps, options.warp_size, options.num_ctas
        try:
            run(module, passes.ttir.add_convert_to_ttgpuir, target, *shape)
            module = coalesced(module)
        except (Unfamiliar, RuntimeError):  # the latter: a text that it cannot read
            with without((passes.ttir, "add_convert_to_ttgpuir")):
                return make_ttgir(module, metadata, options, *rest)
        with without((passes.ttir, "add_convert_to_ttgpuir"), (passes.ttgpuir, "add_coalesce")):
            return make_ttgir(module, metadata, options, *rest)

    make.whole = make_ttgir
    return staticmethod(make)


def install():
    """Puts this in the pass' place, once."""
    if triton.__version__.startswith("3.7.") and not hasattr(CUDABackend.make_ttgir, "whole"):
        CUDABackend.make_ttgir = quick(CUDABackend.make_ttgir, "cuda")
        HIPBackend.make_ttgir = quick(HIPBackend.make_ttgir, "hip")


@contextlib.contextmanager
def left_out():
    """Within, Triton's own pass runs."""
    kept = {backend: backend.make_ttgir for backend in (CUDABackend, HIPBackend)}
    for backend, make in kept.items():
        backend.make_ttgir = staticmethod(getattr(make, "whole", make))
    try:
        yield
    finally:
        for backend, make in kept.items():
            backend.make_ttgir = staticmethod(make)

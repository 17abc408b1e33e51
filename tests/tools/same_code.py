"""Compares the machine code of this checkout's calls with that of another checkout, without a GPU.

usage: python tests/tools/same_code.py --against CHECKOUT [--only triton|pallas|PART OF A CALL'S NAME] [--target sm_90] [-v]

Every call of `code_calls.CALLS` goes through the public API of both checkouts. Of Triton's launches it compares grid,
threads, registers, spills and machine instructions, of Pallas the host's operations and the Mosaic kernels. Exits with 1
where a call differs in what costs time: launches, programs, shared memory, spills, accesses to memory, arithmetic,
more registers than ALLOWED_REGISTERS or instructions than ALLOWED_SIZE allows. Facts are kept by the packages' contents.
"""

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
CACHE = Path(tempfile.gettempdir()) / f"same_code_{os.getuid()}"
PACKAGES = {"triton": "triton_impl", "pallas": "pallas_impl"}
ALLOWED_REGISTERS = 8  # a thread; a warp's registers are allocated in such steps
ALLOWED_SIZE = 1.05  # instructions, since none is in all programs' way
# What is counted as memory or arithmetic: of SASS, of AMD's instructions, of MLIR. Address arithmetic is not; nor is
# HFMA2, by which ptxas loads constants: no kernel multiplies in 16 bits.
COSTS = (
    "LDG", "STG", "LDS", "STS", "LDL", "STL", "LDGSTS", "LDSM", "STSM", "ATOM", "RED", "FFMA", "FMUL", "FADD", "FSEL",
    "MUFU", "HADD2", "HMUL2", "F2F", "SHFL", "BAR", "global_", "buffer_", "ds_", "v_fma", "v_exp", "v_rcp",
    "s_barrier", "math.", "arith.mulf", "arith.addf", "arith.subf", "arith.truncf", "vector.load", "vector.store",
    "memref.load", "memref.store", "nvvm.", "asm ",
)  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", required=True, type=Path, metavar="CHECKOUT")
    parser.add_argument(
        "--only", default="", help="triton, pallas, or a part of a call's name; several by commas"
    )
    parser.add_argument("--target", default="sm_90", help="of Triton: sm_80, sm_90, sm_100, gfx942 or gfx950")
    parser.add_argument("-v", "--verbose", action="store_true", help="print equal calls too")
    given = parser.parse_args(arguments)
    checkouts = (given.against.resolve(), HERE)
    for checkout in checkouts:
        if not (checkout / "oracle" / "contract.py").is_file():
            parser.error(f"--against: expected a checkout of this repository, got {checkout}")
    words = [word for word in given.only.split(",") if word]
    twins = [twin for twin in PACKAGES if twin in words] or list(PACKAGES)
    names = [word for word in words if word not in PACKAGES]
    failed = compared = 0
    for twin in twins:
        if importlib.util.find_spec({"triton": "triton", "pallas": "jax"}[twin]) is None:
            print(f"{twin}: not installed here")
            failed += 1
            continue
        before, after = facts_of(checkouts, twin, given.target, names)
        for name in after:
            compared += 1
            different, lines = compare(before[name], after[name])
            failed += different
            if different or given.verbose or lines:
                print(f"{'DIFFERS' if different else 'same   '} {twin}: {name}")
                for line in lines:
                    print(f"          {line}")
    if not compared:
        parser.error(f"--only: expected triton, pallas or a part of a call's name, got {given.only!r}")
    print(f"{compared} calls, {failed} with other code")
    return 1 if failed else 0


def facts_of(checkouts, twin, target, names):
    """The facts of both checkouts, made at the same time in a process each."""
    running = [ask(checkout, twin, target, names) for checkout in checkouts]
    found = []
    for process, place in running:
        if process is not None and process.wait():
            raise SystemExit(f"{twin}: no facts of {place}")
        facts = json.loads(place.read_text())
        found.append({name: facts[name] for name in wanted(twin, names)})
    return found


def ask(checkout, twin, target, names):
    """(the process that adds the missing facts of a checkout to its file, or None; the file)"""
    place = CACHE / f"{twin}-{key(checkout, twin, target)}.json"
    known = json.loads(place.read_text()) if place.exists() else {}
    missing = [name for name in wanted(twin, names) if name not in known]
    if not missing:
        return None, place
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu", TRITON_INTERPRET="0")
    command = [sys.executable, __file__, "--facts", str(checkout), twin, target, str(place), *missing]
    return subprocess.Popen(command, env=environment), place


def wanted(twin, names):
    """The names of the calls of a twin that have one of these parts in theirs."""
    calls = _tool("code_calls").CALLS
    return [
        n
        for n, call in calls.items()
        if twin in call.twins and (not names or any(part in n for part in names))
    ]


def key(checkout, twin, target):
    """Names the contents of what decides a call's code: the packages, this tool, versions, target."""
    digest = hashlib.sha256()
    tools = [Path(__file__).with_name(f"{name}.py") for name in ("code_calls", f"{twin}_code")]
    packages = [checkout / name for name in ("oracle/contract.py", "oracle/contract_values.py")]
    packages += sorted((checkout / PACKAGES[twin]).rglob("*.py"))
    for path in [*tools, *packages]:
        if path.exists():
            digest.update(path.name.encode() + path.read_bytes())
    versions = [
        importlib.metadata.version(name) for name in {"triton": ["torch", "triton"], "pallas": ["jax"]}[twin]
    ]
    digest.update(repr((versions, target if twin == "triton" else "", sys.version_info[:2])).encode())
    return digest.hexdigest()[:20]


def write_facts(checkout, twin, target, place, *names):
    """Adds the facts of a checkout's calls of these names to a file; in a process of its own."""
    sys.path[:] = [checkout, *(path for path in sys.path if Path(path).resolve() != Path(__file__).parent)]
    place = Path(place)
    known = json.loads(place.read_text()) if place.exists() else {}
    code = _tool(f"{twin}_code")
    if twin == "triton":
        code.pretend(code.TARGETS[target])
    package = importlib.import_module(PACKAGES[twin])
    if not Path(package.__file__).resolve().is_relative_to(Path(checkout).resolve()):
        raise SystemExit(f"expected {PACKAGES[twin]} of {checkout}, got {package.__file__}")
    calls = _tool("code_calls").CALLS
    for name in names:
        try:
            known[name] = code.facts(calls[name], *([code.TARGETS[target]] if twin == "triton" else []))
        except Exception as error:  # a call that raises is a fact as well
            known[name] = [dict(kernel="call", failed=f"{type(error).__name__}: {error}"[:300])]
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(known))
    part.replace(place)


def _tool(name):
    """A helper beside this file, whatever `tests` the other checkout has."""
    with contextlib.suppress(KeyError):
        return sys.modules[f"same_code_{name}"]
    spec = importlib.util.spec_from_file_location(f"same_code_{name}", Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(before, after):
    """(whether the facts of a call differ in what costs time, lines that say in what they differ)"""
    failures = [f"fails: {fact['kernel']}: {fact['failed']}" for fact in after if "failed" in fact]
    if failures or any("failed" in fact for fact in before):
        both = bool(failures) and [f.get("failed") for f in before] == [f.get("failed") for f in after]
        return not both, failures or ["fails there, not here"]
    if len(before) != len(after):
        there, here = ([fact["kernel"] for fact in facts] for facts in (before, after))
        return True, [f"launches: {there} -> {here}", *_changed(*map(_costs, (_sum(before), _sum(after))))]
    if sorted(f.get("hash", "") for f in before) == sorted(f.get("hash", "") for f in after):
        pairs = [pair for pair in zip(before, after, strict=True) if "hash" not in pair[0]]
    else:
        pairs = zip(before, after, strict=True)
    different, lines = False, []
    for old, new in pairs:
        worse, found = _compare_one(old, new)
        different |= worse
        lines += [f"{new['kernel']}: {line}" for line in found]
    return different, lines


def _compare_one(old, new):
    worse, lines = False, []
    for fact in ("grid", "threads", "shared", "spilled"):
        if old.get(fact) != new.get(fact):
            worse = True
            lines.append(f"{fact}: {old[fact]} -> {new[fact]}")
    if old.get("registers") != new.get("registers"):
        worse |= new["registers"] > old["registers"] + ALLOWED_REGISTERS
        lines.append(f"registers: {old['registers']} -> {new['registers']}")
    costs = _changed(
        *(fact["opcodes"] if fact["kernel"] == "host" else _costs(fact["opcodes"]) for fact in (old, new))
    )
    size = [sum(fact["opcodes"].values()) for fact in (old, new)]
    if size[0] != size[1]:
        worse |= size[1] > ALLOWED_SIZE * size[0]
        lines.append(f"instructions: {size[0]} -> {size[1]}")
    elif old.get("hash") != new.get("hash") and not costs:
        lines.append("another kernel of as many operations")
    return worse or bool(costs), lines + costs


def _sum(facts):
    return sum((Counter(fact["opcodes"]) for fact in facts), Counter())


def _costs(opcodes):
    """The part of the opcodes that is memory or arithmetic."""
    return {name: count for name, count in opcodes.items() if name.startswith(COSTS)}


def _changed(old, new):
    names = sorted(name for name in old.keys() | new.keys() if old.get(name, 0) != new.get(name, 0))
    return ["; ".join(f"{name}: {old.get(name, 0)} -> {new.get(name, 0)}" for name in names)] if names else []


if __name__ == "__main__":
    if sys.argv[1:2] == ["--facts"]:
        write_facts(*sys.argv[2:])
    else:
        raise SystemExit(main())

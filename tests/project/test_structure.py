"""The structure of the sources, read from their syntax trees: twins file by file, who imports whose names, long signatures.

No framework is imported, so this runs anywhere. Every exception stands here by name with its reason, and an
exception that is no longer needed is an error: the lists can only shrink. Each check is shown to fail on damaged source.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TWINS = ("triton_impl", "pallas_impl")
FOLDERS = ("modules", "compat")  # what stands in them follows each framework's libraries and peers
ONE_TWIN_ONLY = {
    "pallas_impl/parts.py": "arrays that know how they are split over a mesh are JAX's idea",
    "pallas_impl/sharding.py": "arguments split over a mesh are JAX's idea; torch has process groups",
    "triton_impl/packed_rows.py": "memory and views, which JAX arrays have not",
    "triton_impl/module.py": "the former place of a public class, three lines",
    "triton_impl/state_pool.py": "the former place of a public class, three lines",
}
# Files in which a reader of one twin finds, under the same names, what he knows from the other.
SAME_PUBLIC_NAMES = ("__init__.py", "api.py", "functional.py", "functional_prologue.py", "short_conv.py")
LIMIT, KERNEL_LIMIT = 12, 30
# The public operations and their records repeat the contract's signature: that is what they are for.
SIGNATURES = {
    "api.py",
    "functional.py",
    "functional_prologue.py",
    "context_parallel.py",
    "contract.py",
    "reference.py",
    "reference_grad.py",
    "reference_prologue.py",
    "reference_prologue_grad.py",
    "reference_short.py",
}
FMT_SKIP_LIMIT = 60  # in both twins together


def sources(*folders):
    return sorted(
        path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")
    )


def read(path):
    return (ROOT / path).read_text()


def missing_files(files, exceptions=ONE_TWIN_ONLY):
    """Returns the files of one twin that the other lacks, folders by name counted as one."""
    found = {}
    for twin in TWINS:
        names = {file.removeprefix(f"{twin}/") for file in files if file.startswith(f"{twin}/")}
        found[twin] = {name.partition("/")[0] if name.startswith(FOLDERS) else name for name in names}
    alone = {f"{twin}/{name}" for twin, other in (TWINS, TWINS[::-1]) for name in found[twin] - found[other]}
    return sorted(alone ^ set(exceptions))


def public_names(source):
    """Returns the public functions and classes that a file defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {
        node.name
        for node in ast.parse(source).body
        if isinstance(node, kinds) and not node.name.startswith("_")
    }


def private_imports(source, ours=("oracle", "triton_impl", "pallas_impl", "benchmarks", "tests")):
    """Returns the private names that a file takes from another module of ours, by import or as an attribute."""
    tree = ast.parse(source)
    modules, found = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] in ours):
            for alias in node.names:
                modules.add(alias.asname or alias.name)
                if private(alias.name):
                    found.add(alias.name)
        elif isinstance(node, ast.Import):
            modules |= {
                alias.asname for alias in node.names if alias.asname and alias.name.partition(".")[0] in ours
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if private(node.attr) and node.attr not in (
                "_make",
                "_replace",
                "_fields",
                "_asdict",
                "_field_defaults",
            ):
                found.add(f"{node.value.id}.{node.attr}")
    return sorted(found)


def private(name):
    return name.startswith("_") and not name.startswith("__")


def long_signatures(source):
    """Returns {function: parameters} of those above the limit; a Triton kernel's entry has a higher one."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = node.args
            count = len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs)
            entry = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            entry = entry and node.name.endswith("_kernel")
            if count > (KERNEL_LIMIT if entry else LIMIT):
                found[node.name] = count
    return found


def test_the_twins_have_the_same_files():
    assert missing_files(sources(*TWINS)) == []


@pytest.mark.parametrize("file", SAME_PUBLIC_NAMES)
def test_the_twins_have_the_same_public_names(file):
    first, second = (public_names(read(f"{twin}/{file}")) for twin in TWINS)
    assert first == second


@pytest.mark.parametrize("file", sources("oracle", *TWINS, "benchmarks", "tests", "examples"))
def test_no_private_name_crosses_a_module(file):
    assert private_imports(read(file)) == []


@pytest.mark.parametrize("file", sources("oracle", *TWINS, "benchmarks"))
def test_no_function_takes_more_than_one_can_read(file):
    if Path(file).name in SIGNATURES or "/compat/" in file:
        return
    assert long_signatures(read(file)) == {}


def test_argument_lists_are_not_set_by_hand():
    count = sum(len(re.findall(r"# fmt: (?:skip|off)", read(file))) for file in sources(*TWINS))
    assert count <= FMT_SKIP_LIMIT


# Each check fails on damaged source.


@pytest.mark.parametrize(
    "damage",
    [lambda files: files[1:], lambda files: [*files, "triton_impl/extra.py"], lambda files: files[:-1]],
)
def test_a_missing_file_is_seen(damage):
    files = ["triton_impl/a.py", "triton_impl/modules/x.py", "pallas_impl/modules/y.py", "pallas_impl/a.py"]
    assert missing_files(files, {}) == []
    assert missing_files(damage(files), {})


def test_an_exception_that_is_not_needed_is_seen():
    assert missing_files(["triton_impl/a.py", "pallas_impl/a.py"], {"pallas_impl/a.py": "once alone"})


def test_another_public_name_is_seen():
    assert public_names("def a(): ...\ndef _b(): ...\nclass C: ...\nd = 1") == {"a", "C"}


@pytest.mark.parametrize(
    "line",
    [
        "from triton_impl.prefill import _find_row",
        "from . import _launch",
        "from triton_impl import prefill\nprefill._find_row()",
        "import oracle.contract as c\nc._host_int",
        "def late():\n    from tests.tools.covering import _all",
    ],
)
def test_a_private_import_is_seen(line):
    assert private_imports(line)


@pytest.mark.parametrize(
    "line", ["from torch._C import _x", "from oracle import __version__", "import torch\ntorch._C"]
)
def test_what_is_not_ours_or_not_private_may_be_imported(line):
    assert private_imports(line) == []


def test_a_long_signature_is_seen():
    many = ", ".join(f"a{i}" for i in range(LIMIT + 1))
    assert long_signatures(f"def f({many}): ...") == {"f": LIMIT + 1}
    assert long_signatures(f"def f(a0, *, {many[4:]}): ...") == {"f": LIMIT + 1}
    assert long_signatures(f"@triton.jit\ndef _f_kernel({many}): ...") == {}
    more = ", ".join(f"a{i}" for i in range(KERNEL_LIMIT + 1))
    assert long_signatures(f"@triton.jit\ndef _f_kernel({more}): ...") == {"_f_kernel": KERNEL_LIMIT + 1}
    assert long_signatures(f"class A:\n    def f({many}): ...") == {"f": LIMIT + 1}

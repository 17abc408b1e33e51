"""The twins are alike: signatures, files, exports and import arrows, read from the syntax trees.

No framework is imported, so this runs anywhere. A serving engine broke because two implementations of this very
function took different keyword arguments; the checks below are each shown to fail on damaged source.
"""

import ast
import sys
import types
from pathlib import Path

import pytest

from oracle import contract, contract_prologue

ROOT = Path(__file__).resolve().parents[2]
TWINS = ("triton_impl", "pallas_impl")
SHARED_FILES = {
    "__init__.py", "adapter.py", "api.py", "backward.py", "config.py", "functional.py", "prefill.py", "update.py",
}  # fmt: skip
OPERATIONS = ("causal_conv1d_fn", "causal_conv1d_update")
FUNCTIONAL = ("causal_conv1d",)  # the differentiable form
SPECULATION = ("commit_windows", "tree_parents_from_links")
DENSE = ("short_conv",)
FRONTS = (
    "gated_delta_prologue_fn", "gated_delta_prologue_update", "gated_short_conv_fn", "gated_short_conv_update",
)  # fmt: skip
FUNCTIONAL_FRONTS = ("gated_delta_prologue", "gated_short_conv")

# What each package's files may import beside the standard library.
MAY_IMPORT = {
    "oracle": {"numpy", "oracle"},
    "triton_impl": {
        "numpy",
        "torch",
        "triton",
        "triton_impl",
        "oracle.contract",
        "oracle.contract_prologue",
        "oracle.__version__",
    },
    "pallas_impl": {
        "numpy",
        "jax",
        "jaxlib",
        "absl",
        "ml_dtypes",
        "pallas_impl",
        "oracle.contract",
        "oracle.contract_prologue",
        "oracle.__version__",
    },
}
FILES_MAY_IMPORT = {
    "oracle/conformance/pytest_suite.py": {"pytest"},
    "oracle/conformance/traffic/histories.py": {"hypothesis"},
    # an adapter speaks the oracle's array type and its names of gradients; operations never do
    "triton_impl/adapter.py": {"oracle.numerics", "oracle.conformance.adapter"},
    "pallas_impl/adapter.py": {"oracle.numerics", "oracle.conformance.adapter"},
    "pallas_impl/modules/linen.py": {"flax"},
    "pallas_impl/modules/nnx.py": {"flax"},
    "pallas_impl/modules/equinox.py": {"equinox"},
}


def read(path):
    return (ROOT / path).read_text()


def files_of(package):
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py"))


def signatures(source, operations=OPERATIONS):
    """Returns {operation: [(parameter, kind, default as text), ...]} of the functions of these names."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: parameters(node.args) for node in functions if node.name in operations}


def records(source):
    """The same of the contract's records: classes decorated by `@record(operation, positional=...)`.

    A field that may not be None, but has it as its default, is a keyword that must be given.
    """
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.decorator_list:
            (operation,), (positional,) = node.decorator_list[0].args, node.decorator_list[0].keywords
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            found[operation.value] = [
                (
                    field.target.id,
                    "positional" if i < positional.value.value else "keyword only",
                    None if field.value is None or required(field) else ast.unparse(field.value),
                )
                for i, field in enumerate(fields)
            ]
    return found


def fields(record):
    """The same of a record that was put together of others, which no syntax tree shows."""
    defaults = record._field_defaults
    return [
        (
            name,
            "positional" if i < record.POSITIONAL else "keyword only",
            None if name not in defaults or name in record.REQUIRED else repr(defaults[name]),
        )
        for i, name in enumerate(record._fields)
    ]


def required(field):
    return ast.unparse(field.value) == "None" and "None" not in ast.unparse(field.annotation)


def parameters(args):
    plain = [*args.posonlyargs, *args.args]
    kinds = ["positional only"] * len(args.posonlyargs) + ["positional"] * len(args.args)
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    rows = list(zip(plain, kinds, defaults, strict=True))
    rows += [(args.vararg, "*", None)] if args.vararg else []
    rows += [
        (arg, "keyword only", default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    rows += [(args.kwarg, "**", None)] if args.kwarg else []
    return [(arg.arg, kind, None if default is None else ast.unparse(default)) for arg, kind, default in rows]


def imports(source, package):
    """Returns every module that a file imports, in functions too; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def forbidden_imports(source, package, allowed):
    def fits(module):
        return module.partition(".")[0] in sys.stdlib_module_names or any(
            module == name or module.startswith(name + ".") for name in allowed
        )

    return sorted(module for module in imports(source, package) if not fits(module))


def asserts(source):
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def exports(source):
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


RECORDS = records(read("oracle/contract.py"))
FRONT_RECORDS = {operation: fields(record) for operation, record in contract_prologue.RECORDS.items()}
REFERENCE = read("oracle/reference.py")


@pytest.mark.parametrize(
    ("path", "operations"),
    [("oracle/reference.py", OPERATIONS), *((f"{twin}/api.py", OPERATIONS) for twin in TWINS),
     ("oracle/reference_grad.py", FUNCTIONAL), *((f"{twin}/functional.py", FUNCTIONAL) for twin in TWINS),
     ("oracle/reference.py", SPECULATION),
     *((f"{twin}/api.py", SPECULATION) for twin in TWINS)],
)  # fmt: skip
def test_signatures_are_the_contracts(path, operations):
    assert signatures(read(path), operations) == {operation: RECORDS[operation] for operation in operations}


def test_every_record_is_looked_at():
    assert set(RECORDS) == {*OPERATIONS, *FUNCTIONAL, *SPECULATION}
    assert set(FRONT_RECORDS) == {*FRONTS, *FUNCTIONAL_FRONTS}


def test_records_read_alike_from_source_and_from_their_fields():
    assert {name: fields(contract.RECORDS[name]) for name in RECORDS} == RECORDS


def test_signatures_of_fronts_are_the_contracts():
    found = signatures(read("oracle/reference_prologue.py"), FRONTS)
    found |= signatures(read("oracle/reference_prologue_grad.py"), FUNCTIONAL_FRONTS)
    assert found == FRONT_RECORDS
    assert ("num_k_heads", "keyword only", None) in found["gated_delta_prologue_fn"]


@pytest.mark.parametrize("twin", TWINS)
def test_files_and_exports(twin):
    assert SHARED_FILES - {Path(file).name for file in files_of(twin)} == set()
    results = {"ConvOutput", "ConvWindowOutput", "Unsupported", "__version__"}
    fronts = {*FRONTS, *FUNCTIONAL_FRONTS, "PrologueOutput", "PrologueWindowOutput"}
    operations = {*OPERATIONS, *FUNCTIONAL, *SPECULATION, *DENSE, *fronts}
    assert exports(read(f"{twin}/__init__.py")) == operations | results


def test_short_conv_has_one_signature():
    """Its record's, and in JAX the axes of a mesh."""
    (record,) = (
        n
        for n in ast.parse(read("oracle/contract_short.py")).body
        if getattr(n, "name", "") == "ShortConvCall"
    )
    fields = [node for node in record.body if isinstance(node, ast.AnnAssign)]
    wanted = [
        (field.target.id, "positional" if i < 3 else "keyword only", field.value and ast.unparse(field.value))
        for i, field in enumerate(fields)
    ]
    for file in ("oracle/reference_short.py", "triton_impl/short_conv.py"):
        assert signatures(read(file), DENSE)["short_conv"] == wanted
    wanted.append(("axes", "keyword only", "None"))
    assert signatures(read("pallas_impl/short_conv.py"), DENSE)["short_conv"] == wanted


@pytest.mark.parametrize(
    ("twin", "file", "operations"),
    [(twin, file, operations) for twin in TWINS
     for file, operations in (("api.py", OPERATIONS), ("functional.py", FUNCTIONAL), ("api.py", SPECULATION),
                              ("short_conv.py", DENSE))],
)  # fmt: skip
def test_public_operations_have_docstrings(twin, file, operations):
    tree = ast.parse(read(f"{twin}/{file}"))
    docs = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    for operation in operations:
        for part in ("Args:", "Returns:", "Raises:"):
            assert part in (docs[operation] or ""), f"{twin}.{operation}: no {part} in its docstring"


@pytest.mark.parametrize("file", [file for package in MAY_IMPORT for file in files_of(package)])
def test_import_arrows(file):
    package = file.partition("/")[0]
    allowed = MAY_IMPORT[package] | FILES_MAY_IMPORT.get(file, set())
    assert forbidden_imports(read(file), package, allowed) == []


STANDARD_LIBRARY = {
    "oracle/contract.py": {
        "oracle.contract_checks",
        "oracle.contract_memory",
        "oracle.contract_short",
        "oracle.contract_values",
    },
    "oracle/contract_checks.py": set(),
    "oracle/contract_prologue.py": {"oracle.contract", "oracle.contract_checks"},
    "oracle/contract_short.py": {"oracle.contract_checks"},
    "oracle/contract_memory.py": set(),
    "oracle/contract_values.py": {"oracle.contract"},
    **{f"{twin}/config.py": set() for twin in TWINS},
}


@pytest.mark.parametrize("file", STANDARD_LIBRARY)
def test_standard_library_only(file):
    """The contract serves every library; a config is a pure function of integers."""
    assert forbidden_imports(read(file), file.partition("/")[0], STANDARD_LIBRARY[file]) == []


@pytest.mark.parametrize("file", [file for twin in TWINS for file in files_of(twin)])
def test_no_assert_on_input(file):
    """`python -O` deletes an assert: bad input must raise the contract's errors."""
    assert asserts(read(file)) == []


# Each check fails on damaged source.


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("has_initial_state=None", "initial_states_mask=None"),  # another name
        ("    x,\n    weight,", "    weight,\n    x,"),  # another order
        ("pad_slot_id=-1", "pad_slot_id=0"),  # another default
        ('    backend="auto",\n', ""),  # one parameter less
        ("    split_sizes=None,\n", "    split_sizes=None,\n    **ignored,\n"),  # one more, in disguise
        ("    window_out=None,\n    window_indices=None,", "    window_indices=None,\n    window_out=None,"),
        ("    *,\n", ""),  # keyword only no longer
        ("    bias,\n", "    bias,\n    /,\n"),  # positional only
    ],
)
def test_a_changed_signature_is_seen(old, new):
    assert old in REFERENCE
    assert signatures(REFERENCE.replace(old, new)) != signatures(REFERENCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    has_initial_state: IndexArray", "    initial_states_mask: IndexArray"),
        ("    x: Array\n    weight: Array\n", "    weight: Array\n    x: Array\n"),
        ("    pad_slot_id: Integer = -1", "    pad_slot_id: Integer = 0"),
        ('    backend: str = "auto"\n', ""),
        ("positional=7", "positional=6"),
    ],
)
def test_a_changed_record_is_seen(old, new):
    source = read("oracle/contract.py")
    assert old in source
    assert records(source.replace(old, new)) != RECORDS


def test_a_changed_record_of_a_front_is_seen():
    record = contract_prologue.PrologueFnCall
    own, plain = contract_prologue.PrologueArguments, contract_prologue.FnCall
    assert record._fields[:7] == plain._fields[:7]
    assert [name for name in record._fields[7:] if name not in plain._fields] == list(own._fields[:-1])
    changed = types.SimpleNamespace(
        _fields=record._fields[::-1],
        _field_defaults=record._field_defaults,
        POSITIONAL=7,
        REQUIRED=record.REQUIRED,
    )
    assert fields(changed) != FRONT_RECORDS["gated_delta_prologue_fn"]


def test_a_missing_operation_is_seen():
    changed = REFERENCE.replace("def causal_conv1d_update", "def causal_conv1d_step")
    assert set(signatures(changed)) == {"causal_conv1d_fn"}


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("import jax", "triton_impl"),
        ("import torch", "pallas_impl"),
        ("import torch", "oracle"),
        ("from pallas_impl import api", "triton_impl"),
        ("from triton_impl.config import prefill_config", "pallas_impl"),
        ("from triton_impl import api", "oracle"),
        ("from oracle import reference", "pallas_impl"),
        ("from oracle.tolerance import bound", "triton_impl"),
        ("from oracle.numerics import TypedArray", "pallas_impl"),
        ("import oracle", "triton_impl"),
        ("def late():\n    import scipy.signal", "oracle"),
        ("import torchvision", "triton_impl"),
    ],
)
def test_a_forbidden_import_is_seen(line, package):
    assert forbidden_imports(line, package, MAY_IMPORT[package])


def test_a_relative_import_stays_at_home():
    assert imports("from . import config\nfrom .taps import load", "triton_impl") == {
        "triton_impl.config",
        "triton_impl.taps.load",
    }


def test_an_assert_is_seen():
    assert asserts("def launch(x):\n    assert x.ndim == 2\n") == [2]


def test_a_missing_export_is_seen():
    assert exports('__all__ = ["causal_conv1d_fn"]') == {"causal_conv1d_fn"}
    assert exports("x = 1") == set()

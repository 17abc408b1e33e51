"""The tables of the contract's tests are complete, shown by mutation.

The syntax trees of the contract and of what its records check by are damaged in one place at a time, and some row of
the tables must notice.
"""

import __future__

import ast
import inspect
import operator
import pickle
import types

from oracle import contract, contract_checks, contract_prologue, contract_values
from tests.oracle.contract import (
    test_contract_commit,
    test_contract_fn,
    test_contract_links,
    test_contract_prologue,
    test_contract_records,
    test_contract_rows,
    test_contract_update,
)  # fmt: skip
from tests.oracle.contract.test_contract_records import (
    ROLES,
    SIGNATURES,
    roles,
    signatures,
    signatures_of,
)
from tests.tools.contract_calls import Guard, call, prologue_of

FILES = {
    test_contract_fn: "fn",
    test_contract_update: "update",
    test_contract_rows: "rows",
    test_contract_commit: "commit",
    test_contract_links: "links",
    test_contract_prologue: "prologue",
    test_contract_records: "",
}

# Damage that changes nothing a caller can see, each with its reason.
HARMLESS = {
    "if False: if type(a) is type(b) is int:": "a shortcut for the common case",
}

NEIGHBOURS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}


def damages(node):
    """Yields (what, function that damages a node of this kind in place)."""
    if isinstance(node, ast.If):
        for value in (True, False):
            yield f"if {value}", lambda n, value=value: setattr(n, "test", ast.Constant(value))
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in NEIGHBOURS[type(op)]:
                yield (
                    f"{type(op).__name__} -> {other.__name__}",
                    lambda n, i=i, o=other: operator.setitem(n.ops, i, o()),
                )
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"{type(node.op).__name__} -> {other.__name__}", lambda n, o=other: setattr(n, "op", o())
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call deleted", lambda n: setattr(n, "value", ast.Constant(None))
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        yield "error type", lambda n: setattr(n.exc, "func", ast.Name("RuntimeError", ast.Load()))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "number + 1", lambda n: setattr(n, "value", n.value + 1)


# What records are made of: damage to it shows in records that are made anew.
MAKES_RECORDS = ("record", "_fields", "Front", "Prologue", "GatedConv")


def is_check(node):
    if isinstance(node, ast.ClassDef):
        return node.decorator_list or node.name in MAKES_RECORDS
    return isinstance(node, ast.FunctionDef)


def mutants(source, makers):
    """Yields (name, description, syntax tree) of each damaged copy of a function or record of a source text.

    makers: of what makes records, or of all else.
    """
    lines = source.encode().split(b"\n")
    for whole in filter(is_check, ast.parse(source).body):
        if (whole.name in MAKES_RECORDS) != makers:
            continue
        sound = pickle.dumps(whole)  # read again in a tenth of the time of a deepcopy
        for j, node in enumerate(ast.walk(whole)):
            for what, damage in damages(node):
                check = pickle.loads(sound)
                damage(next(n for k, n in enumerate(ast.walk(check)) if k == j))
                end = node.end_col_offset if node.end_lineno == node.lineno else None
                text = lines[node.lineno - 1][node.col_offset : end].decode()
                tree = ast.fix_missing_locations(ast.Module([check], []))
                yield whole.name, f"line {node.lineno}: {what}: {text}", tree


def load(source):
    module = types.ModuleType("damaged_contract")
    exec(compile(source, "<copy>", "exec", dont_inherit=True), module.__dict__)
    return module


def damaged_contracts():
    """Yields (name, description, a contract with one place damaged in it, or in what it checks by).

    It is the same copy each time, damaged in another place; but what makes the records damages a copy of its own.
    """
    for original in (contract, contract_prologue):
        source = inspect.getsource(original)
        for name, description, tree in mutants(source, makers=True):
            body = [tree.body[0] if getattr(n, "name", "") == name else n for n in ast.parse(source).body]
            try:
                module = load(ast.unparse(ast.Module(body, [])))
            except Exception:  # that is noticed
                continue
            if original is contract_prologue:
                fronts, module = module, load(inspect.getsource(contract))
                module.contract_prologue = fronts
            yield name, description, module
    originals = contract, contract_checks, contract_values, contract_prologue
    copies = module, checks, values, fronts = [load(inspect.getsource(original)) for original in originals]
    module.contract_values, module.contract_prologue = values, fronts
    rebind(module, checks)
    for damaged, original in zip(copies, originals, strict=True):
        for name, description, tree in mutants(inspect.getsource(original), makers=False):
            sound = getattr(damaged, name)
            records = [(kept, dict(kept)) for kept in (module.RECORDS, fronts.RECORDS)]
            code = compile(tree, "<damaged>", "exec", __future__.annotations.compiler_flag, dont_inherit=True)
            exec(code, damaged.__dict__)
            rebind(module, checks)
            checks._DTYPE_NAMES.clear()
            checks._NUMPY_NAMES.clear()
            yield name, description, module
            setattr(damaged, name, sound)
            rebind(module, checks)
            for kept, before in records:
                kept.update(before)


def rebind(module, checks):
    """Lets a copy of the contract use the functions of a copy of its checks."""
    for name, value in vars(checks).items():
        if isinstance(value, types.FunctionType) and hasattr(module, name):
            setattr(module, name, value)


def same(module, operation, overrides, result):
    try:
        return call(module, operation, overrides) == result
    except (Exception, Guard):
        return False


def rejected(module, operation, overrides, error, text):
    try:
        call(module, operation, overrides)
    except (Exception, Guard) as caught:
        own = getattr(module, error.__name__, error)  # the copy has an Unsupported of its own
        return (type(caught), str(caught)) == (own, text)
    return False


def notices(module, name=""):
    """Whether a row of the tables sees that a copy of the contract answers otherwise; those of `name` are asked first."""
    files = sorted(FILES, key=lambda file: FILES[file] not in name.lower())
    return (
        signatures(module) != SIGNATURES
        or roles(module) != ROLES
        or signatures_of(prologue_of(module).RECORDS) != test_contract_prologue.SIGNATURES
        or not all(same(module, *row) for file in files for row in file.ACCEPTED)
        or not all(rejected(module, *row) for file in files for row in file.REJECTED)
    )


def test_tables_notice_every_damaged_check():
    assert not notices(load(inspect.getsource(contract)))
    survivors, count = [], 0
    for name, description, damaged in damaged_contracts():
        count += 1
        if not notices(damaged, name):
            survivors.append(description)
    unexplained = [s for s in survivors if s.partition(": ")[2] not in HARMLESS]
    assert not unexplained, "\n".join(["no row of the tables notices:", *unexplained])
    stale = [h for h in HARMLESS if h not in {s.partition(": ")[2] for s in survivors}]
    assert not stale, f"listed as harmless, but noticed or gone: {stale}"
    assert count > 500

"""Settings of every test process: one framework, an explicit mode, fixed seeds, poisoned memory.

A process holds torch or jax, never both: each reserves the GPU's memory, and each reads its environment when
it is first imported. So run one file at a time, or `make test`, which does (tests/run_groups.py).

The mode is chosen, never guessed. Without `--gpu` no GPU is used: the files of tests/triton run in Triton's
interpreter (but for names with "compile", which need its compiler), JAX on the CPU, and tests marked `gpu` are skipped.
With `--gpu` only the marked tests run, and a missing GPU is a failure.

SECOND_JAX=1 says that the kernels' files of tests/pallas run once more, under another JAX: then tests of the plain path, which have xla
in the names of their file, their own or their parameters, are left out, the conformance suite takes a case for every feature, and files of ONE_CASE a case a test.
"""

import functools
import gc
import importlib.util
import os
import random
import sys

import numpy as np
import pytest

from oracle.conformance.demo import QUICK_COMPILE

# On a CPU most of the time of JAX, and of a kernel in Pallas' interpreter above all, is XLA compiling what runs once.
# What rests on how XLA compiles has files of its own, besides the conformance suite, which says by itself.
AS_USERS_COMPILE = ("test_bits.py", "test_conformance.py")
# Under a second JAX one case a test: what these ask of JAX is the same in every case.
ONE_CASE = (
    "test_operations.py", "test_serving_jit.py", "test_exchange.py", "test_short_conv.py", "test_settings.py",
    "test_compat_calls.py", "test_sharding_types.py", "test_prologue_sharding.py",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--gpu", action="store_true", help="run the tests marked gpu, and only those; fail without a GPU"
    )
    if (
        importlib.util.find_spec("pytest_timeout") is None
    ):  # keep the setting known where the plugin is missing
        parser.addini("timeout", "seconds a test (needs pytest-timeout)")


def pytest_configure(config):
    if config.getoption("--gpu"):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["JAX_PLATFORMS"] = "cpu"
        # The compiler of PyTorch tries three vector units, 20 seconds, which nothing here is about.
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")


def pytest_collectstart(collector):
    """Sets the interpreters' modes before a file is imported: Triton reads its own in `@triton.jit`."""
    if not isinstance(collector, pytest.Module) or collector.config.getoption("--gpu"):
        return
    framework = collector.path.parent.name  # tests/triton and tests/pallas hold one framework each
    if framework == "pallas" and collector.path.name not in AS_USERS_COMPILE:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = flags if QUICK_COMPILE in flags else f"{flags} {QUICK_COMPILE}".strip()
    if framework != "triton":
        return
    wanted = "0" if "compile" in collector.path.name else "1"
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET", "0") != wanted:
        raise pytest.UsageError(
            f"{collector.path.name} needs TRITON_INTERPRET={wanted} from the start: run it in its own process"
        )
    os.environ["TRITON_INTERPRET"] = wanted


def pytest_collection_modifyitems(config, items):
    if config.getoption("--gpu"):
        kept = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("gpu")])
        items[:] = kept
    else:
        skip = pytest.mark.skip(reason="needs a GPU: run `make test-gpu`")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    if os.environ.get("SECOND_JAX") == "1":
        kept = first_cases([item for item in items if "xla" not in item.path.stem + item.name])
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def first_cases(items):
    """Of the files in ONE_CASE the first case of every test, all of the others."""
    seen, kept = set(), []
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test not in seen or item.path.name not in ONE_CASE:
            kept.append(item)
        if not item.get_closest_marker("gpu"):  # it would be skipped
            seen.add(test)
    return kept


def two_frameworks() -> str | None:
    """Returns what to say if this process has loaded both frameworks."""
    if "torch" in sys.modules and "jax" in sys.modules:
        return "torch and jax were both imported in this test process: run one file at a time, or `make test`"
    return None


def pytest_collection_finish(session):
    if message := two_frameworks():
        raise pytest.UsageError(message)
    quick_interpreters()


def pytest_sessionfinish(session, exitstatus):
    if exitstatus in (0, 5) and (message := two_frameworks()):
        print(f"\nERROR: {message}", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def gpu_missing() -> str | None:
    """Returns why the framework of this process has no GPU, or None if it has one."""
    if "torch" in sys.modules:
        return None if sys.modules["torch"].cuda.is_available() else "torch finds no CUDA GPU"
    if "jax" in sys.modules:
        platform = sys.modules["jax"].default_backend()
        return None if platform == "gpu" else f"jax runs on {platform}, not on a GPU"
    return "the test file imports neither torch nor jax"


def pytest_runtest_setup(item):
    if item.path.name == "test_multi_gpu.py":  # they start a process a GPU, and count GPUs themselves
        return
    if item.config.getoption("--gpu") and (reason := gpu_missing()):
        pytest.fail(f"--gpu was asked for, but {reason}", pytrace=False)


def quick_interpreters():
    """Takes out of the interpreters that are loaded what they do again and again to no end: half of their time.

    Where another version has no such function, nothing happens.
    """
    gc.freeze()  # a tenth of the time is the search for garbage among what was imported
    gc.set_threshold(100_000, 50, 100)
    patch_once(sys.modules.get("triton.runtime.interpreter"))
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") == "0":
        from tests.tools import quick_coalesce

        quick_coalesce.install()
    if "jax" in sys.modules:
        plain_callbacks()
        no_program_a_shape()
        from tests.tools import quick_lowering, quick_pallas

        quick_pallas.install()
        quick_lowering.install()


def patch_once(interpreter):
    """Makes Triton's interpreter patch `triton.language` once a launch, and keep what it makes anew at every operation.

    It patches again at every call of a device function, which finds nothing left to patch; and at every operation it makes
    a table of NumPy's dtypes, constants for the result's shape and text for its type.
    """
    patch, dtype_of = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_get_np_dtype", None)
    if patch is None or dtype_of is None or hasattr(patch, "once"):
        return
    language, dtypes = interpreter.tl, {}

    @functools.cache
    def modules_of(function):
        return [m for m in function.__globals__.values() if m is language or m is language.core]

    def once(function):
        seen = modules_of(function)
        if seen and not any(language.core.is_builtin(module.load) for module in seen):
            return interpreter._LangPatchScope()  # inside a kernel: nothing to put back
        scope = patch(function)
        if operations is not None:
            operations.install(scope)
        return scope

    def kept(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = dtype_of(dtype)
        return dtypes[name]

    once.once, operations = True, None
    interpreter._patch_lang, interpreter._get_np_dtype = once, kept
    if os.environ.get("TRITON_INTERPRET") == "1":
        kept_types(language.core)
        # Eight operations for every sum, whose result is dropped unless `debug` is set.
        language.semantic.TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
        operands_alike(language.semantic.TritonSemantic, language.core)
        from tests.tools import quick_triton

        if quick_triton.IS_KNOWN:
            operations = quick_triton.Operations(interpreter)


def kept_types(core):
    """Makes what a type and its tensors derive from a shape once a shape."""
    make_tensor, make_block, scalar, blocks = core.tensor.__init__, core.block_type.__init__, {}, {}

    def tensor(self, handle, type):
        sizes = getattr(type, "sizes", {}) if type.is_block() else scalar
        if sizes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.__dict__.update(sizes)
        else:
            make_tensor(self, handle, type)
            sizes.update(numel=self.numel, shape=self.shape)

    def block_type(self, element_ty, shape):
        if not all(type(size) is int for size in shape):
            make_block(self, element_ty, shape)
            return
        key = (type(element_ty), element_ty.name, *shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = {"shape": self.shape, "numel": self.numel, "name": self.name, "sizes": {}}
        self.element_ty = element_ty
        self.__dict__.update(blocks[key])

    core.tensor.__init__, core.block_type.__init__ = tensor, block_type


def operands_alike(semantic, core):
    """Leaves operands of one dtype and one shape as they are, which Triton finds out by comparing constants and tuples of them."""
    check, broadcast, tensor = (
        semantic.binary_op_type_checking_impl,
        semantic.broadcast_impl_value,
        core.tensor,
    )

    def broadcast_unlike(self, lhs, rhs):
        left, right = lhs.type, rhs.type
        alike = left.is_block() and right.is_block() and left.shape.values == right.shape.values
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    def check_unlike(self, lhs, rhs, *places, **flags):
        if type(lhs) is type(rhs) is tensor and lhs.dtype.name == rhs.dtype.name:
            divides = flags.get("div_or_mod") or places[3:]  # which widens 16 bits
            if not (divides or lhs.dtype.is_ptr()):
                return broadcast_unlike(self, lhs, rhs)
        return check(self, lhs, rhs, *places, **flags)

    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = check_unlike, broadcast_unlike


def plain_callbacks():
    """Hands the callbacks of Pallas' interpreter NumPy arrays: it makes them of the jax.Array that each is first put into."""
    from jax._src import callback as callbacks
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    def called(*arguments, callback, **_):
        return [np.asarray(value) for value in callback(*map(np.array, arguments))]

    if not hasattr(callbacks, "io_callback_impl"):
        return
    callbacks.io_callback_impl = called
    if to_int := getattr(shared_memory, "_to_int", None):  # JAX 0.12 asks whether a coordinate is a jax.Array
        shared_memory._to_int = lambda value: (
            value.item() if isinstance(value, (np.ndarray, np.generic)) else to_int(value)
        )


def no_program_a_shape():
    """Makes jnp.array and jnp.asarray copy a NumPy array, where they compile a program for every shape and dtype."""
    import jax
    from jax._src.lax import lax

    stage = getattr(lax, "stage_p", None)
    if stage is None or hasattr(stage.impl, "copies"):
        return
    compiled = stage.impl

    def copied(value):
        return jax.device_put(value.copy()) if isinstance(value, np.ndarray) else compiled(value)

    copied.copies = True
    stage.def_impl(copied)


def boolean_masks():
    """Makes Triton's interpreter, where it is loaded, refuse masks that hold no booleans, as that of Triton 3.9 does.

    Such a mask is a comparison of scalars that was spread over lanes: `triton_impl.records.holds` is for them.
    """
    builder = getattr(sys.modules.get("triton.runtime.interpreter"), "InterpreterBuilder", None)
    if builder is None or hasattr(builder, "boolean_masks"):
        return

    def checked(method, place):
        def access(self, *args):
            if args[place].data.dtype != bool:
                raise ValueError(f"expected a mask of booleans, got one of {args[place].data.dtype}")
            return method(self, *args)

        return access

    builder.create_masked_load = checked(builder.create_masked_load, 1)
    builder.create_masked_store = checked(builder.create_masked_store, 2)
    builder.boolean_masks = True


@pytest.fixture(autouse=True)
def checked_interpreter():
    patch_once(sys.modules.get("triton.runtime.interpreter"))
    boolean_masks()


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills every fresh torch tensor with NaN (integers: their largest value) for the time of a test.

    `torch.empty` often returns zeros by luck, and so hides an element that no kernel wrote. JAX needs nothing
    of the kind: XLA has no uninitialised arrays, and Pallas' interpreter fills its own with NaN.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    # torch.use_deterministic_algorithms would import the compiler, four seconds a process
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    yield
    torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])

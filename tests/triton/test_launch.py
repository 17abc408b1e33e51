"""How Triton's launchers are entered at once: found out from the launcher itself, whichever Triton it is of."""

import pytest
import torch
import triton

from triton_impl import launch

STREAMS = {0: 7001, 1: 7002}  # of two devices


class Driver:
    device = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return STREAMS[device]


@pytest.fixture(autouse=True)
def driver():
    active = Driver()
    triton.runtime.driver.set_active(active)
    yield active
    triton.runtime.driver._active = None  # `reset_active` would look for a GPU


class Launcher:
    """What the launchers of all versions have."""

    def __init__(self, function):
        self.launch = function
        self.num_ctas = 1
        self.launch_cooperative_grid, self.launch_pdl = False, False
        self.global_scratch_size = self.profile_scratch_size = 0
        self.global_scratch_align = self.profile_scratch_align = 1

    def scratch(self):
        return object() if self.global_scratch_size else None


class OneByOne(Launcher):
    """Triton 3.6: a C function a kernel, which takes the kernel's arguments one by one."""

    def __call__(self, x, y, z, stream, function, *rest):
        self.launch(
            x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, self.scratch(), None, *rest
        )  # fmt: skip


class InOneTuple(Launcher):
    """Triton 3.7 to 3.9: one C function for all kernels, which are told apart by how their arguments are read."""

    def __init__(self, function):
        super().__init__(function)
        self.arg_annotations, self.kernel_signature = [object(), object()], b"\x01\x02"

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, exit, *args):
        self.launch(
            x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, metadata, launch_metadata,
            enter, exit, self.scratch(), None, self.arg_annotations, self.kernel_signature, self.all(args),
        )  # fmt: skip

    def all(self, args):
        return args


class Hip(Launcher):
    """On AMD: the same, but for their order."""

    def __call__(self, x, y, z, stream, function, *rest):
        self.launch(self.launch_cooperative_grid, x, y, z, stream, function, None, *rest)


class Checked(InOneTuple):
    """Triton 3.8 and 3.9 with a sanitizer: it hands the kernel an argument more."""

    def all(self, args):
        return *args, 99


class Twice(OneByOne):
    def __call__(self, *args):
        super().__call__(*args)
        super().__call__(*args)


class Raises(OneByOne):
    def __call__(self, *args):
        raise RuntimeError("a launcher that needs a real stream")


class Nameless:
    def __call__(self, *args):
        self.calls.append(args)


class Compiled:
    """A compiled kernel, as far as launches go."""

    function, packed_metadata = 4242, (4, 1, 0)

    def __init__(self, launcher):
        self.run, self.public = launcher, 0

    def __getitem__(self, grid):
        def runner(*args):
            self.public += 1
            stream = STREAMS[triton.runtime.driver.active.get_current_device()]
            self.run(*grid, stream, self.function, self.packed_metadata, None, None, None, *args)

        return runner


class Kernel:
    def __init__(self, compiled):
        self.compiled = compiled

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled


def launched(make, calls=3):
    """(what the C function received in each of `calls` launches after the first, how many took the public way)."""
    received = []
    launcher = make(lambda *args: received.append(args))
    compiled = Compiled(launcher)
    prepared = launch.Launch(Kernel(compiled), (5, 6, 1), (11, (8, 1), ("silu", 4)), num_warps=4)
    tensors = [torch.zeros(8) for _ in range(2)]
    prepared(*tensors, None)
    assert not received, "trying a launcher launches nothing"
    for _ in range(calls):
        prepared(*tensors, None)
    return received, compiled.public


@pytest.mark.parametrize("launcher", [OneByOne, InOneTuple, Hip])
def test_a_known_launcher_is_entered_with_what_it_would_hand_over(launcher, monkeypatch):
    quick, public = launched(launcher)
    assert public == 0
    assert len(quick) == 3
    monkeypatch.setattr(launch, "launcher_entry", lambda *_: None)
    through, public = launched(launcher)
    assert public == 3
    strip = lambda args: [a for a in args if not isinstance(a, tuple | list | int) or a in STREAMS.values()]  # noqa: E731
    for a, b in zip(quick, through, strict=True):
        assert len(a) == len(b)
        assert strip(a) == strip(b)
        assert [type(i) for i in a] == [type(i) for i in b]


@pytest.mark.parametrize("launcher", [OneByOne, InOneTuple, Hip])
def test_each_launch_takes_the_stream_of_that_moment(launcher, monkeypatch):
    received = []
    prepared = launch.Launch(
        Kernel(Compiled(launcher(lambda *args: received.append(args)))), (5, 6, 1), (11,)
    )
    x = torch.zeros(8)
    prepared(x)
    for stream in (1, 2):
        monkeypatch.setitem(STREAMS, 0, stream + 9000)
        prepared(x)
        assert stream + 9000 in received[-1]
        assert x.data_ptr() in (received[-1][-1] if launcher is InOneTuple else received[-1])


@pytest.mark.parametrize("launcher", [Checked, Twice, Raises, Nameless])
def test_an_unknown_launcher_is_called_as_triton_calls_it(launcher):
    made = launcher.__new__(launcher)
    if launcher is Nameless:
        made.calls = []
    else:
        made.__init__(lambda *args: None)
    compiled = Compiled(made)
    assert launch.launcher_entry(compiled, (1, 1, 1), (11, 12)) is None


def test_scratch_memory_is_of_one_launch():
    made = OneByOne(lambda *args: None)
    made.global_scratch_size = 64
    assert launch.launcher_entry(Compiled(made), (1, 1, 1), (11, 12)) is None


def test_no_driver_no_entry(driver, monkeypatch):
    monkeypatch.setattr(Driver, "get_current_device", lambda self: 1 / 0)
    assert launch.launcher_entry(Compiled(OneByOne(print)), (1, 1, 1), (11,)) is None


def test_an_unaligned_call_goes_through_triton():
    received = []
    compiled = Compiled(OneByOne(lambda *args: received.append(args)))
    kernel = Kernel(compiled)
    prepared = launch.Launch(kernel, (1, 1, 1), ())
    prepared(torch.zeros(8))
    prepared(torch.zeros(8)[1:])
    assert not received
    assert compiled.public == 0
    prepared(torch.zeros(8))
    assert len(received) == 1


def test_an_absent_tensor_has_the_address_0():
    received = []
    prepared = launch.Launch(
        Kernel(Compiled(OneByOne(lambda *args: received.append(args)))), (1, 1, 1), (11, 12)
    )
    tensors = torch.zeros(8), None, torch.zeros(8), None
    for _ in range(2):
        prepared(*tensors)
    (arguments,) = received
    assert arguments[-6:] == (tensors[0].data_ptr(), 0, tensors[2].data_ptr(), 0, 11, 12)


def test_hooks_take_the_public_way():
    received = []
    compiled = Compiled(OneByOne(lambda *args: received.append(args)))
    prepared = launch.Launch(Kernel(compiled), (1, 1, 1), ())
    x, hook = torch.zeros(8), triton.knobs.runtime.launch_enter_hook
    prepared(x)
    watcher = lambda metadata: None  # noqa: E731
    hook.add(watcher)
    try:
        prepared(x)
        assert compiled.public == 1
    finally:
        hook.remove(watcher)
    prepared(x)
    assert compiled.public == 1
    assert len(received) == 2


def test_the_launcher_of_this_triton_is_known():
    """The installed Triton's own launcher, without the C function behind it, which needs a driver."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    made = object.__new__(driver.CudaLauncher)
    received = []
    for name, value in vars(InOneTuple(lambda *args: received.append(args))).items():
        setattr(made, name, value)
    made.gsan_enabled = False
    compiled, arguments = Compiled(made), (16, 32, (8, 1), "constant")
    entry = launch.launcher_entry(compiled, (5, 6, 1), arguments)
    assert entry is not None
    assert not received
    compiled[5, 6, 1](*arguments)
    stream = entry.current_stream(entry.device)
    own = (arguments,) if entry.packed else arguments
    assert received == [(*entry.before, stream, *entry.after, *own)]
    made.global_scratch_size, made.global_scratch_align = 8, 8
    assert launch.launcher_entry(compiled, (5, 6, 1), arguments) is None

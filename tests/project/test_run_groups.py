"""The test runner and conftest.py themselves: nothing that went wrong, or did not run, may look like success."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import run_groups

HERE = Path(__file__).resolve().parents[1]
PASS = "def test_ok():\n    pass\n"
GPU = "import pytest\n\n@pytest.mark.gpu\ndef test_on_gpu():\n    pass\n"
FAKE_TORCH = "class cuda:\n    is_available = staticmethod(lambda: False)\n"


def place(root, name):
    """test_triton_a is tests/triton/test_a.py, test_core is tests/oracle/test_core.py, torch is a module at the root."""
    if not name.startswith("test_"):
        return root / f"{name}.py"
    kind, _, rest = name.removeprefix("test_").partition("_")
    if kind in ("triton", "pallas"):
        return root / "tests" / kind / f"test_{rest}.py"
    return root / "tests" / "oracle" / f"{name}.py"


@pytest.fixture
def project(tmp_path):
    """Returns a function that lays out a small project with the real conftest and settings."""

    def lay(**files):
        (tmp_path / "tests").mkdir()
        shutil.copy(HERE / "conftest.py", tmp_path / "tests")
        shutil.copy(HERE.parent / "pyproject.toml", tmp_path)
        for name, text in files.items():
            path = place(tmp_path, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return tmp_path

    return lay


def run(root, capfd, *arguments):
    code = run_groups.main(list(arguments), root)
    return code, capfd.readouterr().out


GOOD = {"test_core": PASS, "test_triton_a": PASS, "test_pallas_a": PASS}


def test_success(project, capfd):
    code, out = run(project(**GOOD, test_triton_b=PASS, test_pallas_b=GPU), capfd)
    assert code == 0, out
    assert out.endswith("total: 4 passed, 0 failed, 1 skipped\n")
    assert "no .venv312/bin/python: the Pallas tests run under one JAX only" in out


@pytest.mark.parametrize(
    ("text", "closing", "said"),
    [
        ("def test_bad():\n    assert 1 == 2\n", "total: 1 passed, 1 failed, 0 skipped\n", "assert 1 == 2"),
        ("", "total: 1 passed, 1 failed, 0 skipped\n", "no tests ran"),
        ("import missing_module\n", "total: 1 passed, 1 failed, 0 skipped\n", "missing_module"),
        (
            "import os\n\ndef test_gone():\n    os._exit(0)\n",
            "total: 1 passed, 1 failed, 0 skipped\n",
            "FAIL",
        ),
        (
            "import os\n\ndef test_gone():\n    os.abort()\n",
            "total: 1 passed, 1 failed, 0 skipped\n",
            "Fatal Python",
        ),
        (
            "import warnings\n\ndef test_warns():\n    warnings.warn('careless')\n",
            "total: 1 passed, 1 failed, 0 skipped\n",
            "UserWarning: careless",
        ),
        (
            "import pytest\n\n@pytest.mark.gpuu\ndef test_typo():\n    pass\n",
            "total: 1 passed, 1 failed, 0 skipped\n",
            "'gpuu' not found",
        ),
        ("import torch, jax\n" + PASS, "total: 1 passed, 1 failed, 0 skipped\n", "run one file at a time"),
        (
            "def test_late():\n    import torch, jax\n",
            "total: 2 passed, 1 failed, 0 skipped\n",
            "run one file at a time",
        ),
    ],
    ids=["fails", "empty", "import", "exits", "crashes", "warns", "marker", "both frameworks", "both, late"],
)
def test_one_bad_file_fails_the_run(project, capfd, text, closing, said):
    code, out = run(project(test_triton_a=PASS, test_triton_b=text, torch="", jax=""), capfd, "triton")
    assert code == 1
    assert said in out
    assert out.endswith(closing)


@pytest.mark.parametrize("empty", [GPU, None])
def test_a_group_without_a_pass_fails_the_run(project, capfd, empty):
    files = (
        {**GOOD, "test_pallas_a": empty} if empty else {k: v for k, v in GOOD.items() if "pallas" not in k}
    )
    code, out = run(project(**files), capfd)
    assert code == 1
    assert "FAIL pallas: no test ran and passed" in out
    assert ", 1 failed, " in out.splitlines()[-1]


def test_gpu_run_fails_without_a_gpu(project, capfd):
    files = dict(test_triton_a="import torch\n" + GPU, test_pallas_a=GPU, torch=FAKE_TORCH)
    code, out = run(project(**files), capfd, "--gpu")
    assert code == 1
    assert "--gpu was asked for, but torch finds no CUDA GPU" in out
    assert "--gpu was asked for, but the test file imports neither torch nor jax" in out
    assert out.endswith("total: 0 passed, 2 failed, 0 skipped\n")


def test_gpu_run_runs_the_marked_tests_and_needs_some(project, capfd):
    present = "import sys\nfrom unittest.mock import MagicMock\nsys.modules[__name__] = MagicMock()\n"
    unmarked = "import torch\n" + GPU + "\ndef test_on_cpu():\n    raise SystemError\n"
    code, out = run(project(test_triton_a=unmarked, test_pallas_a=PASS, torch=present), capfd, "--gpu")
    assert code == 1
    assert "FAIL pallas: no test ran and passed" in out
    assert out.endswith("total: 1 passed, 1 failed, 0 skipped\n"), out


def test_a_hanging_file_is_stopped(project, capfd, monkeypatch):
    monkeypatch.setattr(run_groups, "LIMIT", 3)
    code, out = run(project(test_hang="import time\ntime.sleep(60)\n"), capfd, "core")
    assert code == 1
    assert "stopped after 3 s" in out


def test_groups_can_be_chosen_and_are_checked(project, capfd):
    root = project(**GOOD)
    code, out = run(root, capfd, "core", "triton")
    assert code == 0
    assert out.endswith("total: 2 passed, 0 failed, 0 skipped\n")
    with pytest.raises(SystemExit) as caught:
        run_groups.main(["cpu"], root)
    assert caught.value.code == 2
    assert "GROUP: expected some of ['core', 'pallas', 'triton'], got ['cpu']" in capfd.readouterr().err


def test_the_pallas_files_run_again_under_the_newer_jax(project, capfd):
    (alone,) = run_groups.NEWEST_JAX
    root = project(**GOOD, **{f"test_pallas_{alone.removeprefix('test_')}": PASS})
    newer = root / run_groups.NEWER_JAX
    newer.parent.mkdir(parents=True)
    newer.symlink_to(sys.executable)
    parts = run_groups.find_parts(root, sys.executable, gpu=False)
    assert [part.name for part in parts["pallas"]] == ["pallas-test_a"]
    again = parts["pallas-newest"]
    assert sorted(file.stem for part in again for file in part.files) == ["test_a", alone]
    assert {part.python for part in again} == {str(newer)}


def test_small_files_share_a_process(project):
    root = project(
        test_triton_a=PASS, test_triton_b=PASS, test_triton_compile=PASS, test_triton_backward=PASS
    )
    parts = run_groups.find_parts(root, sys.executable, gpu=False)["triton"]
    assert sorted([file.stem for file in part.files] for part in parts) == [
        ["test_a", "test_b"],
        ["test_backward"],
        ["test_compile"],
    ]


def test_files_that_fail_together_alone_fail_the_run(project, capfd):
    """A process that dies leaves no result of its other files: each runs again, and the run fails all the same."""
    text = "import os, pathlib\n\ndef test_first_time():\n    seen = pathlib.Path('seen')\n"
    text += "    if not seen.exists():\n        seen.touch()\n        os._exit(0)\n"
    code, out = run(project(test_triton_a=PASS, test_triton_b=text), capfd, "triton")
    assert code == 1
    assert out.endswith("total: 2 passed, 1 failed, 0 skipped\n")


def test_the_slowest_files_begin_first(project, capfd):
    for name in [*run_groups.ALONE, *(f"pallas/{stem}" for stem in run_groups.DEVICES)]:
        assert (HERE / f"{name}.py").exists()
    code, out = run(project(test_triton_a=PASS, test_triton_backward=PASS), capfd, "triton", "--jobs", "1")
    assert code == 0
    assert out.index("triton-test_backward") < out.index("triton-test_a")


@pytest.mark.parametrize(("name", "interpret"), [("test_triton_a", "1"), ("test_triton_compile", "0")])
def test_tritons_mode_is_set_before_the_file_is_imported(project, capfd, name, interpret):
    text = f"import os\n\nMODE = os.environ['TRITON_INTERPRET']\n\ndef test_mode():\n    assert MODE == '{interpret}'\n"
    code, out = run(project(**{name: text}), capfd, "triton")
    assert code == 0, out


def test_what_is_imported_is_compiled_once(project, capfd, monkeypatch):
    """Where Python is told to leave no bytecode beside the sources, it lies among the reports."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    root = project(test_core="import helper\n" + PASS, helper="")
    code, out = run(root, capfd, "core")
    assert code == 0, out
    assert [*(root / "reports" / "bytecode").rglob("helper.*.pyc")]
    assert not [*root.glob("__pycache__")]


def test_two_modes_of_triton_in_one_process_are_refused(project):
    root = project(test_triton_a="import triton\n" + PASS, test_triton_compile=PASS, triton="")
    done = subprocess.run(
        [sys.executable, "-m", "pytest"], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 4
    assert "test_compile.py needs TRITON_INTERPRET=0 from the start" in done.stderr


def test_an_interrupted_run_leaves_no_process_behind(project):
    sleeper = "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)\n"
    root = project(test_hang=sleeper)
    # What a shell starts in the background ignores SIGINT, and its children too.
    command = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command += f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); from pathlib import Path; from tests import run_groups\n"
    command += f"sys.exit(run_groups.main(['core'], Path({str(root)!r})))"
    runner = subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pid = root / "pid"
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(20) != 0
    status = Path(f"/proc/{pid.read_text()}/status")

    def alive():
        return (
            status.exists() and "State:\tZ" not in status.read_text()
        )  # a zombie is gone, but not yet collected

    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive()

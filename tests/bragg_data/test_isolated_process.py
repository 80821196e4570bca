import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import psutil
import pytest

from bragg_data.isolated_process import (
    SINGLE_THREAD,
    IsolatedProcess,
    IsolatedProcessError,
    IsolatedProcessTimeoutError,
)
from tests.children import BUSY, TARGET

ROOT = Path(__file__).parents[2]
SECONDS = 60.0  # far more than anything here takes


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files, empty and of this test alone."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return directory


@pytest.fixture
def child(temporary: Path) -> Iterator[IsolatedProcess]:
    with closing(IsolatedProcess(TARGET, name="test")) as started:
        assert started.scratch.parent == temporary
        yield started


def wait_for(condition: Callable[[], object], problem: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:g} s {problem}"
        time.sleep(0.02)


def is_gone(process: psutil.Process) -> bool:
    try:
        # Who inherits an orphan may be slow to bury it.
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def parent_with_child(
    *methods: str,
) -> Iterator[tuple[subprocess.Popen[str], psutil.Process, Path]]:
    """A program that starts a child and calls methods; the child's process; its directory."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.children", *methods],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        try:
            number, scratch = parent.stdout.readline().split(maxsplit=1)
            orphan = psutil.Process(int(number))
            try:
                yield parent, orphan, Path(scratch.strip())
            finally:
                if not is_gone(orphan):
                    orphan.kill()
        finally:
            parent.kill()


# -- calls -------------------------------------------------------------------------------------


def test_call_returns_what_the_method_returns(child: IsolatedProcess) -> None:
    values = np.random.default_rng(1).normal(size=(300, 500))
    answer = child.call("scale", values, 2.5, seconds=SECONDS)
    assert list(answer) == ["scaled"]
    np.testing.assert_array_equal(answer["scaled"], values * 2.5, strict=True)


def test_object_is_built_once_and_keeps_its_state() -> None:
    with closing(IsolatedProcess(TARGET, 100, name="test")) as child:
        answers = [child.call("add", number, seconds=SECONDS) for number in (1, 2, 3)]
    assert answers == [101, 103, 106]


def test_two_children_have_nothing_in_common(child: IsolatedProcess) -> None:
    with closing(IsolatedProcess(TARGET, 10, name="test")) as other:
        assert other.scratch != child.scratch
        assert other.call("add", 1, seconds=SECONDS) == 11
        assert child.call("add", 1, seconds=SECONDS) == 1
    assert child.call("add", 1, seconds=SECONDS) == 2


def test_it_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(1, b"of the parent\n")
    with closing(IsolatedProcess(TARGET, name="test")) as child:
        child.call("make_noise", 2000, seconds=SECONDS)
    assert capfd.readouterr() == ("of the parent\n", "")


def test_noise_of_earlier_calls_does_not_pile_up(child: IsolatedProcess) -> None:
    for _ in range(3):
        child.call("make_noise", 2000, seconds=SECONDS)
    # What Python itself still holds back is far less than what one call printed.
    assert sum(file.stat().st_size for file in child.scratch.iterdir()) < 50_000


def test_single_thread_per_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = dict(os.environ)
    with closing(IsolatedProcess(TARGET, name="test")) as child:
        assert child.call("environment", seconds=SECONDS) == SINGLE_THREAD
        assert set(SINGLE_THREAD.values()) == {"1"}
        assert set(child.call("threads", seconds=SECONDS)) == {1}
    assert dict(os.environ) == before


# -- directory ---------------------------------------------------------------------------------


def test_files_go_to_a_directory_that_goes(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with closing(IsolatedProcess(TARGET, name="test")) as child:
        assert Path(child.call("directory", seconds=SECONDS)) == child.scratch
        assert child.scratch.name.startswith("bragg-test-")
        child.call("write", "results.txt", "some", seconds=SECONDS)
        child.call("write", "deep/er/results.txt", seconds=SECONDS)
        assert (child.scratch / "results.txt").read_text() == "some"
        assert (child.scratch / "deep" / "er").is_dir()
    assert not any(here.iterdir())
    assert not any(temporary.iterdir())


def test_modules_are_imported_from_a_foreign_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("from collections import Counter\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with closing(IsolatedProcess("only_here:Counter", "abca", name="test")) as child:
        assert child.call("most_common", 1, seconds=SECONDS) == [("a", 2)]


def test_nothing_is_imported_from_the_scratch_directory(child: IsolatedProcess) -> None:
    child.call("write", "colorsys.py", "raise ImportError", seconds=SECONDS)
    child.call("write", "only_in_scratch.py", seconds=SECONDS)
    known = Path(child.call("origin", "colorsys", seconds=SECONDS))
    assert child.scratch not in known.parents
    with pytest.raises(ModuleNotFoundError, match="only_in_scratch"):
        child.call("origin", "only_in_scratch", seconds=SECONDS)


def test_object_that_moves_elsewhere_takes_nothing_along(
    child: IsolatedProcess, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "years_of_work.txt").touch()
    child.call("move", str(precious), seconds=SECONDS)
    child.close()
    assert not child.scratch.exists()
    assert [file.name for file in precious.iterdir()] == ["years_of_work.txt"]


def test_object_may_replace_standard_output(child: IsolatedProcess) -> None:
    child.call("redirect", seconds=SECONDS)
    child.call("make_noise", 1, seconds=SECONDS)
    assert child.call("add", 1, seconds=SECONDS) == 1


# -- exceptions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("builtin", KeyError, "^'the reason'$"),
        ("foreign", RuntimeError, "^ForeignError: the reason$"),
        ("exit", RuntimeError, "^SystemExit: the reason$"),
    ],
)
def test_exception_of_a_method_comes_back(
    child: IsolatedProcess, kind: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        child.call("fail", kind, seconds=SECONDS)
    assert raised.type is error
    assert child.alive
    assert child.call("add", 1, seconds=SECONDS) == 1


def test_method_that_does_not_exist(child: IsolatedProcess) -> None:
    with pytest.raises(AttributeError, match="'Served' object has no attribute 'subtract'"):
        child.call("subtract", 1, seconds=SECONDS)
    assert child.call("add", 1, seconds=SECONDS) == 1


def test_argument_that_pickle_does_not_know(child: IsolatedProcess) -> None:
    with pytest.raises(TypeError, match="pickle"):
        child.call("add", (number for number in range(3)), seconds=SECONDS)


@pytest.mark.parametrize(
    ("target", "argument", "error", "message"),
    [
        ("builtins:int", "x", ValueError, "^invalid literal for int"),
        ("numpy.linalg:inv", np.zeros((2, 2)), RuntimeError, "^LinAlgError: Singular matrix$"),
        ("sys:exit", "the reason", RuntimeError, "^SystemExit: the reason$"),
        ("no_such_module:Served", 1, ModuleNotFoundError, "no_such_module"),
        ("builtins:no_such_name", 1, AttributeError, "no_such_name"),
    ],
)
def test_exception_of_the_constructor_comes_back_and_nothing_stays(
    temporary: Path, target: str, argument: object, error: type[Exception], message: str
) -> None:
    before = psutil.Process().children()
    with pytest.raises(error, match=message) as raised:
        IsolatedProcess(target, argument, name="test")
    assert raised.type is error
    assert not any(temporary.iterdir())
    assert set(psutil.Process().children()) <= set(before)


# -- the end of a child ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sleep", "compute", "hold_on"])
def test_time_limit_of_a_call(child: IsolatedProcess, method: str) -> None:
    with pytest.raises(IsolatedProcessTimeoutError, match=r"longer than 0\.3 s to answer"):
        child.call(method, seconds=0.3)
    assert child.process.returncode == -signal.SIGKILL
    assert not child.scratch.exists()
    assert not child.alive
    with pytest.raises(IsolatedProcessError, match="SIGKILL"):
        child.call("add", 1, seconds=SECONDS)


@pytest.mark.slow
def test_time_limit_of_the_start(temporary: Path) -> None:
    before = psutil.Process().children()
    with pytest.raises(IsolatedProcessTimeoutError, match=r"longer than 0\.5 s to start"):
        IsolatedProcess("time:sleep", 600, name="test", seconds=0.5)
    assert not any(temporary.iterdir())
    assert set(psutil.Process().children()) <= set(before)


@pytest.mark.parametrize(("how", "cause"), [("abort", "was ended by SIGABRT"), ("exit", "code 3")])
def test_crash_names_its_cause_and_the_last_output(
    how: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "")  # what is printed to a file may be held back
    with closing(IsolatedProcess(TARGET, name="test")) as child:
        child.call("make_noise", 1, seconds=SECONDS)
        with pytest.raises(
            IsolatedProcessError, match=f"{cause}; its last words: something went wrong$"
        ):
            child.call("crash", how, seconds=SECONDS)
        assert not child.alive
        assert not child.scratch.exists()


@pytest.mark.parametrize(
    ("target", "arguments", "cause"),
    [("os:_exit", [3], "ended with exit code 3"), ("os:abort", [], "was ended by SIGABRT")],
)
def test_process_that_dies_at_start(
    temporary: Path, target: str, arguments: list[int], cause: str
) -> None:
    with pytest.raises(IsolatedProcessError, match=cause):
        IsolatedProcess(target, *arguments, name="test")
    assert not any(temporary.iterdir())


def test_process_that_is_no_python(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(IsolatedProcessError, match="ended with exit code 1"):
        IsolatedProcess(TARGET, name="test")
    assert not any(temporary.iterdir())


def test_no_process_can_be_started(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(temporary / "no_such_program"))
    with pytest.raises(FileNotFoundError):
        IsolatedProcess(TARGET, name="test")
    gc.collect()
    assert not any(temporary.iterdir())


def test_killed_between_calls(child: IsolatedProcess) -> None:
    assert child.alive
    child.process.kill()
    wait_for(lambda: not child.alive, "the child is alive")
    with pytest.raises(IsolatedProcessError, match="was ended by SIGKILL"):
        child.call("add", 1, seconds=SECONDS)
    assert not child.scratch.exists()


def test_crash_is_noticed_though_a_program_that_it_started_lives(child: IsolatedProcess) -> None:
    program = psutil.Process(child.call("start_program", seconds=SECONDS))
    try:
        with pytest.raises(IsolatedProcessError, match="exit code 3"):
            child.call("crash", "exit", seconds=5)
    finally:
        program.kill()


def test_close_ends_it_and_may_be_repeated(temporary: Path) -> None:
    child = IsolatedProcess(TARGET, name="test")
    assert child.alive
    child.close()
    assert not child.alive
    assert child.process.returncode is not None
    assert not any(temporary.iterdir())
    child.close()
    with pytest.raises(IsolatedProcessError, match="ended"):
        child.call("add", 1, seconds=SECONDS)


@pytest.mark.slow
def test_child_without_close_ends_with_its_last_reference(
    temporary: Path, recwarn: pytest.WarningsRecorder
) -> None:
    child = IsolatedProcess(TARGET, name="test")
    process = psutil.Process(child.process.pid)
    assert process.is_running()
    del child
    gc.collect()
    assert not process.is_running()
    assert not any(temporary.iterdir())
    assert not recwarn.list


def test_ctrl_c_is_none_of_its_business(child: IsolatedProcess) -> None:
    child.call("add", 1, seconds=SECONDS)
    child.process.send_signal(signal.SIGINT)
    assert child.call("add", 1, seconds=SECONDS) == 2


class AlarmError(Exception):
    pass


@pytest.mark.parametrize("kind", [KeyboardInterrupt, AlarmError])
def test_answer_to_an_interrupted_call_is_not_taken_for_the_next(
    child: IsolatedProcess, kind: type[BaseException]
) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise kind

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(kind):
            child.call("signal_parent", seconds=SECONDS)
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(IsolatedProcessError):
        child.call("add", 1, seconds=SECONDS)
    assert not child.scratch.exists()


@pytest.mark.parametrize("methods", [[], ["sleep"], ["compute"]], ids=["idle", "sleep", "compute"])
def test_terminated_child_removes_its_directory(methods: list[str]) -> None:
    with parent_with_child(*methods) as (parent, child, scratch):
        wait_for(lambda: not methods or (scratch / BUSY).exists(), "the child is not busy")
        os.kill(parent.pid, signal.SIGSTOP)  # so that it cannot be the one to remove it
        child.terminate()
        wait_for(lambda: is_gone(child), "the child is alive")
        assert not scratch.exists()


# -- the end of a parent -----------------------------------------------------------------------


@pytest.mark.parametrize("methods", [[], ["sleep"], ["compute"]], ids=["idle", "sleep", "compute"])
def test_child_does_not_outlive_a_killed_parent(methods: list[str], temporary: Path) -> None:
    with parent_with_child(*methods) as (parent, orphan, scratch):
        wait_for(lambda: not methods or (scratch / BUSY).exists(), "the child is not busy")
        assert not is_gone(orphan)
        parent.kill()
        wait_for(lambda: is_gone(orphan), "the child is alive")
        assert not any(temporary.iterdir())


def test_child_that_lost_its_directory_does_not_outlive_a_killed_parent() -> None:
    with parent_with_child("remove_directory") as (parent, orphan, scratch):
        assert parent.stdout is not None
        assert parent.stdout.readline() == "called\n"
        assert not scratch.exists()
        parent.kill()
        wait_for(lambda: is_gone(orphan), "the child is alive", seconds=5)


# -- what killed processes leave ---------------------------------------------------------------


@pytest.fixture
def left(temporary: Path) -> Path:
    """What stays of a child that was killed together with its parent."""
    with parent_with_child() as (parent, child, scratch):
        child.kill()
        wait_for(lambda: is_gone(child), "the child is alive")
        parent.kill()
        parent.wait()
    assert list(temporary.iterdir()) == [scratch]
    return scratch


def make_old(scratch: Path) -> None:
    an_hour_ago = time.time() - 3600
    os.utime(scratch, (an_hour_ago, an_hour_ago))


def test_next_start_of_the_same_name_removes_what_is_old(left: Path, temporary: Path) -> None:
    make_old(left)
    IsolatedProcess(TARGET, name="other").close()
    assert left.exists()
    IsolatedProcess(TARGET, name="test").close()
    assert not any(temporary.iterdir())


def test_next_start_leaves_what_is_young(left: Path) -> None:
    IsolatedProcess(TARGET, name="test").close()
    assert left.exists()


def test_next_start_leaves_what_is_alive(child: IsolatedProcess) -> None:
    child.call("write", "results.txt", seconds=SECONDS)
    make_old(child.scratch)
    IsolatedProcess(TARGET, name="test").close()
    assert (child.scratch / "results.txt").exists()
    assert child.call("add", 1, seconds=SECONDS) == 1


def test_next_start_removes_what_is_half_removed(left: Path) -> None:
    (left / "lock").unlink()
    make_old(left)
    IsolatedProcess(TARGET, name="test").close()
    assert not left.exists()

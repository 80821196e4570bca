"""An object in a process of its own: silent, in a scratch directory, under a time limit.

For a library that prints, writes files, keeps state, crashes or hangs. The process ends, and its
directory is removed, when its parent drops it or dies; if both are killed at once, the next start
removes the directory.

Neither Pebble nor loky gives a worker a scratch directory, quotes its output in errors, or ends a
worker whose parent died while a library holds the interpreter.
"""

import contextlib
import fcntl
import importlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

_LIBRARIES = "OMP_NUM OPENBLAS_NUM MKL_NUM VECLIB_MAXIMUM NUMEXPR_NUM NUMBA_NUM"
SINGLE_THREAD = {f"{library}_THREADS": "1" for library in _LIBRARIES.split()}
"""Environment in which numerical libraries compute with one thread."""

START_SECONDS = 300.0  # for a process and its object; a cold network file system is slow
_LOG, _LOCK = "output.log", "lock"
_STALE_SECONDS = 60.0
_LAST_WORDS = 500  # characters of output that an error quotes


class IsolatedProcessError(RuntimeError):
    """A process that ended, or was ended, before it returned a result."""


class IsolatedProcessTimeoutError(IsolatedProcessError):
    """A process that took too long."""


class IsolatedProcess:
    """An object that lives in a process of its own.

    The target, ``module:callable``, builds the object from the arguments in the new process; they
    are, like everything that is sent in either direction, of types that pickle supports. ``name``
    begins the name of the scratch directory, in the directory for temporary files. Raises an
    IsolatedProcessError if the process dies, or does not start within a number of seconds; the
    exception of the target, or a RuntimeError with its text if its class is of another package.
    """

    def __init__(
        self, target: str, *arguments: Any, name: str, seconds: float = START_SECONDS
    ) -> None:
        self._lock = threading.Lock()
        try:
            _remove_stale(name)
            self.scratch = Path(tempfile.mkdtemp(prefix=f"bragg-{name}-"))
            lock = os.open(self.scratch / _LOCK, os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise IsolatedProcessError(
                f"its scratch directory cannot be made, where TMPDIR or the system says ({error})"
            ) from error
        ours, theirs = socket.socketpair()
        fcntl.flock(lock, fcntl.LOCK_EX)  # held until both processes are gone
        paths = [str(Path(path).absolute()) for path in sys.path]
        with contextlib.ExitStack() as stack, theirs, (self.scratch / _LOG).open("ab") as log:
            stack.callback(ours.close)
            stack.callback(os.close, lock)
            stack.callback(shutil.rmtree, self.scratch, ignore_errors=True)
            self.process = subprocess.Popen(
                # -P: its own directory is full of foreign files and no place to import from.
                [sys.executable, "-u", "-P", "-m", __spec__.name, str(theirs.fileno()), str(lock)],
                env={**os.environ, **SINGLE_THREAD, "PYTHONPATH": os.pathsep.join(paths)},
                cwd=self.scratch,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(), lock),
            )
            stack.pop_all()
        self._channel = Connection(ours.detach())
        self.close = weakref.finalize(self, _end, self.process, self._channel, self.scratch, lock)
        try:
            self._request(target, arguments, seconds, "start")
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.close.alive and self.process.poll() is None

    def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """Call a method of the object there; its exception is raised.

        Raises an IsolatedProcessTimeoutError if it takes longer than ``seconds``: the process is
        ended; an IsolatedProcessError if the process dies.
        """
        return self._request(method, arguments, seconds, "answer")

    def _request(self, name: str, arguments: tuple[Any, ...], seconds: float, what: str) -> Any:
        with self._lock:  # else a thread would get the result of another thread
            try:
                self._channel.send((name, arguments, seconds))
                result = self._channel.recv() if self._channel.poll(seconds) else None
            except (EOFError, OSError) as error:
                raise self._death() from error
            except BaseException:  # the late result would be taken for that of the next call
                self.close()
                raise
            if result is None:
                self.process.kill()
                self.close()
                raise IsolatedProcessTimeoutError(f"it took longer than {seconds:g} s to {what}")
        succeeded, value = result
        if not succeeded:
            raise value
        return value

    def _death(self) -> IsolatedProcessError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        code = self.process.poll()
        how = "does not answer" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        words = ""
        with contextlib.suppress(OSError):
            words = (self.scratch / _LOG).read_text(errors="replace")[-_LAST_WORDS:].strip()
        self.close()
        return IsolatedProcessError(
            f"its process {how}" + (f"; its last words: {words}" if words else "")
        )


def _end(process: subprocess.Popen[bytes], channel: Connection, scratch: Path, lock: int) -> None:
    channel.close()  # on which the process ends
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
    os.close(lock)


def _remove_stale(name: str) -> None:
    """Remove the directories of processes that were killed together with their parents."""
    for scratch in Path(tempfile.gettempdir()).glob(f"bragg-{name}-*"):
        with contextlib.suppress(OSError):  # of other users, just removed, or alive
            if time.time() - scratch.stat().st_mtime > _STALE_SECONDS:
                lock = os.open(scratch / _LOCK, os.O_CREAT | os.O_RDWR)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(scratch, ignore_errors=True)
                finally:
                    os.close(lock)


def _serve(connection: Connection) -> NoReturn:
    scratch = Path.cwd()
    for descriptor in map(int, sys.argv[1:]):
        os.set_inheritable(descriptor, False)
    # A terminal sends Ctrl-C here as well; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _leave(scratch))
    inbox: queue.SimpleQueue[tuple[str, tuple[Any, ...], float]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox, scratch), daemon=True).start()
    served: Any = None
    while True:
        name, arguments, seconds = inbox.get()
        # If the parent is gone and a library holds on to the interpreter, the kernel ends it.
        signal.setitimer(signal.ITIMER_REAL, seconds + 60)
        answer: tuple[bool, Any] = (True, None)
        try:
            if served is None:
                module, _, factory = name.partition(":")
                served = getattr(importlib.import_module(module), factory)(*arguments)
            else:
                answer = (True, getattr(served, name)(*arguments))
        except (Exception, SystemExit) as error:
            answer = (False, _portable(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(OSError):
            os.truncate(scratch / _LOG, 0)
        try:
            connection.send(answer)
        except OSError:
            _leave(scratch)


def _portable(error: BaseException) -> BaseException:
    """Return the error, or a RuntimeError with its text if the parent may not know its class."""
    package = type(error).__module__.partition(".")[0]
    if package in ("builtins", str(__package__).partition(".")[0]) and isinstance(error, Exception):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _listen(connection: Connection, inbox: queue.SimpleQueue[Any], scratch: Path) -> NoReturn:
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    _leave(scratch)


def _leave(scratch: Path) -> NoReturn:
    deadline = time.monotonic() + 10
    while scratch.exists() and time.monotonic() < deadline:  # another thread may still write
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))

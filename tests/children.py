"""What test_child.py has served in a process of its own; run as a program, the parent of one."""

import ctypes
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

from bragg_data.isolated_process import SINGLE_THREAD, IsolatedProcess

TARGET = f"{__package__}.children:Served"
BUSY = "busy"


class ForeignError(ValueError):
    pass


class Served:
    def __init__(self, total: int = 0) -> None:
        self.total = total

    def add(self, number: int) -> int:
        self.total += number
        return self.total

    def scale(self, values: NDArray[np.float64], factor: float) -> dict[str, NDArray[np.float64]]:
        return {"scaled": values * factor}

    def directory(self) -> str:
        return os.getcwd()  # noqa: PTH109

    def environment(self) -> dict[str, str]:
        return {name: os.environ[name] for name in SINGLE_THREAD}

    def threads(self) -> list[int]:
        np.ones((64, 64)) @ np.ones((64, 64))
        return [library["num_threads"] for library in threadpool_info()]

    def write(self, name: str, text: str = "") -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")

    def origin(self, module: str) -> str:
        importlib.invalidate_caches()
        return str(importlib.import_module(module).__file__)

    def make_noise(self, lines: int) -> None:
        for _ in range(lines):
            print("printed", "x" * 100)
        print("printed as an error", file=sys.stderr)
        os.write(1, b"written\n")
        os.write(2, b"written as an error\n")
        os.system("echo from a program; echo from a program >&2")

    def fail(self, kind: str) -> NoReturn:
        raise {"builtin": KeyError, "foreign": ForeignError, "exit": SystemExit}[kind]("the reason")

    def sleep(self) -> None:
        Path(BUSY).touch()
        time.sleep(600)

    def compute(self) -> None:
        Path(BUSY).touch()
        values = np.ones(100_000)
        while True:
            values = np.sqrt(values + 1)

    def hold_on(self) -> None:
        """Sleep without letting any other thread of the interpreter run."""
        ctypes.PyDLL(None).sleep(600)

    def crash(self, how: str) -> None:
        print("something went wrong")
        if how == "abort":
            os.abort()
        os._exit(3)

    def signal_parent(self) -> str:
        os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(0.3)
        return "the answer to an earlier question"

    def move(self, directory: str) -> None:
        os.chdir(directory)

    def remove_directory(self) -> None:
        shutil.rmtree(Path.cwd())

    def redirect(self) -> None:
        sys.stdout = StringIO()

    def start_program(self) -> int:
        return subprocess.Popen(["sleep", "60"], close_fds=False).pid


def main(methods: list[str]) -> None:
    child = IsolatedProcess(TARGET, name="test")
    print(child.process.pid, child.scratch, flush=True)
    for method in methods:
        child.call(method, seconds=60)
    print("called", flush=True)
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])

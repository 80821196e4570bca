"""NeXus files read in a process of its own, because the HDF5 library hangs or dies on damaged ones.

The process gets a path, and returns arrays and JSON. It may be killed, and holds no lock that the
caller waits for.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from bragg_data.measurement.readers.checks import RawProfile
from bragg_data.measurement.readers.common import ProfileError

SECONDS = 60.0  # for a file, which may be on a slow disk
_MODULE = "bragg_data.measurement.readers.nexus"
REFUSED = 3  # exit code; the reason is on stderr
META = "meta"
FIELDS = ("bank", "title", "header", "format", "declared", "counts", "edges", "warnings")


def read_nexus_apart(path: Path, bank: int | None, seconds: float = SECONDS) -> list[RawProfile]:
    """Return what :func:`bragg_data.measurement.readers.nexus.read_nexus` does, or its error.

    A ProfileError is also raised if that ends the process, or takes longer than ``seconds``.
    """
    number = [] if bank is None else [str(bank)]
    paths = [str(Path(entry).absolute()) for entry in sys.path]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", _MODULE, str(path.absolute()), str(path), *number],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProfileError(
            f"{path} is a damaged HDF5 file, or too large: it was not read within {seconds:g} s."
        ) from error
    if done.returncode == REFUSED:
        raise ProfileError(done.stderr.decode("utf-8", "replace").strip())
    if done.returncode:
        raise ProfileError(f"{path} is a damaged HDF5 file: its library fails. Copy it again.")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as arrays:
        banks = json.loads(arrays[META].tobytes())
        return [
            RawProfile(
                path=path,
                x=arrays[f"x{k}"],
                intensity=arrays[f"y{k}"],
                sigma=arrays.get(f"sigma{k}", None),
                **fields | {"warnings": tuple(fields["warnings"])},
            )
            for k, fields in enumerate(banks)
        ]

"""The package itself: what it offers, and what its import costs."""

import subprocess
import sys

import pytest

import bragg_data
from bragg_data.store import repository


def test_open_snapshot_is_an_attribute_of_the_package() -> None:
    assert bragg_data.open_snapshot is repository.open_snapshot
    with pytest.raises(AttributeError, match="no attribute 'open_snapshots'"):
        bragg_data.open_snapshots  # noqa: B018


def test_import_of_the_package_loads_no_library() -> None:
    program = "import sys, bragg_data; print(*sorted(m for m in sys.modules if '.' not in m))"
    modules = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "bragg_data" in modules
    assert not {"numpy", "xarray", "zarr", "icechunk", "pandas"} & set(modules)

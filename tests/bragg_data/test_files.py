import os

import numpy as np
import pytest

from bragg_data.campaign import CampaignError, load_campaign, read_cells
from bragg_data.campaign_file import Range
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.structure import read_phase
from bragg_data.files import read_bounded, write_whole
from bragg_data.instrument.instprm import InstrumentError, read_instrument
from bragg_data.measurement.readers import ProfileError, read_profiles

READERS = {
    "profile": (read_profiles, ProfileError, 100),
    "structure": (lambda path: read_phase(path, "x"), CrystalError, 20),
    "instrument": (read_instrument, InstrumentError, 10),
    "campaign": (load_campaign, CampaignError, 0.5),
    "cells": (lambda path: read_cells(path, load_campaign("batio3-nomad")), CampaignError, 50),
}


@pytest.fixture(params=READERS)
def reader(request):
    return READERS[request.param]


def test_files_above_the_limit_are_refused_unread(reader, tmp_path):
    read, error, megabytes = reader
    path = tmp_path / "large.toml"
    with path.open("wb") as file:
        file.truncate(10**12)  # a sparse file
    with pytest.raises(error, match=rf"cannot be read.*: it is larger than {megabytes:g} MB\.$"):
        read(path)


def test_devices_and_pipes_are_refused(reader, tmp_path):
    read, error, _ = reader
    endless, pipe = tmp_path / "endless.toml", tmp_path / "pipe.toml"
    endless.symlink_to("/dev/zero")
    os.mkfifo(pipe)
    for path in (endless, pipe):
        with pytest.raises(error, match=r"cannot be read.*: it is a device or a pipe"):
            read(path)


def test_a_file_of_the_largest_size_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"ab")
    assert read_bounded(path, 2) == b"ab"
    with pytest.raises(OSError, match="larger"):
        read_bounded(path, 1)
    with pytest.raises(FileNotFoundError, match="no file has such a name"):
        read_bounded(tmp_path / "a\0b", 1)


@pytest.mark.parametrize(("rows", "message"), [(200_001, "Rebin it"), (1_000_001, "lines")])
def test_profiles_of_too_many_points_are_refused(tmp_path, rows, message):
    path = tmp_path / "long.xy"
    path.write_text("".join(f"{n} 1\n" for n in range(1000, 1000 + rows)))
    with pytest.raises(ProfileError, match=message):
        read_profiles(path)


def test_cifs_of_too_many_atoms_are_refused(tmp_path):
    atoms = "".join(f"Si{n} 0.1 0.2 0.{n}\n" for n in range(1001))
    tags = "_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"
    cell = "".join(
        f"_cell_length_{n} 5\n_cell_angle_{m} 90\n"
        for n, m in zip("abc", ("alpha", "beta", "gamma"), strict=True)
    )
    path = tmp_path / "many.cif"
    path.write_text(f"data_x\n{cell}_space_group_name_H-M_alt 'P 1'\nloop_\n{tags}{atoms}")
    with pytest.raises(CrystalError, match=r"lists 1,001 atoms; at most 1,000"):
        read_phase(path, "x")


@pytest.mark.parametrize(
    ("first", "last", "step"),
    [("3.5", "4.499", "0.001"), ("0.1", "0.7", "0.00001"), ("999.999999", "1000", "0.0000000001")],
)
def test_points_of_a_grid_are_the_numbers_next_to_its_decimals(first, last, step):
    grid = Range.model_validate({"first": first, "last": last, "step": step})
    start, _, by = grid.grid
    expected = [float(start + by * n) for n in range(len(grid))]
    np.testing.assert_array_equal(grid.values(), expected)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "record.json"
    write_whole(file, b"old")
    with pytest.raises(TypeError):
        write_whole(file, "no bytes")
    assert file.read_bytes() == b"old"
    write_whole(file, b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["record.json"]
    assert file.read_bytes() == b"new"

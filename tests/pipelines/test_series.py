"""The series command: frames in; cells, events, a table and a figure out."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bragg_data import open_series
from bragg_data.measurement.readers import ProfileError
from bragg_data.store.repository import Store, StoreError
from pipelines import series
from pipelines.cli.console import run
from pipelines.cli.options import ClusterOptions
from pipelines.cli.refinement_options import BankOptions
from pipelines.refinement import frames
from pipelines.refinement.frames import SeriesOptions, refine_series
from pipelines.refinement.inputs import request_of
from pipelines.refinement.result import to_json
from pipelines.refinement.series import values_of_files
from tests.measured_banks import STRUCTURES, bank_of, bins, nomad, structure

CELLS = {10: 5.4310, 20: 5.4315, 30: 5.4320, 40: 5.4325}


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        run(series.app, [*map(str, arguments)])
    return (int(exit_.value.code or 0), *capsys.readouterr())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four frames of silicon, a file that is none, and the instrument."""
    directory = tmp_path_factory.mktemp("frames")
    (directory / "nomad.instprm").write_text(nomad().section, encoding="utf-8")
    for kelvin, cell in CELLS.items():
        sample = [(structure("silicon"), [cell], {"size": 1.0, "microstrain": 700.0})]
        profile = bank_of(sample, nomad(), bins(8000.0, 23_000.0, 1.5e-3), seed=kelvin).profile
        columns = np.stack([profile.tof, profile.intensity, profile.sigma], axis=1)
        np.savetxt(directory / f"si_{kelvin}K.xye", columns, "%.4f")
    (directory / "si_50K.xye").write_text("no numbers\n", encoding="utf-8")
    return directory


def test_cells_follow_the_frames(folder, capsys, tmp_path):
    files = [folder / f"si_{kelvin}K.xye" for kelvin in (*CELLS, 50)]
    options = "--cif", STRUCTURES / "silicon.cif", "--instrument", folder / "nomad.instprm"
    options += "--bin-centres", "--along", "temperature"
    table, png = tmp_path / "series.csv", tmp_path / "series.png"
    code, out, error = command(capsys, *files, *options, "--csv", table, "--plot", png, "--json")
    assert code == 0, error
    *entries, last = json.loads(out)
    assert [entry["value"] for entry in entries] == [*CELLS, 50]
    assert [entry["frame"] for entry in entries] == list(range(5))
    for entry, cell in zip(entries, CELLS.values(), strict=False):
        (phase,) = entry["phases"]
        assert abs(phase["cell"]["a"] - cell) < 4 * phase["su"]["a"]
    assert [(e["frame"], e["kind"]) for e in last["events"]] == [(4, "blank")]
    with table.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["temperature"]) for row in rows] == [*CELLS, 50]
    assert float(rows[1]["silicon a (Å)"]) == pytest.approx(5.4315, abs=3e-4)
    assert rows[4]["silicon a (Å)"] == ""
    assert imread(png).ndim == 3
    page = tmp_path / "series.html"
    code, out, _ = command(capsys, *files[:2], *options, "--report", page)
    assert code == 0
    assert "5.431" in out
    assert "temperature" in page.read_text(encoding="utf-8")


def test_what_a_series_runs_along(tmp_path):
    files = [tmp_path / "run_7.gsa", tmp_path / "run_9.gsa"]
    assert values_of_files(files, None, None) == [7, 9]
    assert values_of_files([tmp_path / "a.gsa", tmp_path / "b.gsa"], None, None) == [0, 1]
    assert values_of_files([tmp_path / "a1.gsa", tmp_path / "b1.gsa"], None, None) == [0, 1]
    table = tmp_path / "table.txt"
    table.write_text("#filename\tStress [MPa]\trun_9\nrun_9.gsa\t-5.5\trun_7\nrun_7\t3\tx\n")
    assert values_of_files(files, table, "stress") == [3, -5.5]
    assert values_of_files(files, table, "stress:2") == [3, -5.5]
    with pytest.raises(ProfileError, match="has the columns stress, run_9: name one of them"):
        values_of_files(files, table, "load")
    with pytest.raises(ProfileError, match=r"no line for other\.gsa"):
        values_of_files([*files, tmp_path / "other.gsa"], table, "stress")
    # Names that are not those of the columns: as VULCAN's tables, with blanks among the names.
    table.write_text("#filename  stress\tstrain\nrun_9.gsa\t0\t-5.5\nrun_7\t0\t3\n")
    with pytest.raises(ProfileError, match=r"give the number of one.*2 0, 3 -5\.5"):
        values_of_files(files, table, "stress")
    assert values_of_files(files, table, "stress:3") == [3, -5.5]
    with pytest.raises(ProfileError, match="cannot be read"):
        values_of_files(files, tmp_path / "missing.csv", "stress")


def test_values_of_headers(tmp_path):
    files = [tmp_path / f"run{k}.gsa" for k in (1, 2)]
    for file, kelvin in zip(files, ("231.4", "-12"), strict=True):
        file.write_text(f"# NaNO3_230C at temperature {kelvin} C.\n1 2 3\n")
    assert values_of_files(files, None, "temperature") == [231.4, -12]
    assert values_of_files(files, None, "pressure") == [1, 2]  # of the names


def test_a_series_in_the_store(folder, capsys, tmp_path):
    files = [folder / f"si_{kelvin}K.xye" for kelvin in (*CELLS, 50)]
    options = "--cif", STRUCTURES / "silicon.cif", "--instrument", folder / "nomad.instprm"
    options += "--bin-centres", "--along", "temperature", "--store", tmp_path / "store"
    for _ in range(2):  # the same series is written once
        code, out, error = command(capsys, *files, *options, "--into", "silicon")
        assert code == 0, error
        assert "series.silicon-v1" in out
    dataset = open_series("series.silicon-v1", tmp_path / "store")
    assert dict(dataset.sizes) == {"frame": 5, "bank": 1, "phase": 1, "site": 1, "event": 1}
    assert dataset.along.values.tolist() == [*CELLS, 50]
    assert dataset.along.attrs["long_name"] == "temperature"
    of_silicon = dataset.sel(phase="silicon")
    z = (of_silicon.a.values[:4] - [*CELLS.values()]) / of_silicon.su_a.values[:4]
    assert np.abs(z).max() < 4
    assert np.isnan(of_silicon.a.values[4])
    assert of_silicon.su_calibration_a.values[0] > 1e-4
    assert of_silicon.a.attrs == {"units": "angstrom", "long_name": "cell length a"}
    assert of_silicon.strain_a.values[1] == pytest.approx(1e6 * (5.4315 / 5.431 - 1), abs=60)
    assert dataset.event_kind.values.tolist() == ["blank"]
    assert dataset.event_frame.values.tolist() == [4]
    assert "_cell_length_a" in json.loads(dataset.structures).popitem()[1]
    assert json.loads(dataset.sha256)[0] == hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert Store(tmp_path / "store").tags() == []  # no data set of profiles
    code, _, error = command(capsys, *files[:3], *options, "--into", "silicon")  # without events
    assert code == 0, error
    assert open_series("series.silicon-v2", tmp_path / "store").sizes["frame"] == 3
    with pytest.raises(StoreError, match=r"Known ones: series.silicon-v1, series.silicon-v2"):
        open_series("series.silicon-v3", tmp_path / "store")


def test_without_any_frame_the_reason_is_a_single_sentence(folder, capsys, tmp_path):
    options = "--cif", STRUCTURES / "silicon.cif", "--instrument", folder / "nomad.instprm"
    code, _, error = command(
        capsys, folder / "si_50K.xye", *options, "--plot", tmp_path / "series.png"
    )
    assert code == 2
    assert "si_50K.xye" in error
    assert not (tmp_path / "series.png").exists()


def test_a_missing_instrument_is_a_single_sentence(folder, capsys):
    file = folder / "si_10K.xye"
    code, _, error = command(
        capsys, file, "--cif", STRUCTURES / "silicon.cif", "--instrument", folder / "none.instprm"
    )
    assert code == 2
    assert "none.instprm" in error
    assert len(error.strip().splitlines()) == 1


def frames_of_silicon(directory: Path, count: int) -> list[Path]:
    (directory / "nomad.instprm").write_text(nomad().section, encoding="utf-8")
    files = []
    for k in range(count):
        sample = [(structure("silicon"), [5.431 + 1e-4 * k], {"size": 1.0, "microstrain": 700.0})]
        profile = bank_of(sample, nomad(), bins(8000.0, 23_000.0, 1.5e-3), seed=k).profile
        columns = np.stack([profile.tof, profile.intensity, profile.sigma], axis=1)
        files.append(directory / f"si_{k}.xye")
        np.savetxt(files[-1], columns, "%.4f")
    return files


def without_times(text: str) -> list[dict]:
    return [{**entry, "seconds": 0} for entry in json.loads(text)]


@pytest.mark.cluster
def test_a_killed_series_goes_on_where_it_was(tmp_path, capsys):
    """Killed with SIGKILL after the first part; the same command finishes with the same result."""
    files = frames_of_silicon(tmp_path, 40)
    table = tmp_path / "series.csv"
    options = "--cif", STRUCTURES / "silicon.cif", "--instrument", tmp_path / "nomad.instprm"
    options += "--bin-centres", "--cluster", "local", "--workers", 1, "--json"
    words = [*map(str, (*files, *options, "--csv", table))]
    started = subprocess.Popen(
        [sys.executable, "-m", "pipelines.series", *words],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    journal = tmp_path / ".series.csv.frames"
    try:
        deadline = time.monotonic() + 120
        while not list(journal.glob("*/Refining-*.json")):
            assert time.monotonic() < deadline
            assert started.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    assert not table.exists()
    finished = {file: file.stat().st_mtime_ns for file in journal.glob("*/*.json")}
    code, out, error = command(capsys, *words)
    assert code == 0, error
    resumed = without_times(out)
    assert table.exists()
    assert not journal.exists()
    # In other processes, nothing kept, and without a cluster it is the same.
    whole = refine_series(
        request_of(files, tmp_path / "nomad.instprm", BankOptions(bin_edges=False)),
        [str(STRUCTURES / "silicon.cif")],
        list(range(40)),
        SeriesOptions(cluster=ClusterOptions(cluster="local", workers=2), quiet=True),
    )[0]
    for entry, frame in zip(resumed[:-1], whole, strict=True):
        assert frame.result is not None
        known = to_json(frame.result) | {"frame": frame.number, "value": frame.value, "seconds": 0}
        assert entry == known
    assert finished


def test_a_series_in_jobs_of_slurm_is_that_of_a_single_process(slurm, tmp_path, capsys):
    assert slurm.is_dir()
    files = frames_of_silicon(tmp_path, 4)
    shared = tmp_path / "shared"
    shared.mkdir()
    options = "--cif", STRUCTURES / "silicon.cif", "--instrument", tmp_path / "nomad.instprm"
    words = [*files, *options, "--bin-centres", "--json"]
    jobs = "--cluster", "slurm", "--jobs", "1:1", "--cores", 2, "--memory", "1500 MB"
    jobs += "--walltime", "00:10:00", "--host", "127.0.0.1", "--shared-directory", shared
    code, out, error = command(capsys, *words, *jobs)
    assert code == 0, error
    *frames, _ = json.loads(out)
    cells = [frame["phases"][0]["cell"]["a"] for frame in frames]
    assert cells == pytest.approx([5.431 + 1e-4 * k for k in range(4)], abs=3e-4)
    _, here, _ = command(capsys, *words)
    assert without_times(here) == without_times(out)
    assert not any(shared.iterdir())


def test_banks_apart_have_different_strains(tmp_path, capsys):
    """Two banks that see strains of opposite sign, as at ±90° to a load."""
    strains = {1: (0.0, 4e-4), 2: (0.0, -2e-4)}
    sections, lines = [], {0: "", 1: ""}
    for bank, of_bank in strains.items():
        instrument = nomad().with_parameters(bank=bank)
        sections.append(instrument.section)
        for k, strain in enumerate(of_bank):
            sample = [(structure("silicon"), [5.431 * (1 + strain)], {"microstrain": 700.0})]
            measured = bank_of(
                sample, instrument, bins(8000.0, 23_000.0, 1.5e-3), seed=10 * k + bank
            )
            widths = np.diff(measured.edges, axis=1)[:, 0]
            n = len(measured.tof)
            lines[k] += f"BANK {bank} {n} {n} SLOG {measured.edges[0, 0]:.4f} "
            lines[k] += f"{measured.edges[-1, 0]:.4f} 0.0015 0 FXYE".ljust(40) + "\n"
            for t, y, su in zip(
                measured.edges[:, 0],
                measured.intensity * widths,
                measured.sigma * widths,
                strict=True,
            ):
                lines[k] += f"{t:15.4f} {y:15.4f} {su:15.4f}\n"
    (tmp_path / "two.instprm").write_text("\n".join(sections), encoding="utf-8")
    files = []
    for k, text in lines.items():
        files.append(tmp_path / f"load_{k}.gsa")
        files[-1].write_text("silicon\n" + text, encoding="utf-8")
    table = tmp_path / "steel.csv"
    options = "--cif", STRUCTURES / "silicon.cif", "--instrument", tmp_path / "two.instprm"
    code, out, error = command(capsys, *files, *options, "--banks-apart", "--csv", table, "--json")
    assert code == 0, error
    *entries, _ = json.loads(out)
    assert [(entry["frame"], entry["banks"]) for entry in entries] == [
        (0, [1]), (0, [2]), (1, [1]), (1, [2])
    ]  # fmt: skip
    with table.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row, strain in zip(rows[2:], (400, -200), strict=True):
        value, su = float(row["silicon strain a (1e-6)"]), float(row["silicon su strain a (1e-6)"])
        assert abs(value - strain) < 4 * su < 100


def test_failed_reads_are_repeated_and_a_changed_frame_is_refined(tmp_path, monkeypatch):
    """The first read of a frame fails, as of a network's disk; then another frame changes."""
    files = frames_of_silicon(tmp_path, 6)
    request = request_of(files, tmp_path / "nomad.instprm", BankOptions(bin_edges=False))
    how = SeriesOptions(keep=tmp_path / "kept", quiet=True)
    failing = {files[0]}
    read, refined = frames.read_samples, []

    def read_sometimes(request):
        if not failing.isdisjoint(request.files):
            raise ProfileError("not now") from OSError(5, "Input/output error")
        refined.extend(request.files)
        return read(request)

    monkeypatch.setattr(frames, "read_samples", read_sometimes)

    def cells() -> list[float | None]:
        refined.clear()
        results, _ = refine_series(request, [str(STRUCTURES / "silicon.cif")], range(6), how)
        return [f.result and f.result.phases[0].cell.a for f in results]

    assert [a is None for a in cells()] == [True] + 5 * [False]
    failing.clear()
    whole = cells()
    assert None not in whole
    assert cells() == whole
    assert refined == []  # all is kept
    files[5].write_text(files[0].read_text())
    changed = cells()
    assert changed[:5] == whole[:5]
    assert changed[5] == pytest.approx(whole[0], abs=2e-5) != whole[5]


def test_no_input_is_overwritten(folder, capsys, tmp_path):
    table = tmp_path / "values.csv"
    table.write_text("file,t\n")
    files = sorted(folder.glob("*.xye"))
    options = "--cif", STRUCTURES / "silicon.cif", "--instrument", folder / "nomad.instprm"
    for words in (("--csv", files[0]), ("--values", table, "--plot", table)):
        code, _, error = command(capsys, *files, *options, *words)
        assert code == 2
        assert "is one of the inputs" in error

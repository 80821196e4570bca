"""From structures and an instrument to predictions with one command, in an empty folder."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bragg_data.campaign import BUILT_IN
from bragg_data.crystallography.structure import read_phase
from bragg_data.instrument.instprm import TofGrid, read_instruments
from bragg_data.simulation.kinematic import Simulator
from catalog import registry
from catalog.tracking import Tracking
from pipelines import predict
from pipelines import run as main_job
from pipelines.cli.console import run
from pipelines.training.presets import PRESETS, Presets
from tests.conftest import link_indices

EXAMPLES = Path(__file__).parents[2] / "pipelines" / "examples"
TETRAGONAL = str(BUILT_IN / "batio3_tetragonal.cif")
INSTRUMENT = str(EXAMPLES / "pseudo_experiment.instprm")
PROFILE = str(EXAMPLES / "pseudo_experiment.xye")
MATERIAL = (
    "--cif",
    TETRAGONAL,
    "--instrument",
    INSTRUMENT,
    "--name",
    "mine",
    "--range",
    "0.5%",
    "--workers",
    "1",
)
NAMES = ("campaign", "tag", "model", "champion", "expected", "seconds", "answers", "banks")
SHARES = ("accuracy", "coverage", "accepted", "rejected")


def small_presets() -> Presets:
    search = replace(PRESETS["search"]["quick"], calibration_draws=40)
    presets = {**PRESETS, "search": {"quick": search}}
    return Presets(presets, test_draws=20, comparison_draws=2, foreign_draws=5)


def run_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[str, str]:
    """Run the command with short presets in a folder; return what it printed, and its errors."""
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(
        main_job.app, [*arguments], obj=small_presets(), catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_from_a_structure_and_an_instrument_to_a_refined_profile(
    tmp_path: Path, indices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_indices(tmp_path, indices)
    stated = (*MATERIAL, "--limit", "300", "--profile", PROFILE)
    printed, progress = run_in(tmp_path, monkeypatch, *stated, "--json")
    result = json.loads(printed)  # nothing else is on standard output
    assert tuple(result) == NAMES
    assert (result["campaign"], result["tag"]) == ("mine", "mine-v1")
    assert result["champion"] is True
    assert result["banks"] == [{name: result[name] for name in NAMES[:5]}]
    tracking = Tracking(f"sqlite:///{tmp_path}/data/mlflow.db")
    assert result["model"] == "models:/mine-measured/1"
    assert registry.champion_uri(tracking) == "models:/mine-measured@champion"
    expected = result["expected"]
    assert expected["accuracy"] == 1.0  # of one phase
    assert set(expected["mae"]) == {"a", "c"}
    assert expected["relative_mae"] < 1e-3
    assert all(0 <= expected[name] <= 1 for name in SHARES)
    assert expected["coverage"] > 0.7
    assert expected["accepted"] > 0.7
    assert expected["rejected"] > 0.7
    assert "Campaign mine.toml" in progress
    (answer,) = result["answers"]
    truth = json.loads((EXAMPLES / "examples.json").read_text())["pseudo_experiment.xye"]
    for cell in (answer["cell"], answer["refined"]["cell"]):
        assert cell["a"] == pytest.approx(truth["a"], rel=5e-4)
        assert cell["c"] == pytest.approx(truth["c"], rel=5e-4)
    page = (tmp_path / "mine-report.html").read_text(encoding="utf-8")
    assert "pseudo_experiment.xye" in page
    assert (tmp_path / "mine.png").stat().st_size > 0

    # Again: nothing is made twice.
    printed, progress = run_in(tmp_path, monkeypatch, *stated[:-2])
    assert "nothing to do" in printed
    assert "models:/mine-measured/1 was made for this data set: it stays." in printed
    assert f"Expect a within {expected['mae']['a']:.2g} Å" in printed
    assert len(registry.versions(tracking, "mine-measured")) == 1


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.training
@pytest.mark.timeout(300)
def test_a_run_on_slurm(
    tmp_path: Path, indices: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slurm.is_dir()
    link_indices(tmp_path, indices)
    jobs = ("--cluster", "slurm", "--jobs", "1:2", "--cores", "1", "--memory", "1GB")
    here = ("--walltime", "00:10:00", "--host", "127.0.0.1", "--shared-directory", str(tmp_path))
    stated = (*MATERIAL[:-2], "--limit", "300", *jobs, *here, "--json")
    printed, _ = run_in(tmp_path, monkeypatch, *stated)
    result = json.loads(printed)
    assert (result["tag"], result["champion"]) == ("mine-v1", True)
    assert result["expected"]["relative_mae"] < 1e-3
    show = ["scontrol", "show", "jobs", "--oneliner"]
    jobs_of_run = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    assert "JobId=" in jobs_of_run
    assert "JobState=RUNNING" not in jobs_of_run  # all are over


def write_banks(path: Path, instrument: Path) -> None:
    """Write a GSAS file of tetragonal BaTiO3, a = 3.99 and c = 4.03 Å, with each bank."""
    phase, cell = read_phase(Path(TETRAGONAL), "batio3", None), [[3.99, 3.99, 4.03, 90, 90, 90]]
    grid, lines = TofGrid(4000.0, 0.0008, 2500), ["BaTiO3"]
    for bank in read_instruments(instrument):
        pattern = Simulator([phase], bank, grid, 1.0, 1000.0).simulate([0], np.array(cell))[0]
        per_bin = grid.tof / grid.tof.mean()  # whose widths grow with T
        expected = (20_000 * pattern / pattern.max() + 500) * per_bin
        counts = np.random.default_rng(bank.bank).poisson(expected)
        # As edges of the bins.
        rows = zip(grid.tof * (1 - grid.relative_step / 2), counts, strict=True)
        lines.append(f"# Total flight path 21.5m, tth {bank.two_theta}deg, DIFC {bank.difc:.2f}")
        lines.append(f"BANK {bank.bank} 2500 2500 SLOG 4000 29532 0.0008 0 FXYE")
        lines += [f"{t:.6f} {count} {count**0.5:.4f}" for t, count in rows]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_all_banks_get_a_model_and_are_combined(
    tmp_path: Path, indices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_indices(tmp_path, indices)
    bank_4 = Path(INSTRUMENT).read_text()
    instrument, file = tmp_path / "two.instprm", tmp_path / "two.gsa"
    sharper = bank_4.replace("Bank:4", "Bank:5").replace("#Bank 4", "#Bank 5")
    sharper = sharper.replace("difC:9497.8802", "difC:10490")
    sharper = sharper.replace("2-theta:122.0", "2-theta:150.0").replace("sig-1:284.918", "sig-1:90")
    instrument.write_text(bank_4 + sharper)
    write_banks(file, instrument)
    stated = (*MATERIAL[:2], "--instrument", str(instrument), *MATERIAL[4:], "--bank", "all")
    printed, progress = run_in(
        tmp_path, monkeypatch, *stated, "--limit", "300", "--profile", str(file), "--json"
    )
    result = json.loads(printed)
    assert tuple(result) == NAMES
    assert [of["campaign"] for of in result["banks"]] == ["mine-bank4", "mine-bank5"]
    best = min(result["banks"], key=lambda of: of["expected"]["relative_mae"])
    assert {name: result[name] for name in NAMES[:5]} == best
    answers = result["answers"]
    assert [answer["bank"] for answer in answers] == [4, 5]
    assert [a["model"] for a in answers] == [of["model"] for of in result["banks"]]
    assert answers[0]["combined"] == answers[1]["combined"]
    combined = answers[0]["combined"]
    for values in (combined["cell"], combined["refined"]):
        assert values["a"]["value"] == pytest.approx(3.99, rel=5e-4)
        assert values["c"]["value"] == pytest.approx(4.03, rel=5e-4)
        assert list(values["a"]["banks"]) == ["Bank 4", "Bank 5"]
    (phase,) = combined["joint"]["phases"]
    for name, true in (("a", 3.99), ("c", 4.03)):
        total = np.hypot(phase["su"][name], phase["su_calibration"][name])
        assert abs(phase["cell"][name] - true) < 3 * total
        # Uncertainties are themselves known to a few percent.
        assert all(phase["su"][name] < 1.05 * a["refined"]["su"][name] for a in answers)
    assert [(a["cell_from"], a["cell"]) for a in answers] == [
        ("joint refinement", phase["cell"])
    ] * 2
    assert combined["phase"] == "batio3_tetragonal"
    assert combined["probabilities"] == {"batio3_tetragonal": 1.0}
    assert "all banks: batio3_tetragonal, p 1.000" in " ".join(progress.split())
    assert "All banks of two.gsa" in (tmp_path / "mine-report.html").read_text(encoding="utf-8")

    # From now on the command that predicts finds the models of both banks.
    options = [str(file), "--instrument", str(instrument), "--refine", "--json"]
    predicted = CliRunner().invoke(predict.app, options, catch_exceptions=False)
    for again, answer in zip(json.loads(predicted.stdout), answers, strict=True):
        assert again["cell"] == pytest.approx(answer["cell"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("small.toml", "--cif", TETRAGONAL), "structures (--cif), not both."),
        (("--cif", TETRAGONAL), "need an instrument file: --instrument FILE."),
        (("--profile", PROFILE), "Name a campaign file, or structures with --cif"),
        (("--json",), "Name a campaign file, or structures with --cif"),
        (("missing.toml",), "Campaign file missing.toml cannot be read"),
        ((*MATERIAL, "--profile", "missing.xye"), "missing.xye"),
    ],
)
def test_what_is_not_possible_is_a_single_sentence(
    arguments: tuple[str, ...],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run(main_job.app, [*arguments])
    printed, error = capfd.readouterr()
    assert exit_.value.code == 2
    assert reason in error
    assert printed == ""
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "mine.toml").exists()


@pytest.mark.slow
def test_another_campaign_of_the_same_name_is_not_replaced(
    tmp_path: Path,
    indices: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    link_indices(tmp_path, indices)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("name = 'mine'\n")
    with pytest.raises(SystemExit) as exit_:
        run(main_job.app, [*MATERIAL, "--json"])
    printed, error = capfd.readouterr()
    assert exit_.value.code == 2
    assert printed == ""
    last = error.strip().splitlines()[-1]
    assert "mine.toml exists and is another campaign: run it by its name" in last
    assert (tmp_path / "mine.toml").read_text() == "name = 'mine'\n"

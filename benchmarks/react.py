"""Measure monitoring and reaction: drifts of an instrument, each served, noticed, and reacted to.

    python benchmarks/react.py FOLDER [--scenarios difc,background,broadening,foreign]

In FOLDER a model for BaTiO3 on NOMAD's bank 4, cubic or tetragonal in the ranges below, is made
first (bragg simulate, bragg train search --preset quick). A service records 200 undisturbed
profiles, sent as files, then 50 of each disturbance: difC off by 3e-4, a background three times as
high, twice the broadening, or another compound. bragg monitor and bragg react are run as commands.
Coverage and mse_paper are of fresh draws of the disturbed state. Prints JSON, a line each.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import requests
import typer

from bragg_data.campaign import BUILT_IN, Campaign
from bragg_data.simulation.measurement_effects import (
    Draws,
    draw_labels,
    draw_profiles,
    simulator_for,
)
from bragg_models.metrics import errors, summary
from bragg_models.predictors import Predictor
from catalog import registry
from catalog.tracking import Tracking
from pipelines.monitoring.plan import scaled
from pipelines.recording.record import FILE as DATABASE
from pipelines.registry.registration import load_version
from pipelines.simulation.foreign import foreign_cells, foreign_phases
from pipelines.training.expectation import expectation
from tests.servers import ROOT, server_at

UNDISTURBED, DISTURBED = 200, 50
PHASES = """
[[phases]]
name = "cubic"
cif = "batio3_cubic.cif"
samples = 600
[phases.cell]
a = { low = 3.98, high = 4.04 }

[[phases]]
name = "tetragonal"
cif = "batio3_tetragonal.cif"
samples = 1400
[phases.cell]
a = { low = 3.96, high = 4.01 }
c = { low = 4.02, high = 4.08 }
"""
DIFC, BACKGROUND, BROADENING = 3e-4, 3.0, 2.0


class Disturbed:
    """A campaign whose effects differ from those of the training."""

    def __init__(self, campaign: Campaign, name: str) -> None:
        self.campaign, self.name = campaign, name
        self.difc = DIFC if name == "difc" else 0.0
        self.effects = campaign.measurement_effects
        if name == "background":
            self.effects = scaled(self.effects, "background", BACKGROUND)
        if name == "broadening":
            self.effects = scaled(self.effects, "width", BROADENING)

    def draws(self, count: int, seed: int) -> Draws:
        """Draw profiles of this state."""
        rng = np.random.default_rng([seed, 2026])
        campaign, instrument = self.campaign, self.campaign.instrument
        instrument = instrument.with_parameters(difc=instrument.difc * (1 + self.difc))
        phase, cells = draw_labels(campaign, -(-count // len(campaign.phases)), rng)
        order, phases = rng.permutation(len(phase))[:count], None
        if self.name == "foreign":
            phases = foreign_phases(campaign)[:1]
            phase, cells = (
                np.zeros(len(phase), dtype=int),
                foreign_cells(phases[0], len(phase), rng),
            )
        simulator = simulator_for(campaign, phases, instrument)
        return draw_profiles(simulator, phase[order], cells[order], rng, self.effects)


def send(address: str, state: Disturbed, count: int, seed: int, known: Path) -> None:
    """Post profiles as files with the nominal calibration, and note their true cells."""
    drawn, tof = state.draws(count, seed), state.campaign.grid.tof
    lines = []
    for row in range(count):
        covered = drawn.covered[row]
        columns = np.column_stack([tof, drawn.intensity[row], drawn.sigma[row]])[covered]
        text = "# bin centres\n" + "\n".join(f"{t:.4f} {y:.8e} {s:.8e}" for t, y, s in columns)
        name = f"{state.name}-{seed}-{row}.xye"
        body = {"text": text, "name": name, "instrument": state.campaign.instprm}
        response = requests.post(f"{address}/predict/file", json=body, timeout=60)
        if response.status_code != 422:  # no significant peaks
            response.raise_for_status()
        if state.name != "foreign":
            names = state.campaign.phases[drawn.phase[row]].lattice.free_parameters
            cell = dict(zip("abc", drawn.cells[row], strict=False))
            free = (f"{cell[n]:.6f}" if n in names else "" for n in "abc")
            lines.append(f"{name},{','.join(free)}")
    with known.open("a") as file:
        file.write("\n".join([*lines, ""]))


def command(*words: object) -> tuple[int, dict[str, object], float]:
    """Run a command with --json; return exit code, what it prints, and seconds."""
    began = time.monotonic()
    full = [sys.executable, "-m", *map(str, words), "--json"]
    done = subprocess.run(full, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, json.loads(done.stdout), round(time.monotonic() - began, 1)


def performance(predictor: Predictor, state: Disturbed, count: int) -> dict[str, float]:
    """Return coverage, accuracy and mse_paper on fresh draws of a state."""
    drawn = state.draws(count, 9)
    prepared = drawn.prepared()
    rows = prepared.max(axis=1) > 0
    prediction = predictor.predict(prepared[rows])
    truth, targets = (drawn.phase[rows], drawn.cells[rows]), predictor.targets
    expected = expectation(targets, prediction, *truth, 0.0)
    accepted = np.flatnonzero(prediction.accepted)
    values = (v[accepted] for v in (*truth, prediction.phase, prediction.cells))
    scores = summary(targets, errors(targets, *values))["all"]
    names = {"coverage": expected.coverage, "accuracy": expected.accuracy}
    names |= {"relative_mae": expected.relative_mae, "accepted": expected.accepted}
    names |= {"mse_paper_accepted": scores["mse_paper"]}
    return {name: float(f"{value:.4g}") for name, value in names.items() if value is not None}


def make_model(folder: Path, places: list[str]) -> None:
    """Simulate a campaign of two phases, and register a model for its measured profiles."""
    folder.mkdir(exist_ok=True)
    for file in BUILT_IN.glob("*.*"):
        shutil.copy(file, folder)
    paper = (folder / "batio3_nomad.toml").read_text(encoding="utf-8")
    head = paper[: paper.index("[[phases]]")].replace('"grid"', '"sobol"')
    campaign = folder / "two-phases.toml"
    campaign.write_text(head.replace('"batio3-nomad"', '"two-phases"') + PHASES, encoding="utf-8")
    store = places[:2]
    simulate = "--campaign", str(campaign), "--simulator", "kinematic", "--tag", "two-phases-v1"
    for words in (("simulate", *simulate, *store), ("train", "search", *places)):
        full = [sys.executable, "-m", f"pipelines.{words[0]}", *words[1:], "--workers", "2"]
        subprocess.run(full, cwd=ROOT, stdout=sys.stderr, check=True)


def main(
    folder: Path,
    scenarios: str = "difc,background,broadening,foreign",
    count: Annotated[int, typer.Option(help="Draws of a state, for coverage and errors.")] = 600,
    workers: int = 2,
) -> None:
    folder = folder.absolute()
    places = ["--store", f"{folder}/store", "--state", f"{folder}/state"]
    address = f"sqlite:///{folder}/mlflow.db"
    if not (folder / "mlflow.db").exists():
        make_model(folder, [*places, "--tracking", address])
    tracking = Tracking(address)
    (name,) = registry.names(tracking)
    base = registry.champion(tracking, name)
    assert base is not None
    before = load_version(tracking.uri, base)
    undisturbed = Disturbed(before.campaign, "undisturbed")
    reference = performance(before, undisturbed, count)
    print(json.dumps({"state": "undisturbed", "model": base.uri, **reference}), flush=True)
    where = "--tracking", tracking.uri
    with tempfile.TemporaryFile() as log:

        def served(state: Disturbed, n: int, seed: int, record: Path) -> None:
            arguments = "pipelines.serve", "--model", base.uri, "--record", str(record), *where
            with server_at(*arguments, answers="ready", log=log) as (address, _):
                send(address, state, n, seed, record / "known.csv")

        first = folder / "record-undisturbed"
        if not (first / DATABASE).exists():
            first.mkdir()
            (first / "known.csv").write_text("file,a,b,c\n")
            served(undisturbed, UNDISTURBED, 1, first)
        watch = *where, "--known"
        code, seen, _ = command("pipelines.monitor", "--record", first, *watch, first / "known.csv")
        result = {"state": "undisturbed", "alarms": seen["alarms"], "exit": code}
        print(json.dumps(result), flush=True)
        for scenario in scenarios.split(","):
            state, record = Disturbed(before.campaign, scenario), folder / f"record-{scenario}"
            shutil.rmtree(record, ignore_errors=True)
            shutil.copytree(first, record)
            served(state, DISTURBED, 2, record)
            options = "--record", record, *watch, record / "known.csv"
            _, seen, _ = command("pipelines.monitor", *options)
            alarms = seen["alarms"]
            noticed = [a["at"] - UNDISTURBED + 1 for a in alarms]  # type: ignore[attr-defined]
            result = {"state": scenario, "noticed_after": noticed, "alarms": alarms}
            print(json.dumps(result), flush=True)
            registry.set_alias(tracking, base, registry.CHAMPION)
            code, reaction, seconds = command(
                "pipelines.react", *options, *places, "--workers", workers
            )
            result = {"state": scenario, "exit": code, "command_seconds": seconds, **reaction}
            print(json.dumps(result), flush=True)
            if state.name == "foreign":
                continue
            result = {"state": scenario, "model": base.uri, **performance(before, state, count)}
            print(json.dumps(result), flush=True)
            if reaction["candidate"]:
                version = registry.find(tracking, str(reaction["candidate"]))
                after = performance(load_version(tracking.uri, version), state, count)
                print(json.dumps({"state": scenario, "model": version.uri, **after}), flush=True)
        registry.set_alias(tracking, base, registry.CHAMPION)


if __name__ == "__main__":
    typer.run(main)

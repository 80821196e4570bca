"""Pseudo-experiments: simulated profiles with noise and measurement effects, and their truth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from bragg_data.campaign import Campaign
from bragg_data.errors import first_line
from bragg_data.measurement.load import Label, Measurement, measurement_from_profile
from bragg_data.measurement.readers import Profile, ProfileError


class PseudoExperiment(NamedTuple):
    """A pseudo-experiment on a campaign's grid, its label, and its truth."""

    measurement: Measurement
    label: Label
    truth: Mapping[str, Any]  # displacement and broadening parameters, difC, Zero …


def read_pseudo_experiments(
    path: Path, campaign: Campaign, *, calibrated: bool
) -> list[PseudoExperiment]:
    """Read pseudo-experiments: an NPZ file with ``tof``, ``y``, ``sigma``, and a JSON file.

    The truth is in the file of the same name that ends with .json. With ``calibrated`` each
    profile's true difC and Zero are used, as a calibrated instrument has them; otherwise its times
    are taken as those of the campaign's instrument. The campaign has one phase of each system.

    Raises
    ------
    ProfileError
        If the files do not exist, or hold something else.
    """
    experiments = []
    try:
        with np.load(path, allow_pickle=False) as file:
            tof, intensity, sigma = (np.asarray(file[k], float) for k in ("tof", "y", "sigma"))
        truths = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        for row, (y, deviation, truth) in enumerate(zip(intensity, sigma, truths, strict=True)):
            title = f"pseudo-experiment {truth['index']}"
            profile = Profile(tof, y, deviation, title=title, source=f"{path}#{row}")
            instruments = None
            if calibrated:
                difc, tzero = truth["difC"], truth["Zero"]
                instruments = [campaign.instrument.with_parameters(difc=difc, tzero=tzero)]
            measurement = measurement_from_profile(profile, campaign, instruments)
            experiments.append(PseudoExperiment(measurement, _label(truth, campaign), truth))
    except (OSError, EOFError, BadZipFile, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(
            f"{path} holds no pseudo-experiments with their truth ({first_line(error)}). Expected: "
            f"an NPZ file with tof (n,), y and sigma (m, n), and a JSON file of the same name."
        ) from error
    return experiments


def _label(truth: Mapping[str, Any], campaign: Campaign) -> Label:
    systems = [phase.crystal_system.name for phase in campaign.phases]
    code = systems.index(truth["crystal_system"])
    lattice = campaign.phases[code].lattice
    free = np.array([[truth[parameter] for parameter in lattice.free_parameters]])
    return Label(code, tuple(float(v) for v in lattice.cells(free)[0]))

"""A trained model, ready to answer: its network, what its outputs mean, and its preprocessing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bragg_data.campaign import Campaign
from bragg_data.crystal import CELL_PARAMETERS, CrystalSystem
from bragg_data.preprocessing import PreprocessingError, Profiles, preprocessing
from bragg_models.networks import NetworkError, build
from bragg_models.targets import Targets, TargetsError
from bragg_models.training import outputs

FORMAT = 1
"""Version of the layout of a saved model."""

DESCRIPTION, WEIGHTS = "model.json", "weights.safetensors"
"""Files of a saved model: what it is, and its numbers."""


class PredictorError(ValueError):
    """A saved model that cannot be read, or profiles that it cannot answer for."""


@dataclass(frozen=True)
class Prediction:
    """The answers for n profiles.

    Attributes
    ----------
    probabilities : shape (n, n_phases)
        Of each of the campaign's phases.
    phase : shape (n,)
        Index of the most probable phase.
    cells : shape (n, 6)
        Cell of that phase: a, b, c in ångström; alpha, beta, gamma in degrees.
    """

    probabilities: NDArray[np.float64]
    phase: NDArray[np.intp]
    cells: NDArray[np.float64]


@dataclass(frozen=True)
class Predictor:
    """A trained model with all that its answers need.

    Attributes
    ----------
    kind
        Name of the network, as in :func:`~bragg_models.networks.build`.
    network
        Trained.
    targets
        Phases, free parameters and their scaling.
    preprocessing
        Name and version of the function that prepares its profiles.
    points
        Length of a profile.
    provenance
        Plain JSON values: the campaign's texts (``campaign_toml``, ``cifs``,
        ``instrument_instprm``), the snapshot, the split, the seeds, the code's commit …
    """

    kind: str
    network: nn.Module
    targets: Targets
    preprocessing: str
    points: int
    provenance: Mapping[str, Any]

    @cached_property
    def campaign(self) -> Campaign:
        """The campaign that it was trained on: phases, instrument and grid."""
        p = self.provenance
        return Campaign(p["campaign_toml"], p["cifs"], p["instrument_instprm"])

    @property
    def phase_names(self) -> tuple[str, ...]:
        """The phases, in the order of the probabilities."""
        return self.targets.names

    @property
    def _prepare(self) -> Callable[[Profiles], Profiles]:
        return preprocessing(self.preprocessing).function

    def predict(self, profiles: ArrayLike) -> Prediction:
        """Answer for profiles on the campaign's grid.

        Parameters
        ----------
        profiles : shape (n, points)
            Intensities without background, in any scale; the model's own preprocessing is applied
            here.

        Raises
        ------
        PredictorError
            If the profiles have another length, or hold values that are not finite.
        bragg_data.preprocessing.PreprocessingError
            If a profile has no signal.
        """
        values = np.asarray(profiles, dtype=np.float32)
        if values.ndim != 2 or values.shape[1] != self.points:
            raise PredictorError(
                f"The model answers for profiles of {self.points} points, given as an array of "
                f"shape (n, {self.points}); got shape {values.shape}."
            )
        if not np.isfinite(values).all():
            raise PredictorError("A profile holds values that are not finite numbers.")
        prepared = np.ascontiguousarray(self._prepare(values), np.float32)
        device = next(self.network.parameters()).device
        probabilities, scaled = outputs(self.network, prepared, device)
        phase = probabilities.argmax(axis=1)
        return Prediction(
            probabilities.astype(np.float64), phase, self.targets.decode(scaled, phase)
        )

    def save(self, directory: Path) -> None:
        """Write the model into an empty directory, as JSON and safetensors."""
        directory.mkdir(parents=True, exist_ok=True)
        described = {
            "format": FORMAT,
            "kind": self.kind,
            "network": asdict(self.network.config),  # type: ignore[call-overload]
            "targets": self.targets.to_json(),
            "preprocessing": self.preprocessing,
            "points": self.points,
            "provenance": dict(self.provenance),
        }
        text = json.dumps(described, indent=1, ensure_ascii=False)
        (directory / DESCRIPTION).write_text(text, encoding="utf-8")
        weights = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        save_file(weights, directory / WEIGHTS)


def load_predictor(directory: Path) -> Predictor:
    """Read a model that :meth:`Predictor.save` wrote. Nothing in it is executed.

    Raises
    ------
    PredictorError
        If a file is missing or damaged, or was written by a newer version of this code.
    """
    try:
        described = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        weights = load_file(directory / WEIGHTS)
        if described["format"] != FORMAT:
            raise PredictorError(
                f"The model in {directory} has format {described['format']}; this code reads "
                f"{FORMAT}. Use the code that wrote it."
            )
        network = build(described["kind"], described["network"])
        network.load_state_dict(weights)
        prepared_by = described["preprocessing"]
        targets = Targets.from_json(described["targets"])
        provenance, points = described["provenance"], int(described["points"])
        kind = described["kind"]
    except (
        OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError,
    ) as error:  # fmt: skip
        if isinstance(error, (PredictorError, TargetsError, NetworkError)):
            raise
        raise PredictorError(
            f"The model in {directory} is incomplete or damaged ({error}). Train it again, or name "
            f"another version."
        ) from error
    try:
        preprocessing(prepared_by)
    except PreprocessingError as error:
        raise PredictorError(
            f"{error} Use the code that trained the model: "
            f"{provenance.get('code_commit', 'unknown')}."
        ) from error
    network.eval()
    return Predictor(kind, network, targets, prepared_by, points, provenance)


class _Served:
    """A predictor as MLflow's own tools want it."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, profiles: ArrayLike, params: object = None) -> pd.DataFrame:  # noqa: ARG002
        answer = self._predictor.predict(np.atleast_2d(np.asarray(profiles, dtype=np.float32)))
        names = self._predictor.phase_names
        systems = self._predictor.targets.crystal_systems[answer.phase]
        return pd.DataFrame(
            {
                "phase": [names[code] for code in answer.phase],
                "crystal_system": [CrystalSystem(code).name for code in systems],
                **dict(zip(CELL_PARAMETERS, answer.cells.T, strict=True)),
                **{f"p_{n}": answer.probabilities[:, k] for k, n in enumerate(names)},
            }
        )


def output_columns(targets: Targets) -> dict[str, str]:
    """Return the columns of the answer that MLflow's tools get, and their types."""
    return {
        "phase": "string",
        "crystal_system": "string",
        **dict.fromkeys(CELL_PARAMETERS, "double"),
        **{f"p_{name}": "double" for name in targets.names},
    }


def _load_pyfunc(path: str) -> _Served:
    """Load a saved model for MLflow's own tools, which call this by its name."""
    return _Served(load_predictor(Path(path)))

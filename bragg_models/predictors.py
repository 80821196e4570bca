"""A trained model ready for prediction: its weights, targets, and preprocessing.

Registered models record the name of this module: MLflow calls :func:`_load_pyfunc` by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError, numpy
from safetensors import torch as tensors
from torch import nn

from bragg_data.arrays import AnyFloats, Array, Floats32, Indices, Mask
from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem
from bragg_data.model_provenance import ModelProvenance
from bragg_data.preprocessing import PreprocessingError, preprocessing
from bragg_models.forest import ForestError, ForestModel
from bragg_models.networks import guided_config, paper
from bragg_models.networks.guided import Guided
from bragg_models.networks.guided_config import guided_config_from_json, with_tuples
from bragg_models.networks.paper import Caenn, Multitask, NetworkError, feature_network
from bragg_models.networks.perceptron import Perceptron
from bragg_models.networks.robust import Robust, single_thread
from bragg_models.targets import Targets, TargetsError
from bragg_models.training.inference import outputs, transformed

FORMAT = 2  # of a saved model's layout; 1 has other names of some values and weights
# Files of a saved model: description, weights, and the directory of its classifier, if any.
DESCRIPTION, WEIGHTS, CLASSIFIER = "model.json", "weights.safetensors", "classifier"


class PredictorError(ValueError):
    """A saved model that cannot be read, or profiles that it cannot be applied to."""


@dataclass(frozen=True)
class Prediction:
    """Predictions for n profiles; the optional ones are from models that estimate them."""

    probabilities: Array  # (n, n_phases), of each of the campaign's phases
    phase: Indices  # (n,): index of the most probable phase, or of the known one
    # (n, 6): cell of that phase, in Å and degrees. It encloses a volume; NaN from a classifier.
    cells: Array
    # (n, 6, 2): ends of the 90 % intervals of the free cell parameters, NaN where one is not free.
    intervals: Array | None = None
    accepted: Mask | None = None  # (n,): the profile may belong to one of the phases
    # (n,): share of the profile's square that ``phase`` and its cell leave unexplained.
    unexplained: Array | None = None
    limit: float | None = None  # unexplained share above which a profile is rejected

    def __getitem__(self, rows: slice) -> Prediction:
        return replace(self, **{n: v[rows] for n, v in vars(self).items() if np.ndim(v)})

    @classmethod
    def concatenated(cls, predictions: Sequence[Prediction]) -> Prediction:
        """Return the predictions of several batches of profiles by one model as one."""
        names = vars(predictions[0])
        columns = {n: [getattr(p, n) for p in predictions] for n in names}
        values: dict[str, Any] = {
            n: np.concatenate(v) if np.ndim(v[0]) else v[0] for n, v in columns.items()
        }
        return cls(**values)

    def widened(self, errors: Array) -> Prediction:
        """Return predictions with intervals that allow for relative errors of lengths, (n,)."""
        if self.intervals is None:
            return self
        intervals = self.intervals.copy()
        intervals[:, :3] *= 1 + errors[:, None, None] * np.array([-1.0, 1.0])
        return replace(self, intervals=intervals)


@dataclass(frozen=True)
class Predictor:
    """A trained model with everything that a prediction needs."""

    kind: str  # name of the model; of a network as for build
    model: nn.Module | ForestModel
    targets: Targets
    preprocessing: str  # name and version of the function that prepares its profiles
    points: int  # length of a profile
    provenance: ModelProvenance
    classifier: Predictor | None = None  # predicts the phases; class-conditional forests need one

    @cached_property
    def campaign(self) -> Campaign:
        """The campaign that it was trained on: phases, instrument and grid."""
        p = self.provenance
        return Campaign(p.campaign_toml, p.cifs, p.instrument_instprm)

    @property
    def has_intervals(self) -> bool:
        """Whether its predictions have intervals and acceptance."""
        return isinstance(self.model, Robust)

    def _prepared(self, profiles: ArrayLike) -> Floats32:
        prepare = preprocessing(self.preprocessing).function
        return np.ascontiguousarray(prepare(np.asarray(profiles)), np.float32)

    def predict(
        self,
        profiles: ArrayLike,
        phase: ArrayLike | None = None,
        calibrated: ArrayLike | None = None,
    ) -> Prediction:
        """Predict phase and cell of profiles (n, points) on the campaign's grid.

        These are intensities without background, on any scale; they are prepared here. ``phase``
        (n,) are known phases, under which the cells are predicted, by default the most probable
        ones; ``calibrated`` (n,) whether a measurement's own calibration was used, which the
        intervals depend on, by default true for all. Raises `PredictorError` if the profiles have
        another length or values that are not finite, or a known phase does not exist, and
        `bragg_data.preprocessing.PreprocessingError` if a profile has no signal.
        """
        values = np.asarray(profiles, dtype=np.float32)
        if values.ndim != 2 or values.shape[1] != self.points:
            raise PredictorError(
                f"The model expects profiles of {self.points} points, as an array of shape "
                f"(n, {self.points}); got shape {values.shape}."
            )
        if not np.isfinite(values).all():
            raise PredictorError("A profile contains values that are not finite numbers.")
        known = None
        if phase is not None:
            codes, phases = np.asarray(phase), self.targets.names
            if codes.shape != (len(values),) or not np.isin(codes, np.arange(len(phases))).all():
                raise PredictorError(
                    f"Expected a known phase for each of the {len(values)} profiles, as a code "
                    f"from 0 to {len(phases) - 1} ({', '.join(phases)})."
                )
            known = codes.astype(np.intp)
        if known is None and isinstance(self.model, Robust):
            is_calibrated = np.ones(len(values)) if calibrated is None else np.asarray(calibrated)
            return self._predict_robust(self.model, values, is_calibrated.astype(bool))
        probabilities: AnyFloats
        if known is None and self.classifier is not None:
            classified = self.classifier.predict(values)
            probabilities, predicted = classified.probabilities, classified.phase
            _, scaled = self._outputs(values, predicted)
        else:
            probabilities, scaled = self._outputs(values, known)
            predicted = probabilities.argmax(axis=1) if known is None else known
        if scaled.shape[1]:
            cells = self.targets.decode(scaled, predicted)
        else:
            cells = np.full((len(values), len(CELL_PARAMETERS)), np.nan)
        return Prediction(probabilities.astype(np.float64), predicted, cells)

    @cached_property
    def _tables(self) -> None:
        """The network's tables of known cells, computed at once, a phase in each thread.

        The first prediction would compute them with all threads of torch in each small operation,
        which takes three times as long, and twenty times where other work shares the processors.
        """
        network = self.model
        if not isinstance(network, Robust):
            return
        device, phases = network.head.device, network.config.pattern.phases

        def tabulate(code: int) -> None:
            with torch.inference_mode():
                network.known_patterns(code, device)

        threads = torch.get_num_threads() if device.type == "cpu" else 1
        longest_first = sorted(range(len(phases)), key=lambda code: -phases[code].lines)
        with single_thread(), ThreadPoolExecutor(threads) as pool:
            list(pool.map(tabulate, longest_first))

    def _predict_robust(self, model: Robust, profiles: Floats32, calibrated: Mask) -> Prediction:
        _ = self._tables
        predicted = model.eval().predict(self._prepared(profiles), calibrated)
        probabilities, values, half_widths, unexplained = predicted
        phase = probabilities.argmax(axis=1)
        cells = self.targets.decode(values, phase)
        intervals = np.full((len(cells), len(CELL_PARAMETERS), 2), np.nan)
        for column, name in enumerate(self.targets.parameters):
            rows = self.targets.free[phase, column]
            half = half_widths[rows, column] * self.targets.half_range[phase[rows], column]
            entry = CELL_PARAMETERS.index(name)
            intervals[rows, entry] = cells[rows, entry, None] + np.stack([-half, half], axis=1)
        limit = float(model.limit)
        accepted = unexplained <= limit
        return Prediction(probabilities, phase, cells, intervals, accepted, unexplained, limit)

    def _outputs(self, profiles: Floats32, phase: Indices | None) -> tuple[AnyFloats, AnyFloats]:
        prepared = self._prepared(profiles)
        if isinstance(self.model, ForestModel):
            return self.model.outputs(prepared, self.targets, phase)
        device = next(self.model.parameters()).device
        # Their regression head is the same for every phase.
        if isinstance(self.model, Multitask | Caenn | Perceptron):
            phase = None
        return outputs(self.model, prepared, device, phase=phase)

    def features(self, profiles: ArrayLike) -> Floats32:
        """Return the features (n, n_features) that the model computes from profiles (n, points).

        The activations of a classifier's dense layer, or an auto-encoder's latent representation;
        raises `PredictorError` if the model has none.
        """
        network = feature_network(self.model)
        if network is None:
            raise PredictorError(f"A model of kind '{self.kind}' has no features.")
        return transformed(network, self._prepared(profiles), next(network.parameters()).device)

    def save(self, directory: Path) -> None:
        """Write the model into an empty directory, as JSON and safetensors files."""
        directory.mkdir(parents=True, exist_ok=True)
        described: dict[str, object] = {
            "format": FORMAT,
            "kind": self.kind,
            "targets": self.targets.to_json(),
            "preprocessing": self.preprocessing,
            "points": self.points,
            "provenance": self.provenance.to_json(),
        }
        if isinstance(self.model, ForestModel):
            described["forest"] = {"integrated": self.model.integrated}
            numpy.save_file(self.model.arrays(), directory / WEIGHTS)
        else:
            described["network"] = asdict(self.model.config)  # type: ignore[call-overload]
            state = self.model.state_dict().items()
            weights = {name: value.detach().cpu().contiguous() for name, value in state}
            tensors.save_file(weights, directory / WEIGHTS)
        text = json.dumps(described, indent=1, ensure_ascii=False)
        (directory / DESCRIPTION).write_text(text, encoding="utf-8")
        if self.classifier is not None:
            self.classifier.save(directory / CLASSIFIER)


def load_predictor(directory: Path) -> Predictor:
    """Read a model that :meth:`Predictor.save` wrote. No code from the files is executed.

    Raises `PredictorError` if a file is missing or damaged, or of a newer version of this code.
    """
    try:
        described = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        if described["format"] not in (1, FORMAT):
            raise PredictorError(
                f"The model in {directory} has format {described['format']}; this code reads 1 and "
                f"{FORMAT}. Use the code that wrote it."
            )
        prepared_by = described["preprocessing"]
        targets = Targets.from_json(described["targets"])
        provenance = ModelProvenance.from_json(described["provenance"])
        points = int(described["points"])
        kind = described["kind"]
        model = _load_model(directory / WEIGHTS, described, targets)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, (PredictorError, TargetsError, NetworkError, ForestError)):
            raise
        raise PredictorError(
            f"The model in {directory} is incomplete or damaged ({error}). Train it again, or name "
            f"another version."
        ) from error
    try:
        preprocessing(prepared_by)
    except PreprocessingError as error:
        raise PredictorError(
            f"{error} Use the code that trained the model: {provenance.code_commit}."
        ) from error
    nested = directory / CLASSIFIER
    classifier = load_predictor(nested) if nested.exists() else None
    expected = targets.names, points
    if classifier is not None and (classifier.targets.names, classifier.points) != expected:
        raise PredictorError(
            f"The model in {directory} is for {', '.join(targets.names)} on {points} points, its "
            f"classifier for {', '.join(classifier.targets.names)} on {classifier.points}. Train "
            f"it again."
        )
    if isinstance(model, ForestModel) and not model.integrated and classifier is None:
        raise PredictorError(
            f"The model in {directory} has a forest for each phase and no classifier that predicts "
            f"the phase. Train it again, or name another version."
        )
    return Predictor(kind, model, targets, prepared_by, points, provenance, classifier)


def _load_model(
    weights: Path, described: Mapping[str, Any], targets: Targets
) -> nn.Module | ForestModel:
    if "forest" in described:
        integrated = bool(described["forest"]["integrated"])
        return ForestModel.from_arrays(numpy.load_file(weights), targets, integrated=integrated)
    network = build(described["kind"], described["network"])
    network.load_state_dict(tensors.load_file(weights))
    return network.eval()


def _conditional_config(
    *, classifier: Mapping[str, Any], free: list[list[int]], **values: Any
) -> paper.ConditionalConfig:
    if "own_features" in values:  # deprecated key
        values["separate_features"] = values.pop("own_features")  # deprecated key
    columns = tuple(map(tuple, free))
    multitask = paper.MultitaskConfig(**with_tuples(classifier))
    return paper.ConditionalConfig(multitask, columns, **values)


_KINDS: Mapping[str, tuple[Callable[..., Any], type[nn.Module]]] = {
    "multitask": (paper.MultitaskConfig, Multitask),
    "conditional": (_conditional_config, paper.Conditional),
    "caenn": (paper.CaennConfig, Caenn),
    "perceptron": (guided_config.PerceptronConfig, Perceptron),
    "guided": (guided_config_from_json, Guided),
    "robust": (guided_config_from_json, Robust),
}


def build(kind: str, config: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Return a network of a kind, from plain JSON values, with seeded initial weights.

    The global generator of torch is not changed. Raises `NetworkError` if the kind is unknown or
    the values do not fit it.
    """
    if kind not in _KINDS:
        raise NetworkError(f"There is no network '{kind}'. Choose one of {', '.join(_KINDS)}.")
    read, network_type = _KINDS[kind]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return network_type(read(**with_tuples(config)))
    except NetworkError:
        raise
    # Plain JSON may hold anything, at any depth.
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise NetworkError(f"The configuration of a {kind} network is invalid: {error}.") from error


class _Served:
    """A predictor with the interface of MLflow's Python models."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, profiles: ArrayLike, params: object = None) -> pd.DataFrame:  # noqa: ARG002
        prediction = self._predictor.predict(np.atleast_2d(np.asarray(profiles, dtype=np.float32)))
        targets = self._predictor.targets
        systems = targets.crystal_systems[prediction.phase]
        columns = [
            [targets.names[code] for code in prediction.phase],
            [CrystalSystem(code).name for code in systems],
            *prediction.cells.T,
            *prediction.probabilities.T,
        ]
        return pd.DataFrame(dict(zip(output_columns(targets), columns, strict=True)))


def output_columns(targets: Targets) -> dict[str, str]:
    """Return the columns, with their types, of the table that MLflow's tools get."""
    return {
        "phase": "string",
        "crystal_system": "string",
        **dict.fromkeys(CELL_PARAMETERS, "double"),
        **{f"p_{name}": "double" for name in targets.names},
    }


def _load_pyfunc(path: str) -> _Served:
    """Load a saved model for MLflow's own tools, which call this by its name."""
    return _Served(load_predictor(Path(path)))

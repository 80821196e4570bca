"""Registered versions that are evaluated: chosen, loaded, and trained again."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from bragg_data.arrays import Mask
from bragg_data.campaign import Samples
from bragg_data.model_provenance import ModelProvenance
from bragg_data.splits import TRAINED
from bragg_data.store.repository import Store
from bragg_models.forest import ForestModel
from bragg_models.predictors import Predictor, load_predictor
from bragg_models.targets import Targets
from catalog import packages, registry
from catalog.model_files import downloaded_model
from catalog.tracking import Tracking
from pipelines.evaluation import names as known
from pipelines.evaluation.names import EvaluateError
from pipelines.evaluation.scoring import SPLIT, Cells, EvaluatedModel, Phases, Profiles, part_of


@dataclass(frozen=True)
class Candidate:
    """A registered version to evaluate.

    Its number is shown where other versions of the same model and split are evaluated too.
    """

    version: registry.ModelVersion
    numbered: bool = False

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.version.tags.get("model", self.version.name)

    @property
    def split(self) -> str:
        """Name of the split that it was trained on."""
        return self.version.tags.get("split", "random").partition(",")[0]

    @property
    def preset(self) -> str:
        """Name of the preset."""
        return self.version.tags.get("preset", "")

    @property
    def label(self) -> str:
        """Name for a reader."""
        label = known.LABELS.get(self.model, self.model)
        return f"{label} v{self.version.version}" if self.numbered else label


def choose_candidates(
    tracking: Tracking, dataset: xr.Dataset, names: Sequence[str] = ()
) -> list[Candidate]:
    """Choose the versions to evaluate: of each model and split the newest one on this data set.

    (Of another data set, test samples may be among their training samples.) The names are those of
    models, or addresses of versions; all models if empty. Raises `EvaluateError` if a name is not
    known, a version was trained on other data, or there is nothing to evaluate, and `ModelError` if
    there is no such version.
    """
    campaign, content, tag = (dataset.attrs[key] for key in ("campaign", "content_hash", "tag"))
    models = (*known.MODELS, *known.MEASURED)
    registered = dict.fromkeys(registry.registered_name(campaign, model) for model in models)
    on_data = [
        Candidate(version)
        for name in registered
        for version in registry.versions(tracking, name)
        if version.tags.get("content_hash") == content
    ]
    newest: dict[tuple[str, str], Candidate] = {}
    for candidate in on_data:
        newest.setdefault((candidate.model, candidate.split), candidate)
    chosen: list[Candidate] = []
    if not names:
        order = {model: number for number, model in enumerate(known.MODELS)}
        chosen = sorted(newest.values(), key=lambda c: order.get(c.model, len(order)))
    for name in names:
        if name.startswith(("models:", packages.PREFIX)):
            version = registry.find(tracking, name)
            if version.tags.get("content_hash") != content:
                raise EvaluateError(
                    f"{name} was trained on {version.tags.get('data', 'unknown data')}, whose "
                    f"content is not that of {tag}. Name its own data set with --data."
                )
            chosen.append(Candidate(version))
        elif name in known.MODELS or any(name == c.model for c in on_data):
            chosen += [c for c in newest.values() if c.model == name]
        else:
            raise EvaluateError(
                f"There is no model '{name}'. Choose of {', '.join(known.MODELS)}, or give an "
                f"address such as models:/{campaign}/1."
            )
    if not chosen:
        command = known.train_command(names[0] if names else "all", "random")
        raise EvaluateError(
            f"No {' or '.join(names) or 'model'} trained on {tag} is registered in {tracking.uri}. "
            f"Train one first: {command} --data {tag}"
        )
    chosen = list({c.version.uri: c for c in chosen}.values())
    kinds = [(c.model, c.split) for c in chosen]
    return [replace(c, numbered=kinds.count((c.model, c.split)) > 1) for c in chosen]


def load_candidate(
    candidate: Candidate, tracking: Tracking, targets: Targets, labels: Samples, training: Mask
) -> EvaluatedModel:
    """Load a registered version, and check that it was trained on ``training`` samples (n,) alone.

    Targets and labels are those of the data set, with n samples. Raises `EvaluateError` if it has
    other phases, or may be trained on test samples, and `ModelError` or `PredictorError` if it
    cannot be read.
    """
    with downloaded_model(tracking.uri, candidate.version) as directory:
        predictor = load_predictor(directory)
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    uri, split = candidate.version.uri, predictor.provenance.split.to_json()
    if predictor.targets.names != targets.names:
        raise EvaluateError(
            f"{uri} has the phases {', '.join(predictor.targets.names)}; the data set has "
            f"{', '.join(targets.names)}. Leave it out by naming others with --models."
        )
    if np.isin(part_of(candidate.split, labels, split), TRAINED)[~training].any():
        raise EvaluateError(
            f"{uri} was trained on a split ({split}) that does not keep these test samples from "
            f"it ({SPLIT}). Leave it out by naming others with --models."
        )
    weights = nodes = 0
    for model in (p.model for p in (predictor, predictor.classifier) if p is not None):
        if isinstance(model, ForestModel):
            nodes += sum(len(forest.feature) for forest in model.forests)
        else:
            weights += sum(parameter.numel() for parameter in model.parameters())
    return replace(
        evaluated_model(candidate, predictor),
        command=_training_command(predictor.provenance),
        size=size,
        n_weights=weights,
        n_nodes=nodes,
    )


def evaluated_model(candidate: Candidate, predictor: Predictor) -> EvaluatedModel:
    """Return a registered version as a model to evaluate."""
    model, version = candidate.model, candidate.version

    def predict(profiles: Profiles) -> tuple[Phases, Cells | None]:
        prediction = predictor.predict(profiles)
        return prediction.phase, None if model == known.CLASSIFIER else prediction.cells

    def predict_cells(profiles: Profiles, phase: Phases) -> Cells:
        return predictor.predict(profiles, phase=phase).cells

    return EvaluatedModel(
        model,
        f"{model}-v{version.version}" if candidate.numbered else model,
        candidate.label,
        predict,
        predict_cells if model in known.CLASS_CONDITIONAL else None,
        version.uri,
        candidate.preset,
    )


def _training_command(provenance: ModelProvenance) -> str:
    task = provenance.order
    options: list[tuple[str, object]] = [
        ("data", provenance.data.tag),
        ("preset", provenance.preset),
        ("seed", provenance.seed),
        *(("extra-data", tag) for tag in provenance.extra_data),
        *(("extra-share", share) for share in task.get("extra_shares") or ()),
        ("continue-from", provenance.parent_uri),
        ("epochs", task.get("epochs")),
        ("max-seconds", task.get("max_seconds")),
    ]
    # A part of the guided network is registered under a name of its own.
    command = known.train_command(task.get("model", provenance.model), provenance.split.name)
    texts = (f"--{name} {shlex.quote(str(v))}" for name, v in options if v is not None)
    return " ".join([command, *texts])


def newest_trained_tag(store: Store, tracking: Tracking) -> str:
    """Return the newest tag of a store that a registered model was trained on.

    Raises `EvaluateError` if there is none.
    """
    trained = {
        version.tags.get("data")
        for name in registry.names(tracking)
        for version in registry.versions(tracking, name)
    }
    tags = [tag for tag in store.tags() if tag.name in trained]
    if not tags:
        raise EvaluateError(
            f"No model in {tracking.uri} was trained on a data set of {store.uri}. Train one "
            f"first: python -m pipelines.train"
        )
    return max(tags, key=lambda tag: tag.written_at).name

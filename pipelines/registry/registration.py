"""From a trained model to a registered one: where it came from, its tags, and who answers."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xarray as xr

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.model_provenance import ModelProvenance, SnapshotReference, SplitSettings
from bragg_data.provenance import code_commit
from bragg_data.store.schema import campaign_of
from bragg_models.predictors import Predictor, load_predictor, output_columns
from catalog import promotion, registry
from catalog.tracking import Run, Tracking
from pipelines.cli.console import say
from pipelines.registry.model_card import model_card, signature_units

CARD = "model_card.md"
"""The model card, among a model's files and its run's."""

_REQUIREMENTS = ("torch", "numpy", "pandas", "safetensors", "pydantic", "gemmi", "periodictable",
                 "numba")  # fmt: skip
# Of a version; its run and its card tell the rest.
_KEPT = ("model", "preset", "data", "split", "content_hash", "test_set")


def provenance_of(
    dataset: xr.Dataset,
    order: Mapping[str, Any],
    split: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> ModelProvenance:
    """Return where a model comes from.

    Parameters
    ----------
    dataset
        An opened snapshot.
    order
        What was asked for: ``model``, ``preset``, ``seed``, ``device`` …
    split
        Name, seed and shares of the split.
    settings
        The preset's values.
    """
    campaign = campaign_of(dataset)
    return ModelProvenance(
        model=order["model"],
        campaign=campaign.name,
        campaign_toml=campaign.toml,
        cifs=dict(campaign.cifs),
        instrument_instprm=campaign.instprm,
        units={p: "Å" if p in "abc" else "degree" for p in CELL_PARAMETERS},
        data=SnapshotReference.from_attrs(dataset.attrs),
        split=SplitSettings.from_json(split),
        test_set=test_set(dataset, split),
        preset=order["preset"],
        preset_values=settings,
        order=dict(order),
        seed=order["seed"],
        device=order["device"],
        code_commit=code_commit(),
        trained_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def test_set(dataset: xr.Dataset, split: Mapping[str, Any]) -> str:
    """Return a short name of the test samples of a split of a data set's contents."""
    values = (dataset.attrs["content_hash"], dict(split), "test")
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def run_tags(provenance: ModelProvenance) -> dict[str, str]:
    """Return the tags by which a run, and a version, are searched and compared."""
    commit, _, dirty = provenance.code_commit.partition("-")
    data, split = provenance.data, provenance.split
    return {
        "model": provenance.model,
        "preset": provenance.preset,
        "seed": str(provenance.seed),
        "data": data.tag,
        "snapshot_id": data.snapshot_id,
        "content_hash": data.content_hash,
        "simulator": data.simulator,
        "split": f"{split.name}, seed {split.seed}",
        "test_set": provenance.test_set,
        "code_commit": commit,
        "code_dirty": str(bool(dirty)).lower(),
        "mlflow.source.name": "pipelines.train",
        "mlflow.source.git.commit": commit,
    }


def register(run_: Run, predictor: Predictor) -> registry.ModelVersion:
    """Register a trained model as a new version.

    Raises
    ------
    ValueError
        If the model was not scored: its provenance has no ``score``.
    """
    provenance = predictor.provenance
    score = provenance.score
    if score is None:
        raise ValueError("A model is registered after its test: its provenance has no score.")
    tags = run_tags(provenance)
    name = registry.registered_name(provenance.campaign, provenance.model)
    card = model_card(predictor, name)
    run_.log_text(card, CARD)
    facts = {**{key: tags[key] for key in _KEPT}, "score": f"{score.value:.6g}"}
    if score.name == "mse_paper":
        facts["mse_paper"] = facts["score"]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "predictor"
        predictor.save(directory)
        (directory / CARD).write_text(card, encoding="utf-8")
        return registry.register(
            run_, name, directory,
            about=_about(provenance),
            loader_module=registry.LOADER,
            points=predictor.points,
            outputs=output_columns(predictor.targets),
            units={c: unit for c, (unit, _) in signature_units(predictor).items() if unit},
            requirements=_REQUIREMENTS,
            description=card,
            tags=facts,
        )  # fmt: skip


def _about(provenance: ModelProvenance) -> str:
    """Return what all versions of a registered name have in common."""
    name = registry.registered_name("", provenance.model)
    what = "Crystal systems" if registry.is_classifier(name) else "Crystal system and cell"
    kind = "measured" if registry.is_measured(name) else "neutron time-of-flight"
    return (
        f"{what} of {kind} profiles, trained on the campaign "
        f"{provenance.campaign}. @{registry.CHAMPION} answers unless another is named; "
        f"@{promotion.CANDIDATE} is the newest; @{promotion.PREVIOUS} is what a rollback brings "
        f"back. Compare and promote: python -m pipelines.promote NAME VERSION"
    )


def load_version(tracking_uri: str, version: registry.ModelVersion) -> Predictor:
    """Read a registered model back.

    Raises
    ------
    ModelError, PredictorError
        If its files are gone, damaged, or not those of a model of this project.
    """
    with registry.downloaded_model(tracking_uri, version) as directory:
        return load_predictor(directory)


def promote_if_better(
    tracking: Tracking, version: registry.ModelVersion, promote: bool
) -> tuple[bool, str]:
    """Make a version the candidate; the champion too if there is none, it is better, or told to.

    Returns
    -------
    is_champion
        Whether it is.
    uri
        Address of the version that answers from now on.
    """
    promotion.set_candidate(tracking, version)
    present = registry.champion(tracking, version.name)
    own = float(version.tags["score"])
    reason = None
    if present is not None and not promote:
        theirs = float(present.tags.get("score", present.tags.get("mse_paper", "nan")))
        if present.tags.get("test_set") != version.tags["test_set"]:
            reason = f"version {present.version} was tested on other samples"
        elif not own < theirs:
            reason = f"version {present.version} did better there ({theirs:.2e})"
    if reason is None:
        why = "trained with --promote" if promote else "lower error on the same test samples"
        promotion.promote(
            tracking, version, reason=why if present else "the first one", forced=promote,
            expected=present.version if present else None,
        )  # fmt: skip
        return True, version.uri
    assert present is not None
    say(
        f"The champion stays: {reason}. To compare them once more: python -m pipelines.promote "
        f"{version.name} {version.version}. To ask this one: --model {version.uri}"
    )
    return False, present.uri

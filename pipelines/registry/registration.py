"""Registering a trained model: its provenance and tags, and whether it becomes the champion."""

import hashlib
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import xarray as xr
from jinja2 import StrictUndefined, Template

from bragg_data.campaign import ranges_text
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.growth import ATTRIBUTE, drawn_content_hash
from bragg_data.model_provenance import ModelProvenance, SnapshotReference, SplitSettings
from bragg_data.provenance import code_commit
from bragg_data.store.schema import campaign_of
from bragg_models.predictors import Predictor, load_predictor, output_columns
from catalog import model_files, registry
from catalog.gate import BaselineComparison
from catalog.model_files import ModelPackage
from catalog.registry import ModelKind
from catalog.tracking import Run, Tracking
from pipelines.cli.console import say
from pipelines.cli.style import SYMBOLS, UNITS
from pipelines.simulation.draws import held_out_key

_CARD = "model_card.md"  # the template here; among a model's files and its run's
# Tags of a version that are among the tags of its run.
_VERSION_TAGS = ("model", "preset", "data", "split", "content_hash", "test_set")
# Columns of the model card's table of scores: heading and format.
_SCORES = {
    "n": ("samples", "{:,.0f}"),
    "accuracy": ("accuracy", "{:.4%}"),
    "mse_paper": ("mse_paper", "{:.3g}"),
    **{f"mae_{p}": (f"MAE {SYMBOLS[p]} ({UNITS[p]})", "{:.3g}") for p in CELL_PARAMETERS},
}


def provenance_of(
    dataset: xr.Dataset,
    order: Mapping[str, Any],
    split: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> ModelProvenance:
    """Return where a model comes from.

    `order` is what was asked for (``model``, ``preset``, ``seed``, ``device`` …), `split` name,
    seed and shares of the split, `settings` the preset's values.
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
    """Return a short name of the held-out samples that a model is tested on.

    Scores are comparable where it is the same: a data set that has grown has the test samples of
    the first one. Of a model that is tested on simulated measurements
    (``test_draws`` of each phase) it depends on all that determines them.
    """
    attrs = dataset.attrs
    content = drawn_content_hash(attrs["content_hash"], attrs.get(ATTRIBUTE, ""))
    values = [content, dict(split), "test"]
    if split.get("test_draws"):
        values.append(held_out_key(campaign_of(dataset), split["test_draws"]))
    return hashlib.sha256(repr(tuple(values)).encode()).hexdigest()[:16]


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
    """Register a trained and scored model as a new version."""
    provenance = predictor.provenance
    score = provenance.score
    if score is None:
        raise ValueError("A model is registered after its test: its provenance has no score.")
    tags = run_tags(provenance)
    name = registry.registered_name(provenance.campaign, provenance.model)
    columns = _columns(predictor)
    card = _model_card(predictor, name, columns)
    run_.log_text(card, _CARD)
    facts = {**{key: tags[key] for key in _VERSION_TAGS}, "score": f"{score.value:.6g}"}
    if score.name == "mse_paper":
        facts["mse_paper"] = facts["score"]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "predictor"
        predictor.save(directory)
        (directory / _CARD).write_text(card, encoding="utf-8")
        package = ModelPackage(
            directory,
            predictor.points,
            outputs=output_columns(predictor.targets),
            units={column: unit for column, (unit, _) in columns.items() if unit},
        )
        entry = _entry(name, provenance)
        return model_files.register(run_, entry, package, description=card, tags=facts)


def _columns(predictor: Predictor) -> dict[str, tuple[str, str]]:
    """Return unit and meaning of each column of a prediction through MLflow's tools."""
    columns = {}
    for column in output_columns(predictor.targets):
        if column in CELL_PARAMETERS:
            columns[column] = (UNITS[column], "cell of the predicted phase")
        elif column.startswith("p_"):
            columns[column] = ("1", f"probability of phase {column.removeprefix('p_')}")
        else:
            columns[column] = ("", f"most probable {column.replace('_', ' ')}")
    return columns


def _model_card(predictor: Predictor, name: str, columns: Mapping[str, tuple[str, str]]) -> str:
    campaign, test = predictor.campaign, predictor.provenance.test or {}
    scored = {key: form for key, form in _SCORES.items() if any(key in v for v in test.values())}
    scores = {
        group: [form.format(v[key]) if key in v else "" for key, (_, form) in scored.items()]
        for group, v in test.items()
    }
    free = (
        ", ".join(f"{p} {ranges_text(spans)} {UNITS[p]}" for p, spans in phase["cell"].items())
        for phase in campaign.definition["phases"]
    )
    text = Path(__file__).with_name(_CARD).read_text(encoding="utf-8")
    template: Template = Template(
        text, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    return template.render(
        name=name,
        predictor=predictor,
        p=predictor.provenance,
        campaign=campaign,
        columns=columns,
        phases=list(zip(campaign.phases, free, strict=True)),
        score_names=[heading for heading, _ in scored.values()],
        scores=scores,
        comparison=BaselineComparison.from_provenance(predictor.provenance),
    )


def _entry(name: str, provenance: ModelProvenance) -> registry.RegistryEntry:
    kind = registry.kind_of(provenance.model)
    predicted = "Crystal systems" if kind is ModelKind.CLASSIFIER else "Crystal system and cell"
    profiles = "measured" if kind is ModelKind.MEASURED else "neutron time-of-flight"
    description = (
        f"{predicted} of {profiles} profiles, trained on the campaign {provenance.campaign}. "
        f"@{registry.CHAMPION} predicts unless another version is named; @{registry.CANDIDATE} is "
        f"the newest; @{registry.PREVIOUS} is the champion that a rollback restores. Compare and "
        f"promote: python -m pipelines.promote NAME VERSION"
    )
    return registry.RegistryEntry(name, kind, provenance.campaign, description)


def load_version(tracking_uri: str, version: registry.ModelVersion) -> Predictor:
    """Read a registered model back.

    Raises `ModelError` or `PredictorError` if its files are gone, damaged, or of another project.
    """
    with model_files.downloaded_model(tracking_uri, version) as directory:
        return load_predictor(directory)


# ``if better``: than the baselines and the champion; ``replace``: than the baselines, for a
# champion of other data; ``force``: whatever the comparisons say; ``never``: who calls decides.
PromotionPolicy = Literal["if better", "replace", "force", "never"]


def promote_if_better(
    tracking: Tracking,
    version: registry.ModelVersion,
    comparison: BaselineComparison | None = None,
    policy: PromotionPolicy = "if better",
) -> bool:
    """Make a version the candidate, and the champion if it is better than what there is.

    It has to be better than the baselines on its held-out samples (None if none was computed), and
    than the present champion on the same test samples. Returns whether it is the champion now; the
    reason is printed if it is not.
    """
    registry.set_alias(tracking, version, registry.CANDIDATE)
    if policy == "never":
        return False
    present = registry.champion(tracking, version.name)
    rival = present if policy == "if better" else None
    forced = policy == "force"
    objection = None if forced else _objection(version, rival, comparison)
    if objection is None:
        reason = {
            "if better": "lower error on the same test samples" if present else "the first version",
            "replace": "trained on the present data",
            "force": "trained with --promote",
        }[policy]
        expected = present.version if present else None
        registry.promote(tracking, version, reason=reason, forced=forced, expected=expected)
        return True
    stays = "There is no champion yet" if present is None else f"{present.uri} stays the champion"
    say(
        f"{version.uri} stays a candidate: {objection}. {stays}. To compare them again: python -m "
        f"pipelines.promote {version.name} {version.version}. To use this version: --model "
        f"{version.uri}"
    )
    return False


def _objection(
    version: registry.ModelVersion,
    champion: registry.ModelVersion | None,
    comparison: BaselineComparison | None,
) -> str | None:
    """Return why a version must not become the champion by itself; None if it may."""
    if comparison is not None and comparison.not_beaten:
        return (
            f"it is not better than {' and '.join(comparison.not_beaten)} ({comparison}). Train it "
            f"longer (--preset standard), or promote it nevertheless with python -m "
            f"pipelines.promote {version.name} {version.version} --force --reason TEXT"
        )
    if champion is None:
        return None
    if champion.tags.get("test_set") != version.tags["test_set"]:
        return f"version {champion.version} was tested on other samples"
    error = float(version.tags["score"])
    # deprecated: versions of classifiers aside, the first ones have no tag "score"
    error_of_champion = float(champion.tags.get("score", champion.tags.get("mse_paper", "nan")))
    if not error < error_of_champion:
        return f"version {champion.version} has a lower error there ({error_of_champion:.2e})"
    return None

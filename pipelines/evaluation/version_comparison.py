"""Comparison of a registered version with the champion, on the same pinned profiles."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import xarray as xr

from bragg_data.arrays import Array, Floats32, Indices, Mask
from bragg_data.campaign import Campaign
from bragg_data.growth import ATTRIBUTE, drawn_content_hash
from bragg_data.splits import Part
from bragg_data.store.repository import DEFAULT_URI, Store
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.metrics import calibration_error, errors, squared_errors, summary
from bragg_models.networks.robust import single_thread
from bragg_models.predictors import Predictor
from catalog.gate import BaselineComparison, Gate, PairedScores, VersionScores
from catalog.registry import ModelKind, ModelVersion, PromotionError
from catalog.tracking import DRAWS_METRICS, TEST_METRICS, Tracking
from pipelines.cli.style import finite_or_null
from pipelines.evaluation.scoring import in_batches, part_of, predict_batches, stored_batches
from pipelines.evaluation.tables import ResultTable, finite
from pipelines.registry.registration import load_version
from pipelines.simulation.draws import held_out_draws

_TIMED_PREDICTIONS = 10
_Pinned = tuple[Floats32, Indices, Array]


@dataclass(frozen=True)
class EvaluationData:
    """The profiles that versions are compared on."""

    store: str = DEFAULT_URI  # by default the store that the candidate was trained from
    tag: str | None = None  # of the data set; None for the candidate's
    n_samples: int = 2000
    campaign: Campaign | None = None  # of the draws; None for the data set's


@dataclass(frozen=True)
class VersionComparison:
    """A candidate and the champion, if there is one, on the same profiles."""

    versions: Mapping[str, ModelVersion]  # "candidate" and "champion"
    scores: Mapping[str, VersionScores]  # by the addresses of the versions
    objections: list[str]  # why the gate does not let the candidate pass; empty if it does
    dataset: xr.Dataset  # the snapshot that the profiles, or the campaign of the draws, are from
    n_samples: int

    @property
    def on_draws(self) -> bool:
        """Whether the profiles are draws of measured ones, not simulated test samples."""
        return self.versions["candidate"].kind is ModelKind.MEASURED

    def to_json(self, *, promoted: bool) -> Mapping[str, Any]:
        """Return plain JSON values; numbers that are not finite are null."""
        scores = finite_or_null({uri: asdict(scores) for uri, scores in self.scores.items()})
        uris = {part: version.uri for part, version in self.versions.items()}
        return {
            "candidate": uris["candidate"],
            "champion": uris.get("champion"),
            "passed": not self.objections,
            "promoted": promoted,
            "objections": self.objections,
            "scores": scores,
            "judged": scores,  # deprecated name of "scores"
        }


def compare_versions(
    tracking: Tracking,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    gate: Gate,
    data: EvaluationData,
    *,
    quiet: bool = False,
) -> VersionComparison:
    """Score a candidate and the champion on the same pinned profiles, and ask the gate.

    Raises `PromotionError` if there are too few profiles that no version was trained on, and
    `ModelError`, `PredictorError` or `StoreError` if a model or the data set cannot be read.
    """
    versions = {"candidate": candidate} | ({} if champion is None else {"champion": champion})
    predictors = {v.uri: load_version(tracking.uri, v) for v in versions.values()}
    provenance = predictors[candidate.uri].provenance
    # Another store given without a tag holds the data set under the same tag.
    in_store = data.tag is None and data.store == DEFAULT_URI
    dataset = Store(provenance.data.uri if in_store else data.store).open(
        data.tag or provenance.data.tag
    )
    if candidate.kind is ModelKind.MEASURED:
        campaign = data.campaign or campaign_of(dataset)
        per_phase = -(-data.n_samples // len(campaign.phases))
        draws = held_out_draws(campaign, per_phase, quiet=quiet)
        pinned: _Pinned = draws.profiles, draws.phase, draws.cells
    else:
        rows, labels = evaluation_rows(dataset, predictors, data.n_samples), samples_of(dataset)
        profiles = np.concatenate([batch.profiles for batch in stored_batches(dataset, rows)])
        pinned = profiles, labels.phase[rows].astype(np.intp), labels.cells[rows]
    scored = {uri: _score(p, pinned, quiet=quiet) for uri, p in predictors.items()}
    scores = {uri: of_version for uri, (of_version, *_) in scored.items()}
    paired = None
    if champion is not None:
        _, squared, wrong = zip(*(scored[v.uri] for v in (candidate, champion)), strict=True)
        paired = PairedScores(np.array(squared), np.array(wrong))
    of_champion = scores[champion.uri] if champion else None
    objections = gate.objections(scores[candidate.uri], of_champion, paired)
    baseline = BaselineComparison.from_provenance(provenance)
    if baseline is not None and baseline.not_beaten:
        objections.append(f"it is not better than {' and '.join(baseline.not_beaten)} ({baseline})")
    return VersionComparison(versions, scores, objections, dataset, len(pinned[0]))


def evaluation_rows(dataset: xr.Dataset, predictors: Mapping[str, Predictor], count: int) -> Mask:
    """Return the pinned samples that versions are compared on, shape (n,), the same every time.

    Of a data set that a version (by its address) was trained on they are test samples of its split;
    of another one all may be among them. Raises `PromotionError` if too few samples are test
    samples to all versions, or a version was trained on the data set in addition to its own.
    """
    labels, content = samples_of(dataset), dataset.attrs["content_hash"]
    content = drawn_content_hash(content, dataset.attrs.get(ATTRIBUTE, ""))
    allowed = np.ones(len(labels), dtype=bool)
    for uri, predictor in predictors.items():
        provenance = predictor.provenance
        data = provenance.data
        if drawn_content_hash(data.content_hash, data.growth) == content:
            split = provenance.split
            allowed &= part_of(split.name, labels, split.to_json()) == Part.test
        elif dataset.attrs["tag"] in provenance.extra_data:
            raise PromotionError(f"{uri} was trained on {dataset.attrs['tag']}: give other --data.")
    rows = np.flatnonzero(allowed)
    if len(rows) < min(count, 100):
        raise PromotionError(
            f"Only {len(rows)} samples of {dataset.attrs['tag']} are test samples to all versions. "
            f"Compare on a data set that none was trained on: --data TAG"
        )
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[rows[:count]] = True  # the stored order is a shuffled one: any part is a fair sample
    return chosen


def _score(
    predictor: Predictor, pinned: _Pinned, *, quiet: bool = False
) -> tuple[VersionScores, Array, Mask]:
    """Score a version on the pinned profiles, and time it.

    Also returned are the squared error of each profile, and whether its crystal system is wrong.
    """
    (profiles, true_phase, true_cells), targets = pinned, predictor.targets
    prediction = predict_batches(
        predictor, in_batches(profiles), len(profiles), description="Evaluating", quiet=quiet
    )
    phase, cells = prediction.phase, prediction.cells
    usable = np.asarray(np.isfinite(cells).all(axis=1))
    has_cells = not np.isnan(cells).all()
    predicted = phase, np.where(usable[:, np.newaxis], cells, true_cells)
    scores = summary(targets, errors(targets, true_phase, true_cells, *predicted))
    seconds = []
    with single_thread():
        for _ in range(_TIMED_PREDICTIONS):
            began = time.process_time()  # other work on the machine does not disturb it
            predictor.predict(profiles[:1])
            seconds.append(time.process_time() - began)
    of_version = VersionScores(
        (scores["all"]["mse_paper"] if usable.all() else math.inf) if has_cells else math.nan,
        scores["all"]["accuracy"],
        calibration_error(prediction.probabilities, true_phase),
        statistics.median(seconds),
        {k: v["mse_paper"] for k, v in scores.items() if k != "all"} if has_cells else {},
    )
    squared, _ = squared_errors(targets, true_phase, true_cells, cells)  # NaN without cells
    systems = targets.crystal_systems
    return of_version, squared, systems[phase] != systems[true_phase]


def log_comparison(tracking: Tracking, comparison: VersionComparison, gate: Gate) -> None:
    """Log a comparison as a run of the registered model's experiment.

    Metrics are ``test/candidate/…`` and ``test/champion/…``, or ``draws/…``.
    """
    candidate = comparison.versions["candidate"]
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    tags = {
        "mlflow.source.name": "pipelines.promote",
        "data": str(comparison.dataset.attrs["tag"]),
        "gate": "; ".join(comparison.objections) or "passed",
    }
    title = f"promotion of version {candidate.version} {started}"
    namespace = DRAWS_METRICS if comparison.on_draws else TEST_METRICS
    with tracking.run(candidate.name, title, tags) as run:
        run.log_parameters(
            {
                "champion": "",
                **{part: version.uri for part, version in comparison.versions.items()},
                "samples": comparison.n_samples,
                "gate": asdict(gate),
            }
        )
        run.log_dataset(comparison.dataset, "evaluation")
        for part, version in comparison.versions.items():
            scores = finite(asdict(comparison.scores[version.uri]))
            run.log_metrics({namespace: {part: scores}})


def comparison_table(comparison: VersionComparison) -> ResultTable:
    """Return a comparison as a table."""
    count, tag = comparison.n_samples, comparison.dataset.attrs["tag"]
    profiles = (
        f"{count:,} draws of measured-looking profiles for the campaign of {tag}"
        if comparison.on_draws
        else f"{count:,} test samples of {tag}"
    )
    systems = list(comparison.scores[comparison.versions["candidate"].uri].by_system)
    headings = ("", "model", "mse_paper", *systems, "accuracy", "calibration error", "ms")
    table = ResultTable(profiles, headings)
    for part, version in comparison.versions.items():
        scores = comparison.scores[version.uri]
        table.add(
            f"{part}, version {version.version}",
            version.tags.get("model", ""),
            f"{scores.mse_paper:.3g}",
            *(f"{scores.by_system.get(system, math.nan):.3g}" for system in systems),
            f"{scores.accuracy:.4%}",
            f"{scores.calibration_error:.4f}",
            f"{1e3 * scores.seconds:.1f}",
        )
    return table

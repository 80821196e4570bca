r"""One decision from all that bears on a profile: the model, the library and the refinements.

Their probabilities are pooled logarithmically (Genest & Zidek, Statistical Science 1 (1986) 114),

.. math:: \ln P_k = \sum_i w_i \ln p_{ik} + \text{const},

with weights that add up to 1, because the parts see the same data: were they independent, each
would count fully. None is surer than it was proven to be: a small share of its probability goes to
all phases alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bragg_data.arrays import Array
from pipelines.prediction.result import (
    Evidence,
    Intervals,
    LibraryCandidate,
    LibraryMatch,
    PredictionResult,
    RefinedPhase,
    Refinement,
)


class Weights(NamedTuple):
    """Weights of the parts of a decision."""

    model: float
    library: float
    refinement: float
    doubt: float  # share of the model's probability that goes to all phases alike

    def of(self, sources: Sequence[str]) -> list[float]:
        """Return the weights of some of the parts; they add up to 1."""
        weights = np.array([getattr(self, source) for source in sources], dtype=np.float64)
        return [float(weight) for weight in weights / weights.sum()]


# Of a model whose probabilities were calibrated on simulated measurements, and of one that knows
# the patterns of ideal samples alone. See docs/explanation/intervals.md, "One decision".
CALIBRATED = Weights(model=0.4, library=0.0, refinement=0.6, doubt=1e-3)
UNCALIBRATED = Weights(model=0.2, library=0.2, refinement=0.6, doubt=0.05)
_DOUBT = 1e-3  # share of the others' probability that goes to all phases alike

# Exponent of the ratio of misfits, 1 - r², of stored patterns, by which a phase is less probable.
_SHARPNESS = 7.4
_LEAST_MISFIT = 3e-3  # of a profile with the best statistics: below, ratios mean nothing


def from_correlations(correlations: Mapping[str, float]) -> dict[str, float]:
    """Return probabilities of phases from the correlations r of their best stored patterns."""
    misfits = {name: max(1 - r**2, _LEAST_MISFIT) for name, r in correlations.items()}
    return normalised({name: -_SHARPNESS * np.log(misfit) for name, misfit in misfits.items()})


def normalised(logarithms: Mapping[str, float]) -> dict[str, float]:
    """Return probabilities that add up to 1 from logarithms of them."""
    values: Array = np.array(list(logarithms.values()), dtype=np.float64)
    odds = np.exp(values - values.max())
    return dict(zip(logarithms, map(float, odds / odds.sum()), strict=True))


def pooled(
    parts: Sequence[tuple[str, Mapping[str, float]]], weights: Weights
) -> tuple[dict[str, float], list[float]]:
    """Return the probabilities of the phases from all parts, and the weight of each part.

    Parts are a source (a field of :class:`Weights`) and its probabilities; those of the model come
    first and name every phase. A phase that another part knows nothing about is as improbable
    there as the least probable one of it. The model alone stays as it is.
    """
    used = weights.of([source for source, _ in parts])
    if used[0] == 1.0:
        return dict(parts[0][1]), used
    phases = list(parts[0][1])
    total = dict.fromkeys(phases, 0.0)
    for weight, (source, probabilities) in zip(used, parts, strict=True):
        least = min(probabilities.values())
        doubt = weights.doubt if source == "model" else _DOUBT
        for phase in phases:
            p = probabilities.get(phase, least)
            total[phase] += weight * float(np.log(p + doubt * (1 / len(phases) - p)))
    return normalised(total), used


def decide(
    predicted: PredictionResult,
    match: LibraryMatch | None = None,
    refined: Sequence[RefinedPhase] = (),
) -> PredictionResult:
    """Return a model's prediction as a decision that library and refinements have a part in.

    The cell is that of the refinement of the decided phase, else the model's, else the library's.
    The refinements, with their probabilities, come in the order of the decision. Only models that
    were calibrated on simulated measurements have intervals, and count as such.
    """
    weights = UNCALIBRATED if predicted.interval_estimates is None else CALIBRATED
    parts = [_part("model", predicted, predicted.probabilities)]
    if match is not None:
        correlations = {c.phase: c.correlation for c in match.candidates}
        best = max(match.candidates, key=lambda candidate: candidate.correlation)
        parts.append(_part("library", best, from_correlations(correlations)))
    if refined:
        evidence = {fit.phase: fit.probability or 0.0 for fit in refined}
        supported = max(refined, key=lambda fit: evidence[fit.phase])
        parts.append(_part("refinement", supported, evidence))
    probabilities, used = pooled([(part.source, part.probabilities) for part in parts], weights)
    phase = max(probabilities, key=lambda name: probabilities[name])
    ranked = sorted(refined, key=lambda fit: -probabilities[fit.phase])
    sources: list[tuple[str, _WithCell]] = [("refinement", fit) for fit in ranked]
    sources.append(("model", predicted))
    sources += [("library", candidate) for candidate in (match.candidates if match else ())]
    cell_from, shown = next((s, c) for s, c in sources if c.phase == phase)
    return replace(
        predicted,
        crystal_system=shown.crystal_system,
        phase=phase,
        probabilities=probabilities,
        cell=shown.cell,
        interval_estimates=_intervals(shown),
        library_match=match,
        refined=Refinement(tuple(ranked)) if ranked else None,
        cell_from=cell_from,
        evidence=tuple(replace(p, weight=w) for p, w in zip(parts, used, strict=True)),
    )


_WithCell = PredictionResult | LibraryCandidate | RefinedPhase


def _part(source: str, best: _WithCell, probabilities: Mapping[str, float]) -> Evidence:
    """Return what a source alone makes of a profile; its weight is not known yet."""
    estimates = _intervals(best)
    intervals = None if estimates is None else dict(estimates.ends)
    system = best.crystal_system
    return Evidence(source, 0.0, system, best.phase, dict(probabilities), best.cell, intervals)


def _intervals(of: _WithCell) -> Intervals | None:
    return None if isinstance(of, LibraryCandidate) else of.interval_estimates

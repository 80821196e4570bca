"""One answer from several banks: predictions of the same sample, combined by their uncertainties.

Banks see the same crystal with different resolution, lines and noise. Where each is right within
its uncertainty, the mean weighted by the inverse variances is better than the best of them; where
they are not, χ² of their deviations shows it, and the bank that is off is named.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import numpy as np

from pipelines.prediction.combined_result import CombinedBanks, CombinedParameter
from pipelines.prediction.result import PredictionResult, RefinedPhase

# Probabilities are calibrated on about a thousand profiles: one below this is not known to be
# smaller, and one bank alone does not exclude a phase that all others see.
_LEAST_PROBABILITY = 1e-3
_NORMAL_90 = 1.6449  # half a 90 % interval of a normal distribution, in standard deviations
_DISCREPANT = 3.0  # standard deviations of the difference from the other banks
_OF_LEFT_OUT = "is left out: not accepted as one of the phases."


class CombinationError(ValueError):
    """Predictions that cannot be of the banks of one sample."""


class _Value(NamedTuple):
    bank: str
    value: float
    sigma: float


def combine(results: Sequence[PredictionResult]) -> CombinedBanks:
    """Combine predictions of the banks of one sample.

    Those that are not accepted are left out, unless all are. Of the others only banks that predict
    the combined phase give its cell. Raises a CombinationError unless all models know the same
    phases.
    """
    names = list(results[0].probabilities)
    if any(set(result.probabilities) != set(names) for result in results):
        raise CombinationError(
            f"{results[0].name} was predicted by models of different phases, so that their "
            f"predictions cannot be combined. Name models of one campaign's banks (--model)."
        )
    banks = dict(zip(_labels(results), results, strict=True))
    used = banks_that_count(results)
    table = np.array([[r.probabilities[name] for name in names] for r in used.values()])
    logarithm = np.log(np.maximum(table, _LEAST_PROBABILITY)).sum(axis=0)
    share = np.exp(logarithm - logarithm.max())
    probabilities = dict(zip(names, (share / share.sum()).tolist(), strict=True))
    phase = names[int(np.argmax(share))]
    predicted = {label: r for label, r in used.items() if r.phase == phase}
    cell = _combined(_predicted_values(used, phase))
    refined = _combined(_refined_values(used, phase))
    warnings = [f"{label} {_OF_LEFT_OUT}" for label in banks if label not in used]
    warnings += [
        f"{label} predicts {r.phase}, and the banks together {phase}."
        for label, r in used.items()
        if r.phase != phase
    ]
    for of, parameters in (("predicted", cell), ("refined", refined)):
        warnings += disagreements(of, parameters)
    system = next((r.crystal_system for r in predicted.values()), None)
    return CombinedBanks(phase, system, probabilities, cell, refined, tuple(used), tuple(warnings))


def with_combined(results: Sequence[PredictionResult]) -> list[PredictionResult]:
    """Return results with what those of the same file show together, where there are several.

    Those of a file follow each other; those that have it keep it. Raises as :func:`combine`.
    """
    combined: list[PredictionResult] = []
    for _, group in groupby(results, key=lambda result: result.file):
        of_sample = list(group)
        together = of_sample[0].combined
        if together is None and len(of_sample) > 1:
            together = combine(of_sample)
        combined += [replace(result, combined=together) for result in of_sample]
    return combined


def banks_that_count(results: Sequence[PredictionResult]) -> dict[str, PredictionResult]:
    """Return the banks of a sample that are accepted, or all if none is, by their names."""
    banks = dict(zip(_labels(results), results, strict=True))
    return {label: r for label, r in banks.items() if r.accepted is not False} or banks


def refined_by(bank: PredictionResult, phase: str) -> RefinedPhase | None:
    """Return a bank's own refinement of a phase, if it converged."""
    fits = bank.refined.candidates if bank.refined else ()
    return next((f for f in fits if f.phase == phase and f.converged), None)


def combined_values(banks: Mapping[str, PredictionResult], phase: str) -> dict[str, float]:
    """Return the free parameters of a phase that banks determine: as refined, or as predicted."""
    predicted = _combined(_predicted_values(banks, phase))
    refined = _combined(_refined_values(banks, phase))
    return {name: parameter.value for name, parameter in (predicted | refined).items()}


def _labels(results: Sequence[PredictionResult]) -> list[str]:
    """Return names by which the results differ: banks, otherwise files and banks."""
    banks = [f"Bank {r.bank}" for r in results]
    if len(set(banks)) == len(banks) and all(r.bank is not None for r in results):
        return banks
    labels = [r.name for r in results]
    return [
        label if labels.count(label) == 1 else f"{label} ({number})"
        for number, label in enumerate(labels, 1)
    ]


def _predicted_values(banks: Mapping[str, PredictionResult], phase: str) -> dict[str, list[_Value]]:
    """Return what the models alone predict, of those that predict the phase."""
    values: dict[str, list[_Value]] = {}
    for label, result in banks.items():
        part = result.evidence[0] if result.evidence else result
        for name, ends in (part.intervals or {}).items() if part.phase == phase else ():
            value = getattr(part.cell, name)
            if ends is not None and value is not None:
                sigma = (ends.high - ends.low) / 2 / _NORMAL_90
                values.setdefault(name, []).append(_Value(label, value, sigma))
    return values


def _refined_values(banks: Mapping[str, PredictionResult], phase: str) -> dict[str, list[_Value]]:
    values: dict[str, list[_Value]] = {}
    for label, result in banks.items():
        fit = refined_by(result, phase)
        if fit is None:
            continue
        # Which contain the drift of an instrument without a calibration of its own.
        estimates = fit.interval_estimates.ends if fit.interval_estimates else {}
        for name in fit.free_parameters:
            value, su, ends = getattr(fit.cell, name), getattr(fit.su, name), estimates.get(name)
            if ends is not None:
                su = (ends.high - ends.low) / 2 / _NORMAL_90
            if value is not None and su is not None:
                values.setdefault(name, []).append(_Value(label, value, su))
    return values


def _combined(values: Mapping[str, Sequence[_Value]]) -> dict[str, CombinedParameter]:
    usable = {n: [v for v in of_name if v.sigma > 0] for n, of_name in values.items()}
    return {name: _mean(of_name) for name, of_name in usable.items() if of_name}


def _mean(values: Sequence[_Value]) -> CombinedParameter:
    value, sigma = _weighted(values)
    chi2 = sum(((v.value - value) / v.sigma) ** 2 for v in values)
    factor = max(1.0, math.sqrt(chi2 / max(len(values) - 1, 1)))
    banks = {v.bank: v.value for v in values}
    return CombinedParameter(value, sigma * factor, chi2, banks, _discrepant(values))


def _discrepant(values: Sequence[_Value]) -> tuple[str, ...]:
    """Return the banks that differ most, one after the other, until the others agree."""
    rest = list(values)
    while len(rest) > 1:
        ratios = []
        for v in rest:
            mean, of_mean = _weighted([other for other in rest if other is not v])
            ratios.append(abs(v.value - mean) / math.hypot(v.sigma, of_mean))
        if max(ratios) <= _DISCREPANT:
            break
        # Of two nothing shows which one is off.
        off = rest if len(rest) == 2 else [rest[int(np.argmax(ratios))]]
        rest = [v for v in rest if v not in off]
    return tuple(v.bank for v in values if v not in rest)


def _weighted(values: Sequence[_Value]) -> tuple[float, float]:
    """Return the mean, weighted by the inverse variances, and its standard uncertainty."""
    weights = [v.sigma**-2 for v in values]
    mean = sum(w * v.value for w, v in zip(weights, values, strict=True)) / sum(weights)
    return mean, sum(weights) ** -0.5


def disagreements(of: str, parameters: Mapping[str, CombinedParameter]) -> list[str]:
    """Return sentences on banks that are off, as ``of`` names what their values are."""
    sentences = []
    for bank in dict.fromkeys(bank for p in parameters.values() for bank in p.discrepant):
        off = ", ".join(
            f"{name} ({p.banks[bank] - p.value:+.2g} from the mean of all)"
            for name, p in parameters.items()
            if bank in p.discrepant
        )
        sentences.append(
            f"{bank} differs from the other banks by more than their uncertainties allow, as {of}: "
            f"{off}. Check its calibration and whether its peaks are of this sample alone."
        )
    return sentences

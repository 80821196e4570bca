r"""Alarms: cumulative sums of log-likelihood ratios, of which each has a rate of false alarms.

With s_i the logarithm of the ratio of the likelihoods of profile i after and before a change, the
sum :math:`S_i = \max(0, S_{i-1} + s_i)` exceeds h on the average once in at least e^h profiles if
nothing changes (Lorden, Ann. Math. Stat. 42 (1971) 1897). The change began after the last zero.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from bragg_data.arrays import Array, Mask
from pipelines.cli.options import WatchOptions
from pipelines.monitoring.signals import WATCHED, Signals

_SHIFT = 1.0  # standard deviations of a signal: the change that is found fastest
_CLIP = 4.0  # standard deviations beyond which a single profile counts no more
# Share of the training's draws beyond either limit, and of profiles after a change.
_OUTSIDE = 0.025, 0.2
_REJECTED = 0.02, 0.2  # share of rejected profiles before, at least, and after a change
_SUMS = 3 * 2 + 2 + 1


@dataclass(frozen=True)
class Alarm:
    """A change of a signal."""

    signal: str  # rejections, calibration, width or background
    kind: str  # change: against earlier answers, or known cells; outside: of the training
    sign: int  # +1: it grew
    since: int  # place among the answers after which it began
    at: int  # where it was noticed
    id: str  # of that answer
    size: float  # since then: mean shift, mean logarithm of the ratio, or share of rejections
    text: str

    def to_json(self) -> Mapping[str, object]:
        """Return plain JSON values."""
        return vars(self)


@dataclass(frozen=True, eq=False)
class Sum:
    """A cumulative sum over all answers, and the threshold that it must not exceed."""

    signal: str
    kind: str
    sign: int
    values: Array  # (n,)
    threshold: float


def find_alarms(
    signals: Signals,
    training: Mapping[str, Array],
    watching: WatchOptions,
    *,
    rejected: float = 0.0,
) -> tuple[list[Alarm], list[Sum]]:
    """Return the first alarm of each kind and signal, and all cumulative sums.

    ``training`` are the logarithms of draws, by signal; ``rejected`` is the expected share of
    rejected profiles. A model's first answers, of which the options state the number, are taken to
    be in order.
    """
    reference = watching.reference
    threshold = float(np.log(_SUMS / watching.rate))
    sums = [
        Sum(signal, kind, sign, _cumulative(steps), threshold)
        for signal, kind, sign, steps in _steps(signals, training, rejected, reference)
    ]
    alarms = [alarm for of in sums if (alarm := _alarm(of, signals, reference)) is not None]
    return sorted(alarms, key=lambda alarm: alarm.at), sums


def _steps(
    signals: Signals, training: Mapping[str, Array], rejected: float, reference: int
) -> Iterator[tuple[str, str, int, Array]]:
    """Yield signal, kind, sign and the log-likelihood ratio of each answer; 0 where unknown."""
    before = max(_REJECTED[0], rejected)
    known = np.isfinite(signals.accepted)
    steps = _bernoulli(signals.accepted == 0, before, max(_REJECTED[1], 3 * before))
    yield "rejections", "change", 1, np.where(known, steps, 0.0)
    shift = signals.shift / signals.shift_su
    scores = {"calibration": shift}
    for name in WATCHED:
        log, first = signals.logs[name], signals.logs[name][:reference]
        if np.isfinite(first).sum() >= reference / 2 and len(log) > reference:
            later = np.where(np.arange(len(log)) < reference, np.nan, log)
            scores[name] = _normal_scores(later, first[np.isfinite(first)])
    for name, score in scores.items():
        bounded = np.clip(score, -_CLIP, _CLIP)
        for sign in (1, -1):
            yield name, "change", sign, np.nan_to_num(_SHIFT * sign * bounded - _SHIFT**2 / 2)
    for name in WATCHED:
        # Lower backgrounds and narrower peaks than those of the training do no harm.
        limit = np.nanquantile(training[name], 1 - _OUTSIDE[0])
        steps = _bernoulli(signals.logs[name] > limit, *_OUTSIDE)
        yield name, "outside", 1, np.where(np.isfinite(signals.logs[name]), steps, 0.0)


def _bernoulli(event: Mask, before: float, after: float) -> Array:
    ratios = np.log(after / before), np.log((1 - after) / (1 - before))
    return np.asarray(np.where(event, *ratios), dtype=np.float64)


def _normal_scores(values: Array, reference: Array) -> Array:
    """Return the normal quantiles of the ranks that values (n,) have in a reference (m,)."""
    order = np.sort(reference)
    low, high = (np.searchsorted(order, values, side) for side in ("left", "right"))
    share = (0.5 * (low + high) + 0.5) / (len(order) + 1)
    return np.where(np.isfinite(values), norm.ppf(share), np.nan)


def _cumulative(steps: Array) -> Array:
    total = np.concatenate([[0.0], np.cumsum(steps)])
    return np.asarray((total - np.minimum.accumulate(total))[1:])


def _alarm(of: Sum, signals: Signals, reference: int) -> Alarm | None:
    beyond = np.flatnonzero(of.values > of.threshold)
    if not len(beyond):
        return None
    at = int(beyond[0])
    zeros = np.flatnonzero(of.values[: at + 1] == 0)
    since = int(zeros[-1]) + 1 if len(zeros) else 0
    later = slice(since, None)
    if of.signal == "rejections":
        size = float(1 - np.nanmean(signals.accepted[later]))
        text = f"{size:.0%} of the profiles are rejected"
    elif of.signal == "calibration":
        weights = np.nan_to_num(signals.shift_su[later] ** -2.0)
        size = float(np.average(np.nan_to_num(signals.shift[later]), weights=weights))
        text = f"lengths of known cells are off by {size:+.2e}, and so is difC"
    else:
        log = signals.logs[of.signal]
        usual = np.nanmean(log[: reference if of.kind == "change" else max(since, 1)])
        size = float(np.nanmean(log[later]) - usual)
        what = {"width": "peaks are", "background": "the background is"}[of.signal]
        text = f"{what} {np.exp(size):.2f} times as {'broad' if of.signal == 'width' else 'high'}"
        if of.kind == "outside":
            text = f"{what} {'broader' if of.signal == 'width' else 'higher'} than in the training"
    where = f"since answer {since + 1}, noticed at answer {at + 1}"
    name = signals.answers[at].id
    return Alarm(of.signal, of.kind, of.sign, since, at, name, size, f"{text} ({where})")

"""Statistics of measured profiles that show whether instrument and samples are as in the training.

The width is that of the peaks of a whole profile, in units of the grid's relative step: of Gaussian
peaks of standard deviation σ the autocorrelation of a profile falls as exp(-k²/4σ²) with the lag k,
whatever their number and overlap, and the white noise is at lag 0 alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from bragg_data.arrays import AnyFloats, Array
from bragg_data.measurement.resampling import GriddedProfile
from bragg_models.predictors import Prediction
from pipelines.prediction.workflow import PredictedProfile

_LAGS = 2, 4  # points, of which the ratio of the autocorrelations gives the width
_FWHM = float(np.sqrt(8 * np.log(2)))  # of a Gaussian, in standard deviations
_EMPTY = 0.02  # of the highest peak: below it a prepared profile shows background alone

Statistics = Mapping[str, float | None]
"""By name: see :func:`statistics_of`."""


def statistics_of(
    profiles: AnyFloats, relative_step: float, gridded: Sequence[GriddedProfile] = ()
) -> list[Statistics]:
    """Return statistics of profiles without background, shape (n, points), on any scale.

    ``width`` is the peaks' relative full width at half maximum, Δd/d; ``start`` and ``end`` are the
    shares of the window between which there is a signal, ``noise`` is in units of the highest peak.
    Of profiles that come with their background (``gridded``, n) there are ``counts``, of neutrons
    at the highest peak, and ``background``, in its units; of others these are None, and what
    cannot be estimated is.
    """
    values = np.asarray(profiles, dtype=np.float32)
    highest = np.maximum(values.max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    values = values / highest
    width = relative_step * widths(values)
    some = values > 0
    points = values.shape[1]
    start = some.argmax(axis=1) / points
    end = 1 - some[:, ::-1].argmax(axis=1) / points
    if gridded:
        counts, background, noise = np.array(
            [_levels(*p) for p in zip(values, gridded, strict=True)]
        ).T
    else:
        counts = background = np.full(len(values), np.nan)
        # The median of |N(0, s)| is 0.6745 s, and a second difference has 6 times the variance.
        # One order statistic: np.median takes two, and eight times as long.
        curvature, middle = np.abs(np.diff(values, 2)), points // 2 - 1
        noise = np.partition(curvature, middle, axis=1)[:, middle] / (0.6745 * np.sqrt(6))
    columns = {
        "width": width,
        "start": start,
        "end": end,
        "noise": noise,
        "counts": counts,
        "background": background,
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {n: v if np.isfinite(v) else None for n, v in zip(columns, row, strict=True)}
        for row in rows
    ]


def with_decisions(statistics: Sequence[Statistics], prediction: Prediction) -> list[Statistics]:
    """Return statistics with whether each profile is accepted, and the misfit of its cell."""
    n = len(prediction.phase)
    accepted = [None] * n if prediction.accepted is None else prediction.accepted.tolist()
    misfit = [None] * n if prediction.unexplained is None else prediction.unexplained.tolist()
    return [
        {**of_profile, "accepted": a if a is None else float(a), "misfit": m}
        for of_profile, a, m in zip(statistics, accepted, misfit, strict=True)
    ]


def statistics_of_predicted(profiles: Sequence[PredictedProfile]) -> list[Statistics]:
    """Return the statistics of predicted profiles of files, with decisions."""
    statistics = []
    for profile in profiles:
        prepared, step = profile.measurement.prepared[None], profile.campaign.grid.relative_step
        of_profile = statistics_of(prepared, step, [profile.measurement.gridded])
        prediction = profile.prediction[slice(profile.row, profile.row + 1)]
        statistics += with_decisions(of_profile, prediction)
    return statistics


def widths(profiles: AnyFloats) -> Array:
    """Return the full width at half maximum of the peaks of profiles (n, points), in points (n,).

    NaN where the autocorrelation does not fall.
    """
    centred = profiles - profiles.mean(axis=1, keepdims=True)
    near, far = (np.vecdot(centred[:, :-lag], centred[:, lag:]) for lag in _LAGS)
    with np.errstate(invalid="ignore", divide="ignore"):
        fall = np.log(near / far) / (_LAGS[1] ** 2 - _LAGS[0] ** 2)  # 1 / 4σ²
        return np.asarray(_FWHM * np.sqrt(1 / (4 * np.where(fall > 0, fall, np.nan))))


def _levels(prepared: AnyFloats, gridded: GriddedProfile) -> tuple[float, float, float]:
    """Return counts at the highest peak, background and noise in its units."""
    summit = int(prepared.argmax())
    intensity, sigma = gridded.intensity, gridded.sigma
    informative = gridded.covered & (sigma > 0)
    empty = informative & (prepared < _EMPTY)
    if not empty.any() or not informative[summit]:
        return np.nan, np.nan, np.nan
    level = float(np.median(intensity[empty]))
    height = float(intensity[summit]) - level
    counts = float(intensity[summit] / sigma[summit]) ** 2
    return counts, level / height, float(np.median(sigma[empty])) / height

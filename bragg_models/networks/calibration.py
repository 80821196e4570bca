"""Calibration of a network for measured profiles: probabilities, intervals, limit of rejection."""

import math

import numpy as np
import torch
from sklearn.linear_model import QuantileRegressor
from torch import Tensor, nn

from bragg_data.arrays import AnyFloats, Integers, Mask
from bragg_models.networks.robust import (
    ACCEPTED,
    COVERAGE,
    PhaseFits,
    Robust,
    of_phase,
    sharpness_features,
)

_FEWEST = 100  # errors, from which powers are fitted
_EDGE = 0.03  # share of the draws beyond each end of the range in which the powers hold
# On the size of the powers: with 0.01, nine in ten of the sharpest intervals no longer hold.
_PENALTY = 1e-3


def calibrate(
    network: Robust,
    fits: PhaseFits,
    phase: Integers,
    values: AnyFloats,
    free: Mask,
    calibrated: Mask,
) -> dict[str, float]:
    """Fit the coefficients of probabilities, intervals and limit of a network to held-out draws.

    The network is changed in place, and ``fits`` are its fits of n draws with true phases (n,) and
    true scaled values (n, n_parameters); ``free`` (n_phases, n_parameters) as in
    :class:`~bragg_models.targets.Targets`. The coefficients of the probabilities are fitted to the
    ``calibrated`` (n,) draws, for which cross entropy, accuracy and limit are returned.
    """
    # Copied out of inference mode, so that the head can be fitted to them.
    fits = PhaseFits(*(values.cpu().clone() for values in fits))
    truth = torch.from_numpy(np.asarray(phase)).long()
    is_calibrated = torch.from_numpy(calibrated)
    network.head = _fitted_head(network, fits, truth, is_calibrated)
    errors = (fits.values - torch.from_numpy(np.asarray(values, dtype=np.float64))).abs()
    fitted_phase = fits.logits.argmax(dim=1)
    correct = is_calibrated & (truth == fitted_phase)
    network.sharpness = torch.zeros_like(network.sharpness)
    for code, column in zip(*np.nonzero(free), strict=True):
        rows = correct & (truth == code)
        ratio = (errors / fits.spread.clamp(min=1e-9))[rows, column]
        powers = _fitted_powers(sharpness_features(fits)[rows, column], ratio)
        if powers is not None:
            network.sharpness[code, column] = powers
    score = errors / network.error_unit(fits, is_calibrated)
    stretch = network.stretch.clone()
    for kind, chosen in enumerate((is_calibrated, ~is_calibrated)):
        for code in range(stretch.shape[1]):
            scores = score[chosen & (truth == code) & (fitted_phase == code)]
            if len(scores):
                stretch[kind, code] = _conformal_quantile(scores, COVERAGE)
    network.stretch = stretch * torch.from_numpy(free)
    logits = network.phase_logits(fits.proposal, fits.misfit)[is_calibrated]
    predicted, truth = logits.argmax(dim=1), truth[is_calibrated]
    unexplained = of_phase(fits.misfit[is_calibrated], predicted)
    # A wrong phase may leave much; a limit that allows for it would accept foreign profiles, too.
    correct = predicted == truth
    genuine = unexplained[correct] if correct.any() else unexplained
    network.limit = _conformal_quantile(genuine, ACCEPTED)[None]
    return {
        "cross_entropy": float(nn.functional.cross_entropy(logits, truth)),
        "accuracy": float((predicted == truth).double().mean()),
        "limit": float(network.limit),
    }


# MAPIE and crepes wrap scikit-learn regressors; here the scores come from a torch network's misfit,
# and what is left of their method is this order statistic.
def _conformal_quantile(scores: Tensor, coverage: float) -> Tensor:
    r"""Return the order statistic with the coverage of split conformal prediction.

    It is the :math:`\lceil (n + 1) \cdot \text{coverage} \rceil`-th smallest of n scores along the
    first axis, without interpolation (Lei et al., J. Am. Stat. Assoc. 113 (2018) 1094, section
    2.2). Where n is too small for the coverage, it is the largest.
    """
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return scores.sort(dim=0).values[min(rank, len(scores)) - 1]


def _fitted_powers(features: Tensor, ratio: Tensor) -> Tensor | None:
    """Return powers and ranges of features (n, 2), (2, 4), for ratios of error to uncertainty (n,).

    By linear quantile regression of the logarithms (Koenker & Bassett, Econometrica 46 (1978) 33),
    outside the range of which nothing is extrapolated; None from too few ratios.
    """
    if len(ratio) < _FEWEST:
        return None
    ends = torch.quantile(features, torch.tensor([_EDGE, 0.5, 1 - _EDGE], dtype=torch.float64), 0)
    inside = features.clamp(ends[0], ends[2]) - ends[1]
    regression = QuantileRegressor(quantile=COVERAGE, alpha=_PENALTY, solver="highs")
    regression.fit(inside.numpy(), ratio.clamp(min=1e-12).log().numpy())
    power = torch.from_numpy(np.asarray(regression.coef_, dtype=np.float64))
    return torch.cat([power[:, None], ends.T], dim=1)


def _fitted_head(network: Robust, fits: PhaseFits, truth: Tensor, is_calibrated: Tensor) -> Tensor:
    head = network.head.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([head], max_iter=200, line_search_fn="strong_wolfe")
    before = network.head
    network.head = head

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = network.phase_logits(fits.proposal[is_calibrated], fits.misfit[is_calibrated])
        loss = nn.functional.cross_entropy(logits, truth[is_calibrated]) + 1e-4 * (head**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    try:
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    finally:
        network.head = before
    return head.detach()

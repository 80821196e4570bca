"""Calibration of a network for measured profiles: probabilities, intervals, limit of rejection."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from bragg_data.arrays import AnyFloats, Integers, Mask
from bragg_models.networks.robust import ACCEPTED, COVERAGE, PhaseFits, Robust, of_phase


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
    score = errors / network.error_unit(fits, is_calibrated)
    fitted_phase = fits.logits.argmax(dim=1)
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

r"""Our network for measured profiles: it knows what differs, how sure it is, and when to refuse.

As :class:`~bragg_models.guided.Guided` it proposes at a glance and settles by Bragg's law, with two
differences. The displacement parameters and peak widths are the sample's own and searched for
beside the cell; and every phase is tried, from the glance and from known cells that look alike,
unless the first one meets the profile as only a clean pattern is met.

What the phases leave unexplained, the misfits m, and the glance's probabilities p decide together:

.. math:: \ln P_k = -\kappa \ln\frac{m_k}{m_\text{min}} + \gamma \ln p_k + b_k + \text{const}, \quad
          \ln\kappa = \alpha + \beta \ln m_\text{min}

with six numbers fitted by maximum likelihood on held-out draws. The 90 % intervals are conformal
(Lei et al., J. Am. Stat. Assoc. 113 (2018) 1094): the quantile, over held-out draws, of the error
in units of the standard uncertainty that the misfit leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bragg_models.guided import Guided, GuidedConfig

COVERAGE = 0.9
"""Of the intervals."""

ACCEPTED = 0.985
"""Share of genuine draws that is accepted."""

_LOOKED_AT = 7  # known cells of each phase that the search may begin from
_BLUR = 5.0  # points
_HOPELESS = 10.0  # misfit of a start over the best one's of all phases, above which none is sought
_BEST = 3e-3  # misfit of a measured profile with the best statistics
_DRIFT = 3e-4  # relative, of an instrument that was not calibrated


@dataclass(frozen=True)
class Assessment:
    """What the network finds for n profiles.

    Attributes
    ----------
    logits : shape (n, n_phases)
    values : shape (n, n_parameters), double precision
        Of the most probable phase.
    spread : shape (n, n_parameters)
        Their standard uncertainties, as far as the misfit tells them; 0 where not free.
    misfit : shape (n, n_phases)
        Share of the profile's square that each phase leaves.
    glance : shape (n, n_phases)
        Logarithms of the glance's probabilities.
    """

    logits: Tensor
    values: Tensor
    spread: Tensor
    misfit: Tensor
    glance: Tensor


@dataclass(frozen=True)
class Assessed:
    """What is said about n profiles.

    Attributes
    ----------
    probabilities : shape (n, n_phases)
    values, half_widths : shape (n, n_parameters)
        Scaled parameters, and half the widths of their 90 % intervals.
    unexplained : shape (n,)
        Share of the profile's square that the best phase leaves.
    limit
        A profile of which more is left is none of the phases'.
    """

    probabilities: NDArray[np.float64]
    values: NDArray[np.float64]
    half_widths: NDArray[np.float64]
    unexplained: NDArray[np.float64]
    limit: float


class Robust(Guided):
    """See the module; only the glance is trained, and a few numbers are calibrated."""

    def __init__(self, config: GuidedConfig) -> None:
        super().__init__(config)
        phases, parameters = len(config.pattern.phases), config.glance.parameters
        # α, β, γ, then b of each phase.
        head = torch.zeros(3 + phases, dtype=torch.float64)
        head[0], head[2] = 2.0, 1.0
        self.register_buffer("head", head)
        # Calibrated instruments, then others.
        self.register_buffer("stretch", torch.ones(2, phases, parameters, dtype=torch.float64))
        self.register_buffer("limit", torch.ones(1, dtype=torch.float64))

    def forward(self, profiles: Tensor, phase: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`bragg_models.guided.Guided.forward`."""
        found = self.assess(profiles, phase)
        return found.logits, found.values

    def assess(self, profiles: Tensor, phase: Tensor | None = None) -> Assessment:
        """Find phase and cell of profiles, and what there is to know of how sure they are.

        Parameters
        ----------
        profiles : shape (n, points)
            Square roots of intensities, of unit norm. Points that are zero are not compared.
        phase : shape (n,)
            Known phases, if the network is not to find them.
        """
        logits, proposed = self.glance(profiles)
        glance = logits.double().log_softmax(dim=1)
        proposed = proposed.double().clamp(-1, 1)
        compared = profiles[:, self.config.pattern.first :].float()
        count, phases = glance.shape
        values = proposed[:, None].repeat(1, phases, 1)
        misfit = torch.full((count, phases), torch.inf, dtype=torch.float64, device=glance.device)
        first = glance.argmax(dim=1) if phase is None else phase
        for code in range(phases):
            rows = torch.nonzero(first == code)[:, 0]
            values[rows, code], misfit[rows, code] = self._searched(
                code, compared[rows], proposed[rows]
            )
        open_ = torch.nonzero(misfit.amin(dim=1) > self.config.met)[:, 0]
        if len(open_):
            self._try_all(open_, compared, values, misfit, phase)
        told = self.decided(glance, misfit)
        best = told.argmax(dim=1) if phase is None else phase
        chosen = values[torch.arange(count), best]
        spread = torch.zeros_like(chosen)
        for code in range(phases):
            rows = torch.nonzero(best == code)[:, 0]
            if len(rows):
                spread[rows] = self._spread_of(code, compared[rows], chosen[rows])
        return Assessment(told, chosen, spread, misfit, glance)

    def _try_all(
        self,
        rows: Tensor,
        compared: Tensor,
        values: Tensor,
        misfit: Tensor,
        phase: Tensor | None,
    ) -> None:
        """Search in every phase from the likeliest start, for some rows, in place."""
        phases = misfit.shape[1]
        roots = self.pattern.blurred(compared[rows] ** 2, _BLUR).sqrt()
        starts, begins, done = [], [], []
        for code in range(phases):
            known = self._alike(code, roots, _BLUR)[:, :_LOOKED_AT]
            candidates = torch.cat([values[rows, code][:, None], known], dim=1)
            n, m = candidates.shape[:2]
            profiles = compared[rows].repeat_interleave(m, dim=0)
            own = self._misfits(code, profiles, candidates.flatten(0, 1)).reshape(n, m)
            best = own.argmin(dim=1)
            # Where a search has been already, it would lead to again.
            done.append((best == 0) & torch.isfinite(misfit[rows, code]))
            starts.append(candidates[torch.arange(n), best])
            begins.append(own[torch.arange(n), best])
        begun = torch.stack(begins, dim=1)
        hopeful = begun < _HOPELESS * begun.amin(dim=1, keepdim=True)
        for code in range(phases):
            wanted = hopeful[:, code] if phase is None else phase[rows] == code
            some = torch.nonzero(wanted & ~done[code])[:, 0]
            if not len(some):
                continue
            found, left = self._searched(code, compared[rows[some]], starts[code][some])
            there = rows[some]
            better = left < misfit[there, code]
            values[there[better], code] = found[better]
            misfit[there[better], code] = left[better]

    def _misfits(self, code: int, profiles: Tensor, start: Tensor) -> Tensor:
        damping = torch.full_like(start[:, 0], 1e-4)
        padded = torch.cat([start, start.new_zeros(len(start), 2)], dim=1)
        return self._step(code, profiles, (profiles > 0).float(), padded, damping)[0]

    def decided(self, glance: Tensor, misfit: Tensor) -> Tensor:
        """Return the logits of the phases; see the module."""
        head = cast("Tensor", self.head)
        least = misfit.amin(dim=1, keepdim=True).clamp(min=1e-9)
        # What is met better than measured profiles ever are says at least as much.
        kappa = torch.exp((head[0] + head[1] * least.clamp(min=_BEST).log()).clamp(-2, 7))
        # A phase that was not searched leaves everything.
        ratio = (misfit.clamp(max=1.0).clamp(min=1e-9) / least).log()
        return -kappa * ratio + head[2] * glance + head[3:]

    def _spread_of(self, code: int, profiles: Tensor, values: Tensor) -> Tensor:
        """Return the standard uncertainties of scaled parameters where they are free."""
        free = torch.tensor(self.config.pattern.phases[code].free, device=values.device)
        damping = torch.full_like(values[:, 0], 1e-9)
        padded = torch.cat([values, values.new_zeros(len(values), 2)], dim=1)
        weights = (profiles > 0).float()
        misfit, _, normal = self._normal(code, profiles, weights, padded, damping)
        noise = misfit * (profiles**2).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        tiny = 1e-9 * torch.diag_embed(torch.diagonal(normal, dim1=1, dim2=2))
        variance = torch.diagonal(torch.linalg.inv(normal + tiny), dim1=1, dim2=2)
        spread = torch.zeros_like(values)
        spread[:, free] = (variance[:, : len(free)].clamp(min=0) * noise[:, None]).sqrt()
        return spread

    def assessed(self, profiles: NDArray[np.float32], calibrated: NDArray[np.bool_]) -> Assessed:
        """Return what is said about prepared profiles.

        Parameters
        ----------
        profiles : shape (n, points)
            As for :meth:`assess`.
        calibrated : shape (n,)
            Whether the measurement's own calibration was used.
        """
        device = cast("Tensor", self.head).device
        right = torch.from_numpy(calibrated).to(device)
        parts = []
        with torch.inference_mode():
            for low in range(0, len(profiles), self.at_once):
                rows = slice(low, low + self.at_once)
                found = self.assess(torch.from_numpy(profiles[rows]).to(device))
                half = self.half_widths(found, found.logits.argmax(dim=1), right[rows])
                least = found.misfit.amin(dim=1)
                parts.append((found.logits.softmax(dim=1), found.values, half, least))
        joined = [torch.cat(some).cpu().numpy() for some in zip(*parts, strict=True)]
        return Assessed(
            joined[0], joined[1], joined[2], joined[3], float(cast("Tensor", self.limit))
        )

    def half_widths(self, found: Assessment, phase: Tensor, calibrated: Tensor) -> Tensor:
        """Return half the widths of the 90 % intervals, (n, n_parameters), scaled.

        Parameters
        ----------
        found
            Of n profiles.
        phase : shape (n,)
            The phases that were answered.
        calibrated : shape (n,)
            Whether the measurement's own calibration was used.
        """
        stretch = cast("Tensor", self.stretch)[(~calibrated).long(), phase]
        return stretch * self.scores_in(found, calibrated)

    def scores_in(self, found: Assessment, calibrated: Tensor) -> Tensor:
        """Return the unit of the errors of n profiles' scaled parameters, (n, n_parameters)."""
        physical = self._physical(found.values)
        drift = _DRIFT * physical / cast("Tensor", self.half_range)
        # Angles do not feel a wrong difC.
        drift = torch.where(physical < 30, drift, torch.zeros_like(drift))
        drift = drift * (~calibrated)[:, None]
        return (found.spread**2 + drift**2).sqrt().clamp(min=1e-9)


def joined_assessments(parts: Sequence[Assessment]) -> Assessment:
    """Return what was found for several batches as one."""
    # Out of inference mode, so that the head can be fitted to it.
    return Assessment(
        *(torch.cat([getattr(p, f.name) for p in parts]).cpu().clone() for f in fields(Assessment))
    )


def calibrate(
    network: Robust,
    found: Assessment,
    phase: NDArray[np.integer],
    values: NDArray[np.floating],
    free: NDArray[np.bool_],
    calibrated: NDArray[np.bool_],
) -> dict[str, Any]:
    """Fit head, intervals and limit to what a network finds for held-out draws.

    Parameters
    ----------
    network
        It keeps the result.
    found
        Its assessment of n draws.
    phase : shape (n,)
        True phases.
    values : shape (n, n_parameters)
        True scaled parameters.
    free : shape (n_phases, n_parameters)
        Which parameters are free in which phase.
    calibrated : shape (n,)
        Which draws have a right calibration; the head is fitted to these.

    Returns
    -------
    Cross entropy and accuracy on the calibrated draws, and the limit of the misfit.
    """
    truth, right = torch.from_numpy(np.asarray(phase)).long(), torch.from_numpy(calibrated)
    network.head = _fitted_head(network, found, truth, right)
    decided = network.decided(found.glance, found.misfit)
    errors = (found.values - torch.from_numpy(np.asarray(values, dtype=np.float64))).abs()
    score = errors / network.scores_in(found, right)
    best = found.logits.argmax(dim=1)
    stretch = cast("Tensor", network.stretch).clone()
    for kind, chosen in enumerate((right, ~right)):
        for code in range(stretch.shape[1]):
            own = score[chosen & (truth == code) & (best == code)]
            if len(own):
                level = min(COVERAGE * (1 + 1 / len(own)), 1.0)
                stretch[kind, code] = torch.quantile(own, level, dim=0)
    network.stretch = stretch * torch.from_numpy(free)
    least = found.misfit.amin(dim=1)[right]
    network.limit = torch.quantile(least, ACCEPTED)[None]
    loss = nn.functional.cross_entropy(decided[right], truth[right])
    return {
        "cross_entropy": float(loss),
        "accuracy": float((decided[right].argmax(dim=1) == truth[right]).double().mean()),
        "limit": float(network.limit),
    }


def _fitted_head(network: Robust, found: Assessment, truth: Tensor, right: Tensor) -> Tensor:
    head = cast("Tensor", network.head).clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([head], max_iter=200, line_search_fn="strong_wolfe")
    before = network.head

    def closure() -> Tensor:
        optimizer.zero_grad()
        network.head = head
        logits = network.decided(found.glance[right], found.misfit[right])
        loss = nn.functional.cross_entropy(logits, truth[right]) + 1e-4 * (head**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    try:
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    finally:
        network.head = before
    return head.detach()

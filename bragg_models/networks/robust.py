r"""Our network for measured profiles: it knows what differs, how sure it is, and when to refuse.

As :class:`~bragg_models.networks.guided.Guided` it proposes at a glance and settles by Bragg's law,
with two differences. The displacement parameters and peak widths are the sample's own and searched
for beside the cell; and every phase is tried, from the glance or from a known cell that looks
alike, all in one batch, and where none meets the profile well, from more of them.

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

from bragg_models.networks.guided import Guided, GuidedConfig

COVERAGE = 0.9
"""Of the intervals."""

ACCEPTED = 0.985
"""Share of genuine draws that is accepted."""

_LOOKED_AT = 7  # known cells of each phase that the search may begin from
_BLUR = 5.0  # points
_UNMET = 0.08  # misfit above which more starts are tried: nine in ten draws are met better
_TOGETHER = 32  # patterns that are computed together
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
        """As :meth:`bragg_models.networks.guided.Guided.forward`."""
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
        compared = profiles[:, self.config.pattern.first :].float()
        first = glance.argmax(dim=1) if phase is None else phase
        values = proposed.double()[:, None].repeat(1, glance.shape[1], 1)
        misfit = torch.full_like(glance, torch.inf)
        cells, begun = self._known_cells(compared, values[:, 0].clamp(-1, 1))
        least = begun.amin(dim=2)
        wanted = least < _HOPELESS * least.amin(dim=1, keepdim=True)
        if phase is not None:
            wanted = nn.functional.one_hot(phase, glance.shape[1]).bool()
        asked = begun == least[..., None]
        # What the glance proposes in its own phase is tried in any case.
        asked[torch.arange(len(asked)), first, 0] = True
        self._search(compared, cells, asked & wanted[..., None], values, misfit)
        unmet = misfit.amin(dim=1) > _UNMET
        if unmet.any():
            rest = ~asked & (wanted & unmet[:, None])[..., None]
            self._search(compared, cells, rest, values, misfit)
        told = self.decided(glance, misfit)
        best = told.argmax(dim=1) if phase is None else phase
        chosen = values[torch.arange(len(best)), best]
        return Assessment(told, chosen, self._spread_of(best, compared, chosen), misfit, glance)

    def _known_cells(self, compared: Tensor, proposed: Tensor) -> tuple[Tensor, Tensor]:
        """Return cells to search from, (n, phases, k, p), and their misfits, (n, phases, k).

        The first of the cells is what the glance proposes, the others look like the profiles.
        """
        phases = len(self.config.pattern.phases)
        roots = self.pattern.blurred(compared**2, _BLUR).sqrt()
        known = [self._alike(code, roots, _BLUR)[:, :_LOOKED_AT] for code in range(phases)]
        of_glance = proposed[:, None, None].expand(-1, phases, 1, -1)
        cells = torch.cat([of_glance, torch.stack(known, dim=1)], dim=2)
        return cells, self._misfits(compared, cells)

    def _search(
        self, compared: Tensor, cells: Tensor, asked: Tensor, values: Tensor, misfit: Tensor
    ) -> None:
        """Search from those cells that are asked for, and keep what is better, in place."""
        row, code, number = torch.nonzero(asked, as_tuple=True)
        found, left = self._searched(code, compared[row], cells[row, code, number])
        place = row * misfit.shape[1] + code
        before = misfit.clone()
        misfit.view(-1).scatter_reduce_(0, place, left, "amin")
        better = (left == misfit[row, code]) & (left < before[row, code])
        values[row[better], code[better]] = found[better]

    def _misfits(self, profiles: Tensor, cells: Tensor) -> Tensor:
        """Return what cells of all phases, (n, phases, k, p), leave of n profiles' squares."""
        shape = cells.shape[:3]
        code = torch.arange(shape[1], device=cells.device)[None, :, None].expand(shape).flatten()
        row = torch.arange(shape[0], device=cells.device)[:, None, None].expand(shape).flatten()
        parts = []
        for some in torch.split(torch.arange(len(code), device=cells.device), _TOGETHER):
            physical = self._physical(cells.flatten(0, 2)[some])
            e = self.pattern(code[some], physical, slopes=False)[0].sqrt()
            v = profiles[row[some]]
            e = e * (v > 0)
            parts.append((v * e).sum(dim=1) ** 2 / (e * e).sum(dim=1).clamp(min=1e-30))
        met = torch.cat(parts) / (profiles**2).sum(dim=1)[row].clamp(min=1e-30)
        return (1 - met).double().reshape(shape)

    def decided(self, glance: Tensor, misfit: Tensor) -> Tensor:
        """Return the logits of the phases; see the module."""
        head = cast("Tensor", self.head)
        least = misfit.amin(dim=1, keepdim=True).clamp(min=1e-9)
        # What is met better than measured profiles ever are says at least as much.
        kappa = torch.exp((head[0] + head[1] * least.clamp(min=_BEST).log()).clamp(-2, 7))
        # A phase that was not searched leaves everything.
        ratio = (misfit.clamp(max=1.0).clamp(min=1e-9) / least).log()
        return -kappa * ratio + head[2] * glance + head[3:]

    def _spread_of(self, code: Tensor, profiles: Tensor, values: Tensor) -> Tensor:
        """Return the standard uncertainties of scaled parameters where they are free."""
        damping = torch.full_like(values[:, 0], 1e-9)
        padded = torch.cat([values, values.new_zeros(len(values), 2)], dim=1)
        weights = (profiles > 0).float()
        spread = torch.zeros_like(values)
        for low in range(0, len(values), _TOGETHER):
            r = slice(low, low + _TOGETHER)
            misfit, *_, normal = self._normal(
                code[r], profiles[r], weights[r], padded[r], damping[r]
            )
            points = weights[r].sum(dim=1).clamp(min=1)
            noise = misfit * (profiles[r] ** 2).sum(dim=1) / points
            # Columns that nothing depends on are left alone.
            diagonal = torch.diagonal(normal, dim1=1, dim2=2)
            tiny = torch.where(diagonal > 0, 1e-9 * diagonal, torch.ones_like(diagonal))
            inverse = torch.linalg.inv(normal + torch.diag_embed(tiny))
            variance = torch.diagonal(inverse, dim1=1, dim2=2)
            free = self.pattern.free(code[r])
            own = (variance[:, : free.shape[1]].clamp(min=0) * noise[:, None]).sqrt()
            own = own * (diagonal[:, : free.shape[1]] > 0)
            spread[r] = spread[r].scatter(1, free, own)
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

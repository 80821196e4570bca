"""Our integrated network: a perceptron proposes phase and cell, and Bragg's law settles the cell.

The perceptron's glance at a profile says which phase it is and, to about a thousandth of an
ångström, which cell. From there the layer that knows what a cell's pattern looks like
(:mod:`bragg_models.pattern`) compares and corrects, a few times, until the profile is met. What the
perceptron leaves open is settled by how well the profile is met: where it is not, the network tries
again from cells as far off as the perceptron is known to be, and from its other phases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from bragg_data.campaign import Campaign
from bragg_models.pattern import Pattern, PatternConfig, pattern_of, read_pattern_config
from bragg_models.targets import Targets

_LIMIT = 1.2  # scaled parameters end here: a little beyond the campaign's range
_THROUGH = 3e-6  # a step that is smaller, in scaled parameters, ends the search
_END = 24.0, 48  # points from the window's end: a line there, and what is then not compared
_ROWS = 128  # starts that are searched from together
# Where the profile is not met, cells up to so many points away are tried, and compared under a blur
# of so many points: first near, then far.
_AFAR = ((80.0, 5.0), (400.0, 12.0))
_CLEARLY = 0.25  # another phase has to meet the profile so much better


@dataclass(frozen=True)
class PerceptronConfig:
    """A perceptron with two heads.

    Attributes
    ----------
    points
        Points of a profile.
    phases, parameters
        Outputs of the classifier and of the regressor.
    hidden
        Widths of its layers.
    """

    points: int
    phases: int
    parameters: int
    hidden: tuple[int, ...] = (512, 512)


class Perceptron(nn.Module):
    """Dense layers, and a head each for the phase and for the cell parameters."""

    def __init__(self, config: PerceptronConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.points, *config.hidden)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.phase = nn.Linear(widths[-1], config.phases)
        self.cell = nn.Linear(widths[-1], config.parameters)

    def forward(self, profiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the phases, and the scaled cell parameters.

        Parameters
        ----------
        profiles : shape (n, points)
            Square roots of intensities, of unit norm (``profile_sqrt_unit``).

        Returns
        -------
        logits : shape (n, n_phases)
        values : shape (n, n_parameters)
            Scaled as by :class:`~bragg_models.targets.Targets`.
        """
        # Of unit norm a value is about 1/√points.
        hidden = self.layers(profiles * self.config.points**0.5)
        return self.phase(hidden), self.cell(hidden)


@dataclass(frozen=True)
class GuidedConfig:
    """Our network.

    Attributes
    ----------
    glance
        The perceptron.
    pattern
        The layer that knows the patterns.
    steps
        How often a cell is corrected at most.
    draws, starts
        Where the profile is not met, so many other cells are compared with it from afar, and from
        so many of them it tries again.
    met
        A profile is met if the squared difference is below this share of its square. The layer
        itself is good to a few 1e-6.
    """

    glance: PerceptronConfig
    pattern: PatternConfig
    steps: int = 12
    draws: int = 2048
    starts: int = 16
    met: float = 2e-5


def read_guided_config(
    *, glance: Mapping[str, Any], pattern: Mapping[str, Any], **values: Any
) -> GuidedConfig:
    """Return the configuration that was written as plain JSON values.

    Raises
    ------
    TypeError
        If a value is missing, or unknown.
    """
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in glance.items()}
    return GuidedConfig(PerceptronConfig(**plain), read_pattern_config(**pattern), **values)


class Guided(nn.Module):
    """Our integrated network; see the module. Only its glance is trained."""

    def __init__(self, config: GuidedConfig) -> None:
        super().__init__()
        self.config = config
        self.glance = Perceptron(config.glance)
        self.pattern = Pattern(config.pattern)
        parameters = config.glance.parameters
        for name in ("middle", "half_range"):
            self.register_buffer(name, torch.ones(parameters, dtype=torch.float64))

    def forward(self, profiles: Tensor, phase: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of the phases, and the scaled cell parameters.

        Parameters
        ----------
        profiles : shape (n, points)
            Square roots of intensities, of unit norm (``profile_sqrt_unit``). Points that are zero
            hold no information and are not compared.
        phase : shape (n,)
            Known phases, if the network is not to find them.

        Returns
        -------
        logits : shape (n, n_phases)
        values : shape (n, n_parameters), double precision
            Scaled as by :class:`~bragg_models.targets.Targets`.
        """
        logits, proposed = self.glance(profiles)
        proposed = proposed.double().clamp(-1, 1)
        values = proposed.clone()
        compared = profiles[:, self.config.pattern.first :].float()
        first = logits.argmax(dim=1) if phase is None else phase
        misfit = torch.full_like(proposed[:, 0], torch.inf)
        for code in range(len(self.config.pattern.phases)):
            rows = torch.nonzero(first == code)[:, 0]
            values[rows], misfit[rows] = self._settled(code, compared[rows], proposed[rows])
        if phase is not None:
            return logits, values
        logits = logits.clone()
        for code in range(len(self.config.pattern.phases)):
            rows = torch.nonzero((misfit > self.config.met) & (first != code))[:, 0]
            found, own = self._settled(code, compared[rows], proposed[rows])
            better = own < _CLEARLY * misfit[rows]
            rows = rows[better]
            values[rows], misfit[rows] = found[better], own[better]
            # The two phases change places, so that probabilities stay those of the glance.
            there = logits[rows].argmax(dim=1)
            logits[rows, there], logits[rows, code] = logits[rows, code], logits[rows, there]
        return logits, values

    def _settled(self, code: int, profiles: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cells that meet some profiles best, and their misfit, shapes as ``start``."""
        values, misfit = self._searched(code, profiles, start)
        rows = torch.nonzero(misfit > self.config.met)[:, 0]
        for row in rows.tolist():
            for farthest, blur in _AFAR:
                others = self._candidates(code, profiles[row], start[row], farthest, blur)
                found, own = self._searched(code, profiles[row].expand(len(others), -1), others)
                best = int(own.argmin())
                if own[best] < misfit[row]:
                    values[row], misfit[row] = found[best], own[best]
                if misfit[row] <= self.config.met:
                    break
        return values, misfit

    def _candidates(
        self, code: int, profile: Tensor, start: Tensor, farthest: float, blur: float
    ) -> Tensor:
        """Return the likeliest of many cells around one, in scaled parameters, (starts, p).

        Blurred patterns are compared, and met as well as they can be: cells may then be further
        off to be found.
        """
        others = (start + self._offsets(code, start, farthest)).clamp(-1, 1)
        root = self.pattern.blurred(profile[None] ** 2, blur)[0].sqrt()
        alike = []
        for some in torch.split(others, _ROWS):
            patterns, _ = self.pattern(code, self._physical(some), slopes=False, blur=blur)
            roots = patterns.sqrt()
            alike.append((roots @ root) / roots.norm(dim=1))
        best = others[torch.cat(alike).topk(self.config.starts).indices]
        roots = root.expand(len(best), -1)
        nearer, _ = self._descended(code, roots, best, torch.ones_like(roots), blur)
        return nearer.clamp(-1, 1)

    def _offsets(self, code: int, start: Tensor, farthest: float) -> Tensor:
        """Return where else to begin, in scaled parameters, (draws, p), the same every time.

        Evenly in all directions as the peaks see it, from one point of the grid on, more of them
        near than far. (Near its limit of 120° a rhombohedral angle moves peaks ten times as far as
        elsewhere.)
        """
        free = list(self.config.pattern.phases[code].free)
        count = self.config.draws
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn((count, len(free)), generator=generator, dtype=torch.float64)
        draws = draws.to(start.device) / len(free) ** 0.5
        radius = torch.logspace(0, math.log10(farthest), count, dtype=torch.float64)
        sensitivity = self.pattern.sensitivity(code, self._physical(start[None]))[0]
        half = cast("Tensor", self.half_range)[free]
        values, vectors = torch.linalg.eigh(sensitivity * half[:, None] * half)
        inverse_root = vectors / values.clamp(min=1e-6).sqrt() @ vectors.T
        offsets = torch.zeros(count, len(start), dtype=torch.float64, device=start.device)
        offsets[:, free] = radius[:, None].to(start.device) * (draws @ inverse_root)
        return offsets

    def _searched(self, code: int, profiles: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Search downhill from each start, first without the window's end where a line is near."""
        if not len(start):
            return start, start[:, 0]
        parts = []
        for v, begin in zip(torch.split(profiles, _ROWS), torch.split(start, _ROWS), strict=True):
            values, misfit = self._descended(code, v, begin, self._weights(code, v, begin))
            near = torch.nonzero(self._near_the_end(code, begin) | self._near_the_end(code, values))
            rows = near[:, 0]
            if len(rows):
                again = self._descended(code, v[rows], values[rows], (v[rows] > 0).float())
                values[rows], misfit[rows] = again
            parts.append((values, misfit))
        return torch.cat([p for p, _ in parts]), torch.cat([m for _, m in parts])

    def _near_the_end(self, code: int, values: Tensor) -> Tensor:
        return self.pattern.near_the_end(code, self._physical(values), _END[0])

    def _weights(self, code: int, profiles: Tensor, values: Tensor) -> Tensor:
        """Return 1 where a point is compared, otherwise 0.

        A line that a proposed cell puts on the wrong side of the window's end would pull at all
        others: there the end is left out.
        """
        weights = (profiles > 0).float()
        end = torch.arange(profiles.shape[1], device=profiles.device) >= (
            profiles.shape[1] - _END[1]
        )
        weights[self._near_the_end(code, values)[:, None] & end] = 0
        return weights

    def _descended(
        self, code: int, profiles: Tensor, start: Tensor, weights: Tensor, blur: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Correct cells until nothing changes: Levenberg and Marquardt's method, row by row."""
        free = torch.tensor(self.config.pattern.phases[code].free, device=start.device)
        values = start.clone()
        damping = torch.full_like(values[:, 0], 1e-4)
        misfit, step = self._step(code, profiles, weights, values, damping, blur)
        active = torch.arange(len(values), device=values.device)
        for _ in range(self.config.steps):
            active = active[step[active].abs().amax(dim=1) > _THROUGH]
            if not len(active):
                break
            trial = values[active].clone()
            trial[:, free] = (trial[:, free] + step[active]).clamp(-_LIMIT, _LIMIT)
            own, next_step = self._step(
                code, profiles[active], weights[active], trial, damping[active], blur
            )
            better = own < misfit[active]
            taken, refused = active[better], active[~better]
            values[taken], misfit[taken] = trial[better], own[better]
            step[taken] = next_step[better]
            damping[taken] *= 0.2
            damping[refused] *= 10
            step[refused] *= 0.3
        return values, misfit

    def _step(
        self,
        code: int,
        profiles: Tensor,
        weights: Tensor,
        values: Tensor,
        damping: Tensor,
        blur: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        r"""Return how badly profiles are met, and the step that would meet them better.

        With v the profile and e the square root of the pattern,

        .. math:: \min_{s,\delta} \sum_i w_i \Big(v_i - s e_i - s \sum_p
            \frac{\partial e_i}{\partial p} \delta_p\Big)^2
        """
        free = torch.tensor(self.config.pattern.phases[code].free, device=values.device)
        pattern, slopes = self.pattern(code, self._physical(values), blur=blur)
        root = pattern.sqrt()
        slopes = slopes * cast("Tensor", self.half_range)[free].float()[:, None]
        slopes = slopes / (2 * root[:, None]) * weights[:, None]
        v, e = profiles * weights, root * weights
        scale = ((v * e).sum(dim=1) / (e * e).sum(dim=1).clamp(min=1e-30))[:, None]
        rest = v - scale * e
        columns = torch.cat([slopes * scale[:, None], (scale * e)[:, None]], dim=1)
        normal = (columns @ columns.transpose(1, 2)).double()
        right = (columns @ rest[:, :, None]).double()
        diagonal = torch.diag_embed(torch.diagonal(normal, dim1=1, dim2=2))
        tiny = 1e-12 * torch.eye(normal.shape[1], dtype=torch.float64, device=normal.device)
        solved = torch.linalg.solve(normal + damping[:, None, None] * diagonal + tiny, right)
        misfit = (rest**2).sum(dim=1) / (v * v).sum(dim=1).clamp(min=1e-30)
        return misfit.double(), solved[:, :-1, 0].clamp(-0.2, 0.2)

    def _physical(self, values: Tensor) -> Tensor:
        return values * cast("Tensor", self.half_range) + cast("Tensor", self.middle)


def guided_config(campaign: Campaign, targets: Targets, **changes: Any) -> dict[str, Any]:
    """Return the description of a network for a campaign, as plain JSON values."""
    glance = {
        "points": campaign.grid.points,
        "phases": len(targets.names),
        "parameters": len(targets.parameters),
        "hidden": list(PerceptronConfig.hidden),
    }
    return {"glance": glance, "pattern": pattern_of(campaign, targets)[0], **changes}


def fill_tables(network: nn.Module, campaign: Campaign, targets: Targets) -> None:
    """Give a new network what it knows beforehand: the campaign's lines and the scales."""
    state = {
        "middle": targets.middle,
        "half_range": targets.half_range,
        **{f"pattern.{name}": values for name, values in pattern_of(campaign, targets)[1].items()},
    }
    own = network.state_dict()
    network.load_state_dict(
        {name: torch.as_tensor(values, dtype=own[name].dtype) for name, values in state.items()},
        strict=False,
    )

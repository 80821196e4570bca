"""Our integrated network: a perceptron proposes phase and cell, and Bragg's law settles the cell.

The perceptron's glance at a profile says which phase it is and, to about a thousandth of an
ångström, which cell. From there the layer that knows what a cell's pattern looks like
(:mod:`bragg_models.networks.pattern_layer`) compares and corrects, a few times, until the profile
is met. What the perceptron leaves open is settled by how well the profile is met: where it is not,
the network tries again under a blur, under which cells may be further off to be found, then from
those of many cells all over the campaign's range that look most like the profile, and then in the
other phases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from bragg_data.campaign import Campaign
from bragg_models.networks.pattern_layer import (
    Pattern,
    PatternConfig,
    pattern_of,
    read_pattern_config,
)
from bragg_models.targets import Targets

_LIMIT = 1.2  # scaled parameters end here: a little beyond the campaign's range
_THROUGH = 3e-6  # a step that is smaller, in scaled parameters, ends the search
_END = 24.0, 48  # points from the window's end: a line there, and what is then not compared
_NOISY = 1e-4, 3e-4  # the same of noisy profiles, and the share of the misfit that a step gains
_ROWS = 32  # starts that are searched from together: their deposits stay in a processor's cache
_BLURS = 5.0, 12.0  # points, first near, then far: peaks so far off still overlap
_DRAWN = 8  # times as many cells are drawn as are kept, so that they lie evenly for the peaks
_SCALES = 0.5, 4.0  # of the sample's own parameters: ln of a factor, and points²
_NUISANCE = (-2.0, 2.0), (-0.5, 15.0)  # where they end, in these scales
_CLEARLY = 0.5  # another phase has to meet the profile so much better


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
        Where the profile is not met, it is compared with so many cells all over the range, and
        from so many of them the network tries again.
    met
        A profile is met if the squared difference is below this share of its square. The layer
        itself is good to a few 1e-6.
    nuisance
        Whether displacement parameters and peak widths are the sample's own, and searched for, too.
    """

    glance: PerceptronConfig
    pattern: PatternConfig
    steps: int = 12
    draws: int = 4096
    starts: int = 8
    met: float = 2e-5
    nuisance: bool = False


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

    at_once = 512  # profiles: it makes small batches of them itself, of those alike

    def __init__(self, config: GuidedConfig) -> None:
        super().__init__()
        self.config = config
        self.glance = Perceptron(config.glance)
        self.pattern = Pattern(config.pattern)
        parameters = config.glance.parameters
        for name in ("middle", "half_range"):
            self.register_buffer(name, torch.ones(parameters, dtype=torch.float64))
        self._known: dict[tuple[int, float, torch.device], tuple[Tensor, Tensor]] = {}

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
        """Return the cells that meet some profiles best, and their misfit, shapes as ``start``.

        Downhill from the start, then from where the start leads to under a blur, then from where
        known cells lead to: each only for profiles that are not met yet.
        """
        values, misfit = self._searched(code, profiles, start)
        for own, blur in product((True, False), _BLURS):
            rows = torch.nonzero(misfit > self.config.met)[:, 0]
            if not len(rows):
                break
            roots = self.pattern.blurred(profiles[rows] ** 2, blur).sqrt()
            others = start[rows][:, None] if own else self._alike(code, roots, blur)
            count = others.shape[1]
            roots = roots.repeat_interleave(count, dim=0)
            nearer, _ = self._descended(
                code, roots, others.flatten(0, 1), torch.ones_like(roots), blur
            )
            found, left = self._searched(
                code, profiles[rows].repeat_interleave(count, dim=0), nearer.clamp(-1, 1)
            )
            best = left.reshape(-1, count).argmin(dim=1)
            best += count * torch.arange(len(rows), device=best.device)
            better = left[best] < misfit[rows]
            values[rows[better]], misfit[rows[better]] = found[best][better], left[best][better]
        return values, misfit

    def _alike(self, code: int, roots: Tensor, blur: float) -> Tensor:
        """Return the known cells whose blurred patterns look most like blurred profiles.

        Parameters
        ----------
        code
            The phase.
        roots : shape (n, compared points)
            Square roots of the blurred profiles.
        blur
            In points.

        Returns
        -------
        shape (n, starts, n_parameters)
            Scaled, the likeliest first.
        """
        sharp, key = (code, 0.0, roots.device), (code, blur, roots.device)
        if sharp not in self._known:
            cells = self._spread(code).to(roots.device)
            patterns = [
                self.pattern(code, self._physical(some), slopes=False)[0]
                for some in torch.split(cells, _ROWS)
            ]
            self._known[sharp] = cells, torch.cat(patterns)
        if key not in self._known:
            cells, patterns_of = self._known[sharp]
            blurred = self.pattern.blurred(patterns_of, blur)[:, :: _some_points(blur)].sqrt()
            self._known[key] = cells, nn.functional.normalize(blurred, dim=1)
        cells, known = self._known[key]
        likeness = roots[:, :: _some_points(blur)] @ known.T
        return cells[likeness.topk(min(self.config.starts, len(cells))).indices]

    def _spread(self, code: int) -> Tensor:
        """Return cells all over the range, in scaled parameters, (draws, p), the same every time.

        They lie evenly as the peaks see it, not as the parameters do: near its limit of 120° a
        rhombohedral angle moves peaks ten times as far as elsewhere.
        """
        free = list(self.config.pattern.phases[code].free)
        half = cast("Tensor", self.half_range)
        engine = SobolEngine(len(free), scramble=True, seed=0)  # type: ignore[no-untyped-call]
        drawn = engine.draw(_DRAWN * self.config.draws)
        cells = torch.zeros(len(drawn), len(half), dtype=torch.float64, device=half.device)
        cells[:, free] = 2 * drawn.to(cells) - 1
        volume = []
        for some in torch.split(cells, 32 * _ROWS):
            sensitivity = self.pattern.sensitivity(code, self._physical(some))
            scaled = sensitivity * half[free, None] * half[free]
            volume.append(torch.linalg.det(scaled).clamp(min=1e-12).sqrt())
        generator = torch.Generator().manual_seed(0)
        kept = torch.multinomial(torch.cat(volume).cpu(), self.config.draws, generator=generator)
        return cells[kept.to(cells.device)]

    def _searched(
        self, code: int | Tensor, profiles: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Search downhill from each start, first without the window's end where a line is near.

        ``code`` is the phase of all rows, or that of each.
        """
        if not len(start):
            return start, start[:, 0]
        values, misfit = self._descended(
            code, profiles, start, self._weights(code, profiles, start)
        )
        near = self._near_the_end(code, start) | self._near_the_end(code, values)
        # Where nothing was measured there, nothing was left out.
        rows = torch.nonzero(near & (profiles[:, -_END[1] :] > 0).any(dim=1))[:, 0]
        if len(rows):
            v = profiles[rows]
            values[rows], misfit[rows] = self._descended(
                _of_rows(code, rows), v, values[rows], (v > 0).float()
            )
        return values, misfit

    def _near_the_end(self, code: int | Tensor, values: Tensor) -> Tensor:
        return self.pattern.near_the_end(code, self._physical(values), _END[0])

    def _weights(self, code: int | Tensor, profiles: Tensor, values: Tensor) -> Tensor:
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
        self,
        code: int | Tensor,
        profiles: Tensor,
        start: Tensor,
        weights: Tensor,
        blur: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Correct cells until nothing changes: Levenberg and Marquardt's method, row by row.

        Rows that have arrived make room for others, so that parts stay full.
        """
        free = self.pattern.free(code)
        # The sample's own parameters stand after the cell's.
        own_parameters = len(_NUISANCE) if self.config.nuisance else 0
        values = torch.cat([start, start.new_zeros(len(start), own_parameters)], dim=1)
        own_columns = start.shape[1] + torch.arange(own_parameters, device=free.device)
        searched = torch.cat([free, own_columns.expand(len(free), -1)], dim=1)
        searched = searched.expand(len(values), -1)
        limits = torch.full((2, searched.shape[1]), _LIMIT, dtype=values.dtype, device=start.device)
        limits[0] *= -1
        if own_parameters:
            limits[:, free.shape[1] :] = torch.tensor(_NUISANCE, dtype=values.dtype).T
        damping = torch.full_like(values[:, 0], 1e-4)
        misfit, step, gain = self._step(code, profiles, weights, values, damping, blur)
        active = torch.arange(len(values), device=values.device)
        through, least = _NOISY if self.config.nuisance else (_THROUGH, 0.0)
        for _ in range(self.config.steps):
            far = step[active].abs().amax(dim=1) > through
            active = active[far & (gain[active] > least * misfit[active])]
            if not len(active):
                break
            trial, columns = values[active].clone(), searched[active]
            moved = (trial.gather(1, columns) + step[active]).clamp(limits[0], limits[1])
            trial.scatter_(1, columns, moved)
            own, next_step, next_gain = self._step(
                _of_rows(code, active), profiles[active], weights[active], trial, damping[active],
                blur,
            )  # fmt: skip
            better = own < misfit[active]
            taken, refused = active[better], active[~better]
            values[taken], misfit[taken] = trial[better], own[better]
            step[taken], gain[taken] = next_step[better], next_gain[better]
            damping[taken] *= 0.2
            damping[refused] *= 10
            step[refused] *= 0.3
        return values[:, : start.shape[1]], misfit

    def _step(
        self,
        code: int | Tensor,
        profiles: Tensor,
        weights: Tensor,
        values: Tensor,
        damping: Tensor,
        blur: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`_normal` without JᵀJ, a few rows at a time."""
        some = [slice(low, low + _ROWS) for low in range(0, len(values), _ROWS)]
        parts = [
            self._normal(_of_rows(code, r), profiles[r], weights[r], values[r], damping[r], blur)
            for r in some
        ]
        misfit, step, gain = (torch.cat(found) for found in list(zip(*parts, strict=True))[:3])
        return misfit, step, gain

    def _normal(
        self,
        code: int | Tensor,
        profiles: Tensor,
        weights: Tensor,
        values: Tensor,
        damping: Tensor,
        blur: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Return how badly profiles are met, a step to meet them better, how much better, JᵀJ.

        With v the profile and e the square root of the pattern,

        .. math:: \min_{s,\delta} \sum_i w_i \Big(v_i - s e_i - s \sum_p
            \frac{\partial e_i}{\partial p} \delta_p\Big)^2
        """
        free = self.pattern.free(code)
        parameters = self.config.glance.parameters
        cell, own = values[:, :parameters], values[:, parameters:]
        nuisance = own * own.new_tensor(_SCALES) if own.shape[1] else None
        pattern, slopes = self.pattern(code, self._physical(cell), blur=blur, nuisance=nuisance)
        root = pattern.sqrt()
        scales = cast("Tensor", self.half_range)[free].float()
        if nuisance is not None:
            scales = torch.cat([scales, scales.new_tensor(_SCALES).expand(len(free), -1)], dim=1)
        slopes = slopes * scales[..., None]
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
        square = (v * v).sum(dim=1).clamp(min=1e-30).double()
        misfit = (rest**2).sum(dim=1) / square
        gain = (solved * (2 * right - normal @ solved)).sum(dim=(1, 2)) / square
        return misfit, solved[:, :-1, 0].clamp(-0.2, 0.2), gain, normal

    def _physical(self, values: Tensor) -> Tensor:
        return values * cast("Tensor", self.half_range) + cast("Tensor", self.middle)


def _of_rows(code: int | Tensor, rows: Tensor | slice) -> int | Tensor:
    return code if isinstance(code, int) else code[rows]


def _some_points(blur: float) -> int:
    """Return the stride at which a pattern under a blur is known as well as at every point."""
    return max(int(blur / 1.25), 1)


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

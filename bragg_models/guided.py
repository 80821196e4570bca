"""Our integrated network: a glance gives phase and cell, and the cell guides a look at the peaks.

The glance is a perceptron. The look knows where Bragg's law puts the peaks of the cell that the
glance proposes, compares the profile there with what it expects, and solves for the cell that moves
the peaks to where they are. What is learnt of it (peak shapes, and how far and how much a window
tells) is the same for every peak, phase and crystal system, so it bridges gaps between the cells
that it was trained on.

Where two lines stand closer than their width, as in nearly cubic tetragonal cells, their windows
see the same peak, and the steps are too short: such cells are what is left of the error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from bragg_data.campaign import Campaign
from bragg_data.crystal import CELL_PARAMETERS, reciprocal_metric
from bragg_data.reflections import lines_of, unique_reflections
from bragg_models.targets import Targets

_Array = np.ndarray[Any, np.dtype[np.float64]]

# Tables of a phase's lines, and their rows; None stands for the number of metric terms.
_TABLES = {"products": None, "strength": 1, "decay": 1, "centre": 1}
_MOST_LINES = 3000  # of a phase, the strongest ones
_SHORTEST = 0.42  # Å: below, the peaks of most structures overlap beyond use
_NEXT = 1e-4  # step of the numerical derivative of positions, in Å or degrees


@dataclass(frozen=True)
class GuidedPhase:
    """What the look has to know of a phase beside its tables of lines.

    Attributes
    ----------
    free
        Columns of the network's parameters that are free in it.
    cell
        For each of a, b, c, alpha, beta, gamma: the column of the network's parameters that it
        equals, or a fixed angle in degrees as a negative number.
    terms
        Which terms of the reciprocal metric its lines' products belong to.
    lines
        How many there are.
    """

    free: tuple[int, ...]
    cell: tuple[float, ...]
    terms: tuple[int, ...]
    lines: int


@dataclass(frozen=True)
class GuidedConfig:
    """Our network.

    Attributes
    ----------
    points, relative_step, start
        The time-of-flight grid: T_i = start · exp(relative_step · i), in µs.
    calibration
        difC, difA, difB and Zero of the instrument.
    phases
        One for each phase.
    parameters
        Number of cell parameters that are free in any phase.
    hidden
        Width of the glance.
    lowest
        First point that the look regards: at shorter times peaks overlap beyond use.
    peaks
        How many peaks it regards, the strongest ones in the window.
    reach, strides
        It regards so many points on either side of a peak, taken at these distances from one
        another: first far apart, to catch a peak that is some widths away, then side by side.
    zones, taps
        Learnt peak shapes along the grid, and their length in points.
    rounds
        How often it looks with each stride.
    window
        Width of the network that judges one window.
    """

    points: int
    relative_step: float
    start: float
    calibration: tuple[float, float, float, float]
    phases: tuple[GuidedPhase, ...]
    parameters: int
    hidden: int = 512
    lowest: int = 0
    peaks: int = 48
    reach: int = 8
    strides: tuple[int, ...] = (3, 1)
    zones: int = 8
    taps: int = 31
    rounds: tuple[int, ...] = (3, 3)
    window: int = 64


def read_config(*, phases: Sequence[Mapping[str, Any]], **values: Any) -> GuidedConfig:
    """Return the configuration that was written as plain JSON values.

    Raises
    ------
    TypeError
        If a value is missing, or unknown.
    """
    tables: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in phase.items()}
        for phase in phases
    ]
    return GuidedConfig(phases=tuple(GuidedPhase(**table) for table in tables), **values)


class Guided(nn.Module):
    """Our integrated network; see the module.

    In training mode it answers with the glance alone, and :meth:`own_loss` trains the look on cells
    that are a little wrong. Otherwise it looks, a few times.
    """

    def __init__(self, config: GuidedConfig) -> None:
        super().__init__()
        self.config = config
        self.glance = nn.Sequential(
            nn.Linear(config.points, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
        )
        self.phase = nn.Linear(config.hidden, len(config.phases))
        self.cell = nn.Linear(config.hidden, config.parameters)
        self.look = _Look(config)
        for name in ("middle", "half_range"):
            self.register_buffer(name, torch.ones(config.parameters, dtype=torch.float64))

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
        hidden = self.glance(profiles * self.config.points**0.5)
        logits, values = self.phase(hidden), self.cell(hidden)
        if self.training:
            return logits, values
        values = values.double()
        guessed = logits.argmax(dim=1)
        for code, phase in enumerate(self.config.phases):
            rows = torch.nonzero(guessed == code)[:, 0]
            if len(rows):
                own = values[rows].clamp(-1, 1)
                for level, rounds in enumerate(self.config.rounds):
                    for _ in range(rounds):
                        step = self._step(code, level, profiles[rows], own)
                        own = (own + step).clamp(-1.05, 1.05)
                free = torch.tensor(phase.free, device=values.device)
                values[rows[:, None], free] = own[:, free]
        return logits, values

    def own_loss(
        self, profiles: Tensor, phase: Tensor, values: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss of the look on some profiles of one phase, drawn at random.

        Parameters
        ----------
        profiles, phase, values
            A batch: prepared profiles (n, points), phases (n,), true scaled parameters
            (n, n_parameters).
        generator
            Source of all random draws.
        """
        present = torch.unique(phase)
        draw = int(torch.randint(len(present), (1,), generator=generator))
        code = int(present[draw])
        rows = torch.nonzero(phase == code)[:128, 0]
        own, true = profiles[rows].float(), values[rows].double()
        size = (len(rows), 1)
        # Mistakes from a thousandth of a point of the grid to as far as a window sees.
        level = int(torch.randint(len(self.config.strides), (1,), generator=generator))
        power = torch.rand(size, generator=generator, dtype=torch.float64)
        least, most = (1e-5, 1e-2) if self.config.strides[level] == 1 else (1e-4, 7e-2)
        spread = least * (most / least) ** power
        wrong = spread * torch.randn(true.shape, generator=generator, dtype=torch.float64)
        guess = (true + wrong.to(true.device)).clamp(-1, 1)
        free = list(self.config.phases[code].free)
        step = self._step(code, level, own, guess)[:, free]
        wanted = (true - guess)[:, free]
        relative = (step - wanted) ** 2 / (spread.to(true.device) ** 2 + 1e-10)
        expected = self.look.expected(code, self._physical(true))
        expected = expected * self.look.scale(own, expected)[:, None]
        shape = ((own - expected)[:, self.config.lowest :] ** 2).sum(dim=1).mean()
        return (torch.log1p(relative).mean() + 100 * shape).float()

    def _physical(self, values: Tensor) -> Tensor:
        middle, half = cast("Tensor", self.middle), cast("Tensor", self.half_range)
        return values * half + middle

    def _step(self, code: int, level: int, profiles: Tensor, values: Tensor) -> Tensor:
        free = list(self.config.phases[code].free)
        half = cast("Tensor", self.half_range)
        change = torch.zeros_like(values)
        step = self.look(code, level, profiles.float(), self._physical(values))
        change[:, free] = step / half[free]
        return change


class _Look(nn.Module):
    """One step from a proposed cell towards the cell whose peaks are where the profile's are."""

    def __init__(self, config: GuidedConfig) -> None:
        super().__init__()
        self.config = config
        for code, phase in enumerate(config.phases):
            for name, rows in _TABLES.items():
                shape = (rows or len(phase.terms), phase.lines)
                self.register_buffer(f"{name}_{code}", torch.ones(shape, dtype=torch.float64))
        taps = torch.arange(config.taps) - config.taps // 2
        start = torch.clamp(-(taps**2) / (2 * 2.4**2), min=-6.0)
        self.shapes = nn.Parameter(start.repeat(config.zones, 1).float())
        width, windows = config.window, 2 * (2 * config.reach + 1) + 4
        self.judges = nn.ModuleList(
            nn.Sequential(
                nn.Linear(windows, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                nn.Linear(width, 3),
            )
            for _ in config.strides
        )  # fmt: skip
        for judge in self.judges:
            last = cast("nn.Linear", cast("nn.Sequential", judge)[-1])
            with torch.no_grad():  # it begins as plain least squares
                last.weight.mul_(0.1)
                last.bias.zero_()

    def forward(self, code: int, level: int, profiles: Tensor, parameters: Tensor) -> Tensor:
        r"""Return the step in the phase's free parameters.

        With v the profile and e the expectation in the window of peak k, whose position is u_k,

        .. math:: m_k = -\frac{\sum e'(v - e)}{\sum e'^2}, \quad
                  \min_\delta \sum_k w_k (m_k - \partial u_k/\partial p \cdot \delta)^2

        where a small network corrects each shift m_k, and sets its weight w_k.

        Parameters
        ----------
        code, level
            The phase, and which of the strides.
        profiles : shape (n, points)
            Prepared.
        parameters : shape (n, n_parameters)
            In Å and degrees.

        Returns
        -------
        shape (n, n_free)
            In Å and degrees.
        """
        c, phase = self.config, self.config.phases[code]
        stride = c.strides[level]
        reach = c.reach * stride + 1
        position, inverse = self._positions(code, parameters)
        amplitude = self._amplitudes(code, inverse)
        inside = (position > c.lowest) & (position < c.points - c.reach)
        height = amplitude * inside * torch.exp(-position * c.relative_step)
        chosen = height.topk(min(c.peaks, phase.lines), dim=1).indices
        at = position.gather(1, chosen)
        slopes = []
        for column in phase.free:
            beside = parameters.clone()
            beside[:, column] += _NEXT
            moved = self._positions(code, beside)[0].gather(1, chosen)
            slopes.append((moved - at) / _NEXT)
        slope = torch.stack(slopes, dim=2).float()

        expected = torch.sqrt(self._pattern(position, amplitude))
        expected = expected * self.scale(profiles, expected)[:, None]
        offsets = stride * torch.arange(-c.reach, c.reach + 1, device=profiles.device)
        nearest = at.round().long().clamp(reach, c.points - 1 - reach)
        window = nearest[:, :, None] + offsets
        v, e = _taken(profiles, window), _taken(expected, window)
        derivative = (_taken(expected, window + 1) - _taken(expected, window - 1)) / 2
        taper = torch.cos(offsets / (stride * (c.reach + 1)) * (np.pi / 2)) ** 2
        top = e.amax(dim=2, keepdim=True) + 1e-5
        # In units of the window's own height, so that weak and strong peaks look alike.
        difference, derivative = (v - e) / top, derivative / top
        certainty = (taper * derivative**2).sum(dim=2) + 1e-3
        shift = -(taper * derivative * difference).sum(dim=2) / certainty
        shift = shift.clamp(-6 * stride, 6 * stride)
        seen = torch.cat(
            [
                difference, e / top, (at - at.round()).float()[:, :, None], torch.log(top),
                shift[:, :, None] / stride, torch.log(certainty)[:, :, None],
            ],
            dim=2,
        )  # fmt: skip
        factor, more, trust = self.judges[level](seen).unbind(dim=2)
        shift = shift * (1 + torch.tanh(factor)) + 0.1 * stride * more
        weight = certainty * top[:, :, 0] ** 2 * torch.exp(4 * torch.tanh(trust))
        weight = weight * inside.gather(1, chosen)
        weighted = slope * weight[:, :, None]
        normal = weighted.transpose(1, 2) @ slope
        diagonal = torch.diagonal(normal, dim1=1, dim2=2)
        damping = torch.diag_embed(1e-4 * diagonal + 1e-9)
        right = (weighted * shift[:, :, None]).sum(dim=1)
        solved: Tensor = torch.linalg.solve(normal + damping, right[:, :, None])[:, :, 0]
        return solved.double()

    def expected(self, code: int, parameters: Tensor) -> Tensor:
        """Return the square root of the expected pattern, in any scale, shape (n, points)."""
        position, inverse = self._positions(code, parameters)
        return torch.sqrt(self._pattern(position, self._amplitudes(code, inverse)))

    def scale(self, profiles: Tensor, expected: Tensor) -> Tensor:
        """Return the factor that brings expectations to profiles, shape (n,)."""
        v, e = profiles[:, self.config.lowest :], expected[:, self.config.lowest :]
        return (v * e).sum(dim=1) / (e * e).sum(dim=1)

    def _positions(self, code: int, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return where on the grid each line of each cell stands, and its 1/d² in Å⁻²."""
        phase = self.config.phases[code]
        columns = [
            parameters[:, int(entry)] if entry >= 0 else torch.full_like(parameters[:, 0], -entry)
            for entry in phase.cell
        ]
        metric = _reciprocal_metric(*columns)[:, list(phase.terms)]
        inverse = (metric @ self._table("products", code)).clamp(min=1e-3)
        d = inverse**-0.5
        difc, difa, difb, zero = self.config.calibration
        tof = (difc * d + difa * d * d + difb / d + zero).clamp(min=1.0)
        return torch.log(tof / self.config.start) / self.config.relative_step, inverse

    def _amplitudes(self, code: int, inverse: Tensor) -> Tensor:
        """Return multiplicity · |F|² · d⁴ of each line."""
        strength, decay, centre = (self._table(n, code) for n in ("strength", "decay", "centre"))
        return strength * torch.exp(-decay * (inverse - centre)) * inverse**-2

    def _pattern(self, position: Tensor, amplitude: Tensor) -> Tensor:
        """Return sticks of these amplitudes, spread by the learnt peak shapes."""
        c = self.config
        there = (position > 0) & (position < c.points - 2)
        low = position.clamp(0, c.points - 2).floor().long()
        part = (position.clamp(0, c.points - 2) - low).float()
        height = (amplitude * there).float()
        sticks = torch.zeros(len(position), c.points, device=position.device)
        sticks = sticks.scatter_add(1, low, height * (1 - part))
        sticks = sticks.scatter_add(1, low + 1, height * part)
        shapes = torch.softmax(self.shapes, dim=1)
        spread = nn.functional.conv1d(sticks[:, None], shapes[:, None], padding=c.taps // 2)
        along = torch.linspace(0, c.zones - 1, c.points, device=position.device)
        zone = torch.arange(c.zones, device=position.device)[:, None]
        share = (1 - (along - zone).abs()).clamp(min=0)
        # Points are further apart at long times: the same area is lower there.
        step = torch.exp(torch.arange(c.points, device=position.device) * c.relative_step)
        return ((spread * share).sum(dim=1) / step).clamp(min=1e-9)

    def _table(self, name: str, code: int) -> Tensor:
        return cast("Tensor", getattr(self, f"{name}_{code}"))


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Return the values of (n, points) at indices (n, k, m)."""
    n, k, m = index.shape
    return values.gather(1, index.reshape(n, k * m)).reshape(n, k, m)


def _reciprocal_metric(
    a: Tensor, b: Tensor, c: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor
) -> Tensor:
    """As :func:`bragg_data.crystal.reciprocal_metric`, shape (n, 6)."""
    ca, cb, cg = (torch.cos(torch.deg2rad(angle)) for angle in (alpha, beta, gamma))
    s = (1 - ca**2 - cb**2 - cg**2 + 2 * ca * cb * cg).clamp(min=1e-6)
    return torch.stack(
        [
            (1 - ca**2) / (a**2 * s),
            (1 - cb**2) / (b**2 * s),
            (1 - cg**2) / (c**2 * s),
            2 * (ca * cb - cg) / (a * b * s),
            2 * (ca * cg - cb) / (a * c * s),
            2 * (cb * cg - ca) / (b * c * s),
        ],
        dim=1,
    )


def fill_tables(network: nn.Module, campaign: Campaign, targets: Targets) -> None:
    """Give a new network what it knows beforehand: each phase's lines, the parameters' scale."""
    state: dict[str, _Array] = {
        "middle": targets.middle,
        "half_range": targets.half_range,
    }
    for code, tables in enumerate(_lines(campaign, cast("Guided", network).config.lowest)):
        for name, table in zip(_TABLES, tables, strict=True):
            state[f"look.{name}_{code}"] = np.atleast_2d(table)
    tensors: Mapping[str, Tensor] = {
        name: torch.from_numpy(np.array(values, dtype=np.float64)) for name, values in state.items()
    }
    network.load_state_dict(tensors, strict=False)


def guided_config(campaign: Campaign, targets: Targets, **changes: Any) -> dict[str, Any]:
    """Return the description of a network for a campaign, as plain JSON values."""
    instrument, grid = campaign.instrument, campaign.grid
    described = {
        "points": grid.points,
        "relative_step": grid.relative_step,
        "start": grid.start,
        "calibration": (instrument.difc, instrument.difa, instrument.difb, instrument.tzero),
        "parameters": len(targets.parameters),
        "lowest": int(np.clip(_first_point(campaign), 0, grid.points // 2)),
        **changes,
    }
    names = targets.parameters
    phases = []
    for lattice, (products, *_) in zip(
        targets.lattices, _lines(campaign, described["lowest"]), strict=True
    ):
        tied = dict(lattice.tied)
        cell = []
        for name in CELL_PARAMETERS:
            source = tied.get(name, name)
            cell.append(float(names.index(source)) if isinstance(source, str) else -float(source))
        phases.append(
            {
                "free": [names.index(name) for name in lattice.free_parameters],
                "cell": cell,
                "terms": [group[0] for group in lattice.metric_terms],
                "lines": products.shape[1],
            }
        )
    return {**described, "phases": phases}


def _first_point(campaign: Campaign) -> float:
    tof = campaign.instrument.tof_from_d_spacing(_SHORTEST)
    return float(np.log(tof / campaign.grid.start) / campaign.grid.relative_step)


def _lines(campaign: Campaign, lowest: int) -> list[tuple[_Array, _Array, _Array, _Array]]:
    r"""Return each phase's lines: products of indices, strengths, decays and their centres.

    About the middle one of its cells, :math:`m|F|^2 = S e^{-k(x - x_0)}` with :math:`x = 1/d^2`.
    """
    grid, samples = campaign.grid, campaign.samples
    first = grid.start * np.exp(grid.relative_step * lowest)
    d_min = float(campaign.instrument.d_spacing_from_tof(np.array([first]))[0])
    tables = []
    for code, phase in enumerate(campaign.phases):
        cells = samples.cells[samples.phase == code]
        h, k, l = (int(np.floor(length / d_min)) for length in cells[:, :3].max(axis=0))  # noqa: E741
        lines = lines_of(phase, unique_reflections(phase, (h, k, l)))
        products = np.asarray(lines.products, dtype=np.float64)
        terms = [group[0] for group in phase.lattice.metric_terms]
        centre = reciprocal_metric(np.median(cells, axis=0)[None])[0, terms] @ products
        u = lines.u_groups
        pairs = np.array([u[i] + u[j] for i in range(len(u)) for j in range(i, len(u))])
        parts = lines.strengths * np.exp(-2 * np.pi**2 * np.outer(pairs, centre))
        strength = np.maximum(parts.sum(axis=0), 1e-12)
        decay = 2 * np.pi**2 * (pairs @ parts) / strength
        # A line that vanishes somewhere near has no decay to speak of.
        decay = np.clip(decay, 0, 4 * np.pi**2 * u.max())
        kept = np.argsort(-strength / centre**2, kind="stable")[:_MOST_LINES]
        tables.append((products[:, kept], strength[kept], decay[kept], centre[kept]))
    return tables

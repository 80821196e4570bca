"""Patterns of a campaign's phases as a layer of a network: from cells to profiles and derivatives.

Nothing in the layer is trained. It holds what the campaign defines (the reflections of each phase
with their structure factors, the instrument's calibration and peak shape; see
:mod:`bragg_models.networks.pattern_tables`) and computes, for a batch of cells on any device, the
pattern in the long-d part of the window and its derivatives with respect to the cell. It is the
physics of the fast simulator, batched and with derivatives, and agrees with it to about 1e-4 of a
pattern's maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bragg_models.networks.guided_config import PatternConfig
from bragg_models.networks.pattern_tables import MARGIN, PHASE_TABLES

_DIFFERENCE = 1e-5  # step of the numerical derivative of positions, in Å or degrees
_FAR_BELOW = 1e6  # product of a reflection that pads a table: at a d-spacing far below the window
_SLOPE_RANK = 2  # basis shapes that reproduce derivatives well enough for a search


class Pattern(nn.Module):
    """Patterns and their derivatives from cells; see the module.

    ``code`` is the phase of all rows, or that of each, shape (n,). ``parameters`` (n, n_parameters)
    are cell parameters in Å and degrees, in double precision.
    """

    shapes: Tensor
    shares: Tensor

    def __init__(self, config: PatternConfig) -> None:
        super().__init__()
        self.config = config
        for code, phase in enumerate(config.phases):
            shapes = (len(phase.terms), phase.lines), (phase.pairs, phase.lines), (phase.pairs,)
            for name, shape in zip(PHASE_TABLES, shapes, strict=True):
                self.register_buffer(f"{name}_{code}", torch.ones(shape).double())
        self._nodes = config.points - config.base + MARGIN
        self._slope_rank = min(_SLOPE_RANK, config.rank)
        # Of the Fourier transforms, 2^k or 3·2^k: no peak wraps around onto a compared point.
        least = self._nodes + config.reach
        power = 1 << (least - 1).bit_length()
        self._length = power * 3 // 4 if power * 3 // 4 >= least else power
        self.register_buffer("shapes", torch.ones(config.rank, 2 * config.reach + 1))
        self.register_buffer("shares", torch.ones(self._nodes, config.rank))
        # Values that follow from the tables, computed once per device.
        self._cache: dict[tuple[str, int | None, torch.device], Any] = {}
        self.register_load_state_dict_post_hook(_clear_cache)  # type: ignore[no-untyped-call]

    def free(self, code: int | Tensor) -> Tensor:
        """Return the columns of the free parameters of a phase, (1, n_free), or of each row's.

        Rows of a phase with fewer free parameters are padded with columns of no effect.
        """
        return self._lines(code).free

    def line_positions(self, code: int | Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reflections' positions in points of the grid, and 1/d² in Å⁻²: (n, lines)."""
        lines = self._lines(code)
        metric = _reciprocal_metric(lines.cell_of(parameters))
        inverse = (metric[:, None] @ lines.products)[:, 0].clamp(min=1e-4)
        return self._position(inverse)[0], inverse

    def _position(self, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions of reflections of these 1/d², in points, and the times of flight."""
        d = inverse.rsqrt()
        difc, difa, difb, zero = self.config.calibration
        tof = (difc * d + difa * d * d + difb / d + zero).clamp(min=1.0)
        return torch.log(tof / self.config.start) / self.config.relative_step, tof

    def sensitivity(self, code: int | Tensor, parameters: Tensor) -> Tensor:
        """Return the mean of ∂u/∂p · ∂u/∂q over the reflections, (n, n_free, n_free).

        In points² per Å², Å·degree or degree²; reflections outside the window do not count.
        """
        c = self.config
        position, _, slopes = self._positions_and_slopes(code, parameters)
        inside = ((position > c.base) & (position < c.points - 1)).double()
        count = inside.sum(dim=1).clamp(min=1)[:, None, None]
        return (slopes * inside[:, None]) @ slopes.mT / count

    def _positions_and_slopes(
        self, code: int | Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`line_positions`, and the derivatives of positions, shape (n, n_free, lines)."""
        lines = self._lines(code)
        n, count = len(parameters), lines.free.shape[1]
        # All differences in one call: the number of small operations takes the time.
        cells = parameters[:, None].repeat(1, 1 + count, 1)
        where = lines.free.expand(n, count)[..., None]
        cells[:, 1:].scatter_add_(2, where, torch.full_like(cells[:, 1:, :1], _DIFFERENCE))
        metric = _reciprocal_metric(lines.cell_of(cells))
        metric[:, 1:] = (metric[:, 1:] - metric[:, :1]) / _DIFFERENCE
        both = metric @ lines.products
        inverse = both[:, 0].clamp(min=1e-4)
        position, tof = self._position(inverse)
        difc, difa, difb, _ = self.config.calibration
        d = inverse.rsqrt()
        by_d = difc + 2 * difa * d - difb / (d * d)
        by_inverse = -0.5 * by_d * d / inverse / tof / self.config.relative_step
        return position, inverse, both[:, 1:] * by_inverse[:, None]

    def near_the_end(self, code: int | Tensor, parameters: Tensor, points: float) -> Tensor:
        """Return which cells have a reflection close to the window's end, shape (n,).

        A reflection beyond the end contributes nothing, not even its tail, as in GSAS-II: the
        pattern is discontinuous where a reflection crosses the end.
        """
        position, _ = self.line_positions(code, parameters)
        return ((position - (self.config.points - 1)).abs() < points).any(dim=1)

    def blurred(self, patterns: Tensor, blur: float) -> Tensor:
        """Return patterns (n, points - first) convolved with a Gaussian, ``blur`` points wide."""
        curvature = self._transfer()[2]
        spectra = torch.fft.rfft(patterns, n=self._length) * torch.exp(curvature * blur**2)
        spread: Tensor = torch.fft.irfft(spectra, n=self._length)[:, : patterns.shape[1]]
        return spread.clamp(min=1e-12)

    def forward(
        self,
        code: int | Tensor,
        parameters: Tensor,
        *,
        slopes: bool = True,
        blur: float = 0.0,
        sample_parameters: Tensor | None = None,
        lorentzian: bool = False,
    ) -> tuple[Tensor, Tensor]:
        r"""Return patterns and their derivatives.

        .. math:: I(i) = \sum_l m_l |F_l|^2 d_l^4 \, P_{u_l}(i - u_l), \quad
            \frac{\partial I}{\partial p} = -\sum_l m_l |F_l|^2 d_l^4 \,
            \frac{\partial u_l}{\partial p} P'_{u_l}(i - u_l)

        with the position u of each reflection on the logarithmic grid. The derivative neglects how
        amplitudes and shapes change with the cell, which is less than a hundredth of it.

        Patterns (n, points - first) are on an arbitrary scale; derivatives (n, n_free, points -
        first) with respect to the columns of :meth:`free`, then to the sample parameters if there
        are any, empty without ``slopes``. ``sample_parameters`` (n, 2) are the logarithm of a
        factor on all displacement parameters, and the variance of a Gaussian that broadens the
        peaks, in points² (negative where they are narrower), or if ``lorentzian`` the FWHM, in
        points, of a Lorentzian. ``blur`` is the standard deviation, in points, of a Gaussian with
        which the pattern is convolved.
        """
        c, lines = self.config, self._lines(code)
        position, inverse, *slopes_of_position = (
            self._positions_and_slopes(code, parameters)
            if slopes
            else self.line_positions(code, parameters)
        )
        chosen = inverse.topk(lines.most, dim=1, largest=False).indices
        position, inverse = position.gather(1, chosen), inverse.gather(1, chosen)
        n, pairs = len(chosen), lines.strengths.shape[1]
        damped = inverse
        if sample_parameters is not None:
            damped = inverse * sample_parameters[:, :1].double().exp()
        index = chosen[:, None].expand(n, pairs, -1)
        strengths = lines.strengths.expand(n, -1, -1).gather(2, index)
        parts = strengths * torch.exp(-lines.rates[..., None] * damped[:, None])
        inside = (position > c.base + 1) & (position < c.points - 1)
        common = inside / (inverse * inverse)
        amplitude = parts.sum(dim=1) * common
        weights = [amplitude[:, None]]
        if slopes:
            (changing,) = slopes_of_position
            index = chosen[:, None].expand(n, changing.shape[1], -1)
            weights.append(amplitude[:, None] * changing.gather(2, index))
            if sample_parameters is not None:
                lost = (-lines.rates[..., None] * parts).sum(dim=1)
                weights.append((lost * damped * common)[:, None])
        deposit = self._spread_on_grid(position - c.base, torch.cat(weights, dim=1).float())
        spectra = torch.fft.rfft(deposit)
        shape, derivative, curvature = self._transfer()
        rank, slope_rank = len(shape), len(derivative)
        of_slopes = (
            spectra[:, rank:].unflatten(1, (-1, slope_rank)) if slopes else spectra[:, :0, None]
        )
        n_cell = of_slopes.shape[1] - (slopes and sample_parameters is not None)
        together = torch.cat(
            [
                (spectra[:, :rank] * shape).sum(dim=1, keepdim=True),
                (of_slopes[:, :n_cell] * derivative).sum(dim=2),
                (of_slopes[:, n_cell:] * shape[:slope_rank]).sum(dim=2),
            ],
            dim=1,
        )
        if sample_parameters is not None:
            # Of a Gaussian of variance v the transform is exp(-2π²f²v), of a Lorentzian of FWHM Γ
            # exp(-πfΓ).
            broadening = sample_parameters[:, 1:, None].float()
            exponent, rate = curvature * broadening, curvature
            if lorentzian:
                exponent, rate = self._lorentzian(broadening)
            together = together * torch.exp(exponent)
            if slopes:
                together = torch.cat([together, rate * together[:, :1]], dim=1)
        if blur:
            together = together * torch.exp(curvature * blur**2)
        spread = torch.fft.irfft(together, n=self._length)
        compared = spread[:, :, c.first - c.base : c.points - c.base]
        return compared[:, 0].clamp(min=1e-12), compared[:, 1:]

    def _spread_on_grid(self, position: Tensor, weights: Tensor) -> Tensor:
        """Return weights spread over the grid by cubic B-splines, for each basis shape.

        From positions (n, k) in points from the base and weights (n, m, k) of the pattern, then of
        each derivative, to (n, rank + (m - 1) · rank of derivatives, length).
        """
        position = position.clamp(1, self._nodes - 3)
        whole = position.floor()
        t = (position - whole).float()
        node = whole.long()
        share = self.shares[node] * (1 - t)[..., None] + self.shares[node + 1] * t[..., None]
        share = share.mT
        fewer = weights[:, 1:, None] * share[:, None, : self._slope_rank]
        source = torch.cat([weights[:, :1] * share, fewer.flatten(1, 2)], dim=1)
        square, rest = t * t, 1 - t
        spline = (
            rest * rest * rest / 6,
            (3 * t * square - 6 * square + 4) / 6,
            (-3 * t * square + 3 * square + 3 * t + 1) / 6,
            t * square / 6,
        )
        deposit = torch.zeros(*source.shape[:2], self._length, device=position.device)
        for offset, weight in enumerate(spline):
            index = (node + offset - 1)[:, None].expand(source.shape)
            deposit.scatter_add_(2, index, source * weight[:, None])
        return deposit

    def _lorentzian(self, width: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of a Lorentzian's transform with its shift, and its derivative.

        The FWHM (n, 1, 1) is in points; both results are (n, 1, length).
        """
        frequency = (-self._transfer()[2] / 2).sqrt()  # times π
        unit, first, second = self.config.skew
        ratio = (1 + width / unit).clamp(min=1e-3)
        g = ratio.log()
        shift, slope = (first + second * g) * g, (first + 2 * second * g) / (ratio * unit)
        return -frequency * (width + 2j * shift), -frequency * (1 + 2j * slope)

    def _transfer(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Fourier transforms of the shapes, of minus their slopes, and of a Gaussian.

        Shapes (rank, length) and (rank of derivatives, length); and, (length,), the factor of a
        Gaussian's variance in the logarithm of its transform.
        """
        shapes, reach = self.shapes, self.config.reach

        def compute() -> tuple[Tensor, Tensor, Tensor]:
            kernel = torch.zeros(len(shapes), self._length, device=shapes.device)
            kernel[:, : reach + 1] = shapes[:, reach:]
            kernel[:, -reach:] = shapes[:, :reach]
            frequency = torch.fft.rfftfreq(self._length, device=shapes.device)
            # The B-spline of the deposit is divided out, as sampled on the grid.
            spline = (4 + 2 * torch.cos(2 * torch.pi * frequency)) / 6
            shape = torch.fft.rfft(kernel) / spline
            slope = -2j * torch.pi * frequency * shape[: self._slope_rank]
            return shape, slope, -2 * (torch.pi * frequency) ** 2

        return cast("tuple[Tensor, Tensor, Tensor]", self._once("transfer", None, compute))

    def _once(self, name: str, code: int | None, compute: Callable[[], Any]) -> Any:
        key = name, code, self.shapes.device
        if key not in self._cache:
            # As normal tensors, for later calls that need gradients.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._cache[key] = compute()
        return self._cache[key]

    def _lines(self, code: int | Tensor) -> _Lines:
        """Return the tables of a phase, or of each row's phase."""
        known = code if isinstance(code, int) else None
        codes = range(len(self.config.phases)) if known is None else [known]
        lines: _Lines = self._once("lines", known, lambda: self._joined(codes))
        return lines if isinstance(code, int) else lines.of(code)

    def _joined(self, codes: Sequence[int]) -> _Lines:
        """Return the tables of some phases, padded to the same size."""
        phases = [self.config.phases[code] for code in codes]
        device = self.shapes.device
        lines, pairs = max(p.lines for p in phases), max(p.pairs for p in phases)
        count = max(len(p.free) for p in phases)
        products = torch.zeros(len(phases), 6, lines, dtype=torch.float64, device=device)
        products[:, 0] = _FAR_BELOW
        strengths = products.new_zeros(len(phases), pairs, lines)
        rates = products.new_zeros(len(phases), pairs)
        columns = sorted({column for p in phases for column in p.free})
        free = []
        for row, (code, p) in enumerate(zip(codes, phases, strict=True)):
            tables = [cast("Tensor", getattr(self, f"{name}_{code}")) for name in PHASE_TABLES]
            products[row, :, : p.lines] = 0
            products[row, list(p.terms), : p.lines] = tables[0]
            strengths[row, : p.pairs, : p.lines], rates[row, : p.pairs] = tables[1:]
            unused = [column for column in columns if column not in p.cell]
            free.append([*p.free, *unused[: count - len(p.free)]])
        entries = torch.tensor([p.cell for p in phases], dtype=torch.float64, device=device)
        most = min(max(p.most for p in phases), lines)
        return _Lines(products, strengths, rates, entries, torch.tensor(free, device=device), most)


@dataclass(frozen=True, eq=False)
class _Lines:
    """Tables of phases, or of the phase of each row, along the first axis."""

    products: Tensor
    strengths: Tensor
    rates: Tensor
    entries: Tensor
    free: Tensor
    most: int

    def of(self, codes: Tensor) -> _Lines:
        return replace(self, **{n: table[codes] for n, table in vars(self).items() if n != "most"})

    def cell_of(self, parameters: Tensor) -> Tensor:
        """Return a, b, c, alpha, beta, gamma, (..., 6), of rows of the network's parameters."""
        entries = self.entries
        while entries.ndim < parameters.ndim:
            entries = entries[:, None]
        entries = entries.expand(*parameters.shape[:-1], 6)
        refined = parameters.gather(-1, entries.clamp(min=0).long())
        return torch.where(entries < 0, -entries, refined)


def _clear_cache(pattern: Pattern, _: object) -> None:
    pattern._cache.clear()


def _reciprocal_metric(cell: Tensor) -> Tensor:
    """Return :func:`~bragg_data.crystallography.cell.reciprocal_metric` of cells (..., 6)."""
    length, cosine = cell[..., :3], torch.cos(torch.deg2rad(cell[..., 3:]))
    # Cosines of the two other angles, for each angle.
    first, second = cosine[..., [1, 0, 0]], cosine[..., [2, 2, 1]]
    s = 1 - (cosine * cosine).sum(dim=-1, keepdim=True) + 2 * cosine.prod(dim=-1, keepdim=True)
    s = s.clamp(min=1e-6)
    diagonal = (1 - cosine * cosine) / (length * length * s)
    # (a*·b*, a*·c*, b*·c*) belong to gamma, beta, alpha.
    mixed = 2 * (first * second - cosine) / s / (length[..., [1, 0, 0]] * length[..., [2, 2, 1]])
    return torch.cat([diagonal, mixed.flip(-1)], dim=-1)

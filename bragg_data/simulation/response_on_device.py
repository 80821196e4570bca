"""The peak response on a torch device: deposits, operator and basis of peak shapes for tensors.

Tables, lines, operators and bases are those of the compiled loops; what is done to every reflection
and point is done here in few operations on large batches, one product for all zones or tiles.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from bragg_data.arrays import AnyFloats, Array, Floats32, Indices
from bragg_data.crystallography.reflections import Lines
from bragg_data.simulation.deposition import TAPS
from bragg_data.simulation.deposition_on_device import (
    OfPhase,
    OfSamples,
    Steps,
    add_steps,
    b_spline,
    deposit_lines,
    lines_between,
    steps_of,
    width_and_mixing,
)
from bragg_data.simulation.deposition_tables import Tables, Target
from bragg_data.simulation.device import Device, single_precision
from bragg_data.simulation.peak_operator import PeakOperator
from bragg_data.simulation.peak_response import (
    WIDTH_PARAMETERS,
    PeakResponse,
    WidthInterpolation,
    Widths,
)
from bragg_data.simulation.shape_basis import BLOCK, COARSE, IMPULSES, MARGIN, NEAR, RING

# Lines of all samples that share one selection, before it is made: each takes 200 bytes, or 20.
_LINES, _LINES_COMPILED = 1 << 24, 1 << 26
_VALUES = 1 << 27  # of the largest array of a batch: 0.5 GB
_MOST = 8192  # samples of a batch


class ResponseOnDevice:
    """What draws patterns on a device.

    ``compiled`` fuses the operations on reflections by torch.compile. Raises a DeviceError if there
    is no such device.
    """

    def __init__(
        self, response: PeakResponse, widths: WidthInterpolation, name: str, *, compiled: bool
    ) -> None:
        self.device = Device(name)
        self._response, self._widths = response, widths
        self._stations = _Stations(self.device, response, widths.stations)
        self.deposit_lines: Callable[..., None] = deposit_lines
        self.add_steps: Callable[..., None] = add_steps
        self._lines = _LINES_COMPILED if compiled else _LINES
        if compiled:
            self.deposit_lines, self.add_steps = _fused(deposit_lines), _fused(add_steps)

    def widths(self, samples: Mapping[str, Array]) -> Widths:
        """Return :meth:`WidthInterpolation.widths`, with the widths computed on the device."""
        values = [samples[name] for name in WIDTH_PARAMETERS]
        ratio = self._stations.widths(*self.device.send(np.stack(values)))[0]
        low, high = torch.stack([ratio.min(), ratio.max()]).tolist()
        return self._widths.widths(samples, (low, high))

    def batch(self, varied: Widths | None) -> int:
        """Return how many samples to take in a batch."""
        basis = None if varied is None else varied.basis
        values = basis.n_source * basis.members.shape[3] if basis else self._response.n_source
        return min(max(_VALUES // values, 16), _MOST)

    def patterns(
        self,
        runs: Iterable[tuple[slice, Floats32]],
        lines: Lines,
        metric: Array,
        scale: Array,
        samples: Mapping[str, Array],
        tables: Tables,
        varied: Widths | None,
    ) -> Tensor:
        """Return the patterns (n, points) of samples of one phase.

        Of their ``metric`` (n, n_terms) and ``scale`` (n,). The runs: rows, and the strengths that
        ``lines`` have in them.
        """
        device, response = self.device, self._response
        values = (scale, *(samples[name] for name in ("u_scale", *WIDTH_PARAMETERS)))
        together = device.send(np.concatenate([metric.T, np.stack(values)]))
        of_samples = OfSamples(together[: -len(values)], *together[-len(values) :])
        target = response.target if varied is None else varied.target
        n_source = response.n_source if varied is None else varied.basis.n_source
        steps, draws = device.once(varied or response, lambda: self._drawn_by(varied))
        pieces, taps = device.once(b_spline, lambda: b_spline(device))
        products, whole = device.once(lines, lambda: self._of_lines(lines))
        damping = device.once(tables, lambda: self._damping(tables))
        parts = list(self._selected(runs, lines, metric, samples["difc"], target, steps))
        # All selections are sent at once: small copies take longer than what they carry.
        chosen = [indices for *_, both in parts for indices in both]
        moved = device.send(np.concatenate(chosen))
        places = iter(torch.tensor_split(moved, np.cumsum([len(c) for c in chosen])[:-1].tolist()))
        deposits, patterns = [], []
        for rows, strengths, _ in parts:
            of_rows, n = of_samples.rows(rows), rows.stop - rows.start
            of_lines = whole if strengths is lines.strengths else device.send(strengths)
            deposits.append(device.zeros(n_source, n))
            patterns.append(device.zeros(response.grid.points, n))
            some, few = (
                OfPhase(products[:, place], of_lines[:, place], *damping)
                for place in (next(places), next(places))
            )
            self.deposit_lines(deposits[-1], of_rows, some, target, pieces, taps)
            if few.products.shape[1]:
                self.add_steps(patterns[-1], of_rows, few, target, steps)
        with single_precision():
            drawn: Tensor = draws(torch.cat(deposits, dim=1), of_samples)
            return drawn.add_(torch.cat(patterns, dim=1)).t()

    def _of_lines(self, lines: Lines) -> tuple[Tensor, Tensor]:
        return self.device.send(lines.products).double(), self.device.send(lines.strengths)

    def _damping(self, tables: Tables) -> tuple[Tensor, Tensor, float, float]:
        both = tables.rates.astype(np.float32), tables.resonance
        rates, resonance = (self.device.send(table) for table in both)
        return rates, resonance, float(tables.d_0), float(tables.dd)

    def _selected(
        self,
        runs: Iterable[tuple[slice, Floats32]],
        lines: Lines,
        metric: Array,
        difc: Array,
        target: Target,
        steps: Steps,
    ) -> Iterator[tuple[slice, Floats32, tuple[Indices, Indices]]]:
        """Yield rows, strengths, the lines that any row may need, and those with steps."""
        alike = max(self._lines // lines.products.shape[1], 1)
        for run, strengths in runs:
            for first in range(run.start, run.stop, alike):
                rows = slice(first, min(first + alike, run.stop))
                q_high = (difc[rows].max() / target.tof_low) ** 2
                some = lines_between(metric[rows], lines.products, 0.0, q_high)
                few = some[:0]
                if steps.sides:
                    ends = target.d_step_high**-2, target.d_step_low**-2
                    few = lines_between(metric[rows], lines.products, *ends)
                yield rows, strengths, (some, few)

    def _drawn_by(self, varied: Widths | None) -> tuple[Steps, Callable[..., Tensor]]:
        """Return the steps of erfcx, and what makes patterns of deposits and samples."""
        device, response = self.device, self._response
        if varied is None:
            steps = steps_of(device, response.target, response.shapes, (0.0, 0.0))
            tiles = _Tiles(device, response.operator, response.oversampling)
            return steps, tiles.operate
        steps = steps_of(device, response.target, response.shapes, varied.interval)
        steps = steps._replace(
            shapes=device.send(varied.rates.astype(np.float32)), broadening=response.broadening
        )
        return steps, _Basis(device, varied, self._stations).convolve


def _fused(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function of samples and a phase compiled once for any number of both's rows."""
    compiled = torch.compile(function)

    def call(out: Tensor, samples: OfSamples, phase: OfPhase, *constants: object) -> None:
        torch._dynamo.maybe_mark_dynamic(out, 0)
        for values in (out, *samples):
            torch._dynamo.maybe_mark_dynamic(values, values.ndim - 1)
        for values in (phase.products, phase.strengths):
            torch._dynamo.maybe_mark_dynamic(values, 1)
        compiled(out, samples, phase, *constants)

    return call


class _Tiles:
    """The matrices of a :class:`PeakOperator`: tile t takes nodes from first + t · stride on."""

    def __init__(self, device: Device, operator: PeakOperator, oversampling: int) -> None:
        self._points = operator.far.shape[1]
        self._stride = oversampling * (operator.tiles[1][1] if len(operator.tiles) > 1 else 1)
        starts = [node - self._stride * t for t, (node, _, _) in enumerate(operator.tiles)]
        first = min(starts)
        shapes = [
            (s - first + len(m), m.shape[1])
            for s, (_, _, m) in zip(starts, operator.tiles, strict=True)
        ]
        nodes, points = np.max(shapes, axis=0).tolist()
        nodes += -nodes % 16  # products of matrices are slow where rows begin anywhere
        near = np.zeros((len(starts), nodes, points), dtype=np.float32)
        for tile, start, (_, _, matrix) in zip(near, starts, operator.tiles, strict=True):
            tile[start - first :][: len(matrix), : matrix.shape[1]] = matrix
        n_source, n_coarse = len(operator.coarse_first), len(operator.far)
        coarse = np.zeros((n_source, n_coarse), dtype=np.float32)
        columns = operator.coarse_first[:, None].astype(np.intp) + np.arange(TAPS)
        np.put_along_axis(coarse, columns, operator.coarse_weights, axis=1)
        far = np.zeros((n_coarse, len(near) * points), dtype=np.float32)
        far[:, : self._points] = operator.far
        # Zeros on both sides of the source grid, so that all tiles take as many nodes.
        before = max(0, -first)
        self._first = before + first
        behind = self._first + self._stride * (len(near) - 1) + nodes - before - n_source
        self._beyond = before, max(0, behind)
        self._near, self._coarse, self._far = (device.send(m) for m in (near, coarse, far))

    def operate(self, deposits: Tensor, _: OfSamples) -> Tensor:
        """Return the patterns (points, n) of deposits, (n_source, n) coefficients of B-splines."""
        n, (tiles, nodes, points) = deposits.shape[1], self._near.shape
        patterns = self._far.t() @ (self._coarse.t() @ deposits)
        room = pad(deposits, (0, 0, *self._beyond))
        windows = room.as_strided((tiles, nodes, n), (self._stride * n, n, 1), self._first * n)
        patterns.view(tiles, points, n).baddbmm_(self._near.transpose(1, 2), windows)
        return patterns[: self._points]


class _Stations:
    """Where coefficients of the profiles are computed: T (µs), ln W and d (Å) there, nominal."""

    def __init__(self, device: Device, response: PeakResponse, stations: Sequence[Array]) -> None:
        self._tof, self._log_width, self._d = (device.send(s.reshape(1, -1)) for s in stations)
        self._instrument, self._broadening = response.instrument, response.broadening

    def widths(
        self, difc: Tensor, tzero: Tensor, size: Tensor, microstrain: Tensor, width_scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ln(W / W nominal), η, and the relative difference of d: (n, stations).

        Of the values of samples, (n,).
        """
        difc, tzero, size, microstrain, width_scale = (
            values[:, None] for values in (difc, tzero, size, microstrain, width_scale)
        )
        difa, difb = self._instrument.difa, self._instrument.difb
        d = (self._tof - tzero) / difc
        for _ in range(3 if difa or difb else 0):
            slope = difc + 2 * difa * d - difb / (d * d)
            d = d - (difc * d + difa * d * d + difb / d + tzero - self._tof) / slope
        log_width, eta = width_and_mixing(d, difc, size, microstrain, self._broadening)
        ratio = log_width + torch.log(width_scale) - self._log_width
        return ratio, eta, d / self._d - 1


class _Basis:
    """The matrices of a :class:`ShapeBasis`, whose coefficients are good over an interval."""

    def __init__(self, device: Device, widths: Widths, stations: _Stations) -> None:
        basis = widths.basis
        self._basis, self._interval, self._stations = basis, widths.interval, stations
        rank, places = basis.members.shape[3], int(np.prod(basis.members.shape[1:3]))
        members = basis.members.reshape(4, -1, places, rank).transpose(2, 1, 0, 3)

        def send(matrix: AnyFloats) -> Tensor:
            return device.send(matrix.astype(np.float32))

        self._members = send(members.reshape(places, -1, 4 * rank))
        self._to_nodes, self._impulses = send(basis.to_nodes), send(IMPULSES)
        self._near, self._middle = send(basis.near), send(basis.middle)
        self._far = send(basis.far.reshape(-1, basis.far.shape[2]))
        self._down, self._up = [[send(m) for m in both] for both in (basis.down, basis.up)]

    def coefficients(self, samples: OfSamples) -> Tensor:
        """Return the coefficients of each sample's profiles, (zones, n, K, stations).

        See :func:`bragg_data.simulation.width_coefficients.coefficients`.
        """
        ratio, eta, stretch = self._stations.widths(*samples[-len(WIDTH_PARAMETERS) :])
        low, high = self._interval
        z = 2 / (high - low) * (ratio - low) - 1
        polynomials = [torch.ones_like(z), z]
        for _ in range(self._members.shape[1] - 2):
            polynomials.append(2 * z * polynomials[-1] - polynomials[-2])
        values = torch.stack(polynomials, dim=2).float().transpose(0, 1)
        parts = (values @ self._members).view(*values.shape[:2], 4, -1)
        shares = torch.stack([1 - eta, eta, (1 - eta) * stretch, eta * stretch], dim=2)
        combined = (shares.float().transpose(0, 1)[..., None] * parts).sum(dim=2)
        of_zones = combined.view(len(self._near), -1, *combined.shape[1:])
        return of_zones.permute(0, 2, 3, 1).contiguous()

    def convolve(self, deposits: Tensor, samples: OfSamples) -> Tensor:
        """Return the patterns (points, n) of deposits, (n_source, n) coefficients of B-splines.

        See :meth:`bragg_data.simulation.shape_basis.ShapeBasis.convolve`.
        """
        n = deposits.shape[1]
        near, middle, far = self._slabs(deposits.t().contiguous(), self.coefficients(samples))
        drawn = far.permute(2, 0, 3, 1, 4).reshape(n, -1) @ self._far
        for slab, matrix, up, size in (
            (middle, self._middle, self._up[1], BLOCK // COARSE[0]),
            (near, self._near, self._up[0], NEAR),
        ):
            wide = matrix.shape[2]
            parts = (slab.reshape(len(matrix), -1, matrix.shape[1]) @ matrix).view(-1, n, wide)
            # Values of each block on the coarser grid, 2 before and 3 behind it.
            windows = pad(drawn, (2, 3)).unfold(1, len(up), len(up) - 5)
            fine = (windows @ up).view(n, len(parts), size)
            drawn = _add_parts(fine, parts, (wide - size) // 2).flatten(1)
        return drawn[:, MARGIN : MARGIN + self._basis.points].t()

    def _slabs(self, deposits: Tensor, coefficients: Tensor) -> list[Tensor]:
        """Return deposits times the coefficients on each grid, (zones, blocks, n, K, nodes)."""
        oversampling, (zones, n, rank, _) = self._basis.oversampling, coefficients.shape
        shares = coefficients @ self._to_nodes
        level = self._as_impulses(deposits)
        slabs: list[Tensor] = []
        for spacing, down in zip((None, *COARSE), (None, *self._down), strict=True):
            if down is not None:
                parts = level @ down
                total = parts.new_zeros(n, len(parts), parts.shape[2] - 5)
                size = BLOCK // COARSE[0] if len(slabs) == 1 else total.shape[2]
                level = _add_parts(total, parts, 2).view(n, -1, size).transpose(0, 1)
            blocks, nodes = len(level) // zones, level.shape[2]
            of_nodes = shares[..., :: (spacing or 0) * oversampling or 1]
            of_blocks = of_nodes.reshape(zones, n, rank, blocks, nodes).permute(0, 3, 1, 2, 4)
            slab = level.new_empty(zones, blocks, n, rank, nodes)
            torch.mul(level.reshape(zones, blocks, n, 1, nodes), of_blocks, out=slab)
            slabs.append(slab)
        return slabs

    def _as_impulses(self, deposits: Tensor) -> Tensor:
        """Return impulses (blocks, n, nodes) that draw what the splines of deposits draw."""
        padded = pad(deposits, (RING, RING))
        n, columns = padded.shape
        shape = deposits.shape[1] // NEAR, n, NEAR + 2 * RING
        pieces = padded.as_strided(shape, (NEAR, columns, 1)) @ self._impulses
        of_blocks = pieces.view(-1, self._basis.oversampling, n, NEAR).transpose(1, 2)
        return of_blocks.flatten(2)


def _add_parts(total: Tensor, parts: Tensor, before: int) -> Tensor:
    """Add parts (blocks, n, wide), which begin ``before`` early, to a total (n, blocks, size)."""
    _, blocks, size = total.shape
    wide = parts.shape[2]
    for shift in range(-before // size, (wide - before - 1) // size + 1):
        first, last = before + shift * size, before + (shift + 1) * size
        inside = slice(max(first, 0), min(last, wide))
        of_block = slice(inside.start - first, inside.stop - first)
        source = slice(max(0, -shift), min(blocks, blocks - shift))
        target = slice(max(0, shift), min(blocks, blocks + shift))
        total[:, target, of_block] += parts[source, :, inside].transpose(0, 1)
    return total

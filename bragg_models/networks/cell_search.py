"""Search for the cell whose computed pattern agrees best with a profile.

:class:`CellSearch` refines many cells at once, one per row, by the method of Levenberg and
Marquardt, from starts that a subclass chooses or that look most similar among known cells. (Solvers
of scipy or lmfit refine one problem at a time on the CPU; here hundreds of small ones share each
batch of patterns, on any device, which is why the loop is written out.)
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from bragg_models.networks.guided_config import GuidedConfig
from bragg_models.networks.pattern_layer import Pattern

ROWS = 32  # rows that are computed together: their patterns stay in a processor's cache
_LIMIT = 1.2  # bound of scaled parameters: a little beyond the campaign's range
_SMALLEST_STEP = 3e-6  # in scaled parameters; after a smaller step the search has converged
_NOISY = 1e-4, 3e-4  # the same for noisy profiles, and the least relative gain of a step
_END = 24.0, 48  # points from the window's end: reflections near it, and points then left out
_OVERSAMPLING = 8  # more cells are drawn than used, so that they are even in peak positions
_SCALES = 0.5, 4.0  # unit of the sample parameters: ln of a factor, and points²
_SAMPLE_BOUNDS = (-2.0, 2.0), (-0.5, 15.0)  # their bounds in these units


class CellSearch(nn.Module):
    """The pattern layer, the scaling of the parameters, and the search; nothing is trained.

    ``config`` and the buffers ``middle`` and ``half_range``, shape (n_parameters,), belong to it:
    see :func:`bragg_models.networks.guided.fill_physics_tables`.
    """

    def __init__(self, config: GuidedConfig) -> None:
        super().__init__()
        self.config = config
        self.pattern = Pattern(config.pattern)
        for name in ("middle", "half_range"):
            values = torch.ones(config.proposal.parameters, dtype=torch.float64)
            self.register_buffer(name, values)
        self._known: dict[tuple[int, float, torch.device], tuple[Tensor, Tensor]] = {}

    def most_similar(self, code: int, roots: Tensor, blur: float) -> Tensor:
        """Return the known cells whose blurred patterns are most similar to blurred profiles.

        Parameters
        ----------
        code
            The phase.
        roots : shape (n, compared points)
            Square roots of the blurred profiles.
        blur
            Standard deviation of the Gaussian, in points.

        Returns
        -------
        shape (n, starts, n_parameters)
            Scaled, the most similar first.
        """
        sharp, key = (code, 0.0, roots.device), (code, blur, roots.device)
        if sharp not in self._known:
            cells = self._known_cells(code).to(roots.device)
            patterns = [
                self.pattern(code, self.physical(part), slopes=False)[0]
                for part in torch.split(cells, ROWS)
            ]
            self._known[sharp] = cells, torch.cat(patterns)
        if key not in self._known:
            cells, sharp_patterns = self._known[sharp]
            blurred = self.pattern.blurred(sharp_patterns, blur)[:, :: _stride(blur)].sqrt()
            self._known[key] = cells, nn.functional.normalize(blurred, dim=1)
        cells, known = self._known[key]
        similarity = roots[:, :: _stride(blur)] @ known.T
        return cells[similarity.topk(min(self.config.starts, len(cells))).indices]

    def _known_cells(self, code: int) -> Tensor:
        """Return cells over the whole range, (draws, n_parameters), scaled, always the same.

        Their density is even in the positions of the peaks, not in the parameters: near its limit
        of 120° a rhombohedral angle shifts peaks ten times as far as elsewhere.
        """
        free = list(self.config.pattern.phases[code].free)
        half = cast("Tensor", self.half_range)
        engine = SobolEngine(len(free), scramble=True, seed=0)  # type: ignore[no-untyped-call]
        drawn = engine.draw(_OVERSAMPLING * self.config.draws)
        cells = torch.zeros(len(drawn), len(half), dtype=torch.float64, device=half.device)
        cells[:, free] = 2 * drawn.to(cells) - 1
        density = []
        for part in torch.split(cells, 32 * ROWS):
            sensitivity = self.pattern.sensitivity(code, self.physical(part))
            scaled = sensitivity * half[free, None] * half[free]
            density.append(torch.linalg.det(scaled).clamp(min=1e-12).sqrt())
        generator = torch.Generator().manual_seed(0)
        chosen = torch.multinomial(torch.cat(density).cpu(), self.config.draws, generator=generator)
        return cells[chosen.to(cells.device)]

    def search(self, code: int | Tensor, profiles: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Refine each start, at first without the window's end where a reflection is near it.

        Parameters
        ----------
        code
            The phase of all rows, or that of each, shape (n,).
        profiles : shape (n, compared points)
            Square roots of intensities.
        start : shape (n, n_parameters)
            Scaled.

        Returns
        -------
        values : shape (n, n_parameters)
        misfit : shape (n,)
            Share of each profile's square that is not explained.
        """
        if not len(start):
            return start, start[:, 0]
        values, misfit = self.descend(code, profiles, start, self._weights(code, profiles, start))
        near = self._near_the_end(code, start) | self._near_the_end(code, values)
        # Where nothing was measured at the end, nothing was left out.
        rows = torch.nonzero(near & (profiles[:, -_END[1] :] > 0).any(dim=1))[:, 0]
        if len(rows):
            v = profiles[rows]
            values[rows], misfit[rows] = self.descend(
                code_of_rows(code, rows), v, values[rows], (v > 0).float()
            )
        return values, misfit

    def _near_the_end(self, code: int | Tensor, values: Tensor) -> Tensor:
        return self.pattern.near_the_end(code, self.physical(values), _END[0])

    def _weights(self, code: int | Tensor, profiles: Tensor, values: Tensor) -> Tensor:
        """Return 1 where a point is compared, otherwise 0.

        A reflection that a proposed cell puts on the wrong side of the window's end would bias all
        others: the end is left out then.
        """
        weights = (profiles > 0).float()
        end = torch.arange(profiles.shape[1], device=profiles.device) >= (
            profiles.shape[1] - _END[1]
        )
        weights[self._near_the_end(code, values)[:, None] & end] = 0
        return weights

    def descend(
        self,
        code: int | Tensor,
        profiles: Tensor,
        start: Tensor,
        weights: Tensor,
        blur: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Refine cells row by row until they converge, by Levenberg-Marquardt steps.

        Rows that have converged are dropped, so that the batches stay full.

        Parameters
        ----------
        code, profiles, start
            As for :meth:`search`.
        weights : shape (n, compared points)
            1 where a point is compared, otherwise 0.
        blur
            Standard deviation of a Gaussian, in points, under which both are compared.
        """
        free = self.pattern.free(code)
        # The sample parameters are the columns after those of the cell.
        n_sample = len(_SAMPLE_BOUNDS) if self.config.sample_parameters else 0
        values = torch.cat([start, start.new_zeros(len(start), n_sample)], dim=1)
        sample_columns = start.shape[1] + torch.arange(n_sample, device=free.device)
        refined = torch.cat([free, sample_columns.expand(len(free), -1)], dim=1)
        refined = refined.expand(len(values), -1)
        limits = torch.full((2, refined.shape[1]), _LIMIT, dtype=values.dtype, device=start.device)
        limits[0] *= -1
        if n_sample:
            limits[:, free.shape[1] :] = torch.tensor(_SAMPLE_BOUNDS, dtype=values.dtype).T
        damping = torch.full_like(values[:, 0], 1e-4)
        misfit, step, gain = self._step(code, profiles, weights, values, damping, blur)
        active = torch.arange(len(values), device=values.device)
        smallest, least = _NOISY if self.config.sample_parameters else (_SMALLEST_STEP, 0.0)
        for _ in range(self.config.steps):
            far = step[active].abs().amax(dim=1) > smallest
            active = active[far & (gain[active] > least * misfit[active])]
            if not len(active):
                break
            trial, columns = values[active].clone(), refined[active]
            moved = (trial.gather(1, columns) + step[active]).clamp(limits[0], limits[1])
            trial.scatter_(1, columns, moved)
            codes = code_of_rows(code, active)
            trial_misfit, next_step, next_gain = self._step(
                codes, profiles[active], weights[active], trial, damping[active], blur
            )
            better = trial_misfit < misfit[active]
            taken, refused = active[better], active[~better]
            values[taken], misfit[taken] = trial[better], trial_misfit[better]
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
        """As :meth:`normal_equations` without JᵀJ, a few rows at a time."""
        parts = [
            self.normal_equations(
                code_of_rows(code, r), profiles[r], weights[r], values[r], damping[r], blur
            )
            for r in (slice(low, low + ROWS) for low in range(0, len(values), ROWS))
        ]
        misfit, step, gain = (torch.cat(p) for p in list(zip(*parts, strict=True))[:3])
        return misfit, step, gain

    def normal_equations(
        self,
        code: int | Tensor,
        profiles: Tensor,
        weights: Tensor,
        values: Tensor,
        damping: Tensor,
        blur: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Solve the linearised least-squares problem of each row.

        With v the profile and e the square root of the pattern,

        .. math:: \min_{s,\delta} \sum_i w_i \Big(v_i - s e_i - s \sum_p
            \frac{\partial e_i}{\partial p} \delta_p\Big)^2

        Parameters
        ----------
        code, profiles, weights, blur
            As for :meth:`descend`.
        values : shape (n, n_parameters) or (n, n_parameters + 2)
            Scaled, with the sample parameters if they are refined.
        damping : shape (n,)
            Marquardt's parameter.

        Returns
        -------
        misfit : shape (n,)
            Share of the profile's square that is not explained; 1 where nothing is compared.
        step : shape (n, n_refined)
            Change of the scaled parameters, at most 0.2.
        gain : shape (n,)
            Decrease of the misfit that the linearised problem predicts.
        normal : shape (n, n_refined + 1, n_refined + 1)
            JᵀJ of the refined parameters and the logarithm of the scale.
        """
        free = self.pattern.free(code)
        parameters = len(cast("Tensor", self.half_range))
        cell, sample = values[:, :parameters], values[:, parameters:]
        sample_parameters = sample * sample.new_tensor(_SCALES) if sample.shape[1] else None
        pattern, slopes = self.pattern(
            code, self.physical(cell), blur=blur, sample_parameters=sample_parameters
        )
        root = pattern.sqrt()
        scales = cast("Tensor", self.half_range)[free].float()
        if sample_parameters is not None:
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
        total = (v * v).sum(dim=1)
        square = total.clamp(min=1e-30).double()
        misfit = torch.where(total > 0, (rest**2).sum(dim=1) / square, 1.0)
        gain = (solved * (2 * right - normal @ solved)).sum(dim=(1, 2)) / square
        return misfit, solved[:, :-1, 0].clamp(-0.2, 0.2), gain, normal

    def physical(self, values: Tensor) -> Tensor:
        """Return scaled parameters in ångström and degrees, same shape."""
        return values * cast("Tensor", self.half_range) + cast("Tensor", self.middle)


def code_of_rows(code: int | Tensor, rows: Tensor | slice) -> int | Tensor:
    """Return the phases of some rows, of one for all or one for each."""
    return code if isinstance(code, int) else code[rows]


def _stride(blur: float) -> int:
    """Return the stride at which a blurred pattern is sampled without loss."""
    return max(int(blur / 1.25), 1)

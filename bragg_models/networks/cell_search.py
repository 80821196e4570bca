"""Search for the cell whose computed pattern agrees best with a profile.

:class:`CellSearch` refines many cells at once, one per row, by the method of Levenberg and
Marquardt, from starts that a subclass chooses or that look most similar among known cells. (Solvers
of scipy or lmfit refine one problem at a time on the CPU; here hundreds of small ones share each
batch of patterns, on any device, which is why the loop is written out.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bragg_models.networks.guided_config import GuidedConfig
from bragg_models.networks.known_cells import KnownCells
from bragg_models.networks.perceptron import ROWS, Perceptron

_LIMIT = 1.2  # bound of scaled parameters: a little beyond the campaign's range
_SMALLEST_STEP = 3e-6  # in scaled parameters; after a smaller step the search has converged
_NOISY = 1e-4, 3e-4  # the same for noisy profiles, and the least relative gain of a step
_LONGEST_STEP = 0.2, 1.0  # of scaled cell parameters, of sample parameters in their units
# Peaks narrower than the instrument's ring: below this share of the highest point of a pattern's
# square root its derivatives say nothing, and a search would stop among them.
_RINGING = 1e-3
_CHANCE = 5.0  # a search is given up if this many times the next step's gain would not help it
_END = 24.0, 48  # points from the window's end: reflections near it, and points then left out
_SCALES = 0.5, 4.0, 2.0  # units of sample parameters: ln of a factor; points²; points (Lorentzian)
_SAMPLE_BOUNDS = (-2.0, 2.0), (-0.5, 4.0)  # their bounds in these units; noise fits wider ones
# Unit of the background's terms, in heights of the highest peak, and their bounds in it.
_SMOOTH, _SMOOTH_BOUNDS = 0.02, (-10.0, 10.0)
# Intensity, as a share of the highest peak, above which differences of roots count as such in the
# end, below it as those of intensities. On draws for BaTiO3 on NOMAD (usual, three times the
# background, twice the broadening) mean squared errors fall to 0.12, 0.05 and 0.23 of what they
# were; with 0.05 to 0.20, 0.08 and 0.45.
_FAINT = 1.0
_OLD_PREFIX, _PREFIX = "glance.", "proposal."  # deprecated: name of the weights in saved models


@dataclass(frozen=True, eq=False)
class Observed:
    """Profiles to explain, row by row."""

    code: int | Tensor  # the phase of all rows, or that of each, (n,)
    profiles: Tensor  # (n, compared points): square roots of intensities
    weights: Tensor  # (n, compared points): 1 where a point is compared, otherwise 0
    blur: float = 0.0  # σ, in points, of a Gaussian under which pattern and profile are compared

    def __getitem__(self, rows: Tensor | slice) -> Observed:
        code = self.code if isinstance(self.code, int) else self.code[rows]
        return Observed(code, self.profiles[rows], self.weights[rows], self.blur)


class CellSearch(KnownCells):
    """A proposal network, which is trained, and the search by the pattern layer.

    Without a proposal network the search starts from known cells alone. ``config`` and the buffers
    ``middle`` and ``half_range``, shape (n_phases, n_parameters), belong to it: see
    :func:`bragg_models.networks.guided.fill_physics_tables`.
    """

    batch_size = 512  # profiles; the search makes small batches of them itself
    background: Tensor

    def __init__(self, config: GuidedConfig) -> None:
        super().__init__(config)
        self.proposal = None if config.proposal is None else Perceptron(config.proposal)
        self.register_load_state_dict_pre_hook(_update_saved)  # type: ignore[no-untyped-call]
        axis = torch.linspace(-1, 1, config.pattern.points - config.pattern.first).arccos()
        terms = (torch.arange(config.background_terms)[:, None] * axis).cos()
        self.register_buffer("background", terms, persistent=False)

    def propose(self, profiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return the proposal network's outputs; without one all phases alike, and mean cells."""
        if self.proposal is not None:
            outputs: tuple[Tensor, Tensor] = self.proposal(profiles)
            return outputs
        n_phases, n_parameters = self.half_range.shape
        return profiles.new_zeros(len(profiles), n_phases), profiles.new_zeros(
            len(profiles), n_parameters
        )

    def search(
        self, code: int | Tensor, profiles: Tensor, start: Tensor, hopeless: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Refine each start (n, n_parameters), scaled, and return values and misfits (n,).

        At first without the window's end where a reflection is near it: a reflection that a
        proposed cell puts on the wrong side of it would bias all others. The misfit is the share of
        a profile's square that is not explained. ``code`` and ``profiles`` as in
        :class:`Observed`. ``hopeless`` (n,) are misfits above which a search is given up where it
        improves too slowly to get below.
        """
        if not len(start):
            return start, start[:, 0]
        measured = profiles > 0
        weights = measured.float()
        points = profiles.shape[1]
        end = torch.arange(points, device=profiles.device) >= points - _END[1]
        near = self._near_the_end(code, start)
        weights[near[:, None] & end] = 0
        values, misfit = self._descended(Observed(code, profiles, weights), start, hopeless)
        near |= self._near_the_end(code, values[:, : start.shape[1]])
        # Where nothing was measured at the end, nothing was left out.
        rows = torch.nonzero(near & measured[:, -_END[1] :].any(dim=1))[:, 0]
        if len(rows):
            whole = Observed(code, profiles, measured.float())[rows]
            limit = None if hopeless is None else hopeless[rows]
            values[rows], misfit[rows] = self._descended(whole, values[rows], limit)
        return values[:, : start.shape[1]], misfit

    def fit_intensities(
        self, row: Tensor, code: Tensor, profiles: Tensor, start: Tensor, best: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Refine starts (m, n_parameters) of phases (m,) further, by differences of intensities.

        Start k is for profile ``row[k]`` of the ``profiles`` (n, points), and ``best`` (n,) are the
        starts whose patterns weigh each profile's points. Background that was subtracted leaves
        noise of either sign, of which the root has the positive half: where there is little
        intensity, roots are biased. Returns values and misfits (m,), of the weighted differences.
        """
        compared = profiles[row]
        measured = (compared > 0).float()
        values, _ = self._descended(Observed(code, compared, measured), start)
        weights = torch.zeros_like(profiles)
        for low in range(0, len(best), ROWS):
            k = best[low : low + ROWS]
            pattern = self._patterns(Observed(code[k], compared[k], measured[k]), values[k])[0]
            faint = _FAINT * pattern.amax(dim=1, keepdim=True)
            weights[low : low + ROWS] = (pattern / (pattern + faint)).sqrt()
        observed = Observed(code, compared, measured * weights[row])
        values, misfit = self._descended(observed, values)
        return values[:, : start.shape[1]], misfit

    def _near_the_end(self, code: int | Tensor, values: Tensor) -> Tensor:
        return self.pattern.near_the_end(code, self.physical(values, code), _END[0])

    def descend(
        self, observed: Observed, start: Tensor, hopeless: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Refine cells (n, n_parameters), scaled, row by row until they converge.

        By Levenberg-Marquardt steps; returns values and misfits, and may give up, as
        :meth:`search`.
        """
        values, misfit = self._descended(observed, start, hopeless)
        return values[:, : start.shape[1]], misfit

    def _descended(
        self, observed: Observed, start: Tensor, hopeless: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`descend`; values include the additional ones, and the start may, too.

        Rows that have converged, or are given up, are dropped, so that the batches stay full.
        """
        free, n_cell = self.pattern.free(observed.code), self.half_range.shape[1]
        # The additional parameters are the columns after those of the cell.
        additional = self.n_additional(observed.blur)
        missing = n_cell + additional - start.shape[1]
        values = torch.cat([start, start.new_zeros(len(start), missing)], dim=1)
        columns_after = n_cell + torch.arange(additional, device=free.device)
        refined = torch.cat([free, columns_after.expand(len(free), -1)], dim=1)
        refined = refined.expand(len(values), -1)
        limits = self._limits(free.shape[1], values)[:, : refined.shape[1]]
        damping = torch.full_like(values[:, 0], 1e-4)
        misfit, step, gain = self._step(observed, values, damping)
        active = torch.arange(len(values), device=values.device)
        smallest, least = _NOISY if self.config.sample_parameters else (_SMALLEST_STEP, 0.0)
        for _ in range(self.config.steps):
            far = step[active].abs().amax(dim=1) > smallest
            active = active[far & (gain[active] > least * misfit[active])]
            if hopeless is not None:
                reached = misfit[active] - _CHANCE * gain[active]
                active = active[reached < hopeless[active]]
            if not len(active):
                break
            trial, columns = values[active].clone(), refined[active]
            moved = (trial.gather(1, columns) + step[active]).clamp(limits[0], limits[1])
            trial.scatter_(1, columns, moved)
            trial_misfit, new_step, new_gain = self._step(observed[active], trial, damping[active])
            better = trial_misfit < misfit[active]
            taken, refused = active[better], active[~better]
            values[taken], misfit[taken] = trial[better], trial_misfit[better]
            step[taken], gain[taken] = new_step[better], new_gain[better]
            damping[taken] *= 0.2
            damping[refused] *= 10
            step[refused] *= 0.3
        return values, misfit

    @property
    def _n_sample(self) -> int:
        return len(_SAMPLE_BOUNDS) if self.config.sample_parameters else 0

    def n_additional(self, blur: float = 0.0) -> int:
        """Return how many parameters of sample and background are refined with the cell."""
        return self._n_sample + (0 if blur else len(self.background))

    @property
    def _units(self) -> tuple[float, float]:
        return _SCALES[0], _SCALES[2 if self.config.lorentzian else 1]

    @property
    def _sample_bounds(self) -> list[tuple[float, float]]:
        """Bounds of the sample parameters in their units."""
        if not self.config.sample_parameters:
            return []
        u_scale, gaussian = _SAMPLE_BOUNDS
        if not self.config.lorentzian:
            return [u_scale, gaussian]
        low, high = (end / _SCALES[2] for end in self.config.lorentzian)
        return [u_scale, (low, high)]

    def _limits(self, n_free: int, like: Tensor) -> Tensor:
        """Return the bounds (2, n) of parameters: of the cell, of the sample, of the background."""
        bounds = [(-_LIMIT, _LIMIT)] * n_free
        bounds += self._sample_bounds
        bounds += [_SMOOTH_BOUNDS] * len(self.background)
        return like.new_tensor(bounds).T

    def _step(
        self, observed: Observed, values: Tensor, damping: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`normal_equations` without JᵀJ, a few rows at a time."""
        parts = []
        for low in range(0, len(values), ROWS):
            r = slice(low, low + ROWS)
            parts.append(self.normal_equations(observed[r], values[r], damping[r])[:3])
        misfit, step, gain = map(torch.cat, zip(*parts, strict=True))
        return misfit, step, gain

    def normal_equations(
        self, observed: Observed, values: Tensor, damping: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Solve the linearised least-squares problem of each row.

        With v the profile and e the square root of the pattern,

        .. math:: \min_{s,\delta} \sum_i w_i \Big(v_i - s e_i - s \sum_p
            \frac{\partial e_i}{\partial p} \delta_p\Big)^2

        for scaled values (n, n_parameters), or with :meth:`n_additional` columns more, those of the
        sample and of the background. ``damping`` (n,) is Marquardt's parameter.

        Returns the misfit (n,), the share of the profile's square that is not explained, 1 where
        nothing is compared; the step (n, n_refined) of the scaled parameters, limited; the
        decrease of the misfit (n,) that the linearised problem predicts; and JᵀJ of the refined
        parameters and the logarithm of the scale, (n, n_refined + 1, n_refined + 1).
        """
        code, weights = observed.code, observed.weights
        cell, additional = values.tensor_split((self.half_range.shape[1],), dim=1)
        pattern, slopes, of_terms = self._patterns(observed, values)
        root = pattern.sqrt()
        free = self.pattern.free(code)
        scales = self.half_range[code].expand(len(free), -1).gather(1, free).float()
        if self._n_sample:
            units = scales.new_tensor(self._units)
            scales = torch.cat([scales, units.expand(len(scales), -1)], dim=1)
        slopes = torch.cat([slopes * scales[..., None], of_terms], dim=1)
        clear = root > _RINGING * root.amax(dim=1, keepdim=True)
        slopes = slopes / (2 * root[:, None]) * (weights * clear)[:, None]
        v, e = observed.profiles * weights, root * weights
        scale = ((v * e).sum(dim=1) / (e * e).sum(dim=1).clamp(min=1e-30))[:, None]
        rest = v - scale * e
        columns = torch.cat([slopes * scale[:, None], (scale * e)[:, None]], dim=1)
        normal = products(columns, columns.transpose(1, 2)).double()
        right = products(columns, rest[:, :, None]).double()
        inside = self._inside(code, cell, additional, right[:, :-1, 0])
        right = right * inside[..., None]
        curvature = normal * inside[:, None] * inside[..., None]
        diagonal = torch.diagonal(curvature, dim1=1, dim2=2)
        # Those at a bound stay there.
        diagonal = torch.diag_embed(damping[:, None] * diagonal + (1 - inside) + 1e-12)
        solved = torch.linalg.solve(curvature + diagonal, right)
        total = (v * v).sum(dim=1)
        square = total.clamp(min=1e-30).double()
        misfit = torch.where(total > 0, (rest**2).sum(dim=1) / square, 1.0)
        gain = (solved * (2 * right - curvature @ solved)).sum(dim=(1, 2)) / square
        longest = torch.full_like(solved[:, :-1, 0], _LONGEST_STEP[0])
        longest[:, longest.shape[1] - additional.shape[1] :] = _LONGEST_STEP[1]
        return misfit, solved[:, :-1, 0].clamp(-longest, longest), gain, normal

    def _patterns(self, observed: Observed, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return patterns (n, points) with their smooth background, and derivatives.

        Of values (n, n_parameters + n_additional), scaled. The derivatives are those of the pattern
        layer, and with respect to the terms of the background, (n, n_terms, points).
        """
        cell, sample, smooth = values.tensor_split(
            (n := self.half_range.shape[1], n + self._n_sample), dim=1
        )
        pattern, slopes = self.pattern(
            observed.code,
            self.physical(cell, observed.code),
            blur=observed.blur,
            sample_parameters=sample * sample.new_tensor(self._units) if self._n_sample else None,
            lorentzian=bool(self.config.lorentzian),
        )
        level = _SMOOTH * pattern.amax(dim=1, keepdim=True)
        of_terms = level[..., None] * self.background[: smooth.shape[1]]
        if smooth.shape[1]:
            pattern = (pattern + level * (smooth.float() @ self.background)).clamp(min=1e-12)
        return pattern, slopes, of_terms

    def _inside(
        self, code: int | Tensor, cell: Tensor, additional: Tensor, descent: Tensor
    ) -> Tensor:
        """Return 0 for refined parameters at a bound that ``descent`` would cross, 1 for others.

        Shape (n, n_refined + 1): the logarithm of the scale has no bound.
        """
        free = self.pattern.free(code)
        low, high = self._limits(free.shape[1], cell)[:, : descent.shape[1]]
        refined = torch.cat([cell.gather(1, free.expand(len(cell), -1)), additional], dim=1)
        outside = ((refined <= low) & (descent < 0)) | ((refined >= high) & (descent > 0))
        return torch.cat([~outside, outside.new_ones(len(outside), 1)], dim=1).double()


def products(first: Tensor, second: Tensor) -> Tensor:
    """Return products of n matrices, each the same to the last bit whatever n is.

    A single one torch would compute in another way, which rounds otherwise.
    """
    if len(first) != 1:
        return first @ second
    return (first.expand(2, -1, -1) @ second.expand(2, -1, -1))[:1]


def _update_saved(module: CellSearch, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Give the weights of a saved model their present names and shapes."""
    for name in ("middle", "half_range"):
        if (values := state.get(prefix + name)) is not None and values.ndim == 1:
            # deprecated: one scale for all phases
            shape: Tensor = getattr(module, name)
            state[prefix + name] = values.expand_as(shape).clone()
    old = f"{prefix}{_OLD_PREFIX}"
    for name in [name for name in state if name.startswith(old)]:
        state[f"{prefix}{_PREFIX}{name.removeprefix(old)}"] = state.pop(name)

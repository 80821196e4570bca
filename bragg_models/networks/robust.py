r"""Our network for measured profiles: cells of all phases, calibrated intervals, and rejection.

Like :class:`~bragg_models.networks.guided.Guided` it proposes a cell and refines it by Bragg's law,
with two differences. A factor on the displacement parameters and the peak width are refined with
the cell; and the search runs in every phase, from the proposed cell or from a similar known
cell, all in one batch, and where no phase explains the profile well, from more of them.

The misfits m of the phases and the proposed probabilities p together give the probabilities

.. math:: \ln P_k = -\kappa \ln\frac{m_k}{m_\text{min}} + \gamma \ln p_k + b_k + \text{const}, \quad
          \ln\kappa = \alpha + \beta \ln m_\text{min}

with coefficients fitted by maximum likelihood on held-out draws. The 90 % intervals are conformal
(Lei et al., J. Am. Stat. Assoc. 113 (2018) 1094): the quantile, over held-out draws, of the error
in a unit, which is the standard uncertainty σ that follows from the misfit m, times

.. math:: (m / m_0)^{\beta_1} (\sigma / \sigma_0)^{\beta_2} .

Peaks that differ from the nominal ones shift a cell however well it fits: errors shrink less than σ
where the misfit is small. Without these powers, which are fitted by quantile regression, intervals
of sharp measurements would be too narrow, and those of others too wide.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bragg_data.arrays import Array, Floats32, Mask
from bragg_models.networks.cell_search import CellSearch, Observed, products
from bragg_models.networks.guided_config import GuidedConfig
from bragg_models.networks.known_cells import thinning
from bragg_models.networks.perceptron import ROWS

COVERAGE = 0.9  # share of genuine draws whose parameters lie in the intervals
ACCEPTED = 0.985  # share of genuine draws with a correctly predicted phase that are accepted
_FIRST_STARTS = 5  # of the most similar phase, of networks whose configuration has blurs
_KNOWN_STARTS = 7  # known cells of each phase from which the search may start
_BLUR = 5.0  # points, of networks whose configuration has no blurs
_UNEXPLAINED = 0.08  # misfit above which more starts are used; nine in ten draws are below
_HOPELESS = 10.0  # phases whose starts have a misfit this much larger than the best: not searched
_ABANDONED = 3.0  # a search is abandoned that cannot get below this many times the best misfit
_COARSE = 0.03  # misfit, under a blur, of a start far from its minimum
_AGREE = 1.02  # searches whose misfits differ by less than this factor have the same minimum
_ALIKE = 2.0  # phases whose misfits differ by less are compared by differences of intensities, too
_RESOLUTION = 1e-6  # misfits below this are rounding (single precision), and may be negative
_BEST = 3e-3  # misfit of a measured profile with the best statistics
_DRIFT = 3e-4  # relative error of lengths from an instrument that was not calibrated
# Of models that were saved without powers, of lengths: β₁; the limit over m at either end of the
# misfits that draws have, and over m₀, of which the intervals stay as wide as they were. Chosen on
# 6,000 draws of BaTiO₃ on NOMAD, whose coverage it evens out from 0.81–0.96 to 0.88–0.92 by misfit.
_OLD_POWER, _OLD_MISFITS = -0.3, (30.0, 12.0, 1.0)


class PhaseFits(NamedTuple):
    """Fits of all phases to n profiles."""

    logits: Tensor  # (n, n_phases)
    values: Tensor  # (n, n_parameters), scaled, of the most probable (or known) phase; float64
    spread: Tensor  # their standard uncertainties, as the misfit gives them; 0 where not free
    misfit: Tensor  # (n, n_phases): share of the profile's square left unexplained; 1: no search
    proposal: Tensor  # (n, n_phases): logarithms of the proposal network's probabilities


class _Best(NamedTuple):
    """The best of the searches so far, updated in place."""

    values: Tensor  # (n, n_phases, n_parameters), scaled
    misfit: Tensor  # (n, n_phases)
    blurred: Tensor  # (n_blurs, n): the least misfit of any phase under each of the blurs


class Robust(CellSearch):
    """See the module; the proposal network is trained, and a few coefficients are calibrated."""

    batch_size = 128  # of what a thread fits at a time
    head: Tensor
    stretch: Tensor
    limit: Tensor
    sharpness: Tensor
    is_length: Tensor

    def __init__(self, config: GuidedConfig) -> None:
        super().__init__(config)
        phases, parameters = self.half_range.shape
        # α, β, γ, then b of each phase.
        head = torch.zeros(3 + phases, dtype=torch.float64)
        head[0], head[2] = 2.0, 1.0
        self.register_buffer("head", head)
        # Of measurements with, then without their own calibration.
        self.register_buffer("stretch", torch.ones(2, phases, parameters, dtype=torch.float64))
        self.register_buffer("limit", torch.ones(1, dtype=torch.float64))
        # Powers of the misfit and of the standard uncertainty; the logarithms of both at the lower
        # end, the middle (m₀, σ₀) and the upper end of what draws have.
        shape = phases, parameters, 2, 4
        self.register_buffer("sharpness", torch.zeros(shape, dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_add_sharpness)  # type: ignore[no-untyped-call]
        self.register_buffer("is_length", torch.tensor(config.pattern.is_length), persistent=False)

    def forward(self, profiles: Tensor, phase: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`bragg_models.networks.guided.Guided.forward`."""
        fits = self.fit_phases(profiles, phase)
        return fits.logits, fits.values

    def fit_phases(self, profiles: Tensor, phase: Tensor | None = None) -> PhaseFits:
        """Fit the phases, or known ones (n,), to profiles (n, points).

        These are square roots of intensities, of unit norm; points that are zero are not compared.
        """
        logits, proposed = self.propose(profiles)
        proposal = logits.double().log_softmax(dim=1)
        compared = profiles[:, self.config.pattern.first :].float()
        first = proposal.argmax(dim=1) if phase is None else phase
        values = proposed.double()[:, None].repeat(1, proposal.shape[1], 1)
        misfit = torch.full_like(proposal, torch.inf)
        blurred = misfit.new_full((len(self.config.blurs), len(misfit)), torch.inf)
        best = _Best(values, misfit, blurred)
        cells, start_misfit = self._starts(compared, values[:, 0].clamp(-1, 1))
        least = start_misfit.amin(dim=2)
        if phase is None:
            smallest = _COARSE if self.config.blurs else _RESOLUTION
            searched = least < _HOPELESS * least.amin(dim=1, keepdim=True).clamp(min=smallest)
        else:
            searched = nn.functional.one_hot(phase, proposal.shape[1]).bool()
        # The best starts of the most similar phase, and the proposal; then the best start of each
        # other phase, which is given up where it cannot compete.
        best_start = (start_misfit == least[..., None]) & searched[..., None]
        count = min(_FIRST_STARTS if self.config.blurs else 1, start_misfit.shape[2])
        limit = start_misfit.kthvalue(count, dim=2, keepdim=True).values
        begin = (start_misfit <= limit) & searched[..., None]
        begin &= (least == least.amin(dim=1, keepdim=True))[..., None]
        if self.proposal is not None:
            begin[torch.arange(len(begin)), first, 0] = True
        reached = self._search_starts(compared, cells, begin, best)
        self._search_starts(compared, cells, best_start & ~begin, best)
        least = misfit.amin(dim=1)
        open_ = least > _UNEXPLAINED
        if self.config.blurs:  # a minimum that one start alone leads to may not be the deepest
            open_ |= (reached <= _AGREE * least[:, None, None]).sum(dim=(1, 2)) < 2
        if open_.any():
            rest = ~(begin | best_start) & (searched & open_[:, None])[..., None]
            self._search_starts(compared, cells, rest, best)
        misfit = misfit.clamp(max=1.0)
        if self.config.intensities and len(misfit):
            self._fit_intensities(compared, values, misfit)
        logits = self.phase_logits(proposal, misfit)
        code = logits.argmax(dim=1) if phase is None else phase
        chosen = values[torch.arange(len(code)), code]
        return PhaseFits(logits, chosen, self._spread_of(code, compared, chosen), misfit, proposal)

    def _fit_intensities(self, compared: Tensor, values: Tensor, misfit: Tensor) -> None:
        """Fit phases that explain a profile about as well as the best further; update in place.

        Their misfits keep the least of the profile, in the ratios of those of the further fits.
        """
        least, first = misfit.min(dim=1)
        alike = (misfit <= _ALIKE * least.clamp(min=_RESOLUTION)[:, None]) & (misfit < 1.0)
        alike[torch.arange(len(first)), first] = True
        row, code = torch.nonzero(alike, as_tuple=True)
        best = torch.nonzero(code == first[row])[:, 0]  # one of each row, in order
        fitted, of_fit = self.fit_intensities(row, code, compared, values[row, code], best)
        of_row = torch.full_like(misfit, torch.inf)
        of_row[row, code], values[row, code] = of_fit.clamp(min=_RESOLUTION), fitted
        ratio = (of_row / of_row.amin(dim=1, keepdim=True))[row, code]
        misfit[row, code] = (least[row] * ratio).clamp(max=1.0)

    def _starts(self, compared: Tensor, proposed: Tensor) -> tuple[Tensor, Tensor]:
        """Return cells to search from, (n, phases, k, p), the proposed first, and their misfits."""
        cells, misfits = [], []
        blurred: dict[float, Tensor] = {}
        for code in range(len(self.config.pattern.phases)):
            blur = self.retrieval_blur(code, compared.device)
            if blur not in blurred:
                blurred[blur] = self.pattern.blurred(compared**2, blur).sqrt()
            known, number = self.most_similar(code, blurred[blur], blur)
            known, number = known[:, :_KNOWN_STARTS], number[:, :_KNOWN_STARTS]
            if self.config.blurs:
                coarse, stride = blur, thinning(blur)
                observed = (blurred[blur] * (compared > 0))[:, ::stride]
                patterns = self.known_roots(code, blur, compared.device)[1] ** 2
            else:
                coarse, stride, observed = 0.0, 1, compared
                patterns = self.known_patterns(code, compared.device)[1]
            cells.append(torch.cat([proposed[:, None], known], dim=1))
            parts = []
            for part in torch.split(torch.arange(len(proposed), device=compared.device), ROWS):
                cell = self.physical(proposed[part], code)
                pattern = self.pattern(code, cell, slopes=False, blur=coarse)[0][:, None, ::stride]
                computed = torch.cat([pattern, patterns[number[part]]], dim=1)
                parts.append(_misfits(observed[part], computed))
            misfits.append(torch.cat(parts))
        return torch.stack(cells, dim=1), torch.stack(misfits, dim=1)

    def retrieval_blur(self, code: int, device: torch.device) -> float:
        """Return the blur, in points, under which profiles are compared with known cells."""
        if not self.config.blurs:
            return _BLUR
        self.known_patterns(code, device)  # whose number decides
        return self._retrieval_blurs[code]

    def _search_starts(
        self, compared: Tensor, cells: Tensor, chosen: Tensor, best: _Best
    ) -> Tensor:
        """Search from the chosen cells; update the best, in place, where they improve.

        Returns the misfits that the searches reached, (n, n_phases, k), infinite of the others.
        """
        values, misfit, blurred = best
        row, code, number = torch.nonzero(chosen, as_tuple=True)
        start, able = self._approached(compared, cells[row, code, number], row, code, blurred)
        row, code, number, start = row[able], code[able], number[able], start[able]
        hopeless = _ABANDONED * misfit.amin(dim=1)[row]
        refined, refined_misfit = self.search(code, compared[row], start, hopeless)
        position = row * misfit.shape[1] + code
        before = misfit.clone()
        misfit.view(-1).scatter_reduce_(0, position, refined_misfit, "amin")
        better = (refined_misfit == misfit[row, code]) & (refined_misfit < before[row, code])
        values[row[better], code[better]] = refined[better]
        reached = misfit.new_full(chosen.shape, torch.inf)
        reached[row, code, number] = refined_misfit
        return reached

    def _approached(
        self, compared: Tensor, start: Tensor, row: Tensor, code: Tensor, best: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Follow starts (m, n_parameters) of rows and phases (m,) on less and less blurred data.

        Returns where they lead, and which of them can compete. ``best`` (n_blurs, n), the least
        misfits so far of each of the n profiles, is updated in place.
        """
        able = torch.ones(len(row), dtype=torch.bool, device=row.device)
        blurs = [self.retrieval_blur(k, row.device) for k in range(len(self.half_range))]
        widest = torch.tensor(blurs, device=row.device)[code]
        for level, blur in enumerate(self.config.blurs):
            near = able & (blur <= widest)
            rows = row[near]
            if not len(rows):
                continue
            measured = (compared[rows] > 0).float()
            roots = self.pattern.blurred(compared[rows] ** 2, blur).sqrt() * measured
            observed = Observed(code[near], roots, measured, blur)
            values, misfit = self.descend(observed, start[near], _ABANDONED * best[level, rows])
            best[level].scatter_reduce_(0, rows, misfit, "amin")
            start[near] = values.clamp(-1, 1)
            able[near] = misfit <= _ABANDONED * best[level, rows]
        return start, able

    def phase_logits(self, proposal: Tensor, misfit: Tensor) -> Tensor:
        """Return the logits of the phases, (n, n_phases), from the fields of :class:`PhaseFits`."""
        head = self.head
        least = misfit.amin(dim=1, keepdim=True).clamp(min=1e-9)
        # A misfit below those of measured profiles is at least as decisive as the best of them.
        kappa = torch.exp((head[0] + head[1] * least.clamp(min=_BEST).log()).clamp(-2, 7))
        ratio = (misfit.clamp(max=1.0).clamp(min=1e-9) / least).log()
        return -kappa * ratio + head[2] * proposal + head[3:]

    def _spread_of(self, code: Tensor, profiles: Tensor, values: Tensor) -> Tensor:
        """Return the standard uncertainties of scaled parameters where they are free."""
        damping = torch.full_like(values[:, 0], 1e-9)
        padded = torch.cat([values, values.new_zeros(len(values), self.n_additional())], dim=1)
        observed = Observed(code, profiles, (profiles > 0).float())
        spread = torch.zeros_like(values)
        for low in range(0, len(values), ROWS):
            r = slice(low, low + ROWS)
            misfit, *_, normal = self.normal_equations(observed[r], padded[r], damping[r])
            points = observed.weights[r].sum(dim=1).clamp(min=1)
            noise = misfit * (profiles[r] ** 2).sum(dim=1) / points
            # Columns without effect stay as they are.
            diagonal = torch.diagonal(normal, dim1=1, dim2=2)
            tiny = torch.where(diagonal > 0, 1e-9 * diagonal, torch.ones_like(diagonal))
            inverse = torch.linalg.inv(normal + torch.diag_embed(tiny))
            variance = torch.diagonal(inverse, dim1=1, dim2=2)
            free = self.pattern.free(code[r])
            sigma = (variance[:, : free.shape[1]].clamp(min=0) * noise[:, None]).sqrt()
            sigma = sigma * (diagonal[:, : free.shape[1]] > 0)
            spread[r] = spread[r].scatter(1, free, sigma)
        return spread

    def predict(self, profiles: Floats32, calibrated: Mask) -> tuple[Array, ...]:
        """Return predictions with intervals for prepared profiles, as for :meth:`fit_phases`.

        ``calibrated`` (n,) is whether the measurement's own calibration was used. Returns the
        probabilities (n, n_phases); the scaled parameters of the most probable phase, and half of
        their 90 % intervals, (n, n_parameters); and the share of the profile's square (n,) that
        this phase leaves unexplained: above ``limit`` the profile belongs to none of the phases.
        """
        fits, is_calibrated = self.fit_profiles(profiles), torch.from_numpy(calibrated)
        is_calibrated = is_calibrated.to(self.head.device)
        with torch.inference_mode():
            phase = fits.logits.argmax(dim=1)
            stretch = self.stretch[(~is_calibrated).long(), phase]
            half = stretch * self.error_unit(fits, is_calibrated)
            unexplained = of_phase(fits.misfit, phase)
            results = fits.logits.softmax(dim=1), fits.values, half, unexplained
        return tuple(values.cpu().numpy() for values in results)

    def fit_profiles(
        self, profiles: Floats32, on_rows: Callable[[int], None] | None = None
    ) -> PhaseFits:
        """As :meth:`fit_phases`, of any number of prepared profiles, with all threads of torch.

        Each thread computes batches of its own: within small batches two threads are no faster
        than one, and far slower where other work interrupts one of them. ``on_rows`` is called
        with the number of profiles of each finished batch.
        """

        def fit(low: int) -> PhaseFits:
            batch = torch.from_numpy(profiles[low : low + self.batch_size])
            with torch.inference_mode():
                fits = self.fit_phases(batch.to(self.head.device))
            if on_rows is not None:
                on_rows(len(batch))
            return fits

        batches = range(0, max(len(profiles), 1), self.batch_size)
        threads = torch.get_num_threads() if self.head.device.type == "cpu" else 1
        if threads == 1 or len(batches) == 1:
            parts = list(map(fit, batches))
        else:
            for code in range(len(self.config.pattern.phases)):
                blur = self.retrieval_blur(code, self.head.device)
                self.known_roots(code, blur, self.head.device)  # tables that all batches share
            with single_thread(), ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(fit, batches))
        return PhaseFits(*map(torch.cat, zip(*parts, strict=True)))

    def error_unit(self, fits: PhaseFits, calibrated: Tensor) -> Tensor:
        """Return the unit in which errors of scaled parameters are counted, (n, n_parameters).

        It is the standard uncertainty, combined with the drift of an uncalibrated instrument:
        an error of difC changes all lengths, and no angle.
        """
        phase = fits.logits.argmax(dim=1)
        drift = _DRIFT * self.physical(fits.values, phase) / self.half_range[phase]
        drift = torch.where(self.is_length, drift, torch.zeros_like(drift))
        drift = drift * (~calibrated)[:, None]
        power, low, middle, high = self.sharpness[phase].unbind(dim=-1)
        logarithms = sharpness_features(fits).clamp(low, high) - middle
        spread = fits.spread * (power * logarithms).sum(dim=-1).exp()
        return (spread**2 + drift**2).sqrt().clamp(min=1e-9)


def sharpness_features(fits: PhaseFits) -> Tensor:
    """Return logarithms of the misfit and of the uncertainties, (n, n_parameters, 2)."""
    misfit = of_phase(fits.misfit, fits.logits.argmax(dim=1))[:, None].expand_as(fits.spread)
    return torch.stack([misfit, fits.spread], dim=-1).clamp(min=1e-12).log()


def _add_sharpness(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Give a saved model that has no powers the usual one."""
    if f"{prefix}sharpness" in state or not isinstance(module, Robust):
        return
    values = torch.zeros_like(module.sharpness)
    ends = torch.log(state[f"{prefix}limit"].to(values) / values.new_tensor(_OLD_MISFITS))
    values[..., 0, 0] = torch.where(module.is_length, _OLD_POWER, 0.0)
    values[..., 0, 1:] = ends
    state[f"{prefix}sharpness"] = values


@contextmanager
def single_thread() -> Iterator[None]:
    """Let every operation of torch compute in the thread that calls it.

    Its own threads wait for each other, so that other work on a core stops all of them: on two
    cores that another process shares, a step of the proposal network takes 30 times as long with
    two threads as with one, which is as fast as both where they are free.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def of_phase(misfit: Tensor, phase: Tensor) -> Tensor:
    """Return the misfits (n,) of one phase of each row, from those of all, (n, n_phases)."""
    return misfit.gather(1, phase[:, None])[:, 0]


def _misfits(profiles: Tensor, patterns: Tensor) -> Tensor:
    """Return the misfits (n, k) of patterns (n, k, points) to profiles, as double precision."""
    compared = (profiles > 0).float()[..., None]
    overlap = products(patterns.sqrt(), profiles[..., None])[..., 0]
    square = products(patterns, compared)[..., 0].clamp(min=1e-30)
    total = (profiles**2).sum(dim=1, keepdim=True).clamp(min=1e-30)
    return (1 - overlap**2 / square / total).double()

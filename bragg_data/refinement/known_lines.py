"""Whether a profile shows lines of anything that a refinement could find in it, in milliseconds.

Patterns in all sizes of their cells are shifts of each other on a logarithmic grid. Their roots,
strong lines cut off, and blurred by a peak's width, are correlated with those of the profile: so
positions count more than intensities, which another compound with the same lattice has not.
"""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter1d

from bragg_data.arrays import AnyFloats, Array, Integers, Mask
from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CrystalError
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.preprocessing import background_subtracted
from bragg_data.refinement.sample_refinement import other_metals
from bragg_data.simulation.kinematic import Simulator

# Squared correlation, below which there is nothing to find. On NOMAD's bank 4, of 200 profiles of 5
# to 80 random lines, 19 in 20 have less. Lattices of the model with other structures have at least
# 0.13 (caesium chloride, six times as broad as usual), its phases with four times as much silicon
# 0.14. What has other shapes of the cell is recognised by the cell that a model chooses, which
# resembles random lines up to 0.24, and 866 of 868 genuine samples by 0.36 and more.
_KNOWN, _CHOSEN = 0.1, 0.25
_CLEAR = 30.0  # standard deviations of the highest point, below which noise hides what resembles
_NOISE = 2.0  # standard deviations that are no signal
_STRONG = 0.1  # of the highest point, at which lines are cut off
_BLUR = 3  # σ, in steps of the grid, and the step at which blurred profiles are compared
_NEAR = 0.01  # relative, of lengths of cans and of cells from which a refinement starts


class KnownLines:
    """The lines of a campaign's phases in all sizes, and of what usually holds samples."""

    def __init__(self, campaign: Campaign) -> None:
        samples, metals = campaign.samples, other_metals(campaign.phases)
        self._step = _BLUR * campaign.grid.relative_step
        self._simulator = Simulator(
            *([*campaign.phases, *metals], campaign.instrument, campaign.grid),
            *(campaign.size, campaign.microstrain),
        )
        phases = self._simulator.phases
        cells = np.array([phase.cell for phase in phases])
        roots = self._blurred_roots(np.arange(len(phases)), cells)
        self._known: list[tuple[Array, range]] = []
        for code, (pattern, size) in enumerate(zip(roots, _size(cells), strict=True)):
            shifts = self._near
            if code < len(campaign.phases):
                sizes = _size(samples.cells[samples.phase == code]) / size
                shifts = self._shifts(float(sizes.min()), float(sizes.max()))
            self._known.append((pattern, shifts))

    @property
    def _near(self) -> range:
        return self._shifts(1 - _NEAR, 1 + _NEAR)

    def _shifts(self, least: float, most: float) -> range:
        low, high = np.log([least, most]) / self._step
        return range(int(np.floor(low)), int(np.ceil(high)) + 1)

    def _blurred_roots(self, codes: Integers, cells: Array) -> list[Array]:
        return [_blurred_roots(p) for p in self._simulator.simulate(codes, cells)]

    def resemble(self, gridded: GriddedProfile, starts: Sequence[tuple[int, Array]] = ()) -> bool:
        """Return whether a profile resembles any of them, or is too noisy to know.

        Or the patterns of cells (6,) from which it would be refined, by their phases' codes.
        """
        used = gridded.informative
        sigma = np.where(used, gridded.sigma, 1.0)
        signal = background_subtracted(gridded.intensity, np.where(used, sigma, 0.0))
        clear = np.where(used, np.maximum(signal - _NOISE * sigma, 0.0), 0.0)
        if (clear / sigma).max() < _CLEAR:
            return True
        profile, used = _blurred_roots(clear), used[::_BLUR]
        compared = [(*known, _KNOWN) for known in self._known]
        if starts:
            codes, cells = map(np.array, zip(*starts, strict=True))
            try:
                patterns = self._blurred_roots(codes, cells)
            except CrystalError:  # a cell without a pattern; the refinement has the reason
                return True
            compared += [(pattern, self._near, _CHOSEN) for pattern in patterns]
        return any(
            _squared_correlation(profile, pattern, used, shift) > least
            for pattern, shifts, least in compared
            for shift in shifts
        )


def _size(cells: Array) -> Array:
    return np.asarray(np.cbrt(np.prod(cells[:, :3], axis=1)))


def _blurred_roots(pattern: AnyFloats) -> Array:
    cut = np.minimum(pattern / max(pattern.max(), 1e-300), _STRONG)
    return np.asarray(gaussian_filter1d(np.sqrt(np.maximum(cut, 0.0)), _BLUR)[::_BLUR])


def _squared_correlation(profile: Array, pattern: Array, used: Mask, shift: int) -> float:
    """Return that of a profile with a pattern moved to larger d-spacings; 0 if it is negative."""
    n = len(profile)
    here, there = slice(max(shift, 0), n + min(shift, 0)), slice(max(-shift, 0), n - max(shift, 0))
    x, y = profile[here][used[here]], pattern[there][used[here]]
    if len(x) < 2:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    product = max(float(x @ y), 0.0)
    return product**2 / max(float(x @ x) * float(y @ y), 1e-300)

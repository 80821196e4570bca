"""Configurations of the guided and the robust network, as saved with a registered model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_RENAMED = {"glance": "proposal", "nuisance": "sample_parameters"}  # deprecated keys


@dataclass(frozen=True)
class PatternPhase:
    """What the pattern layer needs to know of a phase, apart from its tables of reflections."""

    free: tuple[int, ...]  # columns of the network's parameters that are free in the phase
    # For each of a, b, c, alpha, beta, gamma: the column of the network's parameters that it
    # equals, or a fixed angle in degrees as a negative number.
    cell: tuple[float, ...]
    terms: tuple[int, ...]  # of the reciprocal metric, to which rows of ``products`` belong
    lines: int  # reflections in its tables
    pairs: int  # pairs of displacement parameters in its tables
    most: int  # upper bound of the number of reflections of any cell on the compared points


@dataclass(frozen=True)
class PatternConfig:
    """Configuration of the pattern layer; the grid is T_i = start·exp(relative_step·i), in µs."""

    points: int
    relative_step: float
    start: float
    calibration: tuple[float, float, float, float]  # difC, difA, difB and Zero of the instrument
    phases: tuple[PatternPhase, ...]
    first: int  # first point that is compared
    base: int  # first point on which a reflection may lie
    reach: int = 384  # points on either side of a reflection over which its peak is computed
    # By how many points a Lorentzian broadening of FWHM Γ points shifts the peaks, which are not
    # symmetric: s = c₁ g + c₂ g² with g = ln(1 + Γ/w); here w, c₁ and c₂.
    skew: tuple[float, ...] = (1.0, 0.0, 0.0)
    rank: int = 6  # basis shapes from which the peaks along the window are composed

    @property
    def is_length(self) -> tuple[bool, ...]:
        """Whether each of the network's parameters is a length (in ångström) or an angle."""
        lengths = {int(e) for phase in self.phases for e in phase.cell[:3] if e >= 0}
        angles = {int(e) for phase in self.phases for e in phase.cell[3:] if e >= 0}
        return tuple(column in lengths for column in range(len(lengths | angles)))


@dataclass(frozen=True)
class PerceptronConfig:
    """A perceptron with two heads: of the phases (a classifier) and of the parameters."""

    points: int
    phases: int
    parameters: int
    hidden: tuple[int, ...] = (512, 512)  # widths of its hidden layers
    pooling: int = 1  # neighbouring points whose mean is an input


@dataclass(frozen=True)
class GuidedConfig:
    """Configuration of the guided and of the robust network."""

    proposal: PerceptronConfig | None  # None: searches start from known cells alone
    pattern: PatternConfig
    steps: int = 12  # most Levenberg-Marquardt steps of one search
    draws: int = 4096  # known cells over the campaign's range with which a profile is compared
    starts: int = 8  # the most similar of them, from which the search starts again
    # A profile is explained if the misfit, the squared difference as a share of the profile's
    # square, is below this. The layer itself is accurate to a few 1e-6.
    met: float = 2e-5
    # Standard deviations, in points, of Gaussians under which pattern and profile are compared
    # first: the widest should be as wide as peaks may be away from those of the nearest known cell.
    blurs: tuple[float, ...] = ()
    # Refine a common factor on the displacement parameters and the peak width of each sample too.
    sample_parameters: bool = False
    # Least and largest Lorentzian broadening relative to the campaign's, FWHM in points, which is
    # refined then, as that of microstrain, instead of a Gaussian one.
    lorentzian: tuple[float, ...] = ()
    # Chebyshev polynomials of a smooth background, which are fitted with the cell where nothing is
    # blurred: where peaks overlap, the one that was subtracted before contains a part of them.
    background_terms: int = 0
    # Fit differences of intensities in the end, for the cell and between phases that fit alike. Not
    # with background terms, which have the same effect, and leave weak peaks their weight.
    intensities: bool = False


def guided_config_from_json(**values: Any) -> GuidedConfig:
    """Return the configuration from JSON values; a TypeError if one is missing or unknown."""
    values = {_RENAMED.get(name, name): value for name, value in values.items()}
    if missing := {"proposal", "pattern"} - values.keys():
        raise TypeError(f"Missing: {', '.join(sorted(missing))}")
    described = values.pop("proposal")
    proposal = None if described is None else PerceptronConfig(**with_tuples(described))
    pattern = _pattern_config(**values.pop("pattern"))
    return GuidedConfig(proposal, pattern, **with_tuples(values))


def _pattern_config(*, phases: Sequence[Mapping[str, Any]], **values: Any) -> PatternConfig:
    tables = tuple(PatternPhase(**with_tuples(phase)) for phase in phases)
    return PatternConfig(phases=tables, **with_tuples(values))


def with_tuples(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return JSON values with their lists as tuples, as frozen dataclasses hold them."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

"""Configurations of the guided and the robust network, as saved with a registered model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_RENAMED = {"glance": "proposal", "nuisance": "sample_parameters"}  # deprecated keys


@dataclass(frozen=True)
class PatternPhase:
    """What the pattern layer needs to know of a phase, apart from its tables of reflections.

    Attributes
    ----------
    free
        Columns of the network's parameters that are free in the phase.
    cell
        For each of a, b, c, alpha, beta, gamma: the column of the network's parameters that it
        equals, or a fixed angle in degrees as a negative number.
    terms
        Terms of the reciprocal metric to which the rows of its table ``products`` belong.
    lines, pairs
        Size of its tables: reflections, and pairs of displacement parameters.
    most
        Upper bound of the number of reflections of any cell on the compared points.
    """

    free: tuple[int, ...]
    cell: tuple[float, ...]
    terms: tuple[int, ...]
    lines: int
    pairs: int
    most: int


@dataclass(frozen=True)
class PatternConfig:
    """Configuration of the pattern layer.

    Attributes
    ----------
    points, relative_step, start
        The time-of-flight grid: T_i = start · exp(relative_step · i), in µs.
    calibration
        difC, difA, difB and Zero of the instrument.
    phases
        One entry per phase.
    first, base
        First point that is compared, and first point on which a reflection may lie.
    reach
        Points on either side of a reflection over which its peak is computed.
    rank
        Number of basis shapes from which the peaks along the window are composed.
    """

    points: int
    relative_step: float
    start: float
    calibration: tuple[float, float, float, float]
    phases: tuple[PatternPhase, ...]
    first: int
    base: int
    reach: int = 384
    rank: int = 6

    @property
    def is_length(self) -> tuple[bool, ...]:
        """Whether each of the network's parameters is a length (in ångström) or an angle."""
        lengths = {int(e) for phase in self.phases for e in phase.cell[:3] if e >= 0}
        angles = {int(e) for phase in self.phases for e in phase.cell[3:] if e >= 0}
        return tuple(column in lengths for column in range(len(lengths | angles)))


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
        Widths of its hidden layers.
    """

    points: int
    phases: int
    parameters: int
    hidden: tuple[int, ...] = (512, 512)


@dataclass(frozen=True)
class GuidedConfig:
    """Configuration of the guided and of the robust network.

    Attributes
    ----------
    proposal
        The proposal network.
    pattern
        The pattern layer.
    steps
        Largest number of Levenberg-Marquardt steps of one search.
    draws, starts
        Number of known cells over the campaign's range with which a profile is compared, and the
        number of the most similar ones from which the search starts again.
    met
        A profile is explained if the misfit, the squared difference as a share of the profile's
        square, is below this. The layer itself is accurate to a few 1e-6.
    sample_parameters
        Whether a common factor on the displacement parameters and the peak width are refined for
        each sample as well.
    """

    proposal: PerceptronConfig
    pattern: PatternConfig
    steps: int = 12
    draws: int = 4096
    starts: int = 8
    met: float = 2e-5
    sample_parameters: bool = False


def guided_config_from_json(**values: Any) -> GuidedConfig:
    """Return the configuration from the JSON values of a saved model.

    Raises
    ------
    TypeError
        If a value is missing or unknown.
    """
    values = {_RENAMED.get(name, name): value for name, value in values.items()}
    if missing := {"proposal", "pattern"} - values.keys():
        raise TypeError(f"Missing: {', '.join(sorted(missing))}")
    proposal = PerceptronConfig(**with_tuples(values.pop("proposal")))
    return GuidedConfig(proposal, _pattern_config(**values.pop("pattern")), **values)


def _pattern_config(*, phases: Sequence[Mapping[str, Any]], **values: Any) -> PatternConfig:
    tables = tuple(PatternPhase(**with_tuples(phase)) for phase in phases)
    return PatternConfig(phases=tables, **with_tuples(values))


def with_tuples(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return JSON values with their lists as tuples, as frozen dataclasses hold them."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

"""Metrics of models: eq. (1) of the paper, errors of each parameter in its unit, and accuracy.

Metrics follow from sums over samples (:class:`Errors`), so that those of chunks can be added; the
squared error of every sample (:func:`squared_errors`) is for :func:`bootstrap_intervals`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bragg_data.arrays import AnyFloats, Array, Indices, Integers, Mask
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem
from bragg_models.targets import Targets

_OF_EQUATION_1 = ("a", "c", "alpha")
_RESAMPLES = 50  # at a time: 16 MiB for 40,000 samples


def prediction_sets(
    probabilities: AnyFloats, phase: Integers, share: float = 0.9
) -> tuple[Indices, Mask]:
    """Return the size of each smallest set of phases whose probability is at least ``share``.

    From probabilities (n, n_phases) and true phases (n,); also, shape (n,), whether the true phase
    is in the set.
    """
    order = np.argsort(-probabilities, axis=1)
    total = np.cumsum(np.take_along_axis(probabilities, order, axis=1), axis=1)
    size = (total < share).sum(axis=1) + 1
    return size, np.asarray((order == phase[:, None]).argmax(axis=1) < size)


@dataclass(frozen=True)
class Errors:
    """Sums over samples, grouped by true phase: those of two chunks add up to those of both."""

    confusion: Integers  # (n_phases, n_phases): samples of true (row), predicted phase
    squared: Array  # (n_phases, 6): squared errors of the cells, in Å² and rad²
    absolute: Array  # (n_phases, 6): absolute errors, in Å and degrees

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.confusion + other.confusion,
            self.squared + other.squared,
            self.absolute + other.absolute,
        )


def errors(
    targets: Targets,
    phase: Integers,
    cells: Array,
    predicted_phase: Integers,
    predicted_cells: Array,
) -> Errors:
    """Return the errors of predictions, as sums; phases (n,), cells (n, 6) in Å and degrees.

    A sample with a wrong phase counts with the cell of that phase.
    """
    n_phases = len(targets.names)
    difference = np.asarray(predicted_cells, dtype=np.float64) - cells
    squared = _squared(difference)
    confusion = np.zeros((n_phases, n_phases), dtype=np.int64)
    np.add.at(confusion, (phase, predicted_phase), 1)
    of_phase = [phase == code for code in range(n_phases)]
    return Errors(
        confusion,
        np.array([squared[rows].sum(axis=0) for rows in of_phase]),
        np.array([np.abs(difference[rows]).sum(axis=0) for rows in of_phase]),
    )


def squared_errors(
    targets: Targets, phase: Integers, cells: Array, predicted_cells: Array
) -> tuple[Array, Array]:
    """Return the contribution of each sample to eq. (1) in both readings, (n,), in Å² and rad².

    Their means are ``mse_paper`` and ``mse_paper_free`` of :func:`summary`; see :func:`errors`.
    """
    squared = _squared(np.asarray(predicted_cells, dtype=np.float64) - cells)
    literal, free = (np.einsum("np,np->n", squared, count[phase]) for count in _counted(targets))
    return literal, free


def _squared(difference: Array) -> Array:
    """Return squared errors of cell parameters, (n, 6), in Å² and rad² from Å and degrees."""
    in_radians = difference.copy()
    in_radians[:, 3:] = np.radians(difference[:, 3:])
    return in_radians**2


def _counted(targets: Targets) -> tuple[Array, Array]:
    """Return how often each phase's cell parameters count in eq. (1), (n_phases, 6) each.

    First as the equation is written, then without a c that is tied to a.
    """
    literal = np.zeros((len(targets.names), len(CELL_PARAMETERS)))
    literal[:, [CELL_PARAMETERS.index(name) for name in _OF_EQUATION_1]] = 1.0
    free = literal.copy()
    tied_c = [("c", "a") in lattice.tied for lattice in targets.lattices]
    free[tied_c, CELL_PARAMETERS.index("c")] = 0.0
    return literal, free


def calibration_error(probabilities: AnyFloats, phase: Integers, bins: int = 15) -> float:
    r"""Return the expected calibration error of the most probable phase's probability.

    .. math:: \sum_b \frac{n_b}{n} \, |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    over bins b of equal width in the confidence, from probabilities (n, n_phases) and true phases
    (n,). Guo et al., Proc. Mach. Learn. Res. 70 (2017) 1321, section 2.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == phase
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=correct.astype(float) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(phase))


def bootstrap_intervals(
    values: AnyFloats, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Array:
    """Return percentile bootstrap intervals (2, columns) of means over n samples, (n, columns).

    Every resample draws n of the n samples with replacement, the same ones for all columns, so that
    columns, such as the squared errors of different models, can be compared. The result is that of
    scipy.stats.bootstrap, which takes minutes instead of seconds for fifty columns of 40,000.
    """
    n, columns = values.shape
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, columns))
    exact = np.asarray(values, dtype=np.float64)
    for low in range(0, resamples, _RESAMPLES):
        count = min(_RESAMPLES, resamples - low)
        drawn = np.stack(
            [np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(count)]
        )
        means[low : low + count] = drawn.astype(np.float64) @ exact / n
    tail = (1 - level) / 2
    return np.quantile(means, [tail, 1 - tail], axis=0)


def summary(targets: Targets, total: Errors) -> dict[str, dict[str, float]]:
    r"""Return the metrics of all samples and of each crystal system that has samples, by name.

    ``n``
        Number of samples.
    ``accuracy``, ``accuracy_phase``
        Share of samples with the correct crystal system, and with the correct phase.
    ``mse_paper``
        Eq. (1) of the paper, with alpha in radians (in degrees the paper's numbers would be
        inconsistent), in Å² and rad²:

        .. math:: \text{mse\_paper} = \frac1n \sum_{i=1}^n
            \big(\Delta a_i^2 + \Delta c_i^2 + \Delta\alpha_i^2\big)

        taken literally: c counts also where symmetry ties it to a, so that the error of a cubic
        cell counts twice.
    ``mse_paper_free``
        The same with a tied length counted once: c only where it is free. For comparison with a
        model that predicts a alone.
    ``mae_a``, ``mae_c`` …
        Mean absolute error, in Å or degrees, of each parameter where it is free.
    """
    systems = targets.crystal_systems
    same_system = systems[:, None] == systems[None, :]
    count = total.confusion.sum(axis=1)
    groups = {"all": np.ones(len(systems), dtype=bool)}
    for code in sorted(set(systems.tolist())):
        groups[CrystalSystem(code).name] = systems == code
    result = {}
    for name, group in groups.items():
        n = int(count[group].sum())
        if not n:
            continue
        literal, free = ((total.squared * counted)[group].sum() for counted in _counted(targets))
        result[name] = scores = {
            "n": float(n),
            "accuracy": float((total.confusion * same_system)[group].sum() / n),
            "accuracy_phase": float(np.diag(total.confusion)[group].sum() / n),
            "mse_paper": float(literal / n),
            "mse_paper_free": float(free / n),
        }
        for index, parameter in enumerate(targets.parameters):
            having = group & targets.free[:, index]
            if count[having].sum():
                absolute = total.absolute[having, CELL_PARAMETERS.index(parameter)].sum()
                scores[f"mae_{parameter}"] = float(absolute / count[having].sum())
    return result

"""Drawing the cells of a phase from the ranges of a campaign file."""

import numpy as np

from bragg_data.arrays import Array, Mask
from bragg_data.campaign_file import CampaignError, PhaseTable
from bragg_data.crystallography.cell import CELL_PARAMETERS, EQUAL_LENGTHS, CrystalError
from bragg_data.crystallography.structure import Phase


def cells_of_phase(
    config: PhaseTable, phase: Phase, generator: np.random.Generator, count: int | None = None
) -> Array:
    """Return the cells that a campaign file draws of a phase, shape (n, 6), in Å and degrees.

    With a ``count`` as many cells anywhere in its ranges, between the points of a grid too. Those
    that a rule excludes are left out. Raises a CampaignError if the ranges are not those of the
    phase's free parameters, a rule is wrong, or a cell is not of the phase's crystal system.
    """
    cells = phase.lattice.cells(_free_parameters(config, phase, generator, count))
    for rule in config.exclude:
        cells = cells[~_matches(rule, cells, config.name)]
    try:
        phase.lattice.check(cells)
    except CrystalError as error:
        raise CampaignError(f"Phase '{config.name}': {error}") from error
    return cells


def _free_parameters(
    config: PhaseTable, phase: Phase, generator: np.random.Generator, count: int | None
) -> Array:
    names = phase.lattice.free_parameters
    if set(config.cell) != set(names):
        raise CampaignError(
            f"Phase '{config.name}' is {phase.crystal_system.name} ({phase.space_group}), free in "
            f"{', '.join(names)}; its ranges name {', '.join(config.cell) or 'nothing'}."
        )
    count = config.samples if count is None else count
    if count is None:
        axes = [np.concatenate([r.values() for r in config.cell[name]]) for name in names]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(names))
    # Here alone, because it takes a second to import, in every worker.
    from scipy.stats import qmc

    # Sobol points fill a cube of 2^m points evenly; a prefix of a longer sequence still does well.
    power = int(np.ceil(np.log2(max(count, 2))))
    unit = qmc.Sobol(len(names), rng=generator).random_base2(power)[:count]
    columns = []
    for name, share in zip(names, unit.T, strict=True):
        # [0, 1) is mapped onto the union of intervals, each in proportion to its length.
        low, high = np.array([r.ends for r in config.cell[name]], dtype=np.float64).T
        ends = np.cumsum(high - low)
        position = share * ends[-1]
        index = np.minimum(np.searchsorted(ends, position, side="right"), len(low) - 1)
        columns.append(low[index] + position - (ends - (high - low))[index])
    return np.stack(columns, axis=1)


def _matches(rule: str, cells: Array, phase: str) -> Mask:
    left, equals, right = (part.strip() for part in rule.partition("="))
    try:
        columns = dict(zip(CELL_PARAMETERS, cells.T, strict=True))
        values, excluded = columns[left], columns[right] if right in columns else float(right)
    except (KeyError, ValueError) as error:
        raise CampaignError(
            f"Phase '{phase}' excludes '{rule}'{'' if equals else ' (without =)'}: a rule names a "
            f"cell parameter, =, and another cell parameter or a number, as in 'a = c'."
        ) from error
    return np.asarray(np.abs(values - excluded) <= EQUAL_LENGTHS)

"""Foreign samples: profiles of common compounds that a model does not know, and has to reject."""

from collections.abc import Mapping

import numpy as np

from bragg_data.arrays import Array, Floats32
from bragg_data.campaign import Campaign
from bragg_data.crystallography.structure import Phase, phase_on_orthogonal_axes
from bragg_data.simulation.measurement_effects import draw_profiles, simulator_for
from pipelines.simulation.draws import Purpose, random_stream

# Space group, lengths in ångström, and atoms, as for phase_on_orthogonal_axes.
FOREIGN_PHASES: Mapping[str, tuple[str, tuple[float, float, float], str]] = {
    "silicon": ("F d -3 m:2", (5.4311, 5.4311, 5.4311), "Si1 Si 0.125 0.125 0.125 0.006"),
    "diamond": ("F d -3 m:2", (3.5671, 3.5671, 3.5671), "C1 C 0.125 0.125 0.125 0.002"),
    "rutile": (
        "P 42/m n m",
        (4.5937, 4.5937, 2.9587),
        "Ti1 Ti 0 0 0 0.005\nO1 O 0.3048 0.3048 0 0.005",
    ),
    # For campaigns that hold one of these three.
    "zircon": (
        "I 41/a m d:2",
        (6.604, 6.604, 5.979),
        "Zr1 Zr 0 0.75 0.125 0.004\nSi1 Si 0 0.25 0.375 0.004\nO1 O 0 0.066 0.195 0.007",
    ),
    "ceria": (
        "F m -3 m",
        (5.4113, 5.4113, 5.4113),
        "Ce1 Ce 0 0 0 0.004\nO1 O 0.25 0.25 0.25 0.007",
    ),
    "copper": ("F m -3 m", (3.6149, 3.6149, 3.6149), "Cu1 Cu 0 0 0 0.007"),
}
_NUMBER = 3  # compounds
_SCATTER = 1e-3  # standard deviation of lengths, relative: temperature and composition


def foreign_phases(campaign: Campaign) -> list[Phase]:
    """Return three compounds, none of elements that a phase of the campaign consists of."""
    known = [set(phase.symbols) for phase in campaign.phases]
    phases = [phase_on_orthogonal_axes(name, *values) for name, values in FOREIGN_PHASES.items()]
    return [phase for phase in phases if set(phase.symbols) not in known][:_NUMBER]


def foreign_cells(phase: Phase, count: int, generator: np.random.Generator) -> Array:
    """Return cells (count, 6) of a foreign compound, in Å and degrees."""
    lengths = generator.normal(1, _SCATTER, (count, 1))
    return np.asarray(phase.cell * np.where(np.arange(6) < 3, lengths, 1))


def foreign_profiles(campaign: Campaign, count: int) -> Floats32:
    """Return prepared profiles (n, points) of foreign compounds, always the same.

    As noisy as the campaign's own, ``count`` of each compound; those without signal are left out.
    """
    parts = []
    for number, phase in enumerate(foreign_phases(campaign)):
        generator = np.random.default_rng(random_stream(Purpose.FOREIGN_PROFILES, 1000 + number))
        cells = foreign_cells(phase, count, generator)
        codes = np.zeros(count, dtype=np.intp)
        simulator = simulator_for(campaign, [phase])
        effects = campaign.measurement_effects
        prepared = draw_profiles(simulator, codes, cells, generator, effects).prepared()
        parts.append(prepared[prepared.max(axis=1) > 0])
    return np.concatenate(parts)

import json
from pathlib import Path

import gemmi
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from bragg_data.campaign import load_campaign
from bragg_data.crystallography.cell import (
    CELL_PARAMETERS,
    CrystalError,
    CrystalSystem,
    d_spacing,
    lattice_from_space_group,
    reciprocal_metric,
)
from bragg_data.crystallography.reflections import unique_lines, unique_reflections
from bragg_data.crystallography.structure import read_phase
from bragg_data.instrument.instprm import InstrumentError, TofGrid
from bragg_data.simulation.kinematic import Simulator
from tests.bragg_data.crystallography.test_structure import RUTILE
from tests.exact_pattern import exact_pattern

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def campaign():
    return load_campaign("batio3-nomad")


@pytest.fixture(scope="module")
def simulator(campaign):
    return Simulator(campaign.phases, campaign.instrument, campaign.grid, size=1.0, microstrain=1e3)


@pytest.fixture(scope="module")
def reference(campaign):
    """GSAS-II's patterns, (phase codes, cells, patterns)."""
    with np.load(DATA / "gsas2_reference_nomad_bank4.npz") as file:
        phase = np.array([CrystalSystem[str(s)].value for s in file["crystal_system"]])
        columns = {"a": file["a"], "c": file["c"], "alpha": file["alpha"]}
        cells = np.empty((len(phase), 6))
        for code, of_campaign in enumerate(campaign.phases):
            rows = phase == code
            free = [columns[name][rows] for name in of_campaign.lattice.free_parameters]
            cells[rows] = of_campaign.lattice.cells(np.stack(free, axis=1))
        return phase, cells, file["y"]


def errors(ours, theirs):
    maximum = np.abs(ours - theirs).max(axis=-1) / theirs.max(axis=-1)
    l2 = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    return maximum, l2


def test_campaign_is_the_references(campaign):
    metadata = json.loads((DATA / "gsas2_reference_nomad_bank4.json").read_text())
    assert campaign.grid.points == metadata["grid"]["n"]
    assert campaign.grid.relative_step == metadata["grid"]["relative_step"]
    for phase in campaign.phases:
        u = metadata["phases"][phase.name]["uiso"]
        assert [u[s] for s in phase.symbols] == phase.u_iso.tolist()


def test_the_side_of_the_beam_changes_no_pattern(campaign):
    grid, cell = TofGrid(5000.0, 0.0009381, 600), campaign.phases[0].cell[None]
    patterns = []
    for sign in (1, -1):
        bank = campaign.instrument.with_parameters(two_theta=sign * campaign.instrument.two_theta)
        simulator = Simulator(campaign.phases[:1], bank, grid, size=1.0, microstrain=1e3)
        patterns.append(simulator.simulate(np.zeros(1, dtype=int), cell)[0])
        exact = exact_pattern(
            campaign.phases[0], cell[0], bank, grid.tof, size=1.0, microstrain=1e3
        )
        maximum, _ = errors(patterns[-1], exact)
        assert maximum < 5e-4
        assert patterns[-1].min() >= 0
        assert patterns[-1].max() > 0
    np.testing.assert_array_equal(*patterns)


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 14, 24])
def test_exact_evaluator_is_gsas2(campaign, reference, row):
    phase, cells, patterns = reference
    ours = exact_pattern(
        campaign.phases[phase[row]],
        cells[row],
        campaign.instrument,
        campaign.grid.tof,
        size=1.0,
        microstrain=1000.0,
    )
    maximum, l2 = errors(ours, patterns[row])
    assert maximum < 5e-6
    assert l2 < 5e-6


def test_fast_simulator_against_gsas2(simulator, reference):
    phase, cells, patterns = reference
    ours = simulator.simulate(phase, cells)
    assert ours.dtype == np.float32
    maximum, l2 = errors(ours, patterns)
    assert maximum.max() < 6e-5
    assert l2.max() < 4e-5
    scale = (ours * patterns).sum(axis=1) / (patterns**2).sum(axis=1)
    np.testing.assert_allclose(scale, 1.0, atol=1e-5)


@pytest.mark.slow
def test_same_rows_same_bits_whatever_came_before(campaign, simulator):
    samples = campaign.samples[:96]
    first = simulator.simulate(samples.phase, samples.cells)
    simulator.simulate(np.zeros(1, int), np.array([[5.0, 5.0, 5.0, 90, 90, 90]]))
    np.testing.assert_array_equal(simulator.simulate(samples.phase, samples.cells), first)
    fresh = Simulator(
        campaign.phases, campaign.instrument, campaign.grid, size=1.0, microstrain=1e3
    )
    np.testing.assert_array_equal(fresh.simulate(samples.phase, samples.cells), first)


def test_rows_do_not_see_each_other(campaign, simulator):
    samples = campaign.samples[:40]
    together = simulator.simulate(samples.phase, samples.cells)
    alone = np.concatenate(
        [simulator.simulate(samples.phase[i : i + 1], samples.cells[i : i + 1]) for i in range(40)]
    )
    np.testing.assert_allclose(together, alone, atol=1e-6 * together.max())


@pytest.mark.slow
def test_every_vector_against_the_exact_evaluator(campaign, reference):
    phase, cells, _ = reference
    grid = TofGrid(4000.0, campaign.grid.relative_step, 1600)  # fewer peaks: the oracle is slow
    simulator = Simulator(campaign.phases, campaign.instrument, grid, size=1.0, microstrain=1000.0)
    rows = np.array([3, 14, 26, 30])
    rng = np.random.default_rng(5)
    n = len(rows)
    vectors = {
        "u_scale": rng.uniform(0.7, 1.4, n),
        "size": rng.uniform(0.35, 2.0, n),
        "microstrain": rng.uniform(400, 2500, n),
        "tzero": rng.normal(4.84, 3, n),
        "difc": campaign.instrument.difc * (1 + rng.normal(0, 3e-4, n)),
        "width_scale": rng.uniform(0.95, 1.05, n),
    }
    ours = simulator.simulate(phase[rows], cells[rows], **vectors)
    for i, row in enumerate(rows):
        v = {name: float(values[i]) for name, values in vectors.items()}
        w = v["width_scale"]
        instrument = campaign.instrument.with_parameters(
            difc=v["difc"],
            tzero=v["tzero"],
            sig_1=campaign.instrument.sig_1 * w**2,
            sig_2=campaign.instrument.sig_2 * w**2,
        )
        exact = exact_pattern(
            campaign.phases[phase[row]],
            cells[row],
            instrument,
            grid.tof,
            size=v["size"] / w,
            microstrain=v["microstrain"] * w,
            u_scale=v["u_scale"],
        )
        maximum, l2 = errors(ours[i], exact)
        assert maximum < 1e-4
        assert l2 < 1e-4


@pytest.mark.slow
def test_nominal_vectors_change_nothing(campaign, reference):
    phase, cells, _ = reference
    grid = TofGrid(4000.0, campaign.grid.relative_step, 1600)
    simulator = Simulator(campaign.phases, campaign.instrument, grid, size=1.0, microstrain=1e3)
    plain = simulator.simulate(phase[24:26], cells[24:26])
    explicit = simulator.simulate(phase[24:26], cells[24:26], size=1.0, width_scale=1.0)
    assert errors(explicit, plain)[0].max() < 2e-5


@pytest.mark.slow
def test_textbook_convention_differs_where_the_notes_say(campaign, reference):
    _, cells, patterns = reference
    args = (campaign.phases[0], cells[0], campaign.instrument, campaign.grid.tof)
    textbook = exact_pattern(*args, size=1.0, microstrain=1e3, convention="textbook")
    assert 1e-3 < errors(textbook, patterns[0])[0] < 5e-2
    fast = Simulator(
        campaign.phases,
        campaign.instrument,
        campaign.grid,
        size=1.0,
        microstrain=1e3,
        convention="textbook",
    )
    assert errors(fast.simulate(np.zeros(1, int), cells[:1])[0], textbook)[0] < 6e-5


def test_peak_position_follows_braggs_law(simulator, campaign):
    cell = np.array([[4.0, 4.0, 4.0, 90, 90, 90]])
    pattern = simulator.simulate(np.zeros(1, int), cell)[0]
    tof = campaign.grid.tof
    expected = campaign.instrument.tof_from_d_spacing(4.0 / np.sqrt(6))  # (211) of the cube
    window = np.abs(tof - expected) < 150
    assert tof[window][pattern[window].argmax()] == pytest.approx(expected, abs=30)


def test_a_cell_without_volume_is_refused(simulator):
    with pytest.raises(CrystalError, match="alpha < 120"):
        simulator.simulate(np.array([2]), np.array([[4.0, 4.0, 4.0, 120, 120, 120]]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "points"), [(1360.0, 2321), (2000.0, 1909), (3000.0, 700), (1500.0, 2400)]
)
def test_any_window_will_do(campaign, start, points):
    grid = TofGrid(start, campaign.grid.relative_step, points)
    simulator = Simulator(campaign.phases, campaign.instrument, grid, size=1.0, microstrain=1000.0)
    assert simulator.response.interpolation_error(simulator.response.operator) < 2e-4


def test_constants_that_give_no_peak_are_refused(campaign):
    instrument = campaign.instrument.with_parameters(beta_1=-0.01)
    with pytest.raises(InstrumentError, match="Choose a grid without this range"):
        Simulator(campaign.phases, instrument, campaign.grid, size=1.0, microstrain=1e3)


# -- other structures: the same code, no BaTiO3 in it ------------------------------------------


@pytest.mark.filterwarnings("ignore:CIF of phase 'any'")  # of made-up atoms
@pytest.mark.parametrize(
    ("symbol", "free"),
    [
        ("F d -3 m:1", (5.43,)),
        ("R -3 c:H", (4.99, 17.06)),
        ("R -3 c:R", (6.36, 46.1)),
        ("P 63/m m c", (2.95, 4.68)),
        ("A m m 2", (3.98, 5.68, 5.69)),
        ("P 1 21/c 1", (5.15, 5.21, 5.32, 99.2)),
        ("P -1", (4.1, 5.2, 6.3, 83.0, 95.0, 102.0)),
    ],
)
def test_multiplicities_add_up_to_all_allowed_reflections(symbol, free):
    group = gemmi.find_spacegroup_by_name(symbol)
    phase = read_phase(_cif(symbol, free), "any")
    cell = phase.lattice.cells(np.array([free]))
    d_min = 0.9
    limits = tuple(int(x / d_min) for x in cell[0, :3])
    unique = unique_reflections(phase, limits)
    inside = d_spacing(unique.hkl, cell)[0] >= d_min
    total = unique.multiplicity[inside].sum()

    grid = np.stack(np.meshgrid(*(np.arange(-m, m + 1) for m in limits), indexing="ij"), -1)
    hkl = grid.reshape(-1, 3)
    hkl = hkl[np.any(hkl != 0, axis=1)]
    allowed = ~group.operations().systematic_absences(hkl.astype(np.int32))
    assert total == (allowed & (d_spacing(hkl, cell)[0] >= d_min)).sum()
    # and each carries the structure factor of a plain sum over atoms
    d = d_spacing(unique.hkl, cell)[0]
    waves = np.exp(2j * np.pi * unique.hkl @ phase.positions.T)
    damping = np.exp(-2 * np.pi**2 * phase.u_iso / d[:, None] ** 2)
    plain = np.abs((phase.scattering_lengths * waves * damping).sum(axis=1)) ** 2
    np.testing.assert_allclose(unique.f_squared(d), plain, atol=1e-9 * plain.max())


def _cif(symbol, free):
    group = gemmi.find_spacegroup_by_name(symbol)
    cell = lattice_from_space_group(group).cells(np.array([free]))[0]
    names = ["length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma"]
    assert len(names) == len(CELL_PARAMETERS)
    lines = ["data_any", *(f"_cell_{n} {v}" for n, v in zip(names, cell, strict=True))]
    lines += ["loop_", "_space_group_symop_operation_xyz"]
    lines += [f"'{op.triplet()}'" for op in group.operations()]
    lines += [
        "loop_",
        "_atom_site_label",
        "_atom_site_type_symbol",
        "_atom_site_fract_x",
        "_atom_site_fract_y",
        "_atom_site_fract_z",
        "_atom_site_occupancy",
        "_atom_site_U_iso_or_equiv",
        "A1 Ca 0.0 0.0 0.0 1 0.004",
        "B1 O 0.137 0.211 0.327 0.7 0.009",
    ]
    return "\n".join(lines) + "\n"


def test_imaginary_scattering_length_averages_friedel_mates():
    phase = read_phase(_cif("P -1", (4.1, 5.2, 6.3, 83.0, 95.0, 102.0)), "any")
    polar = read_phase(_cif("A m m 2", (3.98, 5.68, 5.69)).replace("A1 Ca", "A1 B"), "boron")
    assert np.abs(phase.scattering_lengths.imag).max() == 0
    assert np.abs(polar.scattering_lengths.imag).max() > 0.02
    unique = unique_reflections(polar, (3, 3, 3))
    d = d_spacing(unique.hkl, polar.cell[None])[0]
    damping = np.exp(-2 * np.pi**2 * polar.u_iso / d[:, None] ** 2)
    both = [
        np.abs(
            (
                polar.scattering_lengths
                * np.exp(s * 2j * np.pi * unique.hkl @ polar.positions.T)
                * damping
            ).sum(axis=1)
        )
        ** 2
        for s in (1, -1)
    ]
    np.testing.assert_allclose(unique.f_squared(d), np.mean(both, axis=0), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cif", "free"),
    [
        (RUTILE, [4.61, 2.95]),
        (_cif("R -3 c:H", (4.99, 17.06)), [4.97, 17.1]),
        (_cif("P 1 21/c 1", (5.15, 5.21, 5.32, 99.2)), [5.1, 5.25, 5.3, 98.8]),
    ],
)
def test_other_structures_fast_against_exact(campaign, cif, free):
    phase = read_phase(cif, "other")
    cell = phase.lattice.cells(np.array([free]))
    grid = TofGrid(5000.0, campaign.grid.relative_step, 1400)
    fast = Simulator([phase], campaign.instrument, grid, size=1.0, microstrain=1e3)
    exact = exact_pattern(
        phase, cell[0], campaign.instrument, grid.tof, size=1.0, microstrain=1000.0
    )
    maximum, l2 = errors(fast.simulate(np.zeros(1, int), cell)[0], exact)
    assert maximum < 1e-4
    assert l2 < 1e-4


@pytest.mark.filterwarnings("ignore:CIF of phase 'any'")  # of made-up atoms
@pytest.mark.parametrize(
    ("symbol", "free"),
    [
        ("P m -3 m", (4.0,)),
        ("R -3 c:H", (4.99, 17.06)),
        ("P -1", (4.1, 5.2, 6.3, 83.0, 95.0, 102.0)),
    ],
)
def test_lines_carry_the_intensity_of_their_reflections(symbol, free):
    phase = read_phase(_cif(symbol, free), "any")
    reflections = unique_reflections(phase, (7, 7, 7))
    lines = unique_lines(phase, (7, 7, 7))
    cell = phase.lattice.cells(np.array([free]))
    d = d_spacing(reflections.hkl, cell)[0]
    terms = [group[0] for group in phase.lattice.metric_terms]
    q = reciprocal_metric(cell)[0, terms] @ lines.products
    assert len(np.unique(np.round(q, 6))) <= len(q) <= len(d)
    damping = np.exp(-2 * np.pi**2 * lines.u_groups[:, None] * q)
    pairs = [(g, h) for g in range(len(damping)) for h in range(g, len(damping))]
    strength = sum(
        s * damping[g] * damping[h] for s, (g, h) in zip(lines.strengths, pairs, strict=True)
    )
    intensity = reflections.multiplicity * reflections.f_squared(d)
    by_d = [
        intensity[np.isclose(d**-2, value, rtol=1e-9)].sum() for value in np.unique(np.round(q, 9))
    ]
    ours = [strength[np.isclose(q, value, rtol=1e-9)].sum() for value in np.unique(np.round(q, 9))]
    np.testing.assert_allclose(ours, by_d, rtol=1e-5, atol=1e-6 * intensity.max())


def test_a_cell_of_another_lattice_is_refused(simulator):
    with pytest.raises(CrystalError, match="must equal a"):
        simulator.simulate(np.array([0]), np.array([[4.0, 4.0, 4.1, 90, 90, 90]]))


@pytest.mark.parametrize("parameters", [{}, {"size": np.linspace(0.5, 3.0, 300)}])
def test_the_last_bit_is_the_same_with_any_number_of_threads(simulator, campaign, parameters):
    samples = campaign.samples[slice(40_000, 40_300)]
    alone, together = (
        _simulated_with(threads, simulator, samples, parameters) for threads in (1, 2)
    )
    np.testing.assert_array_equal(alone, together)


def _simulated_with(threads, simulator, samples, parameters):
    with threadpool_limits(threads):
        return simulator.simulate(samples.phase, samples.cells, **parameters)

"""Structures to arrays and back, for all seven crystal systems in one campaign."""

import json

import gemmi
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem, lattice_from_space_group
from bragg_models.targets import Targets, TargetsError, targets_of

# Every system, trigonal in both settings, monoclinic with two unique axes, two cubic phases.
GROUPS = (
    "P m -3 m",
    "F d -3 m",
    "P 4 m m",
    "R 3 m:R",
    "R 3 m:H",
    "P 63/m m c",
    "P n m a",
    "P 1 21/c 1",
    "P 1 1 21/b",
    "P -1",
)


class _Phase:
    def __init__(self, symbol: str) -> None:
        self.name = symbol.replace(" ", "")
        self.lattice = lattice_from_space_group(gemmi.find_spacegroup_by_name(symbol))


PHASES = [_Phase(symbol) for symbol in GROUPS]


def random_samples(n: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    phase = generator.integers(len(PHASES), size=n)
    cells = np.empty((n, 6))
    for code, model_phase in enumerate(PHASES):
        rows = np.flatnonzero(phase == code)
        free = [
            generator.uniform(3.0, 12.0, len(rows))
            if name in "abc"
            else generator.uniform(70.0, 88.0, len(rows))
            for name in model_phase.lattice.free_parameters
        ]
        cells[rows] = model_phase.lattice.cells(np.stack(free, axis=1))
    return phase, cells


@pytest.fixture(scope="module")
def targets() -> Targets:
    return targets_of(PHASES, *random_samples(2000))


def test_all_seven_systems_are_covered(targets: Targets) -> None:
    assert set(targets.crystal_systems.tolist()) == set(CrystalSystem)
    assert targets.parameters == CELL_PARAMETERS


def test_decode_undoes_encode(targets: Targets) -> None:
    phase, cells = random_samples(500)
    values, _ = targets.encode(phase, cells)
    # The scaled values are single precision: 1e-7 of half a range of 9 Å or 18°.
    np.testing.assert_allclose(targets.decode(values, phase), cells, rtol=0, atol=3e-6)


def test_any_output_of_a_network_obeys_the_constraints_of_the_phase(targets: Targets) -> None:
    generator = np.random.default_rng(0)
    phase = generator.integers(len(PHASES), size=300)
    cells = targets.decode(generator.normal(0, 0.3, (300, 6)), phase)
    for code, model_phase in enumerate(PHASES):
        model_phase.lattice.check(cells[phase == code])
    cubic = cells[phase == 0]
    assert (cubic[:, 0] == cubic[:, 1]).all()
    assert (cubic[:, 0] == cubic[:, 2]).all()
    assert (cubic[:, 3:] == 90.0).all()


@settings(max_examples=100)
@given(
    code=st.integers(0, len(GROUPS) - 1),
    values=st.lists(st.floats(-1e9, 1e9), min_size=6, max_size=6),
)
def test_every_decoded_cell_encloses_a_volume(code: int, values: list[float]) -> None:
    targets = targets_of(PHASES, *random_samples(200))
    cells = targets.decode(np.array([values]), np.array([code]))
    assert (cells[:, :3] > 0).all()
    assert ((cells[:, 3:] > 0) & (cells[:, 3:] < 180)).all()
    assert np.isfinite(cells).all()
    cosine = np.cos(np.radians(cells[0, 3:]))
    assert 1 - (cosine**2).sum() + 2 * cosine.prod() > 0


def test_a_rhombohedral_angle_beyond_its_limit_is_clipped() -> None:
    """The limit is 120°, at which the three axes lie in a plane."""
    phase, cells = np.array([0, 0]), np.array([[4.0] * 3 + [80.0] * 3, [4.0] * 3 + [118.0] * 3])
    targets = targets_of([PHASES[GROUPS.index("R 3 m:R")]], phase, cells)
    decoded = targets.decode(np.array([[0.0, 0.9], [0.0, 1.2]]), phase)
    assert decoded[0, 3] == 99.0 + 0.9 * 19.0
    assert 119.0 < decoded[1, 3] < 120.0
    np.testing.assert_array_equal(decoded[:, :3], 4.0)


def test_mask_follows_the_space_group(targets: Targets) -> None:
    free = dict(zip(GROUPS, targets.free, strict=True))
    assert free["P m -3 m"].tolist() == [True, False, False, False, False, False]
    assert free["R 3 m:R"].tolist() == [True, False, False, True, False, False]
    assert free["R 3 m:H"].tolist() == [True, False, True, False, False, False]
    assert free["P 1 1 21/b"].tolist() == [True, True, True, False, False, True]
    phase, cells = random_samples(50)
    values, mask = targets.encode(phase, cells)
    assert (mask == targets.free[phase]).all()
    assert (values[~mask] == 0).all()


def test_each_parameter_is_scaled_to_unit_range(targets: Targets) -> None:
    phase, cells = random_samples(2000)
    values, mask = targets.encode(phase, cells)
    for column in range(6):
        free = values[mask[:, column], column]
        assert free.min() == pytest.approx(-1, abs=1e-6)
        assert free.max() == pytest.approx(1, abs=1e-6)


def test_only_the_parameters_of_the_campaign_are_outputs() -> None:
    phase, cells = random_samples(2000)
    three = [PHASES[0], PHASES[2], PHASES[3]]  # the paper's
    keep = np.isin(phase, [0, 2, 3])
    code = np.searchsorted([0, 2, 3], phase[keep])
    targets = targets_of(three, code, cells[keep])
    assert targets.parameters == ("a", "c", "alpha")
    values, _ = targets.encode(code, cells[keep])
    assert values.shape == (keep.sum(), 3)
    np.testing.assert_allclose(targets.decode(values, code), cells[keep], atol=3e-6)


def test_a_single_sample() -> None:
    phase, cells = np.array([0]), np.array([[4.0, 4.0, 4.0, 90.0, 90.0, 90.0]])
    targets = targets_of(PHASES[:1], phase, cells)
    values, _ = targets.encode(phase, cells)
    np.testing.assert_array_equal(targets.decode(values, phase), cells)


def test_json_round_trip(targets: Targets) -> None:
    copy = Targets.from_json(json.loads(json.dumps(targets.to_json())))
    assert copy.names == targets.names
    assert copy.lattices == targets.lattices
    np.testing.assert_array_equal(copy.middle, targets.middle)
    np.testing.assert_array_equal(copy.half_range, targets.half_range)


def test_damaged_description_is_refused(targets: Targets) -> None:
    lacking = targets.to_json()
    del lacking["parameters"][0]["middle"]
    with pytest.raises(TargetsError, match="Train the model again"):
        Targets.from_json(lacking)
    swapped = targets.to_json()
    swapped["parameters"].reverse()
    with pytest.raises(TargetsError, match="gamma, beta, alpha"):
        Targets.from_json(swapped)


def test_distortions_share_a_scale_and_compounds_do_not() -> None:
    """Barium titanate in three phases, and silicon."""
    phases = [PHASES[0], PHASES[2], PHASES[3], PHASES[1]]
    phase = np.repeat(np.arange(4), 2)
    cells = np.full((8, 6), 90.0)
    cells[:, 0] = [3.9, 4.1, 3.95, 4.05, 4.0, 4.15, 5.3, 5.5]
    cells[:, 1] = cells[:, 2] = cells[:, 0]
    cells[2:4, 2] = 4.0, 4.2
    cells[4:6, 3:] = [[88.0] * 3, [89.0] * 3]
    targets = targets_of(phases, phase, cells)
    assert targets.parameters == ("a", "c", "alpha")
    np.testing.assert_allclose(targets.middle[:, 0], [4.025, 4.025, 4.025, 5.4])
    np.testing.assert_allclose(targets.half_range[:, 0], [0.125, 0.125, 0.125, 0.1])
    # Where a parameter is not free, the scale is that of the others.
    np.testing.assert_allclose(targets.middle[:, 1], 4.1)
    np.testing.assert_allclose(targets.half_range[:, 1], 0.1)
    np.testing.assert_allclose(targets.middle[:, 2], 88.5)
    values, _ = targets.encode(phase, cells)
    np.testing.assert_allclose(values[6:, 0], [-1, 1], atol=1e-6)
    np.testing.assert_allclose(targets.decode(values, phase), cells, atol=1e-6)
    copy = Targets.from_json(json.loads(json.dumps(targets.to_json())))
    np.testing.assert_array_equal(copy.middle, targets.middle)
    np.testing.assert_array_equal(copy.half_range, targets.half_range)


def test_ranges_that_overlap_in_a_chain_share_a_scale() -> None:
    phase = np.repeat(np.arange(3), 2)
    lengths = np.array([4.0, 4.2, 4.35, 4.6, 4.15, 4.4])  # the third joins the first two
    cells = np.column_stack([lengths, lengths, lengths, *np.full((3, 6), 90.0)])
    targets = targets_of([PHASES[0], PHASES[1], PHASES[0]], phase, cells)
    np.testing.assert_allclose(targets.middle[:, 0], 4.3)
    np.testing.assert_allclose(targets.half_range[:, 0], 0.3)


def test_descriptions_of_older_models_have_a_common_scale(targets: Targets) -> None:
    older = targets.to_json()
    for number, entry in enumerate(older["parameters"]):
        entry |= {"middle": 5.0 + number, "half_range": 0.5}
    read = Targets.from_json(json.loads(json.dumps(older)))
    assert read.middle.shape == read.half_range.shape == (len(GROUPS), 6)
    np.testing.assert_array_equal(read.middle, np.tile(5.0 + np.arange(6), (len(GROUPS), 1)))
    np.testing.assert_array_equal(read.half_range, 0.5)

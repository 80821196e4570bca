"""Identification: mixtures of known phases, foreign samples, and the library's cache."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bragg_data.crystallography.structure import Phase
from bragg_data.refinement import retrieval
from bragg_data.refinement.identification import Identification, identify
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.joint_state import State
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.phase_evidence import is_small_part
from bragg_data.refinement.result import RefinementError
from bragg_data.refinement.retrieval import PatternLibrary, pattern_library
from tests.measured_banks import bank_of, bins, nomad, structure

NAMES = "silicon", "rutile", "calcite", "srtio3", "baddeleyite", "diamond", "hydroxyapatite"
CELLS = {"silicon": [5.442], "rutile": [4.579, 2.951], "calcite": [4.995, 17.09]}
TOF = bins(8000.0, 23_000.0, 1.5e-3)
OPTIONS = JointOptions((1e-4,), evidence=False)


@pytest.fixture(scope="module")
def phases() -> dict[str, Phase]:
    return {name: structure(name) for name in NAMES}


@pytest.fixture(scope="module")
def library(phases) -> PatternLibrary:
    library, problems = pattern_library(list(phases.values()), [measured({"silicon": 1.0}, phases)])
    assert problems == []
    return library


def measured(
    weights: Mapping[str, float], phases: Mapping[str, Phase], *, counts: float = 20_000
) -> MeasuredBank:
    """Return a bank of a mixture by weight, with cells up to 0.3 % from the CIFs'."""
    sample = {"size": 1.0, "microstrain": 700.0}
    samples = [
        (phases[name], CELLS[name], {"amount": weight / phases[name].cell_mass, **sample})
        for name, weight in weights.items()
    ]
    return bank_of(samples, nomad(), TOF, counts=counts, seed=3)


def names(identification: Identification) -> Sequence[str]:
    return [phase.name for phase in identification.result.phases]


def test_the_phases_of_a_mixture_with_their_cells_and_fractions(phases, library):
    weights = {"calcite": 0.55, "rutile": 0.4, "silicon": 0.05}
    reported: list[str] = []
    identification = identify([measured(weights, phases)], library, OPTIONS, reported.append)
    result = identification.result
    assert set(names(identification)) == set(weights)
    assert result.accepted
    assert result.unexplained_lines == ()
    for phase in result.phases:
        error = phase.weight_percent - 100 * weights[phase.name]
        assert abs(error) < min(3 * phase.su_weight_percent, 1.5)
        free = phases[phase.name].lattice.free_columns
        off = phase.cell[free] - CELLS[phase.name]
        assert (np.abs(off) < 3.5 * phase.su[free]).all()
        assert (phase.su[free] < 3e-4 * phase.cell[free]).all()
    assert all(alternatives == () for alternatives in identification.alternatives.values())
    assert sum(": reduced χ² " in text for text in reported) >= len(weights)


def test_a_foreign_phase_is_not_explained_away(phases):
    bank = measured({"calcite": 0.6, "silicon": 0.4}, phases)
    rest = [phase for name, phase in phases.items() if name != "calcite"]
    library, _ = pattern_library(rest, [bank])
    identification = identify([bank], library, OPTIONS)
    assert names(identification) == ["silicon"]
    assert not identification.result.accepted
    for d in (2.287, 1.442):  # 113 and 300 of calcite
        assert any(abs(line - d) < 0.005 for line in identification.result.unexplained_lines)


def test_a_phase_explains_much_of_what_is_left_and_an_imitation_little(phases):
    bank = measured({"calcite": 0.5, "rutile": 0.4, "silicon": 0.1}, phases)

    def state(*some: str) -> State:
        refiner = JointRefiner([bank], [phases[name] for name in some])
        cells = [
            phases[n].lattice.cells(np.array([CELLS[n]]))[0] if n in CELLS else phases[n].cell
            for n in some
        ]
        return refiner.near(cells, OPTIONS)

    assert not is_small_part(state("calcite"), None)
    assert not is_small_part(state("calcite", "rutile"), state("calcite"))
    assert is_small_part(state("calcite", "diamond"), state("calcite"))


@pytest.mark.parametrize(("rutile", "share", "steps"), [(0.03, 0.2, 4), (0.02, 0.1, 6)])
def test_tails_of_strong_lines_are_no_phase(phases, rutile: float, share: float, steps: int):
    """Some of silicon's intensity lies 0.6 or 0.9 % further out, as of no profile function.

    By its decrease of χ² alone its structure in a larger cell would be 10 or 20 % of the sample.
    """
    bank = measured({"silicon": 1 - rutile, "rutile": rutile}, phases)
    tails = np.roll(bank.intensity, steps)
    bank = replace(bank, intensity=(1 - share) * bank.intensity + share * tails)
    larger = replace(phases["silicon"], name="larger", cell=np.array([5.54] * 3 + [90.0] * 3))
    library, _ = pattern_library([*phases.values(), larger], [bank])
    reported: list[str] = []
    identification = identify([bank], library, OPTIONS, reported.append)
    assert names(identification) == ["silicon", "rutile"]
    assert abs(identification.result.phases[1].weight_percent - 100 * rutile) < 1.0
    assert "silicon: its lines have tails" in reported


def test_a_can_is_there_from_the_start_and_counts_for_nothing(phases):
    bank = measured({"calcite": 0.5, "silicon": 0.25, "rutile": 0.25}, phases)
    can = replace(phases["calcite"], name="can")
    rest = [phase for name, phase in phases.items() if name != "calcite"]
    library, _ = pattern_library([can, *rest], [bank])
    result = identify([bank], library, replace(OPTIONS, cans=("can",))).result
    by_name = {phase.name: phase for phase in result.phases}
    assert by_name.keys() == {"can", "silicon", "rutile"}
    assert np.isnan(by_name["can"].weight_percent)
    for name in ("silicon", "rutile"):
        phase = by_name[name]
        assert abs(phase.weight_percent - 50) < 4 * phase.su_weight_percent


def test_a_standard_stands_for_what_has_its_pattern_and_calibrates(phases):
    bank = measured({"silicon": 0.6, "rutile": 0.4}, phases)
    like = replace(phases["silicon"], name="like", cell=np.array([5.449] * 3 + [90.0] * 3))
    known = replace(phases["silicon"], name="standard", cell=np.array([5.4365] * 3 + [90.0] * 3))
    library, _ = pattern_library([known, like, *phases.values()], [bank])
    result = identify([bank], library, replace(OPTIONS, standard="standard")).result
    assert [phase.name for phase in result.phases] == ["standard", "rutile"]
    ratio = 5.4365 / CELLS["silicon"][0]  # its cell is said to be so much smaller
    assert result.phases[0].cell[0] == 5.4365
    assert abs(result.phases[1].cell[0] / ratio - CELLS["rutile"][0]) < 5e-4


def test_a_standard_without_lines_is_named(phases, library):
    bank = measured({"silicon": 1.0}, phases)
    with pytest.raises(RefinementError, match="The standard iron has no lines on these banks"):
        identify([bank], library, replace(OPTIONS, standard="iron"))


def test_a_structure_in_a_cell_far_from_its_cif_is_doubted(phases):
    bank = measured({"silicon": 1.0}, phases)
    like = replace(phases["silicon"], name="like", cell=np.array([5.572] * 3 + [90.0] * 3))
    rest = [phase for name, phase in phases.items() if name != "silicon"]
    library, _ = pattern_library([like, *rest], [bank])
    identification = identify([bank], library, OPTIONS)
    assert names(identification) == ["like"]
    (reason,) = identification.result.reasons
    assert reason.startswith("like is in a cell 2.3 % from its CIF's")


def test_nothing_is_identified_in_noise(phases, library):
    bank = measured({"silicon": 1.0}, phases)
    noise = np.random.default_rng(0).poisson(400.0, len(bank.tof)).astype(float)
    flat = replace(bank, intensity=noise, sigma=np.full(len(noise), 20.0))
    result = identify([flat], library, OPTIONS).result
    assert result.phases == ()
    assert result.unexplained_lines == ()
    assert result.reasons == ("None of the structures explains a significant part of the profile.",)
    assert result.reduced_chi2 == pytest.approx(1.0, abs=0.1)


def test_nothing_is_identified_in_zeros_or_among_no_structures(phases, library):
    bank = measured({"silicon": 1.0}, phases)
    n = len(bank.tof)
    zero = replace(bank, intensity=np.zeros(n), sigma=np.ones(n))
    assert identify([zero], library, OPTIONS).result.phases == ()
    cadmium = replace(
        phases["silicon"], name="cd", symbols=("Cd",) * len(phases["silicon"].symbols)
    )
    empty, problems = pattern_library([cadmium], [bank])
    assert empty.phases == ()
    assert problems[0].startswith("cd is left out: Element 'Cd' has a resonance")
    assert identify([bank], empty, OPTIONS).result.phases == ()


def test_structures_of_the_same_pattern_are_named(phases):
    cell = np.array([5.49, 5.49, 5.49, 90.0, 90.0, 90.0])
    like = replace(phases["silicon"], name="imitation", cell=cell)
    bank = measured({"silicon": 1.0}, phases)
    library, _ = pattern_library([like, *phases.values()], [bank])
    identification = identify([bank], library, OPTIONS)
    # The cell that is nearer to the sample's decides.
    assert names(identification) == ["silicon"]
    assert identification.alternatives == {"silicon": ("imitation",)}


def test_patterns_are_simulated_once(phases, tmp_path, monkeypatch):
    bank = measured({"silicon": 1.0}, phases)
    some = [phases["silicon"], phases["rutile"]]
    simulated: list[None] = []
    calls = {"on_pattern": lambda: simulated.append(None)}
    first, _ = pattern_library(some, [bank], tmp_path, **calls)
    again, _ = pattern_library(some, [bank], tmp_path, **calls)
    assert len(simulated) == 2
    np.testing.assert_array_equal(first.banks[0], again.banks[0])
    changed = replace(phases["rutile"], cif=phases["rutile"].cif + "\n# edited")
    pattern_library([phases["silicon"], changed], [bank], tmp_path, **calls)
    assert len(simulated) == 4
    for count, damage in ((6, b"damaged"), (8, b""), (10, b"\x93NUMPY")):
        for file in tmp_path.glob("*.npz"):
            file.write_bytes(damage)
        mended, _ = pattern_library(some, [bank], tmp_path, **calls)
        assert len(simulated) == count
        np.testing.assert_array_equal(first.banks[0], mended.banks[0])
    monkeypatch.setattr(retrieval, "_MOST_FILES", 1)
    pattern_library([phases["rutile"]], [bank], tmp_path, **calls)
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_a_cache_that_cannot_be_written_costs_time_alone(phases, tmp_path):
    file = tmp_path / "file"
    file.touch()
    bank = measured({"silicon": 1.0}, phases)
    library, problems = pattern_library([phases["silicon"]], [bank], Path(file, "cache"))
    assert problems == []
    assert library.banks[0].max() == pytest.approx(1.0)


def test_structures_without_lines_on_the_banks_are_left_out(phases):
    bank = measured({"silicon": 1.0}, phases)
    tiny = replace(phases["diamond"], name="tiny", cell=np.array([0.6, 0.6, 0.6, 90.0, 90.0, 90.0]))
    library, problems = pattern_library([tiny, phases["silicon"]], [bank])
    assert [phase.name for phase in library.phases] == ["silicon"]
    (problem,) = problems
    assert problem.startswith("tiny is left out: Phase 'tiny' has no reflection")

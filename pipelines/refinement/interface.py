"""The Python interface for notebooks: known structures against the banks of samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from bragg_data.crystallography.cif import file_and_block
from bragg_data.crystallography.structure import Phase
from bragg_data.files import user_cache
from bragg_data.measurement.readers import AS_USUAL, Reading
from bragg_data.refinement.identification import identify, informative_banks
from bragg_data.refinement.joint_refinement import JointOptions
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.retrieval import pattern_library
from bragg_data.refinement.sample_refinement import is_vanadium, other_metals, refine_sample
from pipelines.cli.console import Progress
from pipelines.refinement.inputs import (
    Request,
    Sample,
    read_known_structures,
    read_samples,
    read_structures,
)
from pipelines.refinement.result import JointRefinement, joint_refinement

_OF_CAN = "{} is taken for the can's, no part of the sample; with --can none it is a part of it."
_MOST_WARNINGS = 3  # that are listed one by one


class RefinedSample(NamedTuple):
    """A joint refinement as plain values, and as arrays for figures."""

    result: JointRefinement
    fit: JointResult


def _refined(
    sample: Sample,
    fit: JointResult,
    assumptions: Sequence[str],
    alternatives: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> RefinedSample:
    result = joint_refinement(sample, fit, assumptions, alternatives)
    return RefinedSample(result.with_fit(fit), fit)


def refine(
    files: str | Path | Sequence[str | Path],
    cifs: str | Path | Sequence[str | Path],
    instrument: str | Path,
    *,
    banks: Sequence[int] = (),
    calibration: str | Path | None = None,
    reading: Reading = AS_USUAL,
) -> list[JointRefinement]:
    """Refine known structures against all banks of each sample at once, on the measured points.

    Raises `ProfileError`, `InstrumentError`, `CrystalError` or `RefinementError` if a file cannot
    be read, or nothing can be refined on it.

    Parameters
    ----------
    files
        A file with all banks of a sample, or several of different banks. Files that repeat a bank
        are samples of their own.
    cifs
        Structures, ``FILE.cif`` or ``FILE.cif:BLOCK``.
    instrument
        Calibration and peak widths, of any kind that is read.
    banks
        Only these; of files that state no bank one for each file.
    calibration
        A calibration of the same cycle: positions are taken from it, widths from ``instrument``.
    reading
        Unit of the axis, bin edges or centres, and place of the bank, where a file leaves it open.
    """
    of_cycle = None if calibration is None else Path(calibration)
    paths = tuple(map(Path, _several(files)))
    request = Request(paths, Path(instrument), tuple(banks), of_cycle, reading=reading)
    return [refined.result for refined in refine_samples(request, list(map(str, _several(cifs))))]


def refine_samples(
    request: Request, structures: Sequence[str], *, evidence: bool = True
) -> Iterator[RefinedSample]:
    """Yield the refinements of all samples of some files; errors are those of :func:`refine`.

    Without ``evidence`` no parameters are added where the data show the need.
    """
    if request.standard and _place(request.standard) not in map(_place, structures):
        structures = [*structures, request.standard]
    phases, assumptions = read_structures(request.with_cans(structures))
    cans = tuple(phase.name for phase in phases[len(structures) :])
    name = None
    if request.standard:
        name = phases[list(map(_place, structures)).index(_place(request.standard))].name
    for sample in read_samples(request):
        sample = replace(sample, standard=name)
        options = JointOptions(sample.calibration_su, evidence, cans, standard=name)
        look_for = other_metals(phases) if request.cans is None else ()
        fit = refine_sample(sample.banks, phases, options, metals=look_for)
        yield _refined(sample, fit, assumptions)


def _place(structure: str) -> tuple[Path, str | None]:
    """Return the file, however it is written, and the data block of a structure."""
    path, block = file_and_block(structure)
    return path.resolve(), block


def identify_samples(
    request: Request, places: Sequence[Path], *, evidence: bool = True, quiet: bool = False
) -> Iterator[RefinedSample]:
    """Yield what the samples of some files consist of, of the structures in folders and files.

    Errors are those of :func:`refine`, and a CampaignError of a campaign file. Patterns of all
    structures are simulated for banks that are new, and kept.
    """
    phases, problems = read_known_structures(places)
    cans = None if request.cans is None else _structures(request.cans)
    if request.standard:  # under its own name, whatever a folder holds
        (standard,) = _structures([request.standard])
        phases = [
            standard,
            *(replace(p, name=f"{p.name}-2") if p.name == standard.name else p for p in phases),
        ]
    for sample in read_samples(request):
        sample = replace(sample, standard=phases[0].name if request.standard else None)
        refined = identify_sample(sample, phases, cans, evidence=evidence, quiet=quiet)
        result = refined.result
        warnings = *_shortened(problems), *result.warnings
        yield refined._replace(result=result.model_copy(update={"warnings": warnings}))


def identify_sample(
    sample: Sample,
    phases: Sequence[Phase],
    cans: Sequence[Phase] | None = None,
    *,
    evidence: bool = True,
    quiet: bool = True,
) -> RefinedSample:
    """Return what a sample consists of, of some phases; without ``cans`` usual ones are looked for.

    A RefinementError is raised if nothing can be refined.
    """
    metals: list[str] = []
    if cans is None:
        of_cans = other_metals(phases)
        # Cans are of vanadium, samples hardly ever: their weak lines stand for a large weight.
        metals = [phase.name for phase in [*filter(is_vanadium, phases), *of_cans]]
        phases = [*phases, *of_cans]
    known = [replace(can, name=f"can {can.name}") for can in cans or ()]
    phases = [*known, *phases]
    banks = [sample.banks[b] for b in informative_banks(sample.banks)]
    with Progress("Simulating", len(phases) * len(banks), "patterns", quiet=quiet) as bar:
        library, left_out = pattern_library(phases, banks, user_cache(), bar.advance)
    names = tuple(can.name for can in known)
    options = JointOptions(sample.calibration_su, evidence, names, standard=sample.standard)
    fit, alternatives = identify(sample.banks, library, options, metals=metals)
    taken = {phase.name for phase in fit.phases}.intersection(metals)
    of_cans_too = [_OF_CAN.format(n) for n in sorted(taken) if not n.startswith("can ")]
    warnings = _shortened([*left_out, *of_cans_too])
    return _refined(sample, fit, warnings, alternatives)


def _shortened(warnings: Sequence[str]) -> tuple[str, ...]:
    """Return sentences on structures, of many the first ones."""
    rest = len(warnings) - _MOST_WARNINGS
    if rest <= 0:
        return tuple(warnings)
    return (*warnings[:_MOST_WARNINGS], f"Of {rest} structures more there are such warnings.")


def _structures(files: Sequence[str]) -> list[Phase]:
    return read_structures(files)[0] if files else []


def _several(files: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [files] if isinstance(files, str | Path) else files

"""The Python interface for notebooks: known structures against the banks of samples."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bragg_data.measurement.readers import AS_USUAL, Reading
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.joint_result import JointResult
from pipelines.refinement.inputs import Request, read_samples, read_structures
from pipelines.refinement.result import JointRefinement, joint_refinement


class RefinedSample(NamedTuple):
    """A joint refinement as plain values, and as arrays for figures."""

    result: JointRefinement
    fit: JointResult


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
    phases, assumptions = read_structures(structures)
    for sample in read_samples(request):
        refiner = JointRefiner(sample.banks, phases)
        fit = refiner.refine(JointOptions(sample.calibration_su, evidence))
        yield RefinedSample(joint_refinement(sample, fit, assumptions), fit)


def _several(files: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [files] if isinstance(files, str | Path) else files

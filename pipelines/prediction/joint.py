"""The banks of one sample, refined jointly: the phases that they leave, on the measured points.

Banks that are refined one by one are combined by their uncertainties, which do not contain the
errors of their calibrations. Refined jointly they have one cell, and each bank an error of its
difC; which phase explains all of them best is a question with one answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.structure import Phase, scaled_to_volume_per_atom
from bragg_data.instrument.conversion import OriginalBank
from bragg_data.instrument.instprm import InstrumentError, read_banks
from bragg_data.measurement.readers import ProfileError
from bragg_data.refinement.calibration_uncertainty import CalibrationKind
from bragg_data.refinement.evidence import schwarz_evidence
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.measured_bank import MeasuredBank, measured_bank
from bragg_data.refinement.result import RefinementError
from bragg_data.refinement.time_limit import TimeLimitError, limited
from pipelines.cli.style import UNITS
from pipelines.prediction.combination import (
    banks_that_count,
    combine,
    combined_values,
    disagreements,
    refined_by,
)
from pipelines.prediction.combined_result import CombinedBanks
from pipelines.prediction.result import PredictionResult
from pipelines.prediction.workflow import BanksOfSample, PredictedProfile
from pipelines.refinement.inputs import Sample, are_repeated, matched_bank
from pipelines.refinement.result import JointPhase, JointRefinement, joint_refinement

_PLAUSIBLE, _MOST = 0.01, 3  # probability of phases that are refined, and how many at most
_OFF = 3.0  # standard uncertainties, from which a bank's own cell disagrees with the joint one
ERRORS = (ProfileError, InstrumentError, RefinementError, CrystalError, TimeLimitError)


class _Refined(NamedTuple):
    fit: JointResult
    result: JointRefinement


def with_banks(
    profiles: Sequence[PredictedProfile], instrument: Path | None, *, refine: bool
) -> list[PredictedProfile]:
    """Return profiles with what those of the same sample show together, where there are several.

    Those of a sample follow each other. With ``refine`` their banks are refined jointly, too; where
    that is not possible, the combination has the reason. ``instrument`` is the file that the
    profiles were read with. Raises as :func:`pipelines.prediction.combination.combine`.
    """
    combined: list[PredictedProfile] = []
    for _, group in groupby(profiles, key=attrgetter("sample")):
        of_sample = list(group)
        if len(of_sample) == 1:
            combined += of_sample
            continue
        results = [profile.result() for profile in of_sample]
        together, refined = combine(results), None
        if refine:
            together, refined = _refined_jointly(of_sample, together, instrument)
        combined += [
            replace(profile, together=_part_of(profile, together, refined, used=used))
            for profile, used in zip(of_sample, _used(results), strict=True)
        ]
    return combined


def _used(results: Sequence[PredictionResult]) -> list[bool]:
    count = banks_that_count(results).values()
    return [any(result is used for used in count) for result in results]


def _part_of(
    profile: PredictedProfile, together: CombinedBanks, refined: _Refined | None, *, used: bool
) -> BanksOfSample:
    """Return what the banks mean for one of them: the joint cell, if all agree on the phase."""
    if refined is None:
        return BanksOfSample(together, None, None)
    (phase,) = refined.result.phases
    agreed = phase.name == together.phase == profile.result().phase
    decides = agreed and used and refined.result.accepted and phase.cell is not None
    return BanksOfSample(together, refined.fit, phase if decides else None)


def _refined_jointly(
    profiles: Sequence[PredictedProfile], together: CombinedBanks, instrument: Path | None
) -> tuple[CombinedBanks, _Refined | None]:
    """Return the combination with the joint refinement of the most plausible phase, or why not."""
    results = [profile.result() for profile in profiles]
    banks = banks_that_count(results)
    used = [p for p, counts in zip(profiles, _used(results), strict=True) if counts]
    try:
        if all(profile.is_foreign for profile in profiles):
            raise RefinementError("none of them shows lines of the model's structures.")
        starts = _starts(profiles[0].campaign.structures, banks, together)
        sample, labels = sample_of(dict(zip(banks, used, strict=True)), instrument)
        if len(labels) < 2:
            raise RefinementError(" ".join(["at least two banks are needed.", *sample.warnings]))
        with limited(len(labels)):
            fits = _fits(sample, starts)
    except ERRORS as error:
        return replace(together, not_joint=f"The banks were not refined jointly: {error}"), None
    best = fits[0]
    (phase,) = best.result.phases
    calibrations = dict(zip(labels, sample.calibration_su, strict=True))
    warnings = list(together.warnings)
    if best.result.accepted:  # its uncertainties contain those of the calibrations
        alone = disagreements("refined", together.refined)
        warnings = [text for text in warnings if text not in alone]
        warnings += _disagreements(phase, banks, calibrations)
    if phase.name != together.phase:
        warnings.append(
            f"Refined jointly, the banks are explained best by {phase.name}, while their "
            f"predictions together are {together.phase}: the cells are those of each bank."
        )
    together = replace(
        together,
        joint=best.result,
        joint_rwp={fit.result.phases[0].name: fit.fit.rwp for fit in fits},
        warnings=tuple(warnings),
    )
    return together, best


def sample_of(
    profiles: Mapping[str, PredictedProfile], instrument: Path | None
) -> tuple[Sample, list[str]]:
    """Return the banks on their measured points, calibrated as for predictions, and their names.

    ``instrument`` is the file that the profiles were read with. A RefinementError is raised if no
    bank can be refined, or a bank is there several times.
    """
    of_file = None if instrument is None else read_banks(instrument)
    banks: dict[str, MeasuredBank] = {}
    warnings = []
    for label, profile in profiles.items():
        try:
            banks[label] = _bank(profile, of_file)
        except ERRORS as error:
            warnings.append(f"{label} is left out: {error}")
    if not banks:
        raise RefinementError(" ".join(warnings))
    measured = tuple(banks.values())
    if are_repeated(measured):
        raise RefinementError(
            "the file holds a bank of the instrument several times, which are measurements of "
            "their own."
        )
    measurements = [profile.measurement for profile in profiles.values()]
    headers = any(m.nominal and m.calibration is not None for m in measurements)
    kind = CalibrationKind.HEADER if headers else CalibrationKind.OTHER
    files = dict.fromkeys(Path(m.profile.source) for m in measurements)
    return Sample(tuple(files), measured, kind, tuple(warnings)), list(banks)


def _bank(profile: PredictedProfile, of_file: Sequence[OriginalBank] | None) -> MeasuredBank:
    measurement = profile.measurement
    window = incident = None
    instrument = measurement.calibration or profile.campaign.instrument
    if of_file is not None:
        original = matched_bank(measurement.profile, of_file)
        instrument, window, incident = original.exact, original.window, original.incident
    bank = measured_bank(measurement.profile, instrument, window=window, incident=incident)
    # As read: over times of flight an axis of d-spacings leaves nothing open.
    return replace(bank, half_bin=measurement.half_bin)


def _starts(
    phases: Sequence[Phase], banks: Mapping[str, PredictionResult], together: CombinedBanks
) -> list[tuple[Phase, Array]]:
    """Return the plausible phases with cells (6,) to start from, the most probable one first.

    A cell is the banks' mean, otherwise that of the CIF with the same volume per atom.
    """
    structures = {phase.name: phase for phase in phases}
    names = sorted(together.probabilities, key=lambda name: -together.probabilities[name])
    first = structures[names[0]]
    mean = _mean_cell(first, banks)
    starts = [(first, np.asarray(first.cell) if mean is None else mean)]
    for name in names[1:_MOST]:
        if together.probabilities[name] > _PLAUSIBLE:
            phase = structures[name]
            cell = _mean_cell(phase, banks)
            if cell is None:
                cell = scaled_to_volume_per_atom(phase, *starts[0])
            starts.append((phase, cell))
    return starts


def _mean_cell(phase: Phase, banks: Mapping[str, PredictionResult]) -> Array | None:
    values, names = combined_values(banks, phase.name), phase.lattice.free_parameters
    if any(name not in values for name in names):
        return None
    return np.asarray(phase.lattice.cells(np.array([[values[name] for name in names]]))[0])


def _fits(sample: Sample, starts: Sequence[tuple[Phase, Array]]) -> list[_Refined]:
    """Refine each phase; return the results, that with the most evidence first."""
    options = JointOptions(sample.calibration_su)
    fits = [JointRefiner(sample.banks, [phase]).refine(options, [cell]) for phase, cell in starts]
    order = np.argsort(-schwarz_evidence(fits), kind="stable")
    return [_Refined(fits[k], joint_refinement(sample, fits[k])) for k in order]


def _disagreements(
    phase: JointPhase, banks: Mapping[str, PredictionResult], calibrations: Mapping[str, float]
) -> list[str]:
    """Return sentences on banks whose refined cells differ from the joint one.

    ``calibrations`` are the banks' relative uncertainties of lengths. That of the joint cell does
    not count: it grows with the disagreement.
    """
    if phase.cell is None or phase.su is None:
        return []
    cell, su = phase.cell.values(), phase.su.values()
    sentences = []
    for label, bank in banks.items():
        fit = refined_by(bank, phase.name)
        if fit is None or label not in calibrations:
            continue
        off = []
        for name in phase.free_parameters:
            difference = (fit.cell.values()[name] or np.nan) - (cell[name] or np.nan)
            of_calibration = calibrations[label] * (cell[name] or 0.0) if name in "abc" else 0.0
            parts = (su[name] or 0.0, fit.su.values()[name] or 0.0, of_calibration)
            if abs(difference) > _OFF * np.linalg.norm(parts):
                off.append(f"{name} ({difference:+.2g} {UNITS[name]})")
        if off:
            sentences.append(
                f"{label}, refined by itself, differs from the joint refinement by more than the "
                f"uncertainties allow: {', '.join(off)}."
            )
    return sentences

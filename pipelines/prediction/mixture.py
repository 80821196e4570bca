"""Samples that no phase of a model explains by itself: which phases they consist of together."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.time_limit import limited
from pipelines.prediction.joint import ERRORS, sample_of
from pipelines.prediction.workflow import PredictedProfile
from pipelines.refinement.interface import identify_sample


def with_mixtures(
    profiles: Sequence[PredictedProfile], instrument: Path | None, further: Sequence[Phase] = ()
) -> list[PredictedProfile]:
    """Return refined profiles, those of samples that are not accepted with what they consist of.

    Samples that show lines of nothing that is known are left as they are. Phases are those of the
    model, and ``further``; with these every sample is searched for them. Profiles of a sample
    follow each other. ``instrument`` is the file that they were read with.
    """
    identified: list[PredictedProfile] = []
    for _, group in groupby(profiles, key=attrgetter("sample")):
        banks = list(group)
        known = any(profile.result().accepted for profile in banks)
        if further or not (known or all(profile.is_foreign for profile in banks)):
            banks = _identified(banks, instrument, further)
        identified += banks
    return identified


def _identified(
    banks: Sequence[PredictedProfile], instrument: Path | None, further: Sequence[Phase]
) -> list[PredictedProfile]:
    try:
        sample, _ = sample_of({f"bank {k}": bank for k, bank in enumerate(banks, 1)}, instrument)
        known = {phase.name for phase in banks[0].phases}
        phases = [*banks[0].phases, *(phase for phase in further if phase.name not in known)]
        with limited(len(banks)):
            mixture = identify_sample(sample, phases).result
    except ERRORS as error:
        note = f"Not searched for several phases: {error}"
        return [replace(bank, notes=(*bank.notes, note)) for bank in banks]
    return [replace(bank, mixture=mixture) for bank in banks]

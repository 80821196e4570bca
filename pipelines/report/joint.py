"""The report's section on the banks of a sample that were refined jointly."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bragg_data.crystallography.structure import Phase
from bragg_data.refinement.joint_result import JointResult, RefinedBank
from bragg_data.refinement.linear_fit import reflections_within
from pipelines.prediction.combination import with_combined
from pipelines.prediction.combined_result import CombinedBanks
from pipelines.prediction.workflow import PredictedProfile
from pipelines.refinement.output import bank_texts, cell_texts
from pipelines.refinement.result import JointPhase
from pipelines.report.charts import Curves, draw_curves


@dataclass(frozen=True, eq=False)
class BanksSection:
    """What the banks of a file show together, as the page's template takes it."""

    combined: CombinedBanks
    charts: tuple[tuple[str, dict[str, object]], ...]  # of the joint fits, with their names
    system: str  # the crystal system of the jointly refined phase, for its colour

    @property
    def cells(self) -> list[tuple[JointPhase, dict[str, str]]]:
        """The jointly refined phases, and their free parameters with both uncertainties."""
        joint = self.combined.joint
        return [(phase, cell_texts(phase)) for phase in joint.phases] if joint else []

    @property
    def banks(self) -> list[list[str]]:
        """The banks of the joint refinement as rows of a table."""
        joint = self.combined.joint
        rows = [bank_texts(bank) for bank in joint.of_banks] if joint else []
        return [[text.replace("-", "−").replace(",", "\u202f") for text in row] for row in rows]


def banks_sections(profiles: Sequence[PredictedProfile]) -> dict[str, BanksSection]:
    """Return what several banks show together, by the name of their file."""
    sections = {}
    results = with_combined([profile.result() for profile in profiles])
    for profile, result in zip(profiles, results, strict=True):
        name = Path(str(result.file)).name
        if result.combined is not None and name not in sections:
            sections[name] = _section(profile, result.combined)
    return sections


def _section(profile: PredictedProfile, combined: CombinedBanks) -> BanksSection:
    fit = None if profile.together is None else profile.together.fit
    if fit is None or combined.joint is None:
        return BanksSection(combined, (), "")
    (refined,) = combined.joint.phases
    phase = next(p for p in profile.phases if p.name == refined.name)
    charts = [
        (f"{bank.bank.label}, 2θ {bank.bank.instrument.two_theta:g}°", _chart(bank, fit, phase))
        for bank in fit.banks
    ]
    return BanksSection(combined, tuple(charts), phase.crystal_system.name)


def _chart(bank: RefinedBank, fit: JointResult, phase: Phase) -> dict[str, object]:
    """Draw a bank on its measured points, with the reflections of the joint cell."""
    measured, instrument = bank.bank, bank.instrument
    (refined,) = fit.phases
    ends = float(measured.tof[0]), float(measured.tof[-1])
    reflections, _ = reflections_within(phase, refined.cell, instrument, ends)
    curves = Curves(measured.tof, measured.intensity, bank.calculated, bank.background)
    return draw_curves(curves, instrument, [reflections])

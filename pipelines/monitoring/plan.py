"""What a drift means for a model: other measurement effects, or another calibration."""

import json
import re
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq

from bragg_data.campaign import Campaign
from bragg_data.campaign_file import MeasurementEffects
from pipelines.monitoring.alarms import Alarm
from pipelines.monitoring.monitor import Observation
from pipelines.monitoring.signals import Training

# Smaller shifts come with broader peaks, or are within what a calibration is worth.
_LEAST_SHIFT = 1e-4
_PER_PHASE = 60  # draws of each phase, that are compared with what is observed
_REACH = 1.8  # logarithm of the largest factor on an effect that is looked for
_NAMES = "measurement_effects|nuisance"  # deprecated: the second
_TABLE = re.compile(rf"(?ms)^\[({_NAMES})\].*?(?=^\[|\Z)")


@dataclass(frozen=True, eq=False)
class Plan:
    """A changed campaign, from which a model is trained that fits the present profiles."""

    campaign: Campaign
    changes: tuple[str, ...]  # sentences; empty if no effect explains the alarms
    since: int  # first answer of the present state
    difc_factor: float = 1.0


def plan_of(seen: Observation) -> Plan:
    """Return what to change, by the alarms of an observation.

    A common shift of known cells is that of difC. Widths and backgrounds are compared with draws of
    scaled measurement effects, until these differ from the training's draws as the present profiles
    differ from earlier ones.
    """
    campaign = seen.predictor.campaign
    effects, changes, factor = campaign.measurement_effects, [], 1.0
    alarms: dict[str, Alarm] = {}
    for alarm in sorted(seen.alarms, key=lambda a: a.kind):  # changes before what is outside
        alarms.setdefault(alarm.signal, alarm)
    shift = alarms.get("calibration")
    if shift is not None and abs(shift.size) >= _LEAST_SHIFT:
        factor = float(np.exp(shift.size))
        difc = campaign.instrument.difc
        changes.append(f"difC from {difc:.2f} to {factor * difc:.2f} µs/Å ({shift.size:+.2e})")
        campaign = replace(campaign, instprm=with_difc(campaign.instprm, factor))
    training = replace(seen.training, per_phase=_PER_PHASE)
    for name in ("width", "background"):
        if name in alarms:
            scale = _scale(training, effects, name, alarms[name].size)
            effects = scaled(effects, name, scale)
            changed = ("size", "microstrain") if name == "width" else ("background",)
            ranges = (f"{n} {_range(getattr(effects, n))}" for n in changed)
            changes.append(f"measurement effects {', '.join(ranges)} (factor {scale:.2f})")
    toml = campaign.toml if effects == campaign.measurement_effects else _text(campaign, effects)
    since = min((a.since for a in alarms.values()), default=0)
    return Plan(replace(campaign, toml=toml), tuple(changes), since, factor)


def scaled(effects: MeasurementEffects, name: str, factor: float) -> MeasurementEffects:
    """Return effects of which a signal's are scaled: of broader peaks strain and inverse size."""
    factors = {"background": factor}
    if name == "width":
        factors = {"microstrain": factor, "size": 1 / factor}
    update = {n: tuple(f * end for end in getattr(effects, n)) for n, f in factors.items()}
    return effects.model_copy(update=update)


def _scale(training: Training, effects: MeasurementEffects, name: str, size: float) -> float:
    """Return the factor on the effects with which a signal's logarithm changes by ``size``."""
    usual = np.nanmean(training.logs(effects)[name])

    def excess(log_factor: float) -> float:
        drawn = training.logs(scaled(effects, name, float(np.exp(log_factor))))
        return float(np.nanmean(drawn[name]) - usual - size)

    low, high = (0.0, _REACH) if size > 0 else (-_REACH, 0.0)
    if excess(high) < 0:
        return float(np.exp(high))
    if excess(low) > 0:
        return float(np.exp(low))
    return float(np.exp(brentq(excess, low, high, xtol=0.03)))


def with_difc(instprm: str, factor: float) -> str:
    """Return the text of a GSAS-II instrument file with its difC times a factor."""
    return re.sub(
        r"(?m)^(difC\s*:\s*)([-+.\deE]+)",
        lambda match: f"{match[1]}{float(match[2]) * factor:.6f}",
        instprm,
    )


def _text(campaign: Campaign, effects: MeasurementEffects) -> str:
    """Return the campaign file with other measurement effects."""
    values = {name: value for name, value in effects.to_json().items() if value is not None}
    lines = (f"{name} = {json.dumps(value)}" for name, value in values.items())
    return (
        _TABLE.sub("", campaign.toml).rstrip()
        + "\n\n[measurement_effects]\n"
        + "\n".join([*lines, ""])
    )


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3g} to {ends[1]:.3g}"

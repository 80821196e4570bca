"""Alarms on signals whose changes are known."""

from collections.abc import Mapping
from typing import cast

import numpy as np
import pytest

from pipelines.cli.options import WatchOptions
from pipelines.monitoring.alarms import find_alarms
from pipelines.monitoring.signals import Signals
from pipelines.recording.record import RecordedAnswer

N, CHANGE = 250, 200
USUAL = WatchOptions()


def signals(seed: int = 0, **changes: float) -> Signals:
    """Signals of which some change after 200 answers, by so much."""
    rng = np.random.default_rng(seed)
    later = np.arange(N) >= CHANGE
    logs = {
        name: rng.normal(0, 0.5, N) + changes.get(name, 0.0) * later
        for name in ("width", "background")
    }
    su = rng.uniform(1e-4, 3e-4, N)
    shift = rng.normal(0, su) + changes.get("calibration", 0.0) * later
    rejected = rng.random(N) < np.where(later, changes.get("rejections", 0.015), 0.015)
    answers = [RecordedAnswer(f"r{k}", 0, 0.0, "", "", "", "{}", "{}", 0.0) for k in range(N)]
    return Signals(answers, logs, (~rejected).astype(float), shift, su)


def training(seed: int = 7) -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.5, 600) for name in ("width", "background")}


@pytest.mark.parametrize(
    ("signal", "size"),
    [("calibration", 3e-4), ("calibration", -3e-4), ("width", 0.6), ("background", -0.6)],
)
def test_a_shift_is_noticed_with_its_size_and_begin(signal: str, size: float) -> None:
    alarms, _ = find_alarms(signals(**{signal: size}), training(), USUAL)
    (alarm,) = [alarm for alarm in alarms if alarm.kind == "change"]
    assert (alarm.signal, alarm.sign) == (signal, np.sign(size))
    assert CHANGE - 10 <= alarm.since <= CHANGE + 10
    assert CHANGE <= alarm.at < CHANGE + 50
    assert alarm.size == pytest.approx(size, rel=0.35)
    assert alarm.id == f"r{alarm.at}-0"


def test_rejections_are_noticed_and_what_the_model_rejects_anyway_is_not() -> None:
    (alarm,), _ = find_alarms(signals(rejections=0.5), training(), USUAL)
    assert (alarm.signal, alarm.size) == ("rejections", pytest.approx(0.5, abs=0.2))
    alarms, _ = find_alarms(signals(rejections=0.1), training(), USUAL, rejected=0.1)
    assert alarms == []


def test_profiles_outside_the_training_are_noticed_from_the_first() -> None:
    normal = signals()
    above = {**normal.logs, "background": normal.logs["background"] + 1.5}
    beyond = Signals(normal.answers, above, normal.accepted, normal.shift, normal.shift_su)
    (alarm,), _ = find_alarms(beyond, training(), USUAL)
    assert (alarm.signal, alarm.kind) == ("background", "outside")
    assert alarm.at < 30
    below = {**normal.logs, "background": normal.logs["background"] - 1.5}
    beyond = Signals(normal.answers, below, normal.accepted, normal.shift, normal.shift_su)
    assert find_alarms(beyond, training(), USUAL)[0] == []


def test_undisturbed_answers_raise_no_alarm() -> None:
    """At a rate of 1e-4 one of 40 series of 250 answers may, on the average."""
    counts = [len(find_alarms(signals(seed), training(seed), USUAL)[0]) for seed in range(40)]
    assert sum(counts) <= 3


def test_unknown_values_count_for_nothing() -> None:
    nothing = np.full(N, np.nan)
    answers = cast("list[RecordedAnswer]", [None] * N)
    unknown = Signals(answers, dict.fromkeys(("width", "background"), nothing), *[nothing] * 3)
    alarms, sums = find_alarms(unknown, training(), USUAL)
    assert alarms == []
    assert all((of.values == 0).all() for of in sums)

"""One look at a record of answers: its signals, the training's limits, and alarms."""

import ipaddress
import json
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from bragg_data.arrays import Array
from bragg_data.errors import first_line
from bragg_models.predictors import Predictor
from catalog import registry
from catalog.registry import ModelVersion
from catalog.tracking import Tracking
from pipelines.cli.options import WatchOptions
from pipelines.monitoring.alarms import Alarm, Sum, find_alarms
from pipelines.monitoring.signals import (
    WATCHED,
    MonitorError,
    Signals,
    Training,
    read_known_cells,
    signals_of,
)
from pipelines.recording.record import Record
from pipelines.registry.registration import load_version
from pipelines.training.expectation import EXPECTED

_WEBHOOK_SECONDS = 10.0
_LATELY = slice(-50, None)  # answers


@dataclass(frozen=True, eq=False)
class Observation:
    """The state of a model's answers."""

    version: ModelVersion
    predictor: Predictor
    signals: Signals
    training: Training
    draws: Mapping[str, Array]  # logarithms of the training's draws, by signal
    alarms: list[Alarm]
    sums: list[Sum]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return signal, number of answers that show it, its value lately, and what is usual."""
        s, rows = self.signals, []
        judged = s.accepted[np.isfinite(s.accepted)]
        if len(judged):
            share, usual = 1 - judged[_LATELY].mean(), _rejections(self.predictor)
            rows.append(("rejections", f"{len(judged):,}", f"{share:.1%}", f"{usual:.1%}"))
        known = np.isfinite(s.shift)
        if known.any():
            weights = s.shift_su[known][_LATELY] ** -2.0
            shift = np.average(s.shift[known][_LATELY], weights=weights)
            text = f"{shift:+.1e} ± {weights.sum() ** -0.5:.0e}"
            rows.append(("calibration", f"{known.sum():,}", text, "0"))
        for name in WATCHED:
            log = s.logs[name][np.isfinite(s.logs[name])]
            if len(log):
                low, high = np.exp(np.nanquantile(self.draws[name], (0.025, 0.975)))
                usual_range = f"{low:.3g} to {high:.3g} in the training"
                value = np.exp(np.median(log[_LATELY]))
                rows.append((name, f"{len(log):,}", f"{value:.3g}", usual_range))
        return rows

    def to_json(self) -> Mapping[str, object]:
        """Return plain JSON values: alarms and the state of each signal."""
        names = ("signal", "answers", "lately", "usual")
        return {
            "model": self.version.uri,
            "answers": len(self.signals),
            "alarms": [dict(alarm.to_json()) for alarm in self.alarms],
            "signals": [dict(zip(names, row, strict=True)) for row in self.rows()],
        }


def _rejections(predictor: Predictor) -> float:
    """Return the share of genuine profiles that a model rejected in its test."""
    expected = predictor.provenance.facts.get(EXPECTED)
    return 0.0 if expected is None else 1 - float(expected["accepted"])


def observe(
    record: Record, tracking: Tracking | None, model: str | None, watching: WatchOptions
) -> Observation:
    """Look for drift in the answers of a model, by default that of the newest answer.

    Raises `MonitorError` without answers, and the errors of a model that cannot be loaded.
    """
    known = None if watching.known is None else read_known_cells(watching.known)
    model, signals = signals_of(record, model, known or {})
    version = registry.find_or_packaged(tracking, model)
    predictor = load_version("" if tracking is None else tracking.uri, version)
    training = Training.of(predictor.campaign)
    draws = training.logs()
    alarms, sums = find_alarms(signals, draws, watching, rejected=_rejections(predictor))
    return Observation(version, predictor, signals, training, draws, alarms, sums)


def check_webhook(address: str, allowed: str | None) -> None:
    """Raise a `MonitorError` unless a webhook is on this machine, or its host was allowed."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise MonitorError(f"{address} is no address of a webhook: http://HOST:PORT/PATH.")
    try:
        local = ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        local = parts.hostname == "localhost"
    if not local and parts.hostname != allowed:
        raise MonitorError(
            f"{parts.hostname} is another machine: allow it with --webhook-host {parts.hostname}."
        )


def send_alarms(address: str, observation: Observation, folder: Path) -> None:
    """Post alarms as JSON; no profile and no answer is sent. Raises `MonitorError` on failure."""
    body = json.dumps({"record": str(folder), **observation.to_json()}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=_WEBHOOK_SECONDS).close()
    except OSError as error:
        raise MonitorError(f"The webhook {address} failed: {first_line(error)}.") from error

"""bragg monitor and bragg react --dry-run on records with a known history."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bragg_data.campaign import Campaign
from bragg_data.campaign_file import parse_campaign_file
from bragg_data.instrument.instprm import read_instrument
from pipelines import monitor, react
from pipelines.monitoring.monitor import check_webhook
from pipelines.monitoring.plan import _text, scaled, with_difc
from pipelines.monitoring.signals import MonitorError, Training, read_known_cells
from pipelines.recording.record import Exchange, Record

MODEL = "packaged:batio3-nomad"


def history(
    folder: Path, *, background: float = 0.0, shift: float = 0.0, rejected: float = 0.01
) -> Path:
    """A record of 160 answers, and of 50 after a change of log background, lengths, rejections."""
    rng = np.random.default_rng(3)
    record = Record(folder, create=True)
    exchanges = []
    for k in range(210):
        late = k >= 160
        statistics = {
            "width": float(np.exp(rng.normal(np.log(6.3e-3), 0.1))),
            "background": float(np.exp(rng.normal(np.log(0.07), 0.8) + background * late)),
            "accepted": float(rng.random() >= (rejected if late else 0.01)),
        }
        a = 4.0 * (1 + rng.normal(0, 1e-4) + shift * late)
        half = 1.645 * 4.0e-4
        answer = {
            "file": f"sample-{k}.xye",
            "model": MODEL,
            "accepted": statistics["accepted"] > 0,
            "cell": {"a": a},
            "intervals": {"a": [a - half, a + half]},
        }
        exchanges.append(
            Exchange(f"r{k}", "/predict", b"", {"model": MODEL}, [answer], [statistics], [""])
        )
    record.write(exchanges)
    record.close()
    (folder / "known.csv").write_text("file,a\nsample-*.xye,4.0\n")
    return folder


def run(app: Any, folder: Path, *words: str) -> tuple[int, Any]:
    arguments = ["--record", str(folder), "--known", str(folder / "known.csv"), "--json", *words]
    result = CliRunner().invoke(app, [*arguments, "--tracking", "sqlite:///nowhere.db"])
    assert result.stdout, result.output
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def webhook() -> Any:
    """The address of a server, and what was posted to it."""
    posted: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/alarm", posted
    server.shutdown()
    server.server_close()


def test_alarms_are_an_exit_code_a_page_and_a_message(
    tmp_path: Path, webhook: tuple[str, list[Any]]
) -> None:
    address, posted = webhook
    folder, page = history(tmp_path / "record", background=1.1, shift=3e-4), tmp_path / "page.html"
    code, seen = run(monitor.app, folder, "--webhook", address, "--page", str(page))
    assert (code, seen["model"], seen["answers"]) == (1, MODEL, 210)
    assert {alarm["signal"] for alarm in seen["alarms"]} == {"calibration", "background"}
    (message,) = posted
    assert message["alarms"] == seen["alarms"]
    assert message["record"] == str(folder)
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == 4
    assert "http" not in html.replace("http-equiv", "")  # it loads nothing from anywhere
    code, plan = run(react.app, folder, "--dry-run")
    assert (code, plan["promoted"], plan["candidate"]) == (0, False, None)
    assert plan["changes"][0].startswith("difC from 9496.17 to 949")
    assert plan["changes"][1].startswith("measurement effects background 0.0")


def test_nothing_is_done_without_an_alarm(tmp_path: Path, webhook: tuple[str, list[Any]]) -> None:
    address, posted = webhook
    folder = history(tmp_path / "record")
    code, seen = run(monitor.app, folder, "--webhook", address)
    assert (code, seen["alarms"], posted) == (0, [], [])
    code, reaction = run(react.app, folder)
    assert (code, reaction["alarms"], reaction["changes"]) == (0, [], [])


def test_another_sample_is_nothing_to_train_for(tmp_path: Path) -> None:
    folder = history(tmp_path / "record", rejected=0.95)
    code, reaction = run(react.app, folder)
    assert (code, reaction["promoted"], reaction["changes"]) == (1, False, [])
    assert "another sample" in reaction["objections"][0]


def test_a_webhook_stays_on_this_machine_unless_its_host_is_allowed() -> None:
    for address in ("http://localhost:1/x", "http://127.0.0.1/x", "http://[::1]:9/x"):
        check_webhook(address, None)
    check_webhook("https://example.org/x", "example.org")
    with pytest.raises(MonitorError, match=r"--webhook-host example\.org"):
        check_webhook("https://example.org/x", None)
    with pytest.raises(MonitorError, match="no address"):
        check_webhook("file:///etc/passwd", None)


def test_known_cells_need_a_length(tmp_path: Path) -> None:
    file = tmp_path / "known.csv"
    file.write_text("file,a,c\nsi_*,5.431,\n")
    assert read_known_cells(file) == {"si_*": {"a": 5.431}}
    file.write_text("name\nsi\n")
    with pytest.raises(MonitorError, match="file, a"):
        read_known_cells(file)


def test_a_changed_campaign_has_the_new_effects_and_difc_alone(small_campaign: Campaign) -> None:
    effects = scaled(scaled(small_campaign.measurement_effects, "width", 2.0), "background", 3.0)
    before, after = (
        parse_campaign_file(small_campaign.toml),
        parse_campaign_file(_text(small_campaign, effects)),
    )
    assert after.measurement_effects.microstrain == (500.0, 6000.0)
    assert after.measurement_effects.size == (0.15, 1.5)
    assert after.measurement_effects.background == pytest.approx((0.03, 1.5))
    assert after.phases == before.phases
    changed = read_instrument(with_difc(small_campaign.instprm, 1 + 3e-4))
    assert changed.difc == pytest.approx(small_campaign.instrument.difc * (1 + 3e-4), rel=1e-9)
    assert changed.tzero == small_campaign.instrument.tzero


def test_draws_of_a_higher_background_show_it(small_campaign: Campaign) -> None:
    training = Training.of(small_campaign, 40)
    effects = scaled(small_campaign.measurement_effects, "background", 3.0)
    change = training.logs(effects)["background"] - training.logs()["background"]
    assert np.nanmedian(change) == pytest.approx(np.log(3), abs=0.1)

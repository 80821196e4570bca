"""Promotion and lineage: decided by a gate, recorded, undone; and where a model comes from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from bragg_models.metrics import calibration_error
from catalog import promotion, registry
from catalog.gate import Gate, VersionScores
from catalog.lineage import dot, trace
from catalog.promotion import PromotionError
from catalog.registry import ModelError
from pipelines import lineage, promote
from pipelines.evaluation.version_comparison import evaluation_rows

if TYPE_CHECKING:
    from tests.small_bench import Bench

GOOD = VersionScores(1e-6, 1.0, 0.01, 0.01, {"cubic": 1e-7})


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    certain = np.eye(3)[[0, 1, 2, 0]]
    assert calibration_error(certain, np.array([0, 1, 2, 0])) == 0
    assert calibration_error(certain, np.array([0, 1, 2, 1])) == 0.25
    half = np.tile([0.5, 0.3, 0.2], (10, 1))
    assert calibration_error(half, np.array([0] * 5 + [1] * 5)) == pytest.approx(0)
    assert calibration_error(half, np.zeros(10, dtype=int)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        ({"mse_paper": 1.1e-6}, "mse_paper is 1.1e-06, the champion's 1e-06"),
        ({"accuracy": 0.99}, "accuracy is 99"),
        ({"calibration_error": 0.03}, "calibration error is 0.0300"),
        ({"seconds": 0.06}, "60.0 ms for a prediction, and 50.0 ms are allowed"),
    ],
)
def test_the_gate_objects_to_what_is_worse(changes: dict[str, float], objection: str) -> None:
    gate = Gate()
    assert gate.objections(GOOD, GOOD) == []
    (found,) = gate.objections(replace(GOOD, **changes), GOOD)  # type: ignore[arg-type]
    assert objection in found
    better = VersionScores(1e-7, 1.0, 0.0, 0.02, {})
    assert gate.objections(better, GOOD) == []
    assert gate.objections(GOOD, None) == []
    # Slow is let through where the champion is slower still; a classifier has no cell to compare.
    slow = replace(GOOD, seconds=0.06)
    assert gate.objections(slow, replace(GOOD, seconds=0.07)) == []
    unknown = replace(GOOD, mse_paper=math.nan)
    assert gate.objections(unknown, unknown) == []


def ask(app: typer.Typer, bench: Bench, *arguments: str) -> tuple[int, str]:
    where = ["--tracking", bench.tracking.uri]
    result = CliRunner().invoke(app, [*arguments, *where], catch_exceptions=False)
    return result.exit_code, result.stdout


@pytest.fixture
def restored(everything: str, bench: Bench) -> Bench:
    """The champion is our network before and after each test."""
    assert everything
    ours = bench.versions("guided")[0]
    registry.set_alias(bench.tracking, ours, registry.CHAMPION)
    registry.set_alias(bench.tracking, bench.versions("forest")[0], promotion.PREVIOUS)
    return bench


def champion(bench: Bench) -> str:
    found = registry.champion(bench.tracking, "small")
    assert found is not None
    return found.tags["model"]


def test_training_promotes_a_model_with_a_lower_error(restored: Bench) -> None:
    candidate = registry.find(restored.tracking, "models:/small@candidate")
    assert candidate.tags["model"] == "multitask-integer"  # the last one
    ours = restored.versions("guided")[0]
    assert ours.tags["promoted_by"] == "gate passed"
    assert ours.tags["promotion_reason"] == "lower error on the same test samples"


def test_what_does_worse_is_not_promoted(restored: Bench) -> None:
    worse = restored.versions("multitask")[0]
    code, told = ask(promote.app, restored, "small", worse.version, "--samples", "100")
    assert code == 1
    assert "The gate objects" in told
    assert "the champion's" in told
    assert champion(restored) == "guided"
    runs = restored.tracking.client.search_runs(
        [restored.tracking.experiment("small")], "tags.`mlflow.source.name` = 'pipelines.promote'"
    )
    assert runs[0].data.params["candidate"] == worse.uri
    assert runs[0].data.metrics["test/candidate/accuracy"] <= 1
    assert "mse_paper is" in runs[0].data.tags["gate"]


def test_by_force_with_a_reason_and_back(restored: Bench) -> None:
    worse = restored.versions("multitask")[0]
    with pytest.raises(PromotionError, match="--reason"):
        ask(promote.app, restored, "small", worse.version, "--force")
    code, told = ask(
        promote.app, restored, "small", worse.version, "--force", "--reason", "a try", "--json",
        "--samples", "100",
    )  # fmt: skip
    assert code == 0
    found = json.loads(told)  # and nothing else
    assert (found["passed"], found["promoted"]) == (False, True)
    assert champion(restored) == "multitask"
    now = registry.find(restored.tracking, worse.uri)
    assert now.tags["promoted_by"] == "forced"
    assert now.tags["promotion_reason"] == "a try"
    assert registry.find(restored.tracking, "models:/small@previous").tags["model"] == "guided"
    code, told = ask(promote.app, restored, "small", "--rollback")
    assert code == 0
    assert "is the champion again" in told
    assert champion(restored) == "guided"
    assert registry.find(restored.tracking, "models:/small@previous").uri == worse.uri


def test_rollback_takes_no_version(restored: Bench) -> None:
    ours = restored.versions("guided")[0]
    with pytest.raises(PromotionError, match=rf"takes no VERSION.*promote small {ours.version}"):
        ask(promote.app, restored, "small", ours.version, "--rollback")
    assert champion(restored) == "guided"  # nothing was rolled back


def test_what_passes_is_promoted(restored: Bench) -> None:
    ours = restored.versions("guided")[0]
    ask(promote.app, restored, "small", restored.versions("caenn")[0].version, "--force",
        "--reason", "a try", "--samples", "100")  # fmt: skip
    code, told = ask(
        promote.app, restored, "small", ours.version, "--samples", "100", "--seconds", "5"
    )
    assert code == 0, told
    assert "is the champion" in told
    assert "--rollback" in told
    assert champion(restored) == "guided"
    _, told = ask(promote.app, restored, "small", ours.version)
    assert "nothing to do" in told


PROMOTE = """
import sys, time
from catalog import registry, promotion
from catalog.tracking import Tracking
tracking = Tracking(sys.argv[1])
version = registry.find(tracking, f"models:/small/{sys.argv[2]}")
time.sleep(max(0.0, float(sys.argv[4]) - time.time()))
try:
    promotion.promote(tracking, version, reason="a race", expected=sys.argv[3])
    print("promoted")
except promotion.PromotionError as error:
    print(error)
"""


def test_of_two_promotions_at_once_one_is_refused(restored: Bench) -> None:
    ours = restored.versions("guided")[0]
    rivals = [restored.versions(name)[0].version for name in ("forest", "caenn")]
    start = str(time.time() + 10)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, restored.tracking.uri, rival, ours.version, start],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )
        for rival in rivals
    ]  # fmt: skip
    told = [child.communicate()[0].strip() for child in children]
    assert sorted(text == "promoted" for text in told) == [False, True], told
    refused = next(text for text in told if text != "promoted")
    assert "somebody else promoted meanwhile" in refused
    winner = rivals[told.index("promoted")]
    now = registry.champion(restored.tracking, "small")
    assert now is not None
    assert now.version == winner
    assert registry.find(restored.tracking, "models:/small@previous").version == ours.version


def test_without_a_previous_one_there_is_no_way_back(bench: Bench, everything: str) -> None:
    assert everything
    with pytest.raises(PromotionError, match="no previous champion"):
        promotion.rollback(bench.tracking, "small-classifier", reason="")


def test_test_samples_of_one_are_not_asked_where_another_learnt_from_them(
    restored: Bench,
) -> None:
    dataset = restored.store.open("small-v1")
    one = restored.predictor("caenn")
    other = restored.predictor("multitask")
    rows = evaluation_rows(dataset, {"a": one, "b": other}, 100)
    assert rows.sum() == 100
    split = replace(other.provenance.split, seed=1)
    other = replace(other, provenance=replace(other.provenance, split=split))
    with pytest.raises(PromotionError, match="are test samples to all versions"):
        evaluation_rows(dataset, {"a": one, "b": other}, 142)


# ---- lineage -----------------------------------------------------------------------------------


def test_everything_is_recovered_from_the_alias_alone(restored: Bench) -> None:
    dataset = restored.store.open("small-v1")
    found = trace(restored.tracking, "models:/small@champion")
    assert found.version.tags["model"] == "guided"
    assert found.provenance.campaign_toml == dataset.attrs["campaign_toml"]
    assert found.provenance.data.snapshot_id == dataset.attrs["snapshot_id"]
    kinds = [node.kind for node in found.chain.walk()]
    assert kinds == ["model", "run", "view", "snapshot", "campaign", "structure", "structure",
                     "structure", "instrument"]  # fmt: skip
    forest = trace(restored.tracking, restored.versions("forest")[0].uri)
    assert restored.versions("classifier")[0].uri in [n.name for n in forest.chain.walk()]
    drawn = dot(forest.chain)
    assert drawn.startswith("digraph")
    assert drawn.count('label="snapshot small-v1"') == 1
    with pytest.raises(ModelError, match="Registered models"):
        trace(restored.tracking, "models:/nobody@champion")


def test_lineage_command(restored: Bench) -> None:
    code, told = ask(lineage.app, restored)
    assert code == 0
    for wanted in ("guided", "small-v1", "profile_sqrt_unit@1", "campaign small", "commit"):
        assert wanted in told
    _, toml = ask(lineage.app, restored, "models:/small@champion", "--campaign")
    assert toml.strip() == restored.store.open("small-v1").attrs["campaign_toml"].strip()
    _, plain = ask(lineage.app, restored, "--json")
    assert json.loads(plain)["kind"] == "model"
    _, graph = ask(lineage.app, restored, "--dot")
    assert "->" in graph

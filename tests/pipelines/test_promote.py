"""Promotion and lineage: decided by a gate, recorded, undone; and where a model comes from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from bragg_data.arrays import Array, Mask
from bragg_models.metrics import calibration_error
from catalog import registry
from catalog.gate import Gate, PairedScores, VersionScores
from catalog.lineage import Node, dot, trace
from catalog.registry import ModelError, PromotionError
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
    (objections,) = gate.objections(replace(GOOD, **changes), GOOD)  # type: ignore[arg-type]
    assert objection in objections
    better = VersionScores(1e-7, 1.0, 0.0, 0.02, {})
    assert gate.objections(better, GOOD) == []
    assert gate.objections(GOOD, None) == []
    # Slow is let through where the champion is slower still; a classifier has no cell to compare.
    slow = replace(GOOD, seconds=0.06)
    assert gate.objections(slow, replace(GOOD, seconds=0.07)) == []
    unknown = replace(GOOD, mse_paper=math.nan)
    assert gate.objections(unknown, unknown) == []


def judged(squared: Array, wrong: Mask) -> list[str]:
    """Ask the gate about a candidate and a champion, by what each of their profiles adds."""
    of_both = [
        replace(GOOD, mse_paper=float(s.mean()), accuracy=float(1 - w.mean()))
        for s, w in zip(squared, wrong, strict=True)
    ]
    return Gate().objections(*of_both, PairedScores(squared, wrong))


def test_the_gate_allows_for_chance_among_the_profiles() -> None:
    rng = np.random.default_rng(0)
    squared = np.tile(1e-7 * rng.chisquare(1, 900), (2, 1))
    wrong = np.zeros((2, 900), dtype=bool)
    wrong[:, :3] = True
    wrong[0, 3], squared[0, 3] = True, 1e-4  # one profile, which has most of the error
    assert squared[0].mean() > 1.5 * squared[1].mean()
    assert judged(squared, wrong) == []
    wrong[0, 3:12], squared[0, 3:12] = True, 1e-4  # nine of them
    error, accuracy = judged(squared, wrong)
    assert error.startswith("its mse_paper is 1.")
    assert accuracy.startswith("its accuracy is 98.6667%, the champion's 99.6667%")


def test_rare_disasters_and_cells_that_are_no_numbers_are_no_chance() -> None:
    squared, wrong = np.full((2, 900), 1e-7), np.zeros((2, 900), dtype=bool)
    squared[0, 0] = 1.0
    (error,) = judged(squared, wrong)
    assert error.startswith("its mse_paper is 0.00111")
    broken = replace(GOOD, mse_paper=math.inf)  # as comparisons score them
    (error,) = Gate().objections(broken, GOOD, PairedScores(np.full((2, 900), np.nan), wrong))
    assert error.startswith("its mse_paper is inf")
    assert Gate().objections(GOOD, GOOD, PairedScores(squared[:, 1:2], wrong[:, 1:2])) == []


def test_the_gate_refuses_what_is_worse_for_most_profiles() -> None:
    rng = np.random.default_rng(0)
    squared = np.tile(1e-7 * rng.chisquare(1, 900), (2, 1))
    wrong = np.zeros((2, 900), dtype=bool)
    squared[0] *= 1.05 * rng.uniform(0.8, 1.2, 900)  # by a little, but nearly everywhere
    (error,) = judged(squared, wrong)
    assert error.startswith("its mse_paper is 9.75e-08, the champion's 9.19e-08")
    # The mean of the champion's errors is that of one profile: it hides how the others are.
    squared[0], squared[1, 0] = 2 * squared[1], 1e-3
    squared[0, 0] = 5e-4
    (error,) = judged(squared, wrong)
    assert error.startswith("half of its squared errors are above")


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
    registry.set_alias(bench.tracking, bench.versions("forest")[0], registry.PREVIOUS)
    return bench


def champion(bench: Bench) -> str:
    version = registry.champion(bench.tracking, "small")
    assert version is not None
    return version.tags["model"]


def test_training_promotes_a_model_with_a_lower_error(restored: Bench) -> None:
    candidate = registry.find(restored.tracking, "models:/small@candidate")
    assert candidate.tags["model"] == "multitask-integer"  # the last one
    ours = restored.versions("guided")[0]
    assert ours.tags["promoted_by"] == "gate passed"
    assert ours.tags["promotion_reason"] == "lower error on the same test samples"


def test_what_does_worse_is_not_promoted(restored: Bench) -> None:
    worse = restored.versions("multitask")[0]
    code, output = ask(promote.app, restored, "small", worse.version, "--samples", "40")
    assert code == 1
    assert "The gate objects" in output
    assert "the champion's" in output
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
    code, output = ask(
        promote.app,
        restored,
        "small",
        worse.version,
        "--force",
        "--reason",
        "a try",
        "--json",
        "--samples",
        "40",
    )
    assert code == 0
    result = json.loads(output)  # and nothing else
    assert (result["passed"], result["promoted"]) == (False, True)
    assert champion(restored) == "multitask"
    now = registry.find(restored.tracking, worse.uri)
    assert now.tags["promoted_by"] == "forced"
    assert now.tags["promotion_reason"] == "a try"
    assert registry.find(restored.tracking, "models:/small@previous").tags["model"] == "guided"
    code, output = ask(promote.app, restored, "small", "--rollback")
    assert code == 0
    assert "is the champion again" in output
    assert champion(restored) == "guided"
    assert registry.find(restored.tracking, "models:/small@previous").uri == worse.uri


def test_rollback_takes_no_version(restored: Bench) -> None:
    ours = restored.versions("guided")[0]
    with pytest.raises(PromotionError, match=rf"takes no VERSION.*promote small {ours.version}"):
        ask(promote.app, restored, "small", ours.version, "--rollback")
    assert champion(restored) == "guided"  # nothing was rolled back


def test_what_passes_is_promoted(restored: Bench) -> None:
    ours = restored.versions("guided")[0]
    ask(
        promote.app,
        restored,
        "small",
        restored.versions("caenn")[0].version,
        "--force",
        "--reason",
        "a try",
        "--samples",
        "40",
    )
    code, output = ask(
        promote.app, restored, "small", ours.version, "--samples", "40", "--seconds", "5"
    )
    assert code == 0, output
    assert "is the champion" in output
    assert "--rollback" in output
    assert champion(restored) == "guided"
    _, output = ask(promote.app, restored, "small", ours.version)
    assert "nothing to do" in output


PROMOTE = """
import sys
from catalog import registry
from catalog.tracking import Tracking
tracking = Tracking(sys.argv[1])
version = registry.find(tracking, f"models:/small/{sys.argv[2]}")
print("ready", flush=True)
sys.stdin.readline()
try:
    registry.promote(tracking, version, reason="a race", expected=sys.argv[3])
    print("promoted")
except registry.PromotionError as error:
    print(error)
"""


def test_of_two_simultaneous_promotions_the_second_is_refused(restored: Bench) -> None:
    ours = restored.versions("guided")[0]
    rivals = [restored.versions(name)[0].version for name in ("forest", "caenn")]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, restored.tracking.uri, rival, ours.version],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rival in rivals
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    outcomes = [child.communicate()[0].strip() for child in children]
    assert sorted(text == "promoted" for text in outcomes) == [False, True], outcomes
    refused = next(text for text in outcomes if text != "promoted")
    assert "somebody else promoted meanwhile" in refused
    winner = rivals[outcomes.index("promoted")]
    now = registry.champion(restored.tracking, "small")
    assert now is not None
    assert now.version == winner
    assert registry.find(restored.tracking, "models:/small@previous").version == ours.version


def test_without_a_previous_champion_there_is_no_rollback(bench: Bench, everything: str) -> None:
    assert everything
    with pytest.raises(PromotionError, match="no previous champion"):
        registry.rollback(bench.tracking, "small-classifier", reason="")


def test_versions_are_compared_on_test_samples_of_all_of_them(restored: Bench) -> None:
    dataset = restored.store.open("small-v1")
    first = restored.predictor("caenn")
    other = restored.predictor("multitask")
    rows = evaluation_rows(dataset, {"a": first, "b": other}, 100)
    assert rows.sum() == 100
    split = replace(other.provenance.split, seed=1)
    other = replace(other, provenance=replace(other.provenance, split=split))
    with pytest.raises(PromotionError, match="are test samples to all versions"):
        evaluation_rows(dataset, {"a": first, "b": other}, 142)


# ---- lineage -----------------------------------------------------------------------------------


def walk(node: Node) -> Iterator[Node]:
    """Yield a link of a chain and all behind it."""
    yield node
    for source in node.sources:
        yield from walk(source)


def test_everything_is_recovered_from_the_alias_alone(restored: Bench) -> None:
    dataset = restored.store.open("small-v1")
    chain, provenance = trace(restored.tracking, "models:/small@champion")
    assert chain.name == registry.find(restored.tracking, "models:/small@champion").uri
    assert chain.facts["model"] == "guided"
    assert provenance.campaign_toml == dataset.attrs["campaign_toml"]
    assert provenance.data.snapshot_id == dataset.attrs["snapshot_id"]
    kinds = [node.kind for node in walk(chain)]
    assert kinds == [
        "model",
        "run",
        "view",
        "snapshot",
        "campaign",
        "structure",
        "structure",
        "structure",
        "instrument",
    ]
    forest, _ = trace(restored.tracking, restored.versions("forest")[0].uri)
    assert restored.versions("classifier")[0].uri in [n.name for n in walk(forest)]
    drawn = dot(forest)
    assert drawn.startswith("digraph")
    assert drawn.count('label="snapshot small-v1"') == 1
    with pytest.raises(ModelError, match="Registered models"):
        trace(restored.tracking, "models:/nobody@champion")


def test_lineage_command(restored: Bench) -> None:
    code, output = ask(lineage.app, restored)
    assert code == 0
    for expected in ("guided", "small-v1", "profile_sqrt_unit@1", "campaign small", "commit"):
        assert expected in output
    _, toml = ask(lineage.app, restored, "models:/small@champion", "--campaign")
    assert toml.strip() == restored.store.open("small-v1").attrs["campaign_toml"].strip()
    _, plain = ask(lineage.app, restored, "--json")
    assert json.loads(plain)["kind"] == "model"
    _, graph = ask(lineage.app, restored, "--dot")
    assert "->" in graph

"""A registry that is shared with other projects, and models registered by an earlier version."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from catalog import registry
from catalog.registry import CHAMPION, ModelError, ModelKind, RegistryEntry
from catalog.tracking import Tracking

FOREIGN = 120  # MLflow returns at most 100 registered models at a time


def add_version(
    tracking: Tracking,
    name: str,
    version_tags: Mapping[str, str],
    model_tags: Mapping[str, str] | None = None,
) -> registry.ModelVersion:
    """Register a version without files, and make it the champion."""
    client = tracking.client
    client.create_registered_model(name, tags=dict(model_tags or {}))
    source = f"file:///nowhere/{name}"
    entity = client.create_model_version(name, source=source, tags=dict(version_tags))
    version = registry.version_of(client, entity)
    registry.set_alias(tracking, version, CHAMPION)
    return version


@pytest.fixture
def shared(tmp_path: Path, tracking_in: Callable[[Path], Tracking]) -> Tracking:
    """A server with more models of other projects than fit on a page, some with versions."""
    tracking = tracking_in(tmp_path)
    for number in range(FOREIGN):
        tracking.client.create_registered_model(f"another-{number:03}")
    add_version(tracking, "churn-measured", {"team": "marketing"}, {"team": "marketing"})
    return tracking


def test_models_of_other_projects_do_not_count(shared: Tracking) -> None:
    with pytest.raises(ModelError, match=r"No model is registered .* yet\. Train one first"):
        registry.champion_uri(shared)
    entry = RegistryEntry("zircon", ModelKind.CELL, "zircon")
    add_version(shared, "zircon", {"test_set": "x"}, entry.tags)
    assert registry.names(shared) == ["zircon"]
    assert registry.champion_uri(shared) == "models:/zircon@champion"
    with pytest.raises(ModelError, match=r"Registered models: zircon\."):
        registry.find(shared, "models:/quartz@champion")


def test_more_models_than_fit_on_a_page_are_listed(
    tmp_path: Path, tracking_in: Callable[[Path], Tracking]
) -> None:
    tracking = tracking_in(tmp_path)
    for number in range(101):
        entry = RegistryEntry(f"campaign-{number:03}", ModelKind.CELL, f"campaign-{number:03}")
        tracking.client.create_registered_model(entry.name, tags=dict(entry.tags))
    assert len(registry.names(tracking)) == 101


def test_models_without_tags_are_known_by_their_versions(shared: Tracking) -> None:
    """As an earlier version of this project registered them."""
    for name in ("small", "small-classifier", "small-measured"):
        add_version(shared, name, {"test_set": "x", "mse_paper": "0.5"})
    kinds = {entry.name: (entry.kind, entry.campaign) for entry in registry.entries_of(shared)}
    assert kinds == {
        "small": (ModelKind.CELL, "small"),
        "small-classifier": (ModelKind.CLASSIFIER, "small"),
        "small-measured": (ModelKind.MEASURED, "small"),
    }
    assert registry.champion_uri(shared) == "models:/small-measured@champion"
    version = registry.find(shared, "models:/small-measured@champion")
    assert version.kind is ModelKind.MEASURED


def test_tags_and_not_names_say_what_a_model_predicts(shared: Tracking) -> None:
    names = {"alpha-measured": ModelKind.CELL, "beta": ModelKind.MEASURED}
    for name, kind in names.items():
        tags = RegistryEntry(name, kind, "small").tags
        add_version(shared, name, {"test_set": "x", registry.KIND_TAG: str(kind)}, tags)
    assert {e.name: e.kind for e in registry.entries_of(shared)} == names
    assert registry.champion_uri(shared) == "models:/beta@champion"
    version = registry.find(shared, "models:/alpha-measured@champion")
    assert version.kind is ModelKind.CELL


def test_all_versions_are_listed_the_newest_first(shared: Tracking) -> None:
    client = shared.client
    client.create_registered_model("many")
    for _ in range(3):
        client.create_model_version("many", source="file:///nowhere/many", tags={"test_set": "x"})
    assert [v.version for v in registry.versions(shared, "many")] == ["3", "2", "1"]
    with pytest.raises(ModelError, match="It has the versions 1, 2, 3"):
        registry.find(shared, "models:/many/9")
    pages = registry.pages(
        client.search_model_versions, filter_string="name = 'many'", max_results=2
    )
    assert len(list(pages)) == 3

"""The model registry: this project's registered models, their versions, and their promotion.

An MLflow server may be shared with other projects. A registered model of this project carries the
tags :data:`KIND_TAG` and :data:`CAMPAIGN_TAG`; models without them are left alone, unless an
earlier version of this project registered them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from bragg_data.errors import first_line
from bragg_data.files import lock_for, writable_cache
from catalog import packages
from catalog.database import problem_of
from catalog.lineage_events import LineageDataset, LineageRun
from catalog.tracking import Tracking, TrackingError

CHAMPION = "champion"  # alias of the version that predicts unless another is named
CANDIDATE = "candidate"  # alias of the newest version, which may become the champion
PREVIOUS = "previous"  # alias of the previous champion
# Tags of registered models: what a model predicts from what, and the campaign of its data.
KIND_TAG, CAMPAIGN_TAG = "bragg.kind", "bragg.campaign"

# How MLflow reports that something does not exist, and not that it cannot be read.
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_PACKAGED = "packaged"  # instead of a number, of a version that is a package

_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")

# deprecated: models that were registered without tags are known by a tag of their versions, and
# their kind by the end of their name.
_UNTAGGED = "tags.`test_set` LIKE '%'"


class ModelKind(StrEnum):
    """What a registered model predicts, and for which profiles."""

    CELL = "cell"  # phase and cell of profiles without noise and background
    CLASSIFIER = "classifier"  # phase alone
    MEASURED = "measured"  # phase and cell of measured profiles


_SUFFIXES = {ModelKind.CLASSIFIER: "-classifier", ModelKind.MEASURED: "-measured"}
_KINDS = {
    "classifier": ModelKind.CLASSIFIER,
    "robust": ModelKind.MEASURED,
    "search": ModelKind.MEASURED,
}


class ModelError(LookupError):
    """A registered model that does not exist, or that must not be loaded."""


class PromotionError(RuntimeError):
    """A promotion that is refused."""


@dataclass(frozen=True)
class RegistryEntry:
    """A registered model: what its versions have in common; the description is in Markdown."""

    name: str
    kind: ModelKind
    campaign: str
    description: str = ""

    @property
    def tags(self) -> Mapping[str, str]:
        """The tags by which it is recognised."""
        return {KIND_TAG: str(self.kind), CAMPAIGN_TAG: self.campaign}


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model."""

    name: str
    version: str
    run_id: str  # the run that trained it
    aliases: tuple[str, ...]
    tags: Mapping[str, str] = field(hash=False)  # by which versions are compared
    source: str  # where its files are

    @property
    def uri(self) -> str:
        """The address that always means this version."""
        if self.packaged:
            return f"{packages.PREFIX}{self.name}"
        return f"models:/{self.name}/{self.version}"

    @property
    def packaged(self) -> bool:
        """Whether it is a package, which is in no registry."""
        return self.version == _PACKAGED

    @property
    def kind(self) -> ModelKind:
        """What the model predicts."""
        tag = self.tags.get(KIND_TAG)
        return _kind_of_name(self.name) if tag is None else ModelKind(tag)


def kind_of(model: str) -> ModelKind:
    """Return what a model predicts, by the name of the model, such as ``guided``."""
    return _KINDS.get(model, ModelKind.CELL)


def registered_name(campaign: str, model: str) -> str:
    """Return the name that a model is registered under: one per campaign and kind."""
    return campaign + _SUFFIXES.get(kind_of(model), "")


def _kind_of_name(name: str) -> ModelKind:
    """Return the kind by a name's suffix; deprecated, for models that have no tags."""
    kinds = (kind for kind, suffix in _SUFFIXES.items() if name.endswith(suffix))
    return next(kinds, ModelKind.CELL)


def set_alias(tracking: Tracking, version: ModelVersion, alias: str) -> None:
    """Point an alias at a version; the alias is taken from the version that had it."""
    tracking.client.set_registered_model_alias(version.name, alias, version.version)


def find(tracking: Tracking, uri: str) -> ModelVersion:
    """Return the version that an address means now.

    Addresses are ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` and those of packages. Raises
    `ModelError` if one is malformed, or there is no such version, `PackageError` if there is no
    such package, and `TrackingError` if the database or server cannot be read.
    """
    if uri.startswith(packages.PREFIX):
        return packaged_version(uri.removeprefix(packages.PREFIX))
    match = _URI.fullmatch(uri)
    if match is None:
        raise ModelError(
            f"'{uri}' is no address of a registered model. Give models:/NAME@champion or "
            f"models:/NAME/VERSION."
        )
    client, name = tracking.client, match["name"]
    try:
        if match["alias"] is not None:
            return version_of(client, client.get_model_version_by_alias(name, match["alias"]))
        return version_of(client, client.get_model_version(name, match["version"]))
    except MlflowException as error:
        if error.error_code not in _MISSING:
            raise TrackingError(problem_of(first_line(error), tracking.uri)) from error
        if (numbers := _numbers(tracking, name)) and match["alias"] == CHAMPION:
            remedy = (
                f"It has no champion: that was deleted, or none was promoted. Promote a version "
                f"({', '.join(map(str, reversed(numbers)))}): python -m pipelines.promote {name} "
                f"{numbers[0]}"
            )
        elif numbers:
            remedy = f"It has the versions {', '.join(map(str, reversed(numbers)))}."
        elif name in names(tracking):
            remedy = (
                f"{name} has no versions: all of them were deleted. Restore a backup (python -m "
                f"pipelines.tracking_server restore), or train it again."
            )
        elif registered := names(tracking):
            remedy = f"Registered models: {', '.join(registered)}."
        else:
            remedy = "No model is registered there yet: train one with python -m pipelines.train."
        raise ModelError(f"Model {uri} is not in {tracking.uri}. {remedy}") from error


def packaged_version(name: str = packages.DEFAULT_PACKAGE) -> ModelVersion:
    """Return a packaged model as a version; raises `PackageError` if there is none of this name."""
    directory = packages.directory_of(name)
    manifest = packages.Manifest.read(directory)
    tags = {
        "model": manifest.model,
        "data": manifest.data.get("tag", ""),
        "content_hash": manifest.data.get("content_hash", ""),
        "trained_at": manifest.trained_at,
        "campaign": manifest.campaign,
    }
    return ModelVersion(name, _PACKAGED, manifest.run.get("id", ""), (), tags, str(directory))


def find_or_packaged(tracking: Tracking | None, uri: str | None) -> ModelVersion:
    """Return the version that predicts: that of an address, the champion, or the packaged model.

    The packaged model predicts where no model is named and none is the champion. ``tracking`` is
    None where there is no database. Raises as :func:`find` and :func:`champion_uri` do.
    """
    if uri is not None and uri.startswith(packages.PREFIX):
        return packaged_version(uri.removeprefix(packages.PREFIX))
    if tracking is None:
        if uri is not None:
            raise ModelError(
                f"Model {uri} is not registered: there is no MLflow database here. Name one with "
                f"--tracking, or train a model with python -m pipelines.train."
            )
        return packaged_version()
    if uri is not None:
        return find(tracking, uri)
    entry = _default_entry(tracking)
    return (entry and champion(tracking, entry.name)) or packaged_version()


def champion(tracking: Tracking, name: str) -> ModelVersion | None:
    """Return the champion of a registered model, if there is one."""
    try:
        return find(tracking, f"models:/{name}@{CHAMPION}")
    except ModelError:  # a database that does not answer is a TrackingError
        return None


def champion_uri(tracking: Tracking) -> str:
    """Return the address of the champion that predicts unless another model is named.

    Of a campaign with a champion for measured profiles, this one. Raises `ModelError` if there is
    no model, or there are models of several campaigns.
    """
    entry = _default_entry(tracking)
    if entry is None:
        raise ModelError(
            f"No model is registered in {tracking.uri} yet. Train one first: "
            f"python -m pipelines.train"
        )
    return f"models:/{entry.name}@{CHAMPION}"


def _default_entry(tracking: Tracking) -> RegistryEntry | None:
    """Return the registered model that predicts unless another is named; None without models."""
    entries = default_entries(tracking)
    if len(entries) > 1:
        raise ModelError(
            f"Several models are registered: {', '.join(e.name for e in entries)}. Name one, as in "
            f"--model models:/{entries[0].name}@champion"
        )
    return entries[0] if entries else None


def default_entries(tracking: Tracking) -> list[RegistryEntry]:
    """Return the model of each campaign that predicts, the one for measured profiles if any."""
    entries = [entry for entry in entries_of(tracking) if entry.kind is not ModelKind.CLASSIFIER]
    measured = {
        entry.campaign
        for entry in entries
        if entry.kind is ModelKind.MEASURED and champion(tracking, entry.name) is not None
    }
    return [e for e in entries if (e.kind is ModelKind.MEASURED) == (e.campaign in measured)]


def entries_of(tracking: Tracking) -> list[RegistryEntry]:
    """Return the registered models of this project, by name; not those of other projects."""
    models = list(pages(tracking.client.search_registered_models, max_results=1000))
    kinds = {model.name: (model.tags or {}).get(KIND_TAG) for model in models}
    entries = []
    earlier: set[str] = set()
    if any(kind not in set(ModelKind) for kind in kinds.values()):  # deprecated
        search = tracking.client.search_model_versions
        untagged = pages(search, filter_string=_UNTAGGED, max_results=1000)
        earlier = {version.name for version in untagged}
    for model in models:
        if kinds[model.name] in set(ModelKind):
            kind = ModelKind(model.tags[KIND_TAG])
            campaign = model.tags.get(CAMPAIGN_TAG, model.name)
        elif model.name in earlier:
            kind = _kind_of_name(model.name)
            campaign = model.name.removesuffix(_SUFFIXES.get(kind, ""))
        else:
            continue
        entries.append(RegistryEntry(model.name, kind, campaign, model.description or ""))
    return sorted(entries, key=lambda entry: entry.name)


def names(tracking: Tracking) -> list[str]:
    """Return the names of this project's registered models."""
    return [entry.name for entry in entries_of(tracking)]


def versions(tracking: Tracking, name: str) -> list[ModelVersion]:
    """Return the versions of a registered model, the newest first; none if it does not exist."""
    return [find(tracking, f"models:/{name}/{number}") for number in _numbers(tracking, name)]


def _numbers(tracking: Tracking, name: str) -> list[int]:
    """Return the numbers of a registered model's versions, the newest first."""
    entities = pages(tracking.client.search_model_versions, filter_string=f"name = '{name}'")
    return sorted((int(entity.version) for entity in entities), reverse=True)


def pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """Yield all results of one of the client's searches, which return a page at a time."""
    token = None
    while True:
        page = search(page_token=token, **arguments)
        yield from page
        token = page.token
        if not token:
            return


def version_of(client: MlflowClient, entity: Any) -> ModelVersion:
    """Return a version as this project describes it, from an entity of MLflow."""
    source = entity.source
    # A version that was copied in MLflow has no files: its source names the other version.
    while (copied := _URI.fullmatch(source)) is not None:
        source = client.get_model_version(copied["name"], copied["version"]).source
    number, run_id = str(entity.version), entity.run_id or ""
    aliases, tags = tuple(entity.aliases or ()), dict(entity.tags or {})
    return ModelVersion(entity.name, number, run_id, aliases, tags, source)


def lineage_of(tracking_uri: str, version: ModelVersion) -> LineageDataset:
    """Return a version as lineage events name it."""
    place = version.source if version.packaged else tracking_uri
    keys = ("model", "data", "content_hash", "score")
    facts = {key: version.tags[key] for key in keys if key in version.tags}
    return LineageDataset(place, version.name, version.version, facts)


def promote(
    tracking: Tracking,
    version: ModelVersion,
    *,
    reason: str,
    expected: str | None,
    forced: bool = False,
) -> None:
    """Make a version the champion; the one before becomes ``previous``.

    `reason` is recorded with the version, and whether the gate was `forced`. `expected` is the
    champion's number at the time of the decision, None if there was none: raises `PromotionError`
    if it is another one by now.
    """
    with _lock(tracking, version.name):
        present = champion(tracking, version.name)
        if (present.version if present else None) != expected:
            now = "gone" if present is None else f"version {present.version}"
            raise PromotionError(
                f"The champion of {version.name} was version {expected} at the time of the "
                f"decision, and it is {now} now: somebody else promoted meanwhile. Run the same "
                f"command again to compare with the present champion."
            )
        if present is None or present.version != version.version:
            how = "forced" if forced else "gate passed"
            _replace(tracking, present, version, how, reason)


def rollback(tracking: Tracking, name: str, *, reason: str) -> tuple[ModelVersion, ModelVersion]:
    """Make the previous champion the champion again; a second rollback undoes the first.

    Returns champion and previous as they are from now on; raises `PromotionError` if there is no
    previous champion.
    """
    with _lock(tracking, name):
        present = champion(tracking, name)
        try:
            before = find(tracking, f"models:/{name}@{PREVIOUS}")
        except ModelError as error:
            raise PromotionError(
                f"{name} has no previous champion to go back to. Promote a version by its number: "
                f"python -m pipelines.promote {name} VERSION"
            ) from error
        if present is None:
            raise PromotionError(f"{name} has no champion: there is nothing to undo.")
        _replace(tracking, present, before, "rollback", reason)
    return before, present


def _replace(
    tracking: Tracking, present: ModelVersion | None, version: ModelVersion, how: str, reason: str
) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"promoted_at": now, "promoted_by": how, "promotion_reason": reason}
    candidate = lineage_of(tracking.uri, version)
    promoted = replace(candidate, name=f"{version.name}@{CHAMPION}", facts=facts)
    with LineageRun(f"promote.{version.name}", [candidate], [promoted]):
        # In this order: if the process dies in between, the champion is unchanged and both exist.
        if present is not None:
            set_alias(tracking, present, PREVIOUS)
        set_alias(tracking, version, CHAMPION)
        for key, value in facts.items():
            tracking.client.set_model_version_tag(version.name, version.version, key, value)


def _lock(tracking: Tracking, name: str) -> AbstractContextManager[object]:
    """Return the lock of a name's aliases, next to the database or in the user's cache.

    Decisions of different users through one server are distinguished by the expected champion.
    """
    key = sha256(f"{tracking.uri} {name}".encode()).hexdigest()[:16]
    if tracking.database is not None:
        return lock_for(tracking.database.with_name(f".promotion-{key}"))
    cache = writable_cache()
    return nullcontext() if cache is None else lock_for(cache / f"promotion-{key}")

"""Lineage: from a registered model back to the atoms and the instrument it was trained on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bragg_data.errors import first_line
from bragg_data.growth import growths_of
from bragg_data.model_provenance import ModelProvenance
from catalog import packages, registry
from catalog.model_files import read_model_json
from catalog.tracking import Tracking
from catalog.views import VIEWS


@dataclass(frozen=True)
class Node:
    """A link of the chain: its kind, its name, facts about it, and the links behind it."""

    kind: str
    name: str
    facts: Mapping[str, str]
    sources: tuple["Node", ...] = ()

    def to_json(self) -> Mapping[str, Any]:
        """Return plain JSON values."""
        sources = [node.to_json() for node in self.sources]
        return {"kind": self.kind, "name": self.name, **self.facts, "made_from": sources}


@dataclass(frozen=True)
class _TrainingRun:
    """What a link states about the run that trained a model."""

    id: str
    name: str
    packages: Mapping[str, str]  # versions by name
    additional: tuple[Node, ...] = ()  # snapshots besides the training data


def trace(tracking: Tracking, uri: str) -> tuple[Node, ModelProvenance]:
    """Follow a registered model back to where it comes from, by its address alone.

    Returns the chain of links (model, run, views, snapshots, campaign, structures, instrument) and
    the model's provenance; raises `ModelError` if there is no such model, or its files are gone or
    not of this project.
    """
    version = registry.find(tracking, uri)
    described = read_model_json(tracking.uri, version, "model.json")
    chain, provenance = _chain(version, described, _registered_run(tracking, version.run_id))
    models = provenance.classifier_uri, provenance.parent_uri
    built_on = [_traced_or_missing(tracking, uri) for uri in models if uri]
    chain = replace(chain, sources=(*chain.sources, *built_on))
    return chain, provenance


def _traced_or_missing(tracking: Tracking, uri: str) -> Node:
    """Return the chain of a model that another one was made from, which may have been deleted."""
    try:
        return trace(tracking, uri)[0]
    except registry.ModelError as error:
        return Node("model", uri, {"missing": first_line(error)})


def trace_package(name: str) -> tuple[Node, ModelProvenance]:
    """As :func:`trace` for a packaged model, from its manifest; raises `PackageError` too."""
    version = registry.packaged_version(name)
    directory = Path(version.source)
    packages.check_package(directory)
    manifest = packages.Manifest.read(directory)
    described = json.loads((directory / "model.json").read_text(encoding="utf-8"))
    run = _TrainingRun(manifest.run["id"], manifest.run["name"], manifest.environment)
    chain, provenance = _chain(version, described, run)
    facts = {**chain.facts, "packaged version": manifest.version, "command": manifest.command}
    return replace(chain, facts=facts), provenance


def _chain(
    version: registry.ModelVersion, described: Mapping[str, Any], run: _TrainingRun
) -> tuple[Node, ModelProvenance]:
    try:
        provenance = ModelProvenance.from_json(described["provenance"])
        preprocessing = str(described["preprocessing"])
    except (KeyError, TypeError, AttributeError) as error:
        raise registry.ModelError(
            f"The description of {version.uri} is damaged: {first_line(error)}. Train it again."
        ) from error
    if not provenance.campaign_toml:
        raise registry.ModelError(
            f"{version.uri} does not hold the campaign that it was trained on. Train it again."
        )
    view = VIEWS.get(preprocessing)
    definition = {"what": view.description, "definition": view.definition_hash} if view else {}
    sources: tuple[Node, ...] = (Node("view", preprocessing, definition, (_snapshot(provenance),)),)
    sources = (_run_node(run, provenance, sources),)
    score = provenance.score
    facts = {
        "aliases": ", ".join(version.aliases),
        "model": provenance.model,
        "score": "" if score is None else f"{score.name} {score.value:.3g}",
        "trained at": provenance.trained_at,
    }
    return Node("model", version.uri, _non_empty(facts), sources), provenance


def _registered_run(tracking: Tracking, run_id: str) -> _TrainingRun:
    run = tracking.client.get_run(run_id)
    versions = {
        key.removeprefix("version."): str(number)
        for key, number in sorted(run.data.tags.items())
        if key.startswith("version.")
    }
    additional = tuple(
        Node("snapshot", entry.dataset.name, {"id": entry.dataset.digest, "context": tag.value})
        for entry in run.inputs.dataset_inputs
        for tag in entry.tags
        if tag.value != "training"
    )
    return _TrainingRun(run_id, str(run.info.run_name), versions, additional)


def _run_node(run: _TrainingRun, provenance: ModelProvenance, sources: tuple[Node, ...]) -> Node:
    facts = {
        "id": run.id,
        "preset": provenance.preset,
        "seed": str(provenance.seed),
        "continues from": provenance.parent_uri or "",
        "split": ", ".join(f"{key} {value}" for key, value in provenance.split.to_json().items()),
        "commit": provenance.code_commit,
        "packages": ", ".join(f"{name} {number}" for name, number in run.packages.items()),
    }
    return Node("run", run.name, _non_empty(facts), (*sources, *run.additional))


def _snapshot(provenance: ModelProvenance) -> Node:
    parts = [Node("structure", name, _sha256(text)) for name, text in provenance.cifs.items()]
    parts.append(Node("instrument", "instprm", _sha256(provenance.instrument_instprm)))
    digest = _sha256(provenance.campaign_toml)
    data = provenance.data
    facts = {
        "id": data.snapshot_id,
        "content": data.content_hash,
        "store": data.uri,
        "simulator": f"{data.simulator} {data.simulator_version}",
        "commit": data.code_commit,
    }
    source = Node("campaign", provenance.campaign, digest, tuple(parts))
    growths = growths_of(data.growth)
    names = (*(growth.parent for growth in growths[1:]), data.tag) if growths else ()
    for name, growth in zip(names, growths, strict=True):
        if source.kind == "campaign":
            content = {"content": growth.parent_content_hash}
            source = Node("snapshot", growth.parent, content, (source,))
        source = Node("snapshot", name, growth.facts, (source,))
    if growths:
        return replace(source, facts={**source.facts, **_non_empty(facts)})
    return Node("snapshot", data.tag, _non_empty(facts), (source,))


def _sha256(text: str) -> dict[str, str]:
    return {"sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _non_empty(facts: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in facts.items() if value}


def dot(chain: Node) -> str:
    """Return a chain as a graph in the language of Graphviz, links that are the same only once."""
    lines = ["digraph lineage {", '  rankdir="LR"; node [shape=box, fontname="sans-serif"];']
    seen: dict[str, str] = {}

    def add(node: Node) -> str:
        key = f"{node.kind} {node.name}"
        if key not in seen:
            seen[key] = f"n{len(seen)}"
            label = key.replace("\\", "\\\\").replace('"', '\\"')
            lines.append(f'  {seen[key]} [label="{label}"];')
            lines.extend(f"  {add(source)} -> {seen[key]};" for source in node.sources)
        return seen[key]

    add(chain)
    return "\n".join([*lines, "}"])

"""Lineage: from a registered model back to the atoms and the instrument it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bragg_data.errors import first_line
from bragg_data.model_provenance import ModelProvenance
from catalog import registry
from catalog.model_files import read_model_json
from catalog.registry import ModelVersion
from catalog.tracking import Tracking
from catalog.views import VIEWS

DESCRIPTION = "model.json"
"""File of a model that holds its provenance."""


@dataclass(frozen=True)
class Node:
    """A link of the chain: its kind, its name, facts about it, and the links behind it."""

    kind: str
    name: str
    facts: Mapping[str, str]
    sources: tuple[Node, ...] = ()

    def walk(self) -> Iterator[Node]:
        """Yield this link and all behind it."""
        yield self
        for node in self.sources:
            yield from node.walk()

    def to_json(self) -> Mapping[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "name": self.name,
            **self.facts,
            "made_from": [node.to_json() for node in self.sources],
        }


@dataclass(frozen=True)
class Trace:
    """Where a registered model comes from.

    Attributes
    ----------
    version
        The model.
    provenance
        The campaign's texts, snapshot, split, preset, commit … as the model holds them.
    chain
        The same as links: model, run, views, snapshots, campaign, structures, instrument.
    """

    version: ModelVersion
    provenance: ModelProvenance
    chain: Node


def trace(tracking: Tracking, uri: str) -> Trace:
    """Follow a registered model back to where it comes from, by its address alone.

    Parameters
    ----------
    tracking
        Where it is registered.
    uri
        ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Raises
    ------
    ModelError
        If there is no such model, or its files are gone or not of this project.
    """
    version = registry.find(tracking, uri)
    described = read_model_json(tracking.uri, version, DESCRIPTION)
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
    chain = _model(tracking, version, preprocessing, provenance)
    return Trace(version, provenance, chain)


def _model(
    tracking: Tracking, version: ModelVersion, preprocessing: str, provenance: ModelProvenance
) -> Node:
    score = provenance.score
    facts = {
        "aliases": ", ".join(version.aliases),
        "model": provenance.model,
        "score": "" if score is None else f"{score.name} {score.value:.3g}",
        "trained at": provenance.trained_at,
    }
    sources = [_run(tracking, version, preprocessing, provenance)]
    if provenance.classifier_uri:
        sources.append(trace(tracking, provenance.classifier_uri).chain)
    return Node("model", version.uri, _non_empty(facts), tuple(sources))


def _run(
    tracking: Tracking, version: ModelVersion, preprocessing: str, provenance: ModelProvenance
) -> Node:
    run = tracking.client.get_run(version.run_id)
    split = provenance.split.to_json()
    versions = {
        key.removeprefix("version."): value
        for key, value in sorted(run.data.tags.items())
        if key.startswith("version.")
    }
    facts = {
        "id": version.run_id,
        "preset": provenance.preset,
        "seed": str(provenance.seed),
        "split": ", ".join(f"{key} {value}" for key, value in split.items()),
        "commit": provenance.code_commit,
        "packages": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    additional = tuple(
        Node("snapshot", entry.dataset.name, {"id": entry.dataset.digest, "context": tag.value})
        for entry in run.inputs.dataset_inputs
        for tag in entry.tags
        if tag.value != "training"
    )
    view = _view(preprocessing, provenance)
    return Node("run", run.info.run_name, _non_empty(facts), (view, *additional))


def _view(preprocessing: str, provenance: ModelProvenance) -> Node:
    view = VIEWS.get(preprocessing)
    facts = {"what": view.description, "definition": view.definition_hash} if view else {}
    return Node("view", preprocessing, facts, (_snapshot(provenance),))


def _snapshot(provenance: ModelProvenance) -> Node:
    data = provenance.data
    facts = {
        "id": data.snapshot_id,
        "content": data.content_hash,
        "store": data.uri,
        "simulator": f"{data.simulator} {data.simulator_version}",
        "commit": data.code_commit,
    }
    return Node("snapshot", data.tag, facts, (_campaign(provenance),))


def _campaign(provenance: ModelProvenance) -> Node:
    parts = [Node("structure", name, _sha256(text)) for name, text in provenance.cifs.items()]
    parts.append(Node("instrument", "instprm", _sha256(provenance.instrument_instprm)))
    return Node("campaign", provenance.campaign, _sha256(provenance.campaign_toml), tuple(parts))


def _sha256(text: str) -> dict[str, str]:
    return {"sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _non_empty(facts: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in facts.items() if value}


def dot(chain: Node) -> str:
    """Return a chain as a graph in the language of Graphviz, links that are the same only once."""
    lines = ["digraph lineage {", '  rankdir="LR"; node [shape=box, fontname="sans-serif"];']
    seen: dict[str, str] = {}

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def add(node: Node) -> str:
        key = f"{node.kind} {node.name}"
        if key not in seen:
            seen[key] = f"n{len(seen)}"
            lines.append(f"  {seen[key]} [label={quoted(key)}];")
            lines.extend(f"  {add(source)} -> {seen[key]};" for source in node.sources)
        return seen[key]

    add(chain)
    return "\n".join([*lines, "}"])

"""Lineage: from a registered model back to the atoms and the instrument it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from catalog import registry
from catalog.features import VIEWS
from catalog.registry import ModelVersion
from catalog.tracking import Tracking

DESCRIPTION = "model.json"
"""File of a model that tells where it comes from."""


@dataclass(frozen=True)
class Node:
    """A link of the chain: what it is, its name, facts about it, and what it was made from."""

    kind: str
    name: str
    facts: Mapping[str, str]
    made_from: tuple[Node, ...] = ()

    def walk(self) -> Iterator[Node]:
        """Yield this link and all behind it."""
        yield self
        for node in self.made_from:
            yield from node.walk()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "name": self.name,
            **self.facts,
            "made_from": [node.to_json() for node in self.made_from],
        }


@dataclass(frozen=True)
class Trace:
    """Where a registered model comes from.

    Attributes
    ----------
    version
        The model.
    provenance
        What it says of itself: the campaign's texts, snapshot, split, preset, commit …
    chain
        The same as links: model, run, views, snapshots, campaign, structures, instrument.
    """

    version: ModelVersion
    provenance: Mapping[str, Any]
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
    described = registry.description_of(tracking.uri, version, DESCRIPTION)
    try:
        provenance = described["provenance"]
        chain = _model(tracking, version, described, provenance)
    except (KeyError, TypeError) as error:
        raise registry.ModelError(
            f"{version.uri} does not tell where it comes from ({error} is missing). Train it again."
        ) from error
    return Trace(version, provenance, chain)


def _model(
    tracking: Tracking, version: ModelVersion, described: Mapping[str, Any], p: Mapping[str, Any]
) -> Node:
    score = p["score"]
    facts = {
        "aliases": ", ".join(version.aliases),
        "model": p["model"],
        "score": f"{score['name']} {score['value']:.3g}",
        "trained at": p["trained_at"],
    }
    behind = [_run(tracking, version, described, p)]
    classifier = p["order"].get("classifier")
    if classifier:
        behind.append(trace(tracking, classifier).chain)
    return Node("model", version.uri, _told(facts), tuple(behind))


def _run(
    tracking: Tracking, version: ModelVersion, described: Mapping[str, Any], p: Mapping[str, Any]
) -> Node:
    run = tracking.client.get_run(version.run_id)
    tags = run.data.tags
    facts = {
        "id": version.run_id,
        "preset": p["preset"],
        "seed": str(p["seed"]),
        "split": ", ".join(f"{key} {value}" for key, value in p["split"].items()),
        "commit": p["code_commit"],
        "packages": ", ".join(
            f"{key.removeprefix('version.')} {value}"
            for key, value in sorted(tags.items()) if key.startswith("version.")
        ),
    }  # fmt: skip
    beside = tuple(
        Node("snapshot", entry.dataset.name, {"id": entry.dataset.digest, "context": tag.value})
        for entry in run.inputs.dataset_inputs
        for tag in entry.tags
        if tag.value != "training"
    )
    return Node("run", run.info.run_name, _told(facts), (_view(described, p), *beside))


def _view(described: Mapping[str, Any], p: Mapping[str, Any]) -> Node:
    view = VIEWS.get(described["preprocessing"])
    facts = {"what": view.description, "definition": view.definition_hash} if view else {}
    return Node("view", described["preprocessing"], facts, (_snapshot(p),))


def _snapshot(p: Mapping[str, Any]) -> Node:
    data = p["data"]
    facts = {
        "id": data["snapshot_id"],
        "content": data["content_hash"],
        "store": data["uri"],
        "simulator": f"{data['simulator']} {data['simulator_version']}",
        "commit": data["code_commit"],
    }
    return Node("snapshot", data["tag"], facts, (_campaign(p),))


def _campaign(p: Mapping[str, Any]) -> Node:
    parts = [Node("structure", name, _sha256(text)) for name, text in p["cifs"].items()]
    parts.append(Node("instrument", "instprm", _sha256(p["instrument_instprm"])))
    return Node("campaign", p["campaign"], _sha256(p["campaign_toml"]), tuple(parts))


def _sha256(text: str) -> dict[str, str]:
    return {"sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _told(facts: Mapping[str, str]) -> dict[str, str]:
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
            lines.extend(f"  {add(behind)} -> {seen[key]};" for behind in node.made_from)
        return seen[key]

    add(chain)
    return "\n".join([*lines, "}"])

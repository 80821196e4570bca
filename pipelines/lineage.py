"""Print where a registered model comes from: run, views, snapshot, campaign, CIFs, instrument."""

from __future__ import annotations

import json
import shlex
from typing import Annotated

import typer
from rich.markup import escape
from rich.tree import Tree

from catalog import registry
from catalog.lineage import Node, dot, trace
from catalog.tracking import DEFAULT_TRACKING_URI, Tracking
from pipelines.cli.console import console, next_commands, run, say

app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="URI",
            help="models:/NAME@ALIAS or models:/NAME/VERSION; the only champion if left out.",
        ),
    ] = None,
    tracking: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
    ] = DEFAULT_TRACKING_URI,
    as_dot: Annotated[
        bool, typer.Option("--dot", help="Print a graph for Graphviz: … --dot | dot -Tsvg > x.svg")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    campaign: Annotated[
        bool, typer.Option("--campaign", help="Print the campaign file, and nothing else.")
    ] = False,
) -> None:
    """Print the whole chain behind a registered model, from its address alone.

    Nothing but the registry is asked: the model carries the campaign file, the CIFs and the
    instrument with it.
    """
    place = Tracking(tracking)
    found = trace(place, model or registry.champion_uri(place))
    if campaign:
        print(found.provenance.campaign_toml)
    elif as_dot:
        print(dot(found.chain))
    elif as_json:
        provenance = found.provenance
        texts = {
            "campaign_toml": provenance.campaign_toml,
            "cifs": provenance.cifs,
            "instrument_instprm": provenance.instrument_instprm,
        }
        print(json.dumps({**found.chain.to_json(), **texts}, indent=2, ensure_ascii=False))
    else:
        console.print(_tree(found.chain))
        given = "" if tracking == DEFAULT_TRACKING_URI else f" --tracking {shlex.quote(tracking)}"
        again = f"python -m pipelines.lineage {found.version.uri}{given}"
        next_commands(
            [
                (f"{again} --campaign", "the campaign file that made its data"),
                (f"{again} --dot", "the chain as a picture"),
            ]
        )
        say()


def _tree(node: Node, tree: Tree | None = None) -> Tree:
    label = f"[bold]{node.kind}[/] [cyan]{escape(node.name)}[/]"
    own = Tree(label) if tree is None else tree.add(label)
    for name, value in node.facts.items():
        own.add(f"[dim]{name}[/] {escape(value)}")
    for behind in node.made_from:
        _tree(behind, own)
    return own


if __name__ == "__main__":
    run(app)

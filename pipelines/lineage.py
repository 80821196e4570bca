"""Print where a registered model comes from: run, views, snapshot, campaign, CIFs, instrument."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from rich.tree import Tree
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, console, next_commands, print_json, run, say

if TYPE_CHECKING:
    from catalog.lineage import Node


def main(
    model: Annotated[
        str | None,
        Argument(
            metavar="URI", help="models:/NAME@ALIAS or /VERSION, packaged:NAME; or the champion."
        ),
    ] = None,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
    as_dot: Annotated[bool, Option("--dot", help="Print a graph for Graphviz's dot.")] = False,
    as_json: options.JsonOption = False,
    campaign: Annotated[bool, Option("--campaign", help="Print the campaign file alone.")] = False,
) -> None:
    """Print the whole chain behind a registered model, from its address alone.

    Only the registry is read: the model carries the campaign file, the CIFs and the instrument.
    """
    from catalog import packages, registry
    from catalog.lineage import dot, trace, trace_package
    from catalog.tracking import Tracking

    if model is not None and model.startswith(packages.PREFIX):
        chain, provenance = trace_package(model.removeprefix(packages.PREFIX))
    else:
        place = Tracking(tracking)
        chain, provenance = trace(place, model or registry.champion_uri(place))
    if campaign:
        print(provenance.campaign_toml)
    elif as_dot:
        print(dot(chain))
    elif as_json:
        names = ("campaign_toml", "cifs", "instrument_instprm")
        texts = {name: getattr(provenance, name) for name in names}
        print_json({**chain.to_json(), **texts})
    else:
        console.print(_tree(chain))
        lineage = "lineage", chain.name
        next_commands(
            (command_line(*lineage, "--campaign", tracking=tracking), "its campaign file"),
            (command_line(*lineage, "--dot", tracking=tracking), "the chain as a graph"),
        )
        say()


def _tree(node: Node, parent: Tree | None = None) -> Tree:
    label = f"[bold]{node.kind}[/] [cyan]{escape(node.name)}[/]"
    tree = Tree(label) if parent is None else parent.add(label)
    for name, value in node.facts.items():
        tree.add(f"[dim]{name}[/] {escape(value)}")
    for source in node.sources:
        _tree(source, tree)
    return tree


app = options.app_of(main)

if __name__ == "__main__":
    run(app)

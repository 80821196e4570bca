"""Show what changed between two tags: definition, samples, ranges, intensities."""

from typing import Annotated

from typer import Argument

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, print_json, run


def main(
    old: Annotated[str, Argument(metavar="TAG1", help="The older data set.")],
    new: Annotated[str, Argument(metavar="TAG2", help="The data set to compare with it.")],
    store: options.StoreOption = options.DEFAULT_URI,
    as_json: options.JsonOption = False,
) -> None:
    """Show what changed from a tagged data set to another, of the same campaign or not.

    Samples are the same if they have the same phase and cell. All labels are compared, but the
    intensities of a few hundred samples only; content hashes cover all intensities.
    """
    from bragg_data.store.diff import changes
    from bragg_data.store.repository import Store, storage_errors
    from pipelines.snapshots.tables import changes_to_json, print_changes

    repository = Store(store)
    first, second = repository.open(old), repository.open(new)
    with storage_errors(f"comparing '{old}' with '{new}'"):
        difference = changes(first, second)
    if as_json:
        print_json(changes_to_json(first, second, difference))
        return
    print_changes(first, second, difference)
    next_commands(
        (command_line("inspect", new, store=store), "its ranges and provenance"),
        (command_line("check", new, store=store), "check it before training on it"),
        (command_line("features", "stale", store=store), "views that newer tags outdate"),
    )


app = options.app_of(main)

if __name__ == "__main__":
    run(app)

"""Care of the registry: after its folder was moved, and hashes of its files."""

from pathlib import Path

import typer

from pipelines.cli import options
from pipelines.cli.console import run, say

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def _main() -> None:
    """Care of the registry: after its folder was moved, and hashes of its files."""


@app.command()
def relocate(tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI) -> None:
    """Correct the addresses in an sqlite database whose folder was moved or copied.

    Models are read without that; new runs of earlier experiments need it.
    """
    from catalog import database

    path = database.path_of(tracking)
    if path is None:
        raise database.DatabaseError(
            f"{tracking} is no sqlite database: the files of a server have no addresses that move."
        )
    count = database.relocate(path)
    say(f"{count:,} addresses corrected: the files are in {Path(path).parent / database.ARTIFACTS}")


@app.command("hashes")
def hashes_(tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI) -> None:
    """Record the hashes of model files that an earlier release registered without them."""
    from catalog import registry
    from catalog.model_files import record_hashes
    from catalog.tracking import Tracking

    opened = Tracking(tracking)
    versions = [v for name in registry.names(opened) for v in registry.versions(opened, name)]
    added = [version.uri for version in versions if record_hashes(opened, version)]
    say(f"Recorded for {len(added)} of {len(versions)} versions. {', '.join(added)}".rstrip())


if __name__ == "__main__":
    run(app)

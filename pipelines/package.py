"""Write a registered model into a folder that predicts without a registry, with its lineage."""

from pathlib import Path
from typing import Annotated

from rich.filesize import decimal
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, run, say


def main(
    model: Annotated[
        str | None, Argument(metavar="URI", help="models:/NAME@ALIAS or /VERSION; or the champion.")
    ] = None,
    *,
    out: Annotated[Path, Option(metavar="FOLDER", help="New folder; its name is the package's.")],
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
) -> None:
    """Write a registered model into a folder that predicts wherever this code is installed.

    The folder holds JSON and safetensors files, and package.json: their SHA-256 hashes, the
    version, data set, campaign, commit and packages that they come from, the scores on the held-out
    test, and this command. It predicts by --model packaged:./FOLDER; the one in
    bragg_models/pretrained is part of the installation, and predicts where no model is registered.
    """
    from catalog import registry
    from catalog.tracking import Tracking
    from pipelines.registry.packages import write_package

    place = Tracking(tracking)
    uri = model or registry.champion_uri(place)
    version = registry.find(place, uri)
    command = command_line("package", version.uri, "--out", out)
    manifest = write_package(place, version.uri, out, command)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(f"{version.uri} is packaged in {out}: {len(manifest.files)} files, {decimal(size)}")
    address = f"packaged:{out if out.is_absolute() else f'./{out}'}"
    next_commands(
        (command_line("predict", "FILE", "--model", address), "predict with it"),
        (command_line("lineage", address), "where it comes from"),
    )


app = options.app_of(main)

if __name__ == "__main__":
    run(app)

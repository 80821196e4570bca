"""Store measured profiles: as they were read, on a campaign's grid, and tagged."""

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, run, say


def main(
    files: Annotated[
        list[Path],
        Argument(metavar="FILE...", help="Profiles, and folders of them, as for predict."),
    ],
    into: Annotated[str, Option(metavar="NAME", help="Name of the measured data set.")],
    profile: options.ProfileOptions,
    labels: Annotated[
        Path | None,
        Option(
            metavar="CSV",
            help="Known cells: columns file, phase (or crystal_system), and free parameters.",
        ),
    ] = None,
    campaign: options.CampaignOption = options.DEFAULT_CAMPAIGN,
    store: options.StoreOption = options.DEFAULT_URI,
    tag: options.TagOption = None,
) -> None:
    """Put measured profiles into the versioned store, as a measured data set with a tag.

    Each profile is stored as it was read (group native/…), with its file's SHA-256, header and
    calibration, and resampled on the campaign's grid, with the same layout as simulated patterns:
    catalog.features.load("measured_aligned", dataset=TAG) is the input of a model.
    """
    from bragg_data.campaign import load_campaign
    from bragg_data.provenance import code_commit
    from bragg_data.store import measured
    from bragg_data.store.repository import Store
    from pipelines.prediction.files import find_profiles
    from pipelines.snapshots.tables import print_measurements, read_labels, read_measurements

    loaded = load_campaign(campaign)
    measurements = read_measurements(find_profiles(files), loaded, profile)
    rows = [] if labels is None else read_labels(labels)
    known = measured.labels_from(rows, measurements, loaded)
    dataset = measured.measured_dataset(into, loaded, measurements, known, code_commit())
    repository = Store(store, create=True)
    written = measured.write_measured(repository, dataset, measurements, tag)
    print_measurements(measured.measurement_records(dataset), measurements)
    say(f"Tag [bold]{written.name}[/], snapshot {written.snapshot_id}, in {escape(repository.uri)}")
    data = "--data", written.name
    materialise = command_line("features", "materialise", "measured_aligned", *data, store=store)
    next_commands(
        (materialise, "store the input of models"),
        (command_line("validate", *data, store=store), "compare models on it"),
        (command_line("inspect", written.name, store=store), "its contents"),
    )


app = options.app_of(main)

if __name__ == "__main__":
    run(app)

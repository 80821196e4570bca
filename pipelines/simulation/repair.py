"""Repairing data sets with the simulator that they were computed by."""

from collections.abc import Callable, Sequence

from bragg_data.arrays import Floats32
from bragg_data.campaign import Samples
from bragg_data.simulation import kinematic
from bragg_data.simulation.gsas2 import Gsas2Options
from bragg_data.store import repair
from bragg_data.store.care import give_up, outdated
from bragg_data.store.repository import Store
from pipelines.cli.console import Progress
from pipelines.simulation.simulators import SimulationError, recipe_of, simulate_samples


def repair_data_set(
    store: Store, name: str, gsas2: Gsas2Options, blocks: Sequence[int] | None = None
) -> str:
    """Repair a tagged data set, of which all blocks are read unless some are named.

    An unfinished one, named by its branch, begins again: whatever of it can be read needs no
    repair. Returns what was done, for a reader. Raises as :func:`bragg_data.store.repair.repair`
    and :func:`bragg_data.store.care.give_up` do, and `SimulationError` or `Gsas2Error` if the
    simulator that computed it is not installed.
    """
    if name in store.repository.list_branches():
        give_up(store, name)
        return f"[bold]{name}[/]: no blocks any more; its simulate command begins it again"
    definition = repair.definition_of(store, name)
    count = len(definition.samples)
    if blocks:
        count = sum(len(definition.samples_of(block)) for block in blocks)
    simulate = _simulator_of(definition, gsas2)
    with Progress(f"Repairing {name}", count, "patterns") as progress:
        advance = progress.advance
        done = repair.repair(store, name, simulate, blocks=blocks or None, on_block=advance)
    arrays = f", {', '.join(done.arrays)} written again" if done.arrays else ""
    new = ", new snapshot: materialise its feature views again" if done.rewritten else ""
    return (
        f"[bold]{name}[/]: {len(done.blocks)} blocks computed again{arrays}{new}\n"
        f"Content hash {definition.attrs['content_hash']}, as before"
    )


def migrate_data_sets(store: Store, gsas2: Gsas2Options, *, dry_run: bool) -> list[str]:
    """Write data sets of earlier versions as this one does; return their tags.

    Content hashes and tags stay. Raises as :func:`repair_data_set` does.
    """
    tags = [known.name for known in outdated(store)]
    for tag in () if dry_run else tags:
        definition = repair.definition_of(store, tag)
        simulate = _simulator_of(definition, gsas2)
        with Progress(f"Writing {tag}", len(definition.samples), "patterns") as progress:
            repair.rewrite(store, tag, simulate, on_block=progress.advance)
    return tags


def _simulator_of(
    definition: repair.Definition, gsas2: Gsas2Options
) -> Callable[[Samples], Floats32]:
    """Return the simulator of a data set, which is built when the first block needs it."""
    attrs = definition.attrs
    name, version = str(attrs["simulator"]), str(attrs["simulator_version"])
    options = gsas2._replace(call_path=attrs.get("call_path", gsas2.call_path))
    recipe = recipe_of(definition.campaign, name, version, options)

    def simulate(samples: Samples) -> Floats32:
        if name == "kinematic" and version != kinematic.VERSION:
            raise SimulationError(
                f"The blocks were computed by version {version} of the fast simulator, and "
                f"{kinematic.VERSION} is installed. Install the version of bragg that wrote them, "
                f"or restore the store from a copy."
            )
        return simulate_samples(recipe, samples)

    return simulate

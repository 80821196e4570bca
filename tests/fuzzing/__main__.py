"""Read damaged files and classify what comes of them.

    python -m tests.fuzzing [FORMAT ...] [--count 10000] [--seed 1] [--show silent]

A file of each format (`originals`) is damaged once to three times (`mutations`) and read:

same          the original's numbers
refused       the reader's own error, one sentence that names the file
warned        other numbers, and a warning that the original does not cause
valid         other numbers without a warning, of a file that nobody can know to be damaged (below)
SILENT        other numbers without a warning: a fault
TRACEBACK     any other exception, or 10 s of a processor and more: a fault

No more than 1 GiB of memory may be taken.

A damaged file is "valid" if a strict parser, which shares nothing with the reader, accepts it as
an exact file of its format, and takes from it the very numbers that the reader took. Strict means:
every count agrees with what it counts (channels, records, coefficients, banks, maps); times are
regular within 5 % of a step, and those of the binning; numbers are plain, in their columns, as
many in each row; names, keywords and units are exact, but for titles and comments that name no
value, and in any order where each line names what it has; standard deviations are the roots of the
counts if nine in ten are; in a CIF the operations are those of the symbol, and volume, formula,
Z, multiplicities and density agree with cell and atoms. What remains is a changed digit of
an independent number, a row removed at the end of a file without counts, or a part of several
complete banks. Header values (angle, difC) that are lost, not changed, are no numbers here: what
needs them asks for them.
"""

import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.fuzzing.formats import FORMATS, Format, same
from tests.fuzzing.mutations import mutated

SECONDS, BYTES = 10.0, 1 << 30
OUTCOMES = ("same", "refused", "warned", "valid", "SILENT", "TRACEBACK")


def outcome(form: Format, content: bytes, original: Sequence[object], path: Path) -> str:
    """Return what comes of a damaged file, with the fault's text behind a colon."""
    path.write_bytes(content)
    try:
        numbers, messages = form.read(path)
    except form.error as error:
        text = str(error)
        if str(path) not in text or not text.endswith(".") or "\n" in text:
            return f"TRACEBACK: message {text!r}"
        return "refused"
    except Exception:
        return "TRACEBACK: " + " | ".join(traceback.format_exc(limit=-2).splitlines()[1:])
    if same(numbers, original):
        return "same"
    if set(messages) - set(form.messages):
        return "warned"
    strict = form.strict(content)
    return "valid" if strict is not None and same(numbers, strict) else "SILENT"


def fuzz(form: Format, count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Return how many of ``count`` damaged files had each outcome, and the faults."""
    rng, path = random.Random(f"{seed} {form.name}"), folder / f"damaged{form.suffix}"
    counts: Counter[str] = Counter()
    faults = []
    for number in range(count):
        content, names = mutated(form.originals[number % len(form.originals)], rng)
        began = time.process_time()
        result = outcome(form, content, form.numbers[number % len(form.originals)], path)
        if (seconds := time.process_time() - began) > SECONDS:
            result = f"TRACEBACK: {seconds:.0f} s"
        counts[result.partition(":")[0]] += 1
        if result.startswith(("SILENT", "TRACEBACK")):
            faults.append(f"{form.name} {number} ({', '.join(names)}) {result}")
            if folder != Path(tempfile.gettempdir()):
                (folder / f"{form.name}_{number}{form.suffix}").write_bytes(content)
    return counts, faults


def main(
    formats: Annotated[list[str] | None, typer.Argument()] = None,
    count: int = 10_000,
    seed: int = 1,
    show: bool = False,
    keep: Path | None = None,
) -> None:
    """Read damaged files of some formats, or of all, and print what came of them."""
    warnings.simplefilter("ignore")
    table = Table("format", *OUTCOMES, title=f"{count} damaged files of each format, seed {seed}")
    folder = keep or Path(tempfile.gettempdir())
    folder.mkdir(exist_ok=True)
    failed = False
    for name in formats or list(FORMATS):
        counts, faults = fuzz(FORMATS[name](), count, seed, folder)
        failed |= bool(faults)
        table.add_row(name, *(str(counts[outcome]) for outcome in OUTCOMES))
        if show:
            print(*faults, sep="\n", flush=True)
    Console(width=110).print(table)
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{memory / 2**20:.0f} MiB")
    sys.exit(failed or memory > BYTES)


if __name__ == "__main__":
    typer.run(main)

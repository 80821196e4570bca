"""Series of frames, refined in parts that worker processes share, kept as they are finished.

A series is divided into chunks. First the frame at the beginning of each is refined on its own;
from these the errors of the banks' calibrations are known, which all frames have in common. Then
frame follows frame in each chunk. What is done does not depend on how many processes do it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from bragg_data.crystallography.structure import Phase
from bragg_data.errors import first_line
from bragg_data.files import write_whole
from bragg_data.instrument.instprm import InstrumentError, read_banks
from bragg_data.measurement.readers import ProfileError
from bragg_data.provenance import source_digest
from bragg_data.refinement.joint_refinement import JointOptions
from bragg_data.refinement.result import RefinementError
from bragg_data.refinement.series import EVERY, Neighbour, SeriesRefiner
from pipelines.cli.console import Progress
from pipelines.cli.options import ClusterOptions
from pipelines.cli.refinement_options import FrameOptions
from pipelines.refinement.events import Event, events
from pipelines.refinement.inputs import Request, Sample, read_samples, read_structures
from pipelines.refinement.result import JointRefinement, joint_refinement, to_json

_CHUNK, _FEW = 128, 8  # frames of a chunk of a long series; chunks of a short one
_LOCAL = 2 * EVERY  # frames that this process refines by itself, unless a cluster is named
_TRIES = 8  # frames from the beginning of a chunk, of which one has to be usable
_FAILURES = OSError, ProfileError, InstrumentError, RefinementError

_PLAIN = FrameOptions()
_WHERE_IT_FITS = ClusterOptions(cluster=None)  # this process for few frames

Record = dict[str, Any]
"""A frame as JSON: its ``result`` or null, and the ``reason`` why there is none."""


class FrameResult(NamedTuple):
    """A frame of a series; of one bank where banks are refined apart."""

    number: int  # from 0
    file: Path
    value: float
    result: JointRefinement | None  # None where the file cannot be used, for the reason
    reason: str = ""


@dataclass(frozen=True)
class SeriesOptions:
    """How a series is refined, and where.

    ``keep``: a folder where what is finished is kept; the same series goes on from there.
    """

    frame: FrameOptions = _PLAIN
    keep: Path | None = None
    cluster: ClusterOptions = _WHERE_IT_FITS
    quiet: bool = False


_AS_USUAL = SeriesOptions()


@dataclass(frozen=True)
class _Task:
    """What every worker has to know."""

    request: Request
    structures: tuple[str, ...]
    frame: FrameOptions


class _Result(NamedTuple):
    """What a part of a series gives, in JSON values."""

    records: list[Any]
    neighbour: Record | None  # what the next part has to know of it
    lasting: bool = True  # not where a file could not be read, which may be so now alone


class _Start(NamedTuple):
    """A frame that was refined on its own."""

    offsets: list[tuple[int, float, float]]  # number of a bank, error of its difC, that one's su
    neighbour: Record | None  # None where none of the tried frames can be used


def refine_series(
    request: Request,
    structures: Sequence[str],
    values: Sequence[float],
    options: SeriesOptions = _AS_USUAL,
) -> tuple[list[FrameResult], list[Event]]:
    """Refine each file of a request as a frame of a series; return the frames, and what happens.

    A file that cannot be read or refined is a frame without a result. Errors of structures and of
    the instrument file are raised, and a ProfileError where no frame can be used.
    """
    cans = request.cans or ()
    read_structures(request.with_cans(structures))
    read_banks(request.instrument)  # whose errors are no frame's
    files = tuple(file.absolute() for file in request.files)
    absolute = replace(
        request,
        files=files,
        instrument=request.instrument.absolute(),
        calibration=request.calibration and request.calibration.absolute(),
        cans=tuple(str(Path(can).absolute()) for can in cans),
    )
    of_structures = tuple(str(Path(name).absolute()) for name in structures)
    requests = [absolute]
    if options.frame.apart:
        numbers = _banks_of(absolute)
        requests = [replace(absolute, banks=(number,)) for number in numbers]
    frames, listed = list[FrameResult](), list[Event]()
    with _Workers(options, len(files) * len(requests)) as workers:
        for of_banks in requests:
            task = _Task(of_banks, of_structures, options.frame)
            of_series = [
                _frame(number, *known)
                for number, known in enumerate(
                    zip(request.files, values, _refined(task, workers), strict=True)
                )
            ]
            happened = events([frame.result for frame in of_series])
            of_bank = f"bank {of_banks.banks[0]}: " if options.frame.apart else ""
            listed += [replace(event, text=of_bank + event.text) for event in happened]
            frames += of_series
    if not any(frame.result for frame in frames):
        raise ProfileError(frames[0].reason)
    frames.sort(key=lambda frame: frame.number)
    return frames, sorted(listed, key=lambda event: event.frame)


def _frame(number: int, file: Path, value: float, record: Record) -> FrameResult:
    if record["result"] is None:
        return FrameResult(number, file, value, None, record["reason"])
    result = JointRefinement.model_validate(record["result"])
    return FrameResult(number, file, value, result.model_copy(update={"files": (str(file),)}))


def _banks_of(request: Request) -> list[int]:
    """Return the numbers of the banks of the first file that can be read."""
    errors: list[Exception] = []
    for file in request.files:
        try:
            return [bank.number for bank in _sample(request, file).banks]
        except _FAILURES as error:
            errors.append(error)
    raise errors[0]


def _refined(task: _Task, workers: "_Workers") -> list[Record]:
    """Return the records of all frames of a series."""
    count = len(task.request.files)
    chunks = max(-(-count // _CHUNK), min(count // EVERY, _FEW), 1)
    bounds = np.linspace(0, count, chunks + 1).astype(int).tolist()
    # Where there are few chunks, some more frames for the errors of the calibrations.
    more = np.linspace(0, count, min(_FEW, count), endpoint=False).astype(int).tolist()
    places = sorted({*bounds[:-1], *(more if chunks < _FEW else ())})
    first = [[(place, min(place + _TRIES, count))] for place in places]
    results = workers.run("Beginning", _start, task, first, [None] * len(places), {})
    starts = {place: _Start(*result[:2]) for place, (result,) in zip(places, results, strict=True)}
    offsets = _combined(list(starts.values()))
    chains = [list(pairwise([*range(low, high, EVERY), high])) for low, high in pairwise(bounds)]
    before = [starts[low].neighbour for low in bounds[:-1]]
    done = workers.run("Refining", _part, task, chains, before, offsets)
    return [record for chain in done for part in chain for record in part.records]


def _combined(starts: Sequence[_Start]) -> dict[int, float]:
    """Return the error of each bank's difC, from frames that were refined on their own.

    A common error of all banks cannot be seen; it is the likeliest by the calibrations.
    """
    centred: dict[int, list[float]] = {}
    for start in starts:
        if len(start.offsets) > 1:
            banks, values, su = (np.array(column) for column in zip(*start.offsets, strict=True))
            for bank, value in zip(
                banks, values - np.average(values, weights=1 / su**2), strict=True
            ):
                centred.setdefault(int(bank), []).append(float(value))
    return {bank: float(np.median(values)) for bank, values in centred.items()}


def _start(task: _Task, previous: _Result, offsets: dict[int, float]) -> _Result:  # noqa: ARG001
    """Refine a frame on its own; the next one where it cannot be used."""
    phases, cans = _structures(task)
    lasting = True
    for file in task.request.files:
        refiner = SeriesRefiner(phases, cans, single=task.frame.single)
        try:
            sample = _sample(task.request, file)
            result = refiner.refine(sample.banks, _options(sample, cans, task))
        except _FAILURES as error:
            lasting = lasting and not _may_be_read_later(error)
            continue
        if refiner.before is not None:
            su = [float(s) for s in sample.calibration_su]
            errors = [
                [bank.bank.number, float(bank.offset), s]
                for bank, s in zip(result.banks, su, strict=True)
            ]
            return _Result(errors, asdict(refiner.before), lasting)
    return _Result([], None, lasting)


def _part(task: _Task, previous: _Result, offsets: dict[int, float]) -> _Result:
    """Refine the frames of a part of a series, after ``previous``."""
    before, lasting = previous.neighbour, True
    phases, cans = _structures(task)
    neighbour = None if before is None else _neighbour(before)
    refiner = SeriesRefiner(phases, cans, single=task.frame.single, before=neighbour)
    records: list[Record] = []
    samples: list[tuple[int, Sample]] = []
    for file in task.request.files:
        records.append({"result": None, "reason": ""})
        try:
            samples.append((len(records) - 1, _sample(task.request, file)))
        except _FAILURES as error:
            records[-1]["reason"] = first_line(error)
            lasting = lasting and not _may_be_read_later(error)
    frames = [(sample.banks, _options(sample, cans, task, offsets)) for _, sample in samples]
    assumptions = [f"{p.name}: {text}" for p in (*phases, *cans) for text in p.assumptions]
    for (place, sample), fit in zip(samples, refiner.refine_all(frames), strict=True):
        if isinstance(fit, RefinementError):
            records[place]["reason"] = first_line(fit)
        else:
            records[place]["result"] = to_json(joint_refinement(sample, fit, assumptions))
    return _Result(records, None if refiner.before is None else asdict(refiner.before), lasting)


def _may_be_read_later(error: Exception) -> bool:
    return isinstance(error, OSError) or isinstance(error.__cause__, OSError)


def _neighbour(values: Record) -> Neighbour:
    lists = {name: tuple(values[name]) for name in ("present", "terms", "held")}
    seen = {name: tuple(cell) for name, cell in values["seen"].items()}
    return Neighbour(**{**values, **lists, "seen": seen})


def _sample(request: Request, file: Path) -> Sample:
    samples = read_samples(replace(request, files=(file,)))
    if len(samples) > 1:
        raise ProfileError(f"{file} repeats a bank: a frame is one sample. Choose banks by --bank.")
    return samples[0]


def _options(
    sample: Sample, cans: Sequence[Phase], task: _Task, offsets: dict[int, float] | None = None
) -> JointOptions:
    return JointOptions(
        sample.calibration_su,
        evidence=False,
        cans=tuple(can.name for can in cans),
        offsets=tuple(offsets.get(b.number, 0.0) for b in sample.banks) if offsets else None,
        free_lines=task.frame.free_lines,
    )


@lru_cache(maxsize=4)  # simulators are known by their phases
def _phases(structures: tuple[str, ...], cans: tuple[str, ...]) -> tuple[list[Phase], list[Phase]]:
    phases, _ = read_structures([*structures, *cans])
    return phases[: len(structures)], phases[len(structures) :]


def _structures(task: _Task) -> tuple[list[Phase], list[Phase]]:
    return _phases(task.structures, task.request.cans)


class _Journal:
    """What is finished of a series: a file for each part, named by all that it depends on."""

    def __init__(self, folder: Path | None, task: _Task, digests: dict[Path, str]) -> None:
        self._folder, self._digests = None, digests
        if folder is None:
            return
        request = replace(task.request, files=())
        known = [_digest(file) for file in request.inputs(task.structures)]
        what = request, task.structures, task.frame.single, task.frame.free_lines, source_digest()
        self._folder = folder / _hash(repr(what), known)
        self._folder.mkdir(parents=True, exist_ok=True)
        digests |= {file: _digest(file) for file in task.request.files if file not in digests}

    def _file(self, folder: Path, what: str, files: Sequence[Path], before: Any) -> Path:
        return folder / f"{what}-{_hash([self._digests[file] for file in files], before)}.json"

    def read(self, what: str, files: Sequence[Path], before: Any) -> _Result | None:
        """Return a part that was finished, after what is known before it; None if it was not."""
        if self._folder is None:
            return None
        with suppress(OSError, ValueError):
            return _Result(*json.loads(self._file(self._folder, what, files, before).read_text()))
        return None

    def write(self, what: str, files: Sequence[Path], before: Any, result: _Result) -> None:
        """Keep a part, all of it or nothing, if it would be the same again."""
        if self._folder is not None and result.lasting:
            file = self._file(self._folder, what, files, before)
            write_whole(file, json.dumps(result[:2]).encode())


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        return type(error).__name__


class _Workers:
    """Where frames are refined: in this process, or those of a cluster."""

    def __init__(self, options: SeriesOptions, frames: int) -> None:
        self._options, self._stack = options, ExitStack()
        self._is_local = options.cluster.cluster is None and frames <= _LOCAL
        self._client: Any = None
        self._digests: dict[Path, str] = {}

    def __enter__(self) -> Self:
        if not self._is_local:
            from pipelines.cluster.client import open_cluster  # takes a second

            self._client = self._stack.enter_context(open_cluster(self._options.cluster))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(
        self,
        doing: str,
        function: Callable[[_Task, _Result, dict[int, float]], _Result],
        task: _Task,
        chains: Sequence[Sequence[tuple[int, int]]],
        before: Sequence[Record | None],
        offsets: dict[int, float],
    ) -> list[list[_Result]]:
        """Return the results of chains of parts, given by first and last frame, in their order."""
        journal = _Journal(self._options.keep, task, self._digests)
        common = sorted(offsets.items())
        done: list[list[_Result]] = [[] for _ in chains]
        futures: dict[Any, tuple[int, tuple[int, int], Any]] = {}  # with what comes before
        total = sum(high - low for chain in chains for low, high in chain)
        known = 0

        def files_of(bounds: tuple[int, int]) -> tuple[Path, ...]:
            return task.request.files[slice(*bounds)]

        for number, chain in enumerate(chains):
            neighbour = before[number]
            for bounds in chain:
                if (finished := journal.read(doing, files_of(bounds), [neighbour, common])) is None:
                    break
                done[number].append(finished)
                neighbour = finished.neighbour
                known += bounds[1] - bounds[0]
        with Progress(doing, total, "frames", done=known, quiet=self._options.quiet) as bar:
            for number, chain in enumerate(chains):
                results = done[number]
                previous: Any = results[-1] if results else _Result([], before[number])
                for bounds in chain[len(results) :]:
                    files = files_of(bounds)
                    part = replace(task, request=replace(task.request, files=files))
                    if self._client is None:
                        result = function(part, previous, offsets)
                        journal.write(doing, files, [previous.neighbour, common], result)
                        results.append(result)
                        bar.advance(bounds[1] - bounds[0])
                        previous = result
                    else:
                        future = self._client.submit(function, part, previous, offsets, pure=False)
                        futures[future] = number, bounds, previous
                        previous = future
            if futures:
                from distributed import as_completed

                for future, result in as_completed(list(futures), with_results=True):
                    _, bounds, last = futures[future]
                    last = last if isinstance(last, _Result) else last.result()
                    journal.write(doing, files_of(bounds), [last.neighbour, common], result)
                    bar.advance(bounds[1] - bounds[0])
                for future, (number, *_) in futures.items():
                    done[number].append(future.result())
        return done

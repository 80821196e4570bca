"""Ask models and baselines about test sets, and keep the error of every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bragg_data.campaign import Samples
from bragg_data.crystallography.cell import CrystalSystem
from bragg_data.splits import Part, blocked_split, random_split
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.data.batches import Batch, in_order, profiles_of
from bragg_models.library.compressed import CompressedLibrary, Neighbours, mean_of_nearest
from bragg_models.metrics import Errors, bootstrap_intervals, errors, squared_errors, summary
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets
from pipelines.cli.console import Progress
from pipelines.evaluation.baselines import constant_answer
from pipelines.evaluation.tables import Score

SPLIT = {"seed": 0, "test": 0.2, "validation": 0.05}
"""The splits that everything is scored on, so that all scores are of the same samples."""

CONSTANT, NEAREST, NEAREST_MEAN = "constant", "library", "library-mean"
"""Names of the baselines."""

NEAREST_OF = 4
"""Nearest patterns that the mean is taken of, where they are of the phase of the first."""

_SPLITS = {"random": "random split", "blocked": "blocked split"}
_TOGETHER = 1024  # profiles asked about at a time
_AT_ONCE = 512  # the same of profiles in memory

Cells = NDArray[np.float64]
Phases = NDArray[np.integer]


class ScoringError(ValueError):
    """Samples that models cannot be scored on."""


@dataclass(frozen=True)
class HeldOut:
    """Samples that models are scored on.

    Attributes
    ----------
    name
        "random", "blocked" or "off-grid".
    dataset
        The snapshot that they are in.
    wanted : shape (n,)
        Which of its samples.
    training : shape (m,)
        What the models of its split may have learnt from, of the main data set.
    """

    name: str
    dataset: xr.Dataset
    wanted: NDArray[np.bool_]
    training: NDArray[np.bool_]

    @cached_property
    def labels(self) -> Samples:
        """The labels of the whole data set."""
        return samples_of(self.dataset)

    @property
    def count(self) -> int:
        """Number of samples that are scored."""
        return int(self.wanted.sum())

    @property
    def split(self) -> str:
        """The split whose models are asked."""
        return "blocked" if self.name == "blocked" else "random"

    @property
    def title(self) -> str:
        """What is shown."""
        what = _SPLITS.get(self.name, "off the grid")
        return f"{what}, {self.count:,} samples of {self.dataset.attrs['tag']}"


def in_batches(profiles: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Yield profiles (n, points) some at a time."""
    for low in range(0, len(profiles), _AT_ONCE):
        yield profiles[low : low + _AT_ONCE]


def predict_batches(
    predictor: Predictor,
    batches: Iterable[NDArray[np.float32]],
    count: int,
    phase: NDArray[np.integer] | None = None,
    *,
    description: str,
    quiet: bool = False,
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """Predict batches of profiles with a model, with a progress bar.

    Parameters
    ----------
    predictor, batches, count
        The model, the profiles, and their number.
    phase : shape (count,)
        Known phases, if the model is not to decide them.
    description, quiet
        Of the progress bar.

    Returns
    -------
    phase, cells, probabilities : shapes (count,), (count, 6), (count, n_phases)
    """
    phases, cells, probabilities, done = [], [], [], 0
    with Progress(description, count, "profiles", quiet=quiet) as progress:
        for profiles in batches:
            known = None if phase is None else phase[done : done + len(profiles)]
            prediction = predictor.predict(profiles, known)
            phases.append(prediction.phase)
            cells.append(prediction.cells)
            probabilities.append(prediction.probabilities)
            done += len(profiles)
            progress.advance(len(profiles))
    return np.concatenate(phases), np.concatenate(cells), np.concatenate(probabilities)


def part_of(name: str, labels: Samples, values: Mapping[str, Any]) -> NDArray[np.int8]:
    """Return the part of each sample, shape (n,), in a split with this seed and these shares."""
    known = {key: values[key] for key in SPLIT}
    if name == "blocked":
        return blocked_split(labels.crystal_system, labels.cells, **known)
    return random_split(labels.crystal_system, **known)


def held_out_sets(
    dataset: xr.Dataset, offgrid: xr.Dataset | None, limit: int | None = None
) -> list[HeldOut]:
    """Return the test sets of a data set, at most ``limit`` samples of each.

    Raises
    ------
    ScoringError
        If the off-grid data set has other phases or another grid.
    """
    labels = samples_of(dataset)
    sets = []
    for name in _SPLITS:
        part = part_of(name, labels, SPLIT)
        sets.append(HeldOut(name, dataset, part == Part.test, part != Part.test))
    if offgrid is not None:
        phases = [[p.name for p in campaign_of(d).phases] for d in (dataset, offgrid)]
        if phases[0] != phases[1] or not np.array_equal(dataset.tof, offgrid.tof):
            raise ScoringError(
                f"{offgrid.attrs['tag']} has other phases or another time-of-flight grid than "
                f"{dataset.attrs['tag']}. Name another data set with --offgrid."
            )
        every = np.ones(offgrid.sizes["sample"], dtype=bool)
        sets.append(HeldOut("off-grid", offgrid, every, sets[0].training))
    for one in sets:
        one.wanted[np.flatnonzero(one.wanted)[limit:] if limit is not None else []] = False
    return sets


@dataclass
class Tally:
    """The errors of one model on one test set, as they come; of one that tells phases alone, so."""

    targets: Targets
    phases_alone: bool = False
    total: Errors | None = None
    literal: list[NDArray[np.float32]] = field(default_factory=list)
    free: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, phase: Phases, cells: Cells, found: Phases, answer: Cells) -> None:
        """Count a batch: the truth, and the answers."""
        some = errors(self.targets, phase, cells, found, answer)
        self.total = some if self.total is None else self.total + some
        literal, free = squared_errors(self.targets, phase, cells, answer)
        self.literal.append(literal.astype(np.float32))
        self.free.append(free.astype(np.float32))


@dataclass(frozen=True)
class Answers:
    """One who answers.

    Attributes
    ----------
    model
        Name.
    key, label
        What the scores are listed under, and what is shown.
    ask
        From raw profiles to phases, shape (n,), and cells, shape (n, 6); None where it answers
        none.
    given
        From raw profiles and their true phases to cells, where that is another question.
    uri, preset
        Of a registered version.
    """

    model: str
    key: str
    label: str
    ask: Callable[[NDArray[np.float32]], tuple[Phases, Cells | None]]
    given: Callable[[NDArray[np.float32], Phases], Cells] | None = None
    uri: str = ""
    preset: str = ""


class LibraryMatch:
    """The stored patterns as one who answers.

    Parameters
    ----------
    library
        What may be known of a test set.
    labels
        Of the whole data set.
    """

    def __init__(self, library: CompressedLibrary, labels: Samples) -> None:
        self.library, self.labels = library, labels
        self.asked = self.proven = 0
        self._last: tuple[NDArray[np.float32], Neighbours] | None = None

    def answers(self, count: int) -> Callable[[NDArray[np.float32]], tuple[Phases, Cells]]:
        """Return a function that answers with the mean of the nearest patterns of one phase."""

        def ask(profiles: NDArray[np.float32]) -> tuple[Phases, Cells]:
            # The nearest one and the mean of several are asked about the same profiles in turn.
            if self._last is None or self._last[0] is not profiles:
                found = self.library.nearest(profiles, min(NEAREST_OF, len(self.library.rows)))
                self._last = profiles, found
                self.asked += len(profiles)
                self.proven += int(found.proven.sum())
            return mean_of_nearest(self._last[1], self.labels.phase, self.labels.cells, count)

        return ask


def baselines(labels: Samples, match: LibraryMatch | None, test: HeldOut) -> list[Answers]:
    """Return those who answer without having learnt: a constant, and the stored patterns.

    Parameters
    ----------
    labels
        Of the main data set, from which a test set's training part is.
    match
        The library match; None for the constant alone.
    test
        The test set.
    """
    commonest, mean = constant_answer(labels.phase[test.training], labels.cells[test.training])

    def constant(profiles: NDArray[np.float32]) -> tuple[Phases, Cells]:
        return np.full(len(profiles), commonest), np.tile(mean, (len(profiles), 1))

    found = [Answers(CONSTANT, CONSTANT, "always the mean cell", constant)]
    if match is not None:
        found += [
            Answers(NEAREST, NEAREST, "library, nearest", match.answers(1)),
            Answers(
                NEAREST_MEAN, NEAREST_MEAN, f"library, mean of {NEAREST_OF}",
                match.answers(NEAREST_OF),
            ),
        ]  # fmt: skip
    return found


def score_set(
    test: HeldOut,
    asked: Sequence[Answers],
    targets: Targets,
    *,
    resamples: int,
    quiet: bool = False,
) -> list[Score]:
    """Ask everyone about every sample of a test set; its chunks are read once.

    Parameters
    ----------
    test
        The samples.
    asked
        Who answers.
    targets
        Phases and parameters.
    resamples
        Of the bootstrap.
    quiet
        Show no progress.
    """
    labels = test.labels
    tallies: dict[str, Tally] = {}
    phases = []
    profiles = profiles_of(test.dataset, lambda values: values)
    total = test.count * len(asked)
    with Progress(f"Scoring, {test.name}", total, "answers", quiet=quiet) as bar:
        for batch in _together(in_order(profiles, test.wanted), _TOGETHER):
            phase, cells = labels.phase[batch.rows], labels.cells[batch.rows]
            phases.append(phase)
            for one in asked:
                ask_and_count(one, batch.profiles, phase, cells, tallies, targets)
                bar.advance(len(phase), one.label)
    return scored(asked, tallies, np.concatenate(phases), targets, resamples)


def ask_and_count(
    one: Answers,
    profiles: NDArray[np.float32],
    phase: Phases,
    cells: Cells,
    tallies: dict[str, Tally],
    targets: Targets,
) -> tuple[Phases, Cells | None]:
    """Ask one about profiles whose phases and cells are known, count the errors; return the answer.

    Counted under its key; with the true phases given, for who takes them, under ``KEY/true``.
    """
    found, answer = one.ask(profiles)
    tally = tallies.setdefault(one.key, Tally(targets, phases_alone=answer is None))
    # Who answers no cell is scored on phases alone.
    tally.add(phase, cells, found, cells if answer is None else answer)
    if one.given is not None and answer is not None:
        given = answer
        other = np.flatnonzero(found != phase)
        if len(other):
            given = answer.copy()
            given[other] = one.given(profiles[other], phase[other])
        tallies.setdefault(f"{one.key}/true", Tally(targets)).add(phase, cells, phase, given)
    return found, answer


def scored(
    asked: Sequence[Answers],
    tallies: Mapping[str, Tally],
    phases: Phases,
    targets: Targets,
    resamples: int,
) -> list[Score]:
    """Return the scores of everyone that was asked, with their intervals.

    Parameters
    ----------
    asked, tallies
        Who, and what was counted for them.
    phases : shape (n,)
        The true ones, in the order in which they were counted.
    targets, resamples
        As for :func:`score_set`.
    """
    groups = _groups(tallies, targets.crystal_systems[phases], targets, resamples)
    for key, tally in tallies.items():
        if tally.phases_alone:
            groups[key] = {
                group: {k: v for k, v in values.items() if k in ("n", "wrong") or "accuracy" in k}
                for group, values in groups[key].items()
            }
    return [
        Score(one.model, one.label, one.uri, one.preset, groups[one.key],
              groups.get(f"{one.key}/true"))
        for one in asked
    ]  # fmt: skip


def _together(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Join batches until they have some size: many small questions take longer than a large one."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(b.rows) for b in waiting) >= size:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(batches: Sequence[Batch]) -> Batch:
    return Batch(
        np.concatenate([b.profiles for b in batches]), np.concatenate([b.rows for b in batches])
    )


def _groups(
    tallies: Mapping[str, Tally], systems: NDArray[np.integer], targets: Targets, resamples: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the scores with their intervals of everyone, by crystal system and of all."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for key, tally in tallies.items():
        assert tally.total is not None  # a test set has samples
        found[key] = summary(targets, tally.total)
    columns = np.stack(
        [np.concatenate(part) for t in tallies.values() for part in (t.literal, t.free)], axis=1
    )
    names = [(key, name) for key in tallies for name in ("mse_paper", "mse_paper_free")]
    groups = {"all": np.ones(len(systems), dtype=bool)}
    groups |= {CrystalSystem(int(code)).name: systems == code for code in np.unique(systems)}
    for group, rows in groups.items():
        for key in tallies:
            values = found[key][group]
            values["wrong"] = float(round((1 - values["accuracy"]) * values["n"]))
        if rows.sum() < 2:
            continue  # one sample says nothing about others
        low, high = bootstrap_intervals(columns[rows], resamples=resamples)
        for (key, name), bottom, top in zip(names, low, high, strict=True):
            values = found[key][group]
            values[f"{name}_low"], values[f"{name}_high"] = float(bottom), float(top)
    return found

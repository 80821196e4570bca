"""Choosing the cells by which a data set grows: at random, or where a model is weak."""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from bragg_data.arrays import Array, Floats32, Indices, Integers, Mask
from bragg_data.campaign import Campaign, Samples
from bragg_data.growth import Growth, chosen_text, growth_text
from bragg_data.simulation.gsas2 import Gsas2Options
from bragg_data.store.repository import Store, StoreError
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.metrics import squared_errors
from bragg_models.predictors import Predictor
from pipelines.cli.console import Progress
from pipelines.cli.options import ClusterOptions
from pipelines.cluster.client import open_cluster
from pipelines.simulation.simulators import (
    SimulationError,
    choose,
    recipe_of,
    seconds_per_pattern,
    simulate_samples,
)

RULES = ("random", "uncertain", "wrong", "measured")
MODEL_RULES = RULES[1:]  # those that need a model

_CANDIDATES = 8  # for each sample that joins; these are rated by a model
_NEAR_CANDIDATES = 100  # the same where their distance alone counts
_BATCH = 512
_NEAR = 0.1  # of half a parameter's range: how far from a measured cell candidates count as near
_CHOICE = 1001  # spawn key of the choice among candidates; see Campaign.candidates
_LEAST = 1e-12  # weight of a candidate where nothing is wrong

# Phase codes, shape (m,), and cells, shape (m, 6), of measured profiles.
Measured = tuple[Integers, Array]


@dataclass(frozen=True)
class GrowthRequest:
    """By how many samples a data set grows, and by which rule they are chosen."""

    where: str
    samples: int  # 0: as many as a budget of time allows
    seed: int = 0
    model: str = ""  # address and run of the model that rates candidates
    profiles: str = ""  # SHA-256 of the measured profiles

    def __post_init__(self) -> None:
        if self.where not in RULES:
            raise SimulationError(f"No rule '{self.where}': use {', '.join(RULES)}.")
        if (self.where == "measured") != bool(self.profiles):
            raise SimulationError("--where measured and --profiles FILE… belong together.")

    def rated_by(self, uri: str, run_id: str) -> "GrowthRequest":
        """Return the request with the model that rates candidates."""
        return replace(self, model=f"{uri}, run {run_id}" if run_id else uri)

    def is_answered_by(self, growth: Growth) -> bool:
        """Whether a growth is the result of this request; any model will do if none is named."""
        requested = self.where, self.seed, self.profiles, self.model or growth.model
        same = requested == (growth.where, growth.seed, growth.profiles, growth.model)
        return same and self.samples in (0, len(growth.rows))


def parent_of(store: Store, campaign: Campaign, tag: str | None) -> xr.Dataset:
    """Open the data set of a campaign that is to grow: the newest one unless a tag is named.

    Raises `StoreError` if there is none, or the tag is of another campaign.
    """
    if tag is not None:
        dataset = store.open(tag)
        if not _is_of(dataset.attrs, campaign):
            raise StoreError(f"{tag} is no data set of this campaign file ({campaign.name}).")
        return dataset
    names = [tag.name for tag in sorted(store.tags(), key=lambda tag: tag.written_at)]
    datasets = (store.open(name) for name in reversed(names))
    for dataset in datasets:
        if _is_of(dataset.attrs, campaign):
            return dataset
    raise StoreError(
        f"The store {store.uri} has no finished data set of campaign '{campaign.name}' yet. Make "
        f"one with: python -m pipelines.simulate --campaign …"
    )


def begun_growth(
    store: Store, campaign: Campaign, request: GrowthRequest, parent: str | None
) -> Campaign | None:
    """Return the grown campaign that the same request began; None if there is none.

    Without a ``parent`` (a tag) only unfinished ones count: a finished one may grow again.
    """
    for snapshot, attrs in store.snapshots():
        if not _is_of(attrs, campaign) or (snapshot.tag is not None and parent is None):
            continue
        grown = campaign_of(xr.Dataset(attrs=attrs))
        last = grown.growths[-1] if grown.growths else None
        if last and request.is_answered_by(last) and parent in (None, last.parent):
            return grown
    return None


def _is_of(attrs: Mapping[Any, Any], campaign: Campaign) -> bool:
    if attrs.get("campaign") != campaign.name or attrs.get("simulator") == "measured":
        return False
    return bool(
        replace(campaign_of(xr.Dataset(attrs=attrs)), growth="").definition == campaign.definition
    )


def grown_campaign(
    dataset: xr.Dataset,
    request: GrowthRequest,
    predictor: Predictor | None = None,
    measured: Measured | None = None,
) -> Campaign:
    """Return the campaign of a data set with the samples that a request adds.

    Candidates are drawn from the campaign's ranges, and the fast simulator gives their patterns. A
    candidate is chosen with a chance in proportion to its weight, without replacement: the error of
    the predicted cell (wrong); the width of the predicted interval, or of models without intervals
    the misfit between the candidate's pattern and that of the predicted cell (uncertain); or how
    near it is to measured cells (measured). Raises `SimulationError` if the rule needs a model and
    there is none, or too few candidates are left.
    """
    campaign, samples = campaign_of(dataset), samples_of(dataset)
    number = len(campaign.growths)
    of_each = _NEAR_CANDIDATES if request.where == "measured" else _CANDIDATES
    count = of_each * request.samples
    candidates = campaign.candidates(samples, request.seed, count, number)
    eligible = _is_new(candidates, samples)
    if eligible.sum() < request.samples:
        raise SimulationError(
            f"Of {len(candidates):,} candidates only {eligible.sum():,} are new; "
            f"{request.samples:,} are needed. Ask for fewer, or widen the campaign's ranges."
        )
    weights = np.ones(len(candidates))
    if request.where == "measured" and measured is not None and predictor is not None:
        weights = _nearness(candidates, measured, predictor)
    elif request.where != "random":
        if predictor is None:
            raise SimulationError(f"--where {request.where} needs a model.")
        weights = _weakness(campaign, candidates, predictor, request.where)
    # The largest of log w + Gumbel noise are a draw without replacement in proportion to w.
    root = np.random.SeedSequence(
        int(campaign.definition["seed"]), spawn_key=(_CHOICE, request.seed, number)
    )
    noise = np.random.default_rng(root).gumbel(size=len(candidates))
    keys = np.where(eligible, np.log(weights + _LEAST) + noise, -np.inf)
    growth = Growth(
        parent=str(dataset.attrs["tag"]),
        parent_content_hash=str(dataset.attrs["content_hash"]),
        parent_samples=len(samples),
        where=request.where,
        model=request.model,
        profiles=request.profiles,
        seed=request.seed,
        candidates=count,
        chosen=chosen_text(np.argsort(-keys)[: request.samples], len(candidates)),
    )
    return replace(campaign, growth=growth_text((*campaign.growths, growth)))


def samples_within(
    minutes: float,
    dataset: xr.Dataset,
    request: GrowthRequest,
    predictor: Predictor | None,
    *,
    gsas2: Gsas2Options,
    cluster: ClusterOptions,
) -> int:
    """Return by how many samples a data set can grow within some minutes, from timed ones.

    The candidates are rated here, on one core; the patterns are simulated by all cores of the
    cluster, of SLURM by those of as many jobs as are allowed.
    """
    campaign, samples = campaign_of(dataset), samples_of(dataset)
    few, recipe = samples[:_BATCH], recipe_of(campaign)
    cores = cluster.workers or os.cpu_count() or 1
    if cluster.name == "slurm":
        cores = cluster.slurm.job_limits[1] * (cluster.slurm.cores or 1)
    if dataset.attrs["simulator"] == "gsas2":
        with open_cluster(cluster) as client:
            seconds = choose("gsas2", campaign, few, gsas2, client)[1]
        seconds_of_each = float(seconds[few.phase].mean()) / cores
    else:
        seconds_of_each = seconds_per_pattern(recipe, few) / cores
    if predictor is not None and request.where in ("uncertain", "wrong"):
        began = time.monotonic()
        _weakness(campaign, few, predictor, request.where)
        seconds_of_each += _CANDIDATES * (time.monotonic() - began) / len(few)
    return max(1, int(60 * minutes / seconds_of_each))


def _is_new(candidates: Samples, samples: Samples) -> Mask:
    """Return which candidates are neither among the samples nor come twice, shape (n,)."""
    keys = [np.column_stack([of.phase, np.round(of.cells, 9)]) for of in (samples, candidates)]
    _, first = np.unique(np.concatenate(keys), axis=0, return_index=True)
    return np.isin(np.arange(len(candidates)) + len(samples), first)


def _weakness(campaign: Campaign, candidates: Samples, predictor: Predictor, where: str) -> Array:
    """Return how wrong or uncertain the model is on each candidate, shape (n,)."""
    recipe, weights = recipe_of(campaign), []
    with Progress("Rating candidates", len(candidates), "candidates") as progress:
        for batch in _batches(candidates):
            profiles = simulate_samples(recipe, batch)
            prediction = predictor.predict(profiles)
            if not np.isfinite(prediction.cells).all():
                raise SimulationError(
                    f"{predictor.provenance.model} predicts no cells: name another --model."
                )
            if where == "wrong":
                weights.append(_error(predictor, batch.phase, batch.cells, prediction.cells))
            elif prediction.intervals is not None:
                half = np.nan_to_num(np.diff(prediction.intervals, axis=2)[:, :, 0]) / 2
                cells = prediction.cells
                weights.append(_error(predictor, prediction.phase, cells, cells + half))
            else:
                codes = prediction.phase.astype(np.int8)
                guess = Samples(codes, predictor.targets.crystal_systems[codes], prediction.cells)
                weights.append(_misfit(profiles, simulate_samples(recipe, guess)))
            progress.advance(len(batch))
    return np.concatenate(weights)


def _batches(samples: Samples) -> Iterator[Samples]:
    for low in range(0, len(samples), _BATCH):
        yield samples[low : low + _BATCH]


def _error(predictor: Predictor, phase: Integers, cells: Array, predicted: Array) -> Array:
    """Return the root of each sample's contribution to equation (1), shape (n,)."""
    return np.sqrt(squared_errors(predictor.targets, phase, cells, predicted)[1])


def _misfit(profiles: Floats32, calculated: Floats32) -> Array:
    """Return the sine of the angle between patterns (n, points): 0 where one explains the other."""
    first, second = profiles.astype(np.float64), calculated.astype(np.float64)
    norms = np.einsum("np,np->n", first, first) * np.einsum("np,np->n", second, second)
    product = np.einsum("np,np->n", first, second) ** 2
    explained = product / np.maximum(norms, np.finfo(float).tiny)
    return np.asarray(np.sqrt(np.clip(1 - explained, 0, 1)))


def _nearness(candidates: Samples, measured: Measured, predictor: Predictor) -> Array:
    """Return how near each candidate is to measured cells of its phase, shape (n,)."""
    targets, weights = predictor.targets, np.zeros(len(candidates))
    scaled, free = targets.encode(candidates.phase, candidates.cells)
    for code, cell in zip(*measured, strict=True):
        of_cell, _ = targets.encode(np.array([code]), cell[None])
        rows: Indices = np.flatnonzero(candidates.phase == code)
        distance = ((scaled[rows] - of_cell) ** 2 * free[rows]).sum(axis=1)
        weights[rows] += np.exp(-distance / (2 * _NEAR**2))
    return weights


def profiles_hash(files: Sequence[Path]) -> str:
    """Return the SHA-256 (hex) of the contents of files, in this order."""
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in files]
    return hashlib.sha256(b"".join(digests)).hexdigest() if files else ""

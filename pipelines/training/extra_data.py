"""Further data sets in a training: which of their samples join it, and how much they count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from bragg_data.arrays import Array, Integers, Integers8
from bragg_data.campaign import Samples
from bragg_data.preprocessing import prepare_measured
from bragg_data.splits import Part, extra_data_split
from bragg_data.store.repository import Store
from bragg_data.store.schema import campaign_of, samples_of
from pipelines.snapshots.verification import verify_snapshot
from pipelines.training.names import TrainError


@dataclass(frozen=True, eq=False)
class StoredSamples:
    """The n samples of a data set that a training reads."""

    dataset: xr.Dataset
    labels: Samples
    part: Integers8  # the Part of each, shape (n,)
    content: str  # names the profiles in the cache


def extra_samples(main: StoredSamples, tag: str, *, blocked: bool) -> StoredSamples:
    """Open a further data set of a training, of simulated or of labelled measured profiles.

    What the main data set holds out stays out: the same cells, or all cells of a blocked split's
    boxes. Of measured profiles, those with known cells are taken, without their background. Raises
    `TrainError` if none is known, or the phases or the grid are others.
    """
    extra = Store(main.dataset.attrs["uri"]).open(tag)
    verify_snapshot(extra)
    names = [[phase.name for phase in campaign_of(d).phases] for d in (main.dataset, extra)]
    if names[0] != names[1] or not np.array_equal(extra.tof, main.dataset.tof):
        raise TrainError(
            f"{tag} has other phases or another time-of-flight grid than "
            f"{main.dataset.attrs['tag']}: it cannot be used for training with it."
        )
    content = str(extra.attrs["content_hash"])
    if extra.attrs["simulator"] == "measured":
        known = np.flatnonzero(extra.phase.values >= 0)
        if not len(known):
            raise TrainError(f"{tag} has no profile with a known cell. Ingest it with --labels.")
        extra, content = extra.isel(sample=known), f"{content} prepared"
        arrays = (extra[name].values for name in ("intensity", "sigma", "covered"))
        prepared = prepare_measured(*arrays).astype(np.float32)
        extra = extra.assign(intensity=(extra.intensity.dims, prepared))
    labels = samples_of(extra)
    training = extra_data_split(
        main.labels.crystal_system,
        main.labels.cells,
        main.part,
        labels.crystal_system,
        labels.cells,
        blocked=blocked,
    )
    return StoredSamples(extra, labels, training, content)


def loss_weights(
    phase: Integers, number: Integers, part: Integers8, shares: Sequence[float]
) -> Array:
    """Return the weight of each sample, (n,), with which data sets have given shares of the loss.

    ``phase`` (n,) and ``number`` (n,) are the samples' phases and data sets. The shares hold within
    each phase, among the data sets with training samples of it, so that they are the same however
    phases are balanced.
    """
    weight = np.ones(len(phase))
    for code in np.unique(phase):
        groups = [(phase == code) & (number == k) for k in range(len(shares))]
        counts = np.array([(rows & (part == Part.training)).sum() for rows in groups])
        present = np.where(counts > 0, shares, 0.0)
        for rows, count, share in zip(groups, counts, present, strict=True):
            if count:
                weight[rows] = share / present.sum() * counts.sum() / count
    return weight

"""Feature views: named, versioned definitions of what is computed from the profiles of a data set.

A view is a pure function on profiles, the same function object in training and in inference; or
what a registered model computes from them. Another definition is another version of the name.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bragg_data.preprocessing import PREPROCESSING, prepare_measured

Function = Callable[..., NDArray[Any]]

_POINTS = 640  # of the pinned profiles
_DECIMALS = 3
"""Decimals of the features of pinned profiles that a definition is recognised by.

Baselines differ by up to 3e-10 between processors; with 3 decimals the chance that one of 1,280
numbers then rounds the other way is 1e-3, while a change by 1e-5 moves a dozen of them. At 6
decimals hashes differed between two builds of the same linear algebra.
"""


class FeatureError(LookupError):
    """A feature view that is not known, or values of one that do not exist."""


@dataclass(frozen=True)
class View:
    """The definition of a feature view."""

    name: str
    version: int  # another definition is another version, next to the old one
    description: str  # one sentence
    function: Function | None = None  # of (n, points), to features (n, m); else a model computes it
    model: str = ""  # the kind of registered model, which prepares the profiles itself
    inputs: tuple[str, ...] = ("intensity",)  # variables (n, points) that the function takes
    earlier_hashes: tuple[str, ...] = ()  # of the same definition, computed in another way

    @property
    def key(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @cached_property
    def definition_hash(self) -> str:
        """SHA-256 (16 hexadecimal digits) of the key and of the features of pinned profiles.

        Code that computes the same numbers has the same hash, however it is written. A view that a
        model computes is recognised by the digest of the model instead.
        """
        definition = self.model
        if self.function is not None:
            pinned = pinned_inputs()
            values = np.asarray(self.function(*(pinned[name] for name in self.inputs)), "<f8")
            rounded = np.round(values, _DECIMALS) + 0.0  # no negative zeros
            content = repr(rounded.shape).encode() + rounded.tobytes()
            definition = hashlib.sha256(content).hexdigest()
        return hashlib.sha256(json.dumps([self.key, definition]).encode()).hexdigest()[:16]

    @property
    def accepted_hashes(self) -> Sequence[str]:
        """Definition hashes under which stored values are those of this definition."""
        return (self.definition_hash, *self.earlier_hashes)


def pinned_inputs() -> dict[str, NDArray[Any]]:
    """Return two profiles that definitions are recognised by, each variable of shape (2, points).

    Peaks of several widths on a curved background with counting noise, in double precision; in the
    second profile the points at both ends and a gap are without information. No random generator
    is used, as its numbers may change with its version.
    """
    x = np.linspace(0.0, 1.0, _POINTS)
    peaks = np.zeros(_POINTS)
    for centre, height, width in ((0.21, 0.8, 0.004), (0.48, 1.0, 0.006), (0.77, 0.4, 0.009)):
        peaks += height * np.exp(-0.5 * ((x - centre) / width) ** 2)
    signal = np.stack([peaks, 0.6 * peaks[::-1]]) + 0.2 + 0.1 * x**2
    sigma = 0.01 * np.sqrt(signal)
    noise = np.sin(np.arange(2 * _POINTS).reshape(2, _POINTS) ** 2 * 0.7)
    covered = np.ones(signal.shape, dtype=bool)
    for gap in (slice(0, 12), slice(300, 340), slice(630, None)):
        covered[1, gap] = False
    intensity = np.where(covered, signal + sigma * noise, 0.0)
    return {"intensity": intensity, "sigma": np.where(covered, sigma, 0.0), "covered": covered}


# deprecated: hashes of the functions' source text, which stored values of an earlier version carry
_SOURCE_HASHES = {
    "profile_minmax@1": "4b3bfd9ffa73aedd",
    "profile_cropped@1": "dcf51d0af6fc1473",
    "profile_sqrt_unit@1": "05e2f9ba2b40e70e",
    "profile_smoothed@1": "c023ab463c3015e3",
    "profile_background_subtracted@1": "36e25f93abfb23c0",
    "measured_aligned@1": "7071bccd1470c2ea",
}


def _pure(name: str, version: int, description: str, function: Function, *inputs: str) -> View:
    hashes = tuple(h for key, h in _SOURCE_HASHES.items() if key == f"{name}@{version}")
    variables = inputs or ("intensity",)
    return View(name, version, description, function, inputs=variables, earlier_hashes=hashes)


_MEASURED = "A measured profile, background off, between 0 and 1."
_DENSE = "Activations of the classifier's dense layer."
_LATENT = "Latent representation of the convolutional auto-encoder."

VIEWS: dict[str, View] = {
    view.key: view
    for view in (
        *(_pure(p.name, p.version, p.description, p.function) for p in PREPROCESSING.values()),
        _pure("measured_aligned", 1, _MEASURED, prepare_measured, "intensity", "sigma", "covered"),
        View("classifier_256", 1, _DENSE, model="classifier"),
        View("cae_latent", 1, _LATENT, model="caenn"),
    )
}
"""The views by ``name@version``. The functions are those of :mod:`bragg_data.preprocessing`."""


def view_of(name: str) -> View:
    """Return a view by ``name@version``, or the newest version of a name; else a `FeatureError`."""
    if name in VIEWS:
        return VIEWS[name]
    versions = [view for view in VIEWS.values() if view.name == name]
    if not versions:
        raise FeatureError(f"There is no feature view '{name}'. Known: {', '.join(VIEWS)}.")
    return max(versions, key=lambda view: view.version)


def inputs_of(view: View, dataset: xr.Dataset, rows: slice) -> list[NDArray[Any]]:
    """Return what a view's function takes of some samples, each of shape (n, points).

    Raises `FeatureError` if the data set does not have it.
    """
    missing = [name for name in view.inputs if name not in dataset]
    if missing:
        raise FeatureError(
            f"{view.key} is computed from {', '.join(view.inputs)}, and {dataset.attrs['tag']} has "
            f"no {', '.join(missing)}: it is a view of measured data sets, which python -m "
            f"pipelines.ingest writes."
        )
    return [dataset[name].isel(sample=rows).values for name in view.inputs]

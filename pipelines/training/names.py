"""Names of the models and what they can do, importable without the libraries that train them."""

from __future__ import annotations

from pathlib import Path

DEFAULT_STATE = Path("data/training")
"""Where the commands store checkpoints and cached profiles, relative to the working directory."""

FORESTS = ("forest", "integrated-forest")

CONDITIONAL = ("forest", "transfer", "deep")
"""Models with a regressor for each phase; a classifier decides the phase."""

ALL = (
    "classifier",
    "forest",
    "transfer",
    "deep",
    "multitask",
    "integrated-forest",
    "caenn",
    "guided",
)
"""The models of ``train all``, in this order: the class-conditional ones need a classifier."""

MODELS = (*ALL, "multitask-integer")
"""All models that are trained on a data set. The last is the paper's ablation."""

TRAINABLE = (*MODELS, "robust")
"""All models. The last is trained on simulated measurements (domain randomisation)."""

EXTRA_DATA_MODELS = tuple(name for name in MODELS if name not in FORESTS)
"""The models that can be trained on further data sets."""


class TrainError(ValueError):
    """A training that cannot be started as requested."""

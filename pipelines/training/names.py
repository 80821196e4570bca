"""Names of the models and what they can do, importable without the libraries that train them."""

from pathlib import Path

from pipelines.evaluation.names import INTEGER, ROBUST

DEFAULT_STATE = Path("data/training")
"""Where the commands store checkpoints and cached profiles, relative to the working directory."""

FORESTS = ("forest", "integrated-forest")

_CONDITIONAL = ("classifier", "forest", "transfer", "deep")
ALL = (*_CONDITIONAL, "multitask", "integrated-forest", "caenn", "guided")
"""The models of ``train all``, in this order: the class-conditional ones need a classifier."""

MODELS = (*ALL, INTEGER)
"""All models that are trained on a data set. The last is the paper's ablation."""

TRAINABLE = (*MODELS, ROBUST)
"""All models. The last is trained on simulated measurements (domain randomisation)."""

EXTRA_DATA_MODELS = tuple(name for name in MODELS if name not in FORESTS)
"""The models that can be trained on further data sets."""


class TrainError(ValueError):
    """A training that cannot be started as requested."""

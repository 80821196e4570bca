"""Names of the models and what they can do, importable without the libraries that train them."""

from pathlib import Path

from pipelines.evaluation.names import INTEGER, MEASURED

# Where the commands store checkpoints and cached profiles, relative to the working directory.
DEFAULT_STATE = Path("data/training")

FORESTS = ("forest", "integrated-forest")

_CONDITIONAL = ("classifier", "forest", "transfer", "deep")
# The models of ``train all``, in this order: the class-conditional ones need a classifier.
ALL = (*_CONDITIONAL, "multitask", "integrated-forest", "caenn", "guided")
# All models that are trained on a data set. The last is the paper's ablation.
MODELS = (*ALL, INTEGER)
# All models. The last are trained, or calibrated alone, on simulated measurements.
TRAINABLE = (*MODELS, *MEASURED)
# The models that can be trained on further data sets.
EXTRA_DATA_MODELS = tuple(name for name in MODELS if name not in FORESTS)


class TrainError(ValueError):
    """A training that cannot be started as requested."""

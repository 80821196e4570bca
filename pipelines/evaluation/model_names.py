"""Names of the models in tables, and the commands that train them."""

from __future__ import annotations

CLASS_CONDITIONAL = ("forest", "transfer", "deep")
INTEGRATED = ("integrated-forest", "multitask", "caenn", "guided")
CLASSIFIER, INTEGER, ROBUST = "classifier", "multitask-integer", "robust"
MODELS = (CLASSIFIER, *CLASS_CONDITIONAL, *INTEGRATED, INTEGER)
"""The models that are trained on a data set, in the order of the tables."""

LABELS = {
    "forest": "forest (C1)",
    "transfer": "transfer learner (C2)",
    "deep": "deep regressor (C3)",
    "integrated-forest": "integrated forest",
    "caenn": "CAENN",
    "guided": "guided (ours)",
    "perceptron": "its proposal network alone",
    ROBUST: "robust (ours)",
    INTEGER: "multitask, class as integer",
}

CONSTANT, STRUCTURE = "constant", "structure"
NEAREST, NEAREST_MEAN, REFINED = "library", "library-mean", "refined"
"""Names of the baselines: constant cells, library matches, and whole-pattern refinement."""


def train_command(model: str, split: str) -> str:
    """Return the command that trains a model on a split's training part."""
    return f"python -m pipelines.train {model}" + ("" if split == "random" else f" --split {split}")

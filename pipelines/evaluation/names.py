"""Names of the models in tables, the commands that train them, and the paper's results."""

# Models with a regressor for each phase; a classifier decides the phase.
CLASS_CONDITIONAL = ("forest", "transfer", "deep")

INTEGRATED = ("integrated-forest", "multitask", "caenn", "guided")
CLASSIFIER, INTEGER, ROBUST, SEARCH = "classifier", "multitask-integer", "robust", "search"
MEASURED = (ROBUST, SEARCH)  # for measured profiles: tested on simulated measurements
# The models that are trained on a data set, in the order of the tables.
MODELS = (CLASSIFIER, *CLASS_CONDITIONAL, *INTEGRATED, INTEGER)

LABELS = {
    "forest": "forest (C1)",
    "transfer": "transfer learner (C2)",
    "deep": "deep regressor (C3)",
    "integrated-forest": "integrated forest",
    "caenn": "CAENN",
    "guided": "guided (ours)",
    "perceptron": "its proposal network alone",
    ROBUST: "robust (ours)",
    SEARCH: "search (ours)",
    INTEGER: "multitask, class as integer",
}

CONSTANT, STRUCTURE = "constant", "structure"
# Names of the baselines: constant cells, library matches, and whole-pattern refinement.
NEAREST, NEAREST_MEAN, REFINED = "library", "library-mean", "refined"
# The paper's results, in Å² + rad² (mse_paper, its equation 1), are for this campaign alone.
PAPER_CAMPAIGN = "batio3-nomad"

TABLE_II = {  # class-conditional models on the synthetic test set, by crystal system
    "forest": {"cubic": 1.20e-6, "trigonal": 8.14e-4, "tetragonal": 5.84e-6},
    "transfer": {"cubic": 4.71e-4, "trigonal": 1.01e-2, "tetragonal": 5.18e-4},
    "deep": {"cubic": 1.00e-5, "trigonal": 1.40e-5, "tetragonal": 2.60e-5},
}

# Integrated models on the synthetic test set.
TABLE_III = {"integrated-forest": 1.48e-4, "multitask": 1.90e-5, "caenn": 5.96e-6}

TEST_SAMPLES = 41_824  # size of the synthetic test set (section V-B)

TABLE_IV = {  # class-conditional models on the 15 measured profiles, by crystal system
    "forest": {"trigonal": 6.30e-2, "tetragonal": 1.08e-2},
    "transfer": {"trigonal": 1.91e-1, "tetragonal": 3.08e-2},
    "deep": {"trigonal": 6.75e-2, "tetragonal": 3.08e-4},
}

# Integrated models on the 15 measured profiles.
TABLE_V = {"integrated-forest": 1.17e-1, "multitask": 1.23e-3, "caenn": 2.00e-3}

EQUATION_1 = (
    "mse_paper is eq. (1) of the paper: squared errors of a, c (Å²) and alpha (rad²) added. "
    "MAE: over the samples in which the parameter is free."
)


class EvaluateError(ValueError):
    """An evaluation that is not possible as requested."""


def train_command(model: str, split: str) -> str:
    """Return the command that trains a model on a split's training part."""
    return f"python -m pipelines.train {model}" + ("" if split == "random" else f" --split {split}")

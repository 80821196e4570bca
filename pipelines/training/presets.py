"""How each network and each forest is trained, by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bragg_models.forest import ForestSettings
from bragg_models.training.settings import FitSettings
from pipelines.training.names import FORESTS, TrainError

_MINMAX, _CROPPED, _ROOT = "profile_minmax@1", "profile_cropped@1", "profile_sqrt_unit@1"


@dataclass(frozen=True)
class Preset:
    """Settings of the training of a network."""

    stages: Mapping[str, FitSettings]  # of the fit for each stage of the training, by name
    # Values of the network's configuration other than the defaults.
    network: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: str = _ROOT  # name and version of the function that prepares the profiles
    training_samples: int | None = None  # chosen at random, rare phases whole; None is all
    # Where the length of an epoch is fixed: how often, at most, a sample occurs in it on average.
    max_passes: int = 40
    max_seconds: float | None = None  # after which the fit stops even if it is not finished
    training_draws: int = 0  # simulated measurements of each phase
    calibration_draws: int = 0


# Tried on one pass over patterns like the campaign's: drawn as they come, half of the rare cubic
# samples are mistaken and mse_paper is 2e-3. Balanced, with a faster learning rate that runs down
# to zero and more weight on the regression, it is about 2e-4. Square-rooted profiles, brought to
# the size of one, then halve the errors once more; the weak peaks are many.
_QUICK = FitSettings(
    epochs=2,
    batch_size=128,
    learning_rate=2e-3,
    schedule="one_cycle",
    balance=1 / 3,
    regression_weight=10.0,
)
_PROPOSAL = replace(_QUICK, epochs=4, batch_size=256)
# Of the trigonal deep regressor on validation samples: 2.2e-6, on profiles scaled to [0, 1] 5.0e-6.
_REGRESSOR = replace(_QUICK, epochs=8, balance=None, samples_per_epoch=60_000)
_HEAD = replace(_PROPOSAL, epochs=40, balance=None, samples_per_epoch=40_000)
# Section IV-A, which names no number of epochs: "each mini-batch … 30 examples from each".
_PAPER_CLASSIFIER = FitSettings(
    epochs=100,
    batch_size=90,
    learning_rate=1e-3,
    weight_decay=5e-3,
    optimizer="sgd",
    momentum=0.9,
    balance=0.0,
)
# Section V-B2: 500 epochs of 800 of each system, the cubic ones with replacement.
_PAPER = FitSettings(
    epochs=500, batch_size=512, learning_rate=1e-3, balance=0.0, samples_per_epoch=2400
)
_PAPER_SINGLE = Preset(
    {"regressor": replace(_PAPER, balance=None, samples_per_epoch=None)}, {}, _MINMAX
)
# Section V-B3: the same 34,100 patterns for both stages.
_PAPER_AUTOENCODER = FitSettings(epochs=250, batch_size=20, learning_rate=1e-3)
_PAPER_ON_CODES = replace(
    _PAPER_AUTOENCODER, epochs=500, weight_decay=1e-4, schedule="steps", milestones=(100, 250, 400)
)
_SCALE = {"scale": 50.0}  # of unit norm a value is about 1/√points
_WIDE, _DEEP = {"dense": [512, 256]}, {"dense": [256]}


def _caenn(autoencoder: FitSettings, regressor: FitSettings, **more: Any) -> Preset:
    stages = {"autoencoder": autoencoder, "regressor": regressor}
    return Preset(stages, **({"network": {**_WIDE, **_SCALE}} | more))


# In points: where known cells are sparse, searches find minima from 30 points away (a hundredth of
# a d-spacing on most grids) that they miss with 5 alone: docs/explanation/models.md.
_BLURS = (30.0, 12.0, 5.0)
# Values of the network's configuration with which a search starts from known cells.
SEARCH_NETWORK: Mapping[str, Any] = {
    "pooling": None,
    "blurs": _BLURS,
    "lorentzian": True,
    # Of hydroxyapatite on NOMAD, 386 lines, most of which overlap, errors fall from 3.8e-4 to
    # 0.5e-4; 4 terms leave 0.7e-4, 16 are no better.
    "background_terms": 8,
}


def _proposal(epochs: int) -> Mapping[str, FitSettings]:
    return {"proposal": replace(_PROPOSAL, epochs=epochs)}


_MULTITASK = {
    # Reading, validation and testing come to the time of the fit: under three minutes.
    "quick": Preset({"multitask": _QUICK}, _SCALE, max_seconds=130.0),
    "standard": Preset({"multitask": replace(_QUICK, epochs=6)}, _SCALE),
    "paper": Preset({"multitask": _PAPER}, {}, _MINMAX),
}

# Settings of the networks, by model and preset. On two cores ``quick`` takes minutes (of the robust
# network one, and ``standard`` four); ``paper`` has the paper's settings.
PRESETS: Mapping[str, Mapping[str, Preset]] = {
    "classifier": {
        "quick": Preset(
            {"classifier": replace(_QUICK, epochs=1, samples_per_epoch=80_000)}, _SCALE
        ),
        "standard": Preset({"classifier": replace(_QUICK, epochs=3)}, _SCALE),
        "paper": Preset({"classifier": _PAPER_CLASSIFIER}, {}, _MINMAX),
    },
    "transfer": {
        "quick": Preset({"regressor": replace(_HEAD, epochs=10)}, _WIDE),
        "standard": Preset({"regressor": _HEAD}, _WIDE),
        "paper": _PAPER_SINGLE,
    },
    "deep": {
        "quick": Preset(
            {"regressor": replace(_REGRESSOR, epochs=2, samples_per_epoch=30_000)}, _DEEP
        ),
        "standard": Preset({"regressor": _REGRESSOR}, _DEEP),
        "paper": _PAPER_SINGLE,
    },
    "multitask": _MULTITASK,
    "multitask-integer": {
        name: replace(preset, network={**preset.network, "integer": True})
        for name, preset in _MULTITASK.items()
    },
    "caenn": {
        "quick": _caenn(replace(_PROPOSAL, epochs=1, samples_per_epoch=20_000), _PROPOSAL),
        "standard": _caenn(
            replace(_PROPOSAL, epochs=3, samples_per_epoch=40_000), replace(_PROPOSAL, epochs=20)
        ),
        "paper": _caenn(
            _PAPER_AUTOENCODER,
            _PAPER_ON_CODES,
            network={},
            preprocessing=_CROPPED,
            training_samples=34_100,
        ),
    },
    "guided": {"quick": Preset(_proposal(4)), "standard": Preset(_proposal(12))},
    "search": {
        name: Preset(
            {},
            {"pooling": None, "blurs": _BLURS, "lorentzian": True, "intensities": True},
            calibration_draws=draws,
        )
        for name, draws in (("quick", 300), ("standard", 3000))
    },
    # Systems right on 9,000 draws, by the proposal network alone: 96.4 % after 24 epochs of 25,000
    # draws of each phase, 97.0 % after 6 epochs of 50,000, and 97.4 % from means of two points.
    "robust": {
        "quick": Preset(_proposal(6), {"pooling": 2}, training_draws=6000, calibration_draws=300),
        "standard": Preset(
            _proposal(6), {"pooling": 2}, training_draws=50_000, calibration_draws=3000
        ),
    },
}


@dataclass(frozen=True)
class Search:
    """Candidates of a search (values by the name of a forest's setting), and its validation."""

    candidates: Mapping[str, tuple[float | int | bool, ...]] = field(
        default_factory=lambda: {"max_features": (1.0,)}
    )
    folds: int = 2
    trial_trees: int = 2  # of a forest in a fold: a few rank the candidates


@dataclass(frozen=True)
class ForestPreset:
    """How the forests of a campaign are grown."""

    preprocessing: str  # name and version of the function that prepares the profiles
    by_system: Mapping[str, ForestSettings]  # class-conditional, by the crystal system's name
    other: ForestSettings  # class-conditional, of the other crystal systems
    integrated: ForestSettings
    search: Search  # what the method "search" chooses among


# Tried on trigonal test samples with 6,500 to learn from, mse_paper_free: 1.4e-3 by the paper's
# settings (12 trees); with 20 to 24 extremely randomised trees 1.7e-4 from the points at which the
# cumulated intensity reaches 32 shares, and 3e-5 from smoothed profiles, a third of what ordinary
# random forests make of those. More samples then do more than more trees of the same size.
_EXTRA = ForestSettings(trees=16, extra=True, bootstrap=False)
FOREST_PRESETS: dict[str, ForestPreset] = {  # how forests are grown, by name
    # All forests in two to three minutes on two cores.
    "quick": ForestPreset(
        "profile_smoothed@1",
        {"tetragonal": replace(_EXTRA, samples=40_000)},
        replace(_EXTRA, samples=20_000),
        replace(_EXTRA, trees=12, samples=60_000),
        Search(),
    ),
    # Good results in ten minutes on two cores, 150 MB.
    "standard": ForestPreset(
        "profile_smoothed@1",
        {"cubic": replace(_EXTRA, trees=100), "trigonal": replace(_EXTRA, trees=24)},
        replace(_EXTRA, trees=12),
        replace(_EXTRA, trees=12),
        Search({"max_features": (0.5, 1.0)}),
    ),
    # Section V-B1: hours on two cores. The paper does not say how many features a split chooses
    # among, nor the least number of samples in a leaf: scikit-learn's defaults (all, and one).
    "paper": ForestPreset(
        "profile_cropped@1",
        {
            "cubic": ForestSettings(trees=150, samples=792),
            "trigonal": ForestSettings(trees=200, samples=6_500),
            "tetragonal": ForestSettings(trees=200, samples=20_500),
        },
        ForestSettings(trees=200, samples=20_500),
        ForestSettings(trees=250, samples=27_800),
        Search(trial_trees=1),
    ),
}


@dataclass(frozen=True)
class Presets:
    """The presets that can be chosen, and the sizes of the tests on simulated measurements."""

    # By the name of the model and of the preset.
    networks: Mapping[str, Mapping[str, Preset]] = field(default_factory=lambda: PRESETS)
    forests: Mapping[str, ForestPreset] = field(default_factory=lambda: FOREST_PRESETS)
    # Simulated measurements of each phase that models for measured profiles are tested on, and
    # that every model is scored on: the guided network's search takes a second for each of these.
    test_draws: int = 300
    comparison_draws: int = 20
    foreign_draws: int = 100  # of each compound that a campaign does not hold

    def check(self, model: str, preset: str) -> None:
        """Refuse, with a `TrainError` that names those it has, a preset that a model lacks."""
        known = self.forests if model in FORESTS else self.networks[model]
        if preset not in known:
            raise TrainError(
                f"There is no preset '{preset}' of {model}. Choose one of {', '.join(known)}."
            )

    def network(
        self, model: str, preset: str, epochs: int | None = None, max_seconds: float | None = None
    ) -> Preset:
        """Return a preset of a network; raises `TrainError` if there is none of that name.

        The number of epochs replaces that of each stage; 0 seconds stand for no limit.
        """
        self.check(model, preset)
        chosen = self.networks[model][preset]
        if epochs is not None:
            stages = {stage: replace(s, epochs=epochs) for stage, s in chosen.stages.items()}
            chosen = replace(chosen, stages=stages)
        if max_seconds is not None:
            chosen = replace(chosen, max_seconds=max_seconds or None)
        return chosen


DEFAULT_PRESETS = Presets()

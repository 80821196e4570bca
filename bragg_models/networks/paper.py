"""The paper's networks, each with a configuration of plain values.

:func:`bragg_models.predictors.build` makes them by name. All return the logits of the phases,
(n, n_phases), whose softmax is the probability of each phase, and the cell parameters,
(n, n_parameters), scaled as by :class:`~bragg_models.targets.Targets`, of prepared profiles
(n, points).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

_SHARPNESS = 100.0  # of the probabilities of a phase that is regressed as an integer


class NetworkError(ValueError):
    """A configuration from which no network can be built."""


@dataclass(frozen=True)
class MultitaskConfig:
    """The paper's network (section IV-A) with two heads (section IV-C).

    ``phases`` and ``parameters`` are the outputs of the classifier and of the regressor; without
    parameters it is a classifier.
    """

    points: int
    phases: int
    parameters: int
    filters: tuple[int, int] = (16, 32)  # of the two convolutions; a max-pool of 2 follows each
    kernels: tuple[int, int] = (3, 4)
    strides: tuple[int, int] = (1, 2)
    hidden: int = 256  # width of the dense layer that both heads share
    integer: bool = False  # the phase is regressed as one number, its code, and rounded
    scale: float = 1.0  # factor by which profiles are multiplied


class Features(nn.Module):
    """The paper's feature learner: two convolutions and a dense layer (section IV-A).

    The paper's text names no activation after the convolutions, the authors' later code has one.
    Here a ReLU follows each (after the pooling, which gives the same result and is cheaper).
    """

    def __init__(self, config: MultitaskConfig) -> None:
        super().__init__()
        self.scale = config.scale
        first, second = config.filters
        # Convolutions over the points as images of one line, stored with the channels last: on a
        # CPU this takes less than half the time of Conv1d and MaxPool1d.
        self.maps = _pooled(
            nn.Conv2d(1, first, (1, config.kernels[0]), (1, config.strides[0])),
            nn.Conv2d(first, second, (1, config.kernels[1]), (1, config.strides[1])),
        )
        length = config.points
        for kernel, stride in zip(config.kernels, config.strides, strict=True):
            length = ((length - kernel) // stride + 1) // 2
        if length < 1:
            raise NetworkError(
                f"A profile of {config.points} points is too short for this network's "
                f"convolutions. Use a finer grid."
            )
        self.dense = nn.Sequential(*dense((length * second, config.hidden), nn.ReLU))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, profiles: Tensor) -> Tensor:
        """Return the features of profiles, shape (n, points), as shape (n, hidden)."""
        images = (profiles * self.scale)[:, None, None, :]
        images = images.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.dense(self.maps(images).permute(0, 2, 3, 1).flatten(1))
        return features


class Multitask(nn.Module):
    """The paper's integrated multitask network, or, without the regression head, its classifier.

    The paper starts from the trained classifier; here both heads are trained together from the
    beginning, unless the features of a classifier are loaded before.
    """

    def __init__(self, config: MultitaskConfig) -> None:
        super().__init__()
        self.config = config
        self.features = Features(config)
        self.phase = nn.Linear(config.hidden, 1 if config.integer else config.phases)
        self.cell = nn.Linear(config.hidden, config.parameters) if config.parameters else None

    def forward(self, profiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and scaled parameters; see the module."""
        phase, values = self.raw_outputs(profiles)
        return (rounded(phase, self.config.phases) if self.config.integer else phase), values

    def raw_outputs(self, profiles: Tensor) -> tuple[Tensor, Tensor]:
        """As forward, but with the regressed code, shape (n, 1), if the phase is an integer."""
        hidden = self.features(profiles)
        return self.phase(hidden), hidden[:, :0] if self.cell is None else self.cell(hidden)


@dataclass(frozen=True)
class ConditionalConfig:
    """A classifier, and a regressor for each phase (section IV-B)."""

    classifier: MultitaskConfig  # without parameters
    free: tuple[tuple[int, ...], ...]  # for each phase, columns of the parameters free in it
    parameters: int  # number that are free in any phase
    dense: tuple[int, ...] = ()  # widths of the regressors' hidden layers, on top of the features
    # Each regressor has its own feature learner (the paper's deep regressor), or all use the
    # classifier's, frozen (its transfer learner).
    separate_features: bool = False


class Conditional(nn.Module):
    """The paper's class-conditional networks: a classifier, then the regressor of its phase."""

    def __init__(self, config: ConditionalConfig) -> None:
        super().__init__()
        self.config = config
        phases, columns = config.classifier.phases, range(config.parameters)
        unknown = [k for free in config.free for k in free if k not in columns]
        if len(config.free) != phases or unknown:
            raise NetworkError(
                f"The free columns {config.free} do not fit {phases} phases and "
                f"{config.parameters} parameters. Name the free columns of each phase."
            )
        self.classifier = Multitask(config.classifier)
        widths = config.classifier.hidden, *config.dense
        self.heads = nn.ModuleList(_regressor((*widths, len(free))) for free in config.free)
        self.features = nn.ModuleList(
            Features(config.classifier) for _ in config.free if config.separate_features
        )

    def regressor(self, code: int) -> nn.Module:
        """Return the trained part of a phase: from profiles, or from frozen features, to values."""
        head = self.heads[code]
        return nn.Sequential(self.features[code], head) if self.config.separate_features else head

    def forward(self, profiles: Tensor, phase: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits, and the parameters of the most probable phases or of known ones (n,).

        Parameters that are not free are zero.
        """
        hidden = self.classifier.features(profiles)
        logits = self.classifier.phase(hidden)
        chosen = logits.argmax(dim=1) if phase is None else phase
        values = torch.zeros(len(profiles), self.config.parameters, device=profiles.device)
        for code, free in enumerate(self.config.free):
            rows = torch.nonzero(chosen == code)[:, 0]
            if len(rows) and free:
                inputs = profiles[rows] if self.config.separate_features else hidden[rows]
                columns = torch.tensor(free, device=values.device)
                values[rows[:, None], columns] = self.regressor(code)(inputs).float()
        return logits, values


@dataclass(frozen=True)
class CaennConfig:
    """The paper's convolutional auto-encoder with a dense regressor (section V-B3)."""

    points: int
    phases: int
    parameters: int
    # Of the encoder's two convolutions; the decoder mirrors them, with separate weights.
    filters: tuple[int, int] = (9, 2)
    kernels: tuple[int, int] = (15, 7)
    dense: tuple[int, ...] = (150, 70, 20)  # widths of the regressor's hidden layers
    scale: float = 1.0  # factor by which profiles are multiplied


class Autoencoder(nn.Module):
    """The paper's convolutional auto-encoder: two layers each way, to a quarter of the points.

    Profiles are padded so that the decoder's output has their length; the paper does not specify
    how. Its decoder mirrors the encoder: each pooling becomes a repetition of points.
    """

    def __init__(self, config: CaennConfig) -> None:
        super().__init__()
        if any(kernel % 2 == 0 for kernel in config.kernels):
            raise NetworkError(
                f"Kernels of {config.kernels} points would change the length of the profile. Use "
                f"odd numbers of points."
            )
        self.points, self.scale = config.points, config.scale
        self.padding = -config.points % 4
        (first, second), (wide, narrow) = config.filters, config.kernels
        self.latent = second * (config.points + self.padding) // 4

        def convolution(inputs: int, outputs: int, kernel: int) -> nn.Module:
            return nn.Conv2d(inputs, outputs, (1, kernel), padding=(0, kernel // 2))

        self.encoder = _pooled(convolution(1, first, wide), convolution(first, second, narrow))
        self.decoder = nn.Sequential(
            nn.Upsample(scale_factor=(1, 2)),
            convolution(second, first, narrow),
            nn.ReLU(),
            nn.Upsample(scale_factor=(1, 2)),
            convolution(first, 1, wide),
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, profiles: Tensor) -> Tensor:
        """Return the latent representation of profiles (n, points), shape (n, latent)."""
        padded = nn.functional.pad(profiles * self.scale, (0, self.padding))
        images = padded[:, None, None, :].contiguous(memory_format=torch.channels_last)
        latent: Tensor = self.encoder(images).flatten(1)
        return latent

    def forward(self, profiles: Tensor) -> Tensor:
        """Return profiles (n, points) reconstructed from the latent representation, same shape."""
        latent = self.encode(profiles)
        second = self.latent * 4 // (self.points + self.padding)
        maps = latent.reshape(len(profiles), second, 1, -1)
        decoded: Tensor = self.decoder(maps)[:, 0, 0, : self.points]
        return decoded / self.scale


class Caenn(nn.Module):
    """The paper's CAENN: phase, as an integer, and cell regressed from the latent representation.

    The loss counts parameters where they are free; the paper regresses all for every sample.
    """

    def __init__(self, config: CaennConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = Autoencoder(config)
        self.regressor = IntegerRegressor(self.autoencoder.latent, config)

    def forward(self, profiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and scaled parameters; see the module."""
        logits, values = self.regressor(self.autoencoder.encode(profiles))
        return logits, values


class IntegerRegressor(nn.Module):
    """Dense layers from features to the code of the phase and the scaled parameters."""

    def __init__(self, inputs: int, config: CaennConfig) -> None:
        super().__init__()
        self.phases = config.phases
        self.layers = _regressor((inputs, *config.dense, 1 + config.parameters))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the phases and the scaled parameters."""
        code, values = self.raw_outputs(features)
        return rounded(code, self.phases), values

    def raw_outputs(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the regressed code, shape (n, 1), and the scaled parameters."""
        outputs = self.layers(features)
        return outputs[:, :1], outputs[:, 1:]


class Encoding(nn.Module):
    """The encoder of an auto-encoder alone."""

    def __init__(self, coder: Autoencoder) -> None:
        super().__init__()
        self.coder = coder

    def forward(self, profiles: Tensor) -> Tensor:
        """Return the latent representation of profiles (n, points), shape (n, latent)."""
        return self.coder.encode(profiles)


def feature_network(model: object) -> nn.Module | None:
    """Return the feature learner of a network, from prepared profiles (n, points) to (n, m).

    The dense layer of a network with heads, the latent representation of one with an auto-encoder;
    None for others.
    """
    if isinstance(model, Conditional):
        model = model.classifier
    if isinstance(model, Multitask):
        return model.features
    return Encoding(model.autoencoder) if isinstance(model, Caenn) else None


def rounded(code: Tensor, phases: int) -> Tensor:
    """Return logits (n, phases) whose maximum is the regressed code (n, 1), rounded.

    A regressed integer has no probabilities; the softmax of these logits is close to 1 for the
    nearest code.
    """
    return -_SHARPNESS * (code.float() - torch.arange(phases, device=code.device)) ** 2


def dense(widths: tuple[int, ...], activation: type[nn.Module]) -> list[nn.Module]:
    """Return dense layers of these widths, inputs first, each followed by an activation."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return layers


def _pooled(*convolutions: nn.Module) -> nn.Sequential:
    layers = [layer for c in convolutions for layer in (c, nn.MaxPool2d((1, 2)), nn.ReLU())]
    return nn.Sequential(*layers)


def _regressor(widths: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(*dense(widths, nn.ReLU)[:-1])

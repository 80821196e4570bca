"""Neural networks, each described by one dataclass of plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bragg_models.guided import Guided, read_config


class NetworkError(ValueError):
    """A description of a network that cannot be built."""


@dataclass(frozen=True)
class MultitaskConfig:
    """The paper's network (section IV-A) with two heads (section IV-C).

    Attributes
    ----------
    points
        Points of a profile.
    phases, parameters
        Outputs of the classifier and of the regressor.
    filters, kernels, strides
        Of the two convolutions; a max-pool of 2 follows each.
    hidden
        Width of the dense layer that both heads share.
    """

    points: int
    phases: int
    parameters: int
    filters: tuple[int, int] = (16, 32)
    kernels: tuple[int, int] = (3, 4)
    strides: tuple[int, int] = (1, 2)
    hidden: int = 256


class Multitask(nn.Module):
    """The paper's integrated multitask network.

    Notes
    -----
    The paper's text names no activation after the convolutions, the authors' later code has one;
    here a ReLU follows each (after the pooling, which is the same and cheaper). The paper starts
    from the trained classifier; here both heads are trained together from the beginning.
    """

    def __init__(self, config: MultitaskConfig) -> None:
        super().__init__()
        self.config = config
        first, second = config.filters
        # Convolutions over the points as images of one line, stored with the channels last: on a
        # CPU this takes less than half the time of Conv1d and MaxPool1d.
        self.features = nn.Sequential(
            nn.Conv2d(1, first, (1, config.kernels[0]), (1, config.strides[0])),
            nn.MaxPool2d((1, 2)),
            nn.ReLU(),
            nn.Conv2d(first, second, (1, config.kernels[1]), (1, config.strides[1])),
            nn.MaxPool2d((1, 2)),
            nn.ReLU(),
        )
        length = config.points
        for kernel, stride in zip(config.kernels, config.strides, strict=True):
            length = ((length - kernel) // stride + 1) // 2
        if length < 1:
            raise NetworkError(
                f"A profile of {config.points} points is too short for this network's "
                f"convolutions. Use a finer grid."
            )
        self.dense = nn.Sequential(nn.Linear(length * second, config.hidden), nn.ReLU())
        self.phase = nn.Linear(config.hidden, config.phases)
        self.cell = nn.Linear(config.hidden, config.parameters)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, profiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the phases, and the scaled cell parameters.

        Parameters
        ----------
        profiles : shape (n, points)
            Prepared profiles.

        Returns
        -------
        logits : shape (n, n_phases)
            Their softmax is the probability of each phase.
        values : shape (n, n_parameters)
            Scaled as by :class:`~bragg_models.targets.Targets`.
        """
        images = profiles[:, None, None, :].contiguous(memory_format=torch.channels_last)
        maps = self.features(images)
        hidden = self.dense(maps.permute(0, 2, 3, 1).flatten(1))
        return self.phase(hidden), self.cell(hidden)


_KINDS: dict[str, tuple[Callable[..., Any], type[nn.Module]]] = {
    "multitask": (MultitaskConfig, Multitask),
    "guided": (read_config, Guided),
}


def build(kind: str, config: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Return a network with seeded initial weights.

    Parameters
    ----------
    kind
        ``multitask`` or ``guided``.
    config
        Values of its dataclass, as plain JSON values.
    seed
        Of the initial weights. The global generator of torch is left as it was.

    Raises
    ------
    NetworkError
        If the kind is not known or the values do not fit it.
    """
    if kind not in _KINDS:
        raise NetworkError(f"There is no network '{kind}'. Choose one of {', '.join(_KINDS)}.")
    read, network_type = _KINDS[kind]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    try:
        described = read(**values)
    except TypeError as error:
        raise NetworkError(f"The description of a {kind} network does not fit: {error}.") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network_type(described)

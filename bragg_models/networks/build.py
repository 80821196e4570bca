"""Build a network by name, from the plain values that are saved with a model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bragg_models.networks import guided_config, paper
from bragg_models.networks.cell_search import Perceptron
from bragg_models.networks.guided import Guided
from bragg_models.networks.guided_config import guided_config_from_json, with_tuples
from bragg_models.networks.robust import Robust


def _conditional_config(
    *, classifier: Mapping[str, Any], free: list[list[int]], **values: Any
) -> paper.ConditionalConfig:
    if "own_features" in values:  # deprecated key
        values["separate_features"] = values.pop("own_features")  # deprecated key
    columns = tuple(map(tuple, free))
    multitask = paper.MultitaskConfig(**with_tuples(classifier))
    return paper.ConditionalConfig(multitask, columns, **values)


_KINDS: Mapping[str, tuple[Callable[..., Any], type[nn.Module]]] = {
    "multitask": (paper.MultitaskConfig, paper.Multitask),
    "conditional": (_conditional_config, paper.Conditional),
    "caenn": (paper.CaennConfig, paper.Caenn),
    "perceptron": (guided_config.PerceptronConfig, Perceptron),
    "guided": (guided_config_from_json, Guided),
    "robust": (guided_config_from_json, Robust),
}


def build(kind: str, config: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Return a network of a kind, from plain JSON values, with seeded initial weights.

    The global generator of torch is not changed. Raises `NetworkError` if the kind is unknown or
    the values do not fit it.
    """
    if kind not in _KINDS:
        raise paper.NetworkError(
            f"There is no network '{kind}'. Choose one of {', '.join(_KINDS)}."
        )
    read, network_type = _KINDS[kind]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return network_type(read(**with_tuples(config)))
    except paper.NetworkError:
        raise
    # Plain JSON may hold anything, at any depth.
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise paper.NetworkError(
            f"The configuration of a {kind} network is invalid: {error}."
        ) from error

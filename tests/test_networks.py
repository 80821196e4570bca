"""The paper's network: its layers, counted by hand, and its arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bragg_models.networks import NetworkError, build

PAPER = {"points": 2807, "phases": 3, "parameters": 3}


def test_weights_are_those_of_the_paper_s_layers() -> None:
    network = build("multitask", PAPER)
    # 2807 points -> 2805 -> 1402 -> (1402 - 4) / 2 + 1 = 700 -> 350, of 32 filters.
    first, second = 16 * 3 + 16, 32 * 16 * 4 + 32
    dense, heads = 350 * 32 * 256 + 256, 2 * (256 * 3 + 3)
    assert sum(p.numel() for p in network.parameters()) == first + second + dense + heads


def test_it_computes_what_one_dimensional_layers_would() -> None:
    network = build("multitask", {**PAPER, "points": 301}, seed=4)
    weights = network.state_dict()
    one = nn.Conv1d(1, 16, 3)
    two = nn.Conv1d(16, 32, 4, stride=2)
    with torch.no_grad():
        for layer, name in ((one, "features.0"), (two, "features.3")):
            layer.weight.copy_(weights[f"{name}.weight"][:, :, 0])
            layer.bias.copy_(weights[f"{name}.bias"])
        x = torch.rand(5, 301, generator=torch.Generator().manual_seed(0))
        # ReLU straight after each convolution, as in the authors' code.
        maps = nn.functional.max_pool1d(torch.relu(one(x[:, None])), 2)
        maps = nn.functional.max_pool1d(torch.relu(two(maps)), 2)
        flat = maps.transpose(1, 2).flatten(1)
        hidden = torch.relu(flat @ weights["dense.0.weight"].T + weights["dense.0.bias"])
        wanted = hidden @ weights["phase.weight"].T + weights["phase.bias"]
        logits, values = network(x)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    assert values.shape == (5, 3)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build("multitask", PAPER, seed=3).state_dict()
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    same = build("multitask", PAPER, seed=3).state_dict()
    other = build("multitask", PAPER, seed=4).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["phase.weight"], other["phase.weight"])
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is untouched


def test_bad_descriptions_are_refused() -> None:
    with pytest.raises(NetworkError, match="Choose one of multitask"):
        build("transformer", PAPER)
    with pytest.raises(NetworkError, match="does not fit"):
        build("multitask", {**PAPER, "layers": 3})
    with pytest.raises(NetworkError, match="finer grid"):
        build("multitask", {**PAPER, "points": 9})

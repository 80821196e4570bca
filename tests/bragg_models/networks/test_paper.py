"""The paper's networks: their layers, counted by hand, and their arithmetic."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bragg_models.networks.paper import Caenn, Conditional, NetworkError, rounded
from bragg_models.predictors import build

torch.set_num_threads(1)

PAPER = {"points": 2807, "phases": 3, "parameters": 3}


def test_weights_are_those_of_the_paper_s_layers() -> None:
    network = build("multitask", PAPER)
    # 2807 points -> 2805 -> 1402 -> (1402 - 4) / 2 + 1 = 700 -> 350, of 32 filters.
    first, second = 16 * 3 + 16, 32 * 16 * 4 + 32
    dense, heads = 350 * 32 * 256 + 256, 2 * (256 * 3 + 3)
    assert sum(p.numel() for p in network.parameters()) == first + second + dense + heads


def test_outputs_equal_those_of_conv1d_layers() -> None:
    network = build("multitask", {**PAPER, "points": 301}, seed=4)
    weights = network.state_dict()
    first = nn.Conv1d(1, 16, 3)
    second = nn.Conv1d(16, 32, 4, stride=2)
    with torch.no_grad():
        for layer, name in ((first, "maps.0"), (second, "maps.3")):
            layer.weight.copy_(weights[f"features.{name}.weight"][:, :, 0])
            layer.bias.copy_(weights[f"features.{name}.bias"])
        x = torch.rand(5, 301, generator=torch.Generator().manual_seed(0))
        # ReLU straight after each convolution, as in the authors' code.
        maps = nn.functional.max_pool1d(torch.relu(first(x[:, None])), 2)
        maps = nn.functional.max_pool1d(torch.relu(second(maps)), 2)
        flat = maps.transpose(1, 2).flatten(1)
        dense = weights["features.dense.0.weight"], weights["features.dense.0.bias"]
        hidden = torch.relu(flat @ dense[0].T + dense[1])
        expected = hidden @ weights["phase.weight"].T + weights["phase.bias"]
        logits, values = network(x)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert values.shape == (5, 3)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build("multitask", PAPER, seed=3).state_dict()
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    same = build("multitask", PAPER, seed=3).state_dict()
    other = build("multitask", PAPER, seed=4).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["phase.weight"], other["phase.weight"])
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is untouched


FREE = [[0], [0, 1], [0, 2]]
CLASSIFIER = {**PAPER, "parameters": 0}
SHORT = {"points": 301, "phases": 3, "parameters": 3}
CONDITIONAL = {"classifier": {**SHORT, "parameters": 0}, "free": FREE, "parameters": 3}
FEATURES = 16 * 3 + 16 + 32 * 16 * 4 + 32 + 350 * 32 * 256 + 256  # of 2807 points


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def profiles_of(points: int, n: int = 6) -> torch.Tensor:
    return torch.rand(n, points, generator=torch.Generator().manual_seed(0))


def conditional(**changes: Any) -> Conditional:
    network = build("conditional", {**CONDITIONAL, **changes})
    assert isinstance(network, Conditional)
    return network


def test_a_classifier_is_the_same_without_the_cells() -> None:
    assert count(build("multitask", CLASSIFIER)) == FEATURES + 256 * 3 + 3
    logits, values = build("multitask", {**SHORT, "parameters": 0})(profiles_of(301))
    assert logits.shape == (6, 3)
    assert values.shape == (6, 0)


def test_weights_of_class_conditional_networks() -> None:
    described = {"classifier": CLASSIFIER, "free": FREE, "parameters": 3}
    classifier, heads = FEATURES + 256 * 3 + 3, 5 * 256 + 5
    assert count(build("conditional", described)) == classifier + heads
    deep = build("conditional", {**described, "separate_features": True})
    assert count(deep) == classifier + 3 * FEATURES + heads
    dense = build("conditional", {**described, "dense": [40, 20]})
    each = 256 * 40 + 40 + 40 * 20 + 20
    assert count(dense) == classifier + 3 * each + 5 * 20 + 5


def test_weights_of_the_auto_encoder_and_its_regressor() -> None:
    """On 2,496 points: 1,248 and 624 after the poolings, two filters: 1,248 latent numbers."""
    network = build("caenn", {**PAPER, "points": 2496})
    assert isinstance(network, Caenn)
    encoder = 9 * 15 + 9 + 2 * 9 * 7 + 2
    decoder = 9 * 2 * 7 + 9 + 9 * 15 + 1
    assert count(network.autoencoder) == encoder + decoder
    assert network.autoencoder.latent == 1248
    regressor = 1248 * 150 + 150 + 150 * 70 + 70 + 70 * 20 + 20 + 20 * 4 + 4
    assert count(network.regressor) == regressor
    assert count(network) == encoder + decoder + regressor


@pytest.mark.parametrize("separate_features", [False, True])
def test_each_phase_has_a_separate_regressor(separate_features: bool) -> None:
    network = conditional(separate_features=separate_features, dense=[8]).eval()
    profiles = profiles_of(301)
    phase = torch.tensor([0, 1, 2, 2, 1, 0])
    with torch.no_grad():
        logits, values = network(profiles, phase)
        unconditional, _ = network(profiles)
        assert torch.equal(logits, unconditional)  # known phases do not change the classifier
        for row, code in enumerate(phase.tolist()):
            profile = profiles[row : row + 1]
            features = profile if separate_features else network.classifier.features(profile)
            expected = network.regressor(code)(features)[0]
            np.testing.assert_allclose(values[row, FREE[code]], expected, atol=1e-6)
            tied = [column for column in range(3) if column not in FREE[code]]
            assert values[row, tied].abs().sum() == 0


def test_without_phases_the_most_probable_is_used() -> None:
    network = conditional().eval()
    profiles = profiles_of(301, 40)
    with torch.no_grad():
        network.classifier.phase.weight *= 30  # or an untrained one predicts the same for all
        network.classifier.phase.bias -= network(profiles)[0].mean(dim=0)
        logits, values = network(profiles)
        predicted = logits.argmax(dim=1)
        assert len(predicted.unique()) > 1
        assert torch.equal(network(profiles, predicted)[1], values)
        logits, values = network(profiles[:0])
    assert (logits.shape, values.shape) == ((0, 3), (0, 3))


def test_a_regressor_shares_no_weights_with_the_other_parts() -> None:
    for separate_features in (False, True):
        network = conditional(separate_features=separate_features)
        trained = {id(p) for p in network.regressor(1).parameters()}
        other_parts = [*network.classifier.parameters(), *network.heads[0].parameters()]
        other_parts += [p for f in network.features[:1] for p in f.parameters()]
        assert not trained & {id(p) for p in other_parts}


def test_an_integer_is_rounded_to_the_nearest_phase() -> None:
    codes = torch.tensor([[-3.0], [-0.4], [0.49], [0.51], [1.2], [1.6], [9.0]])
    logits = rounded(codes, 3)
    assert logits.argmax(dim=1).tolist() == [0, 0, 0, 1, 1, 2, 2]
    probabilities = logits.softmax(dim=1)
    assert torch.isfinite(probabilities).all()
    assert probabilities[[0, 1, 4, 5, 6]].amax(dim=1).min() > 0.999
    for kind in ("multitask", "caenn"):
        network = build(kind, {**SHORT, **({"integer": True} if kind == "multitask" else {})})
        with torch.no_grad():
            logits, values = network(profiles_of(301))
            regressor = network if kind == "multitask" else network.regressor
            inputs = profiles_of(301)
            if kind == "caenn":
                inputs = network.autoencoder.encode(inputs)
            code, same = regressor.raw_outputs(inputs)
        assert code.shape == (6, 1)
        assert torch.equal(logits, rounded(code, 3))
        assert torch.equal(values, same)


@pytest.mark.parametrize("points", [296, 297, 298, 299, 7])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_the_auto_encoder_returns_the_number_of_points_of_its_input(
    points: int, scale: float
) -> None:
    network = build("caenn", {**SHORT, "points": points, "scale": scale})
    assert isinstance(network, Caenn)
    coder = network.autoencoder
    with torch.no_grad():
        latent, decoded = coder.encode(profiles_of(points)), coder(profiles_of(points))
        assert latent.shape == (6, coder.latent) == (6, 2 * -(-points // 4))
        assert decoded.shape == (6, points)
        assert torch.equal(network(profiles_of(points))[1], network.regressor(latent)[1])


@pytest.mark.slow
def test_the_auto_encoder_can_be_trained() -> None:
    """Its decoder sees the latent maps in the order in which the encoder wrote them."""
    network = build("caenn", {**SHORT, "points": 90})
    assert isinstance(network, Caenn)
    position = torch.arange(90.0)
    centres = 10 + 70 * torch.rand(64, 1, generator=torch.Generator().manual_seed(0))
    profiles = torch.exp(-0.5 * ((position - centres) / 6) ** 2)
    optimizer = torch.optim.Adam(network.autoencoder.parameters(), 1e-2)
    losses = []
    for _ in range(150):
        loss = (network.autoencoder(profiles) - profiles).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_invalid_configurations_are_refused() -> None:
    with pytest.raises(NetworkError, match="Choose one of multitask"):
        build("transformer", PAPER)
    with pytest.raises(NetworkError, match="is invalid"):
        build("multitask", {**PAPER, "layers": 3})
    with pytest.raises(NetworkError, match="finer grid"):
        build("multitask", {**PAPER, "points": 9})
    with pytest.raises(NetworkError, match="Name the free columns of each phase"):
        build("conditional", {**CONDITIONAL, "free": FREE[:2]})
    with pytest.raises(NetworkError, match="Name the free columns of each phase"):
        build("conditional", {**CONDITIONAL, "free": [[0], [0, 1], [0, 3]]})
    with pytest.raises(NetworkError, match="Use odd numbers"):
        build("caenn", {**SHORT, "kernels": [14, 7]})


@pytest.mark.parametrize(
    ("kind", "described"),
    [
        ("multitask", {**PAPER, "points": "many"}),
        ("multitask", {**PAPER, "filters": [16]}),
        ("multitask", {**PAPER, "filters": 16}),
        ("multitask", {**PAPER, "hidden": -3}),
        ("multitask", [1, 2]),
        ("perceptron", {**PAPER, "hidden": None}),
        ("caenn", {**PAPER, "filters": [9, 2, 1]}),
        ("caenn", {**PAPER, "points": 800.5}),
        ("conditional", {key: CONDITIONAL[key] for key in ("classifier", "parameters")}),
        ("conditional", {key: CONDITIONAL[key] for key in ("free", "parameters")}),
        ("conditional", {**CONDITIONAL, "classifier": {"points": 301}}),
        ("conditional", {**CONDITIONAL, "classifier": None}),
        ("conditional", {**CONDITIONAL, "free": [0, 1, 2]}),
        ("guided", {}),
        ("guided", {"proposal": None, "pattern": {}}),
        ("guided", {"proposal": PAPER, "pattern": {"points": 2807}}),
        ("guided", {"proposal": PAPER, "pattern": {"points": 2807, "phases": [3]}}),
        ("guided", {"proposal": PAPER, "pattern": {"points": 2807, "phases": [{"free": [0]}]}}),
    ],
)
def test_any_invalid_value_is_reported_in_a_sentence(kind: str, described: Any) -> None:
    state = torch.random.get_rng_state()
    with pytest.raises(NetworkError, match=rf"^The configuration of a {kind} network is invalid"):
        build(kind, described)
    assert torch.equal(torch.random.get_rng_state(), state)


CAENN = {"points": 2496, "phases": 3, "parameters": 3}


def test_the_auto_encoder_is_the_paper_s() -> None:
    network = build("caenn", CAENN)
    encoder = 9 * 15 + 9 + 2 * 9 * 7 + 2
    decoder = 9 * 2 * 7 + 9 + 9 * 15 + 1
    coder = network.autoencoder
    assert sum(p.numel() for p in coder.parameters()) == encoder + decoder
    assert coder.latent == 2 * 2496 // 4
    with torch.no_grad():
        assert coder(torch.rand(2, 2496)).shape == (2, 2496)
        odd = build("caenn", {**CAENN, "points": 301})
        assert odd.autoencoder(torch.rand(2, 301)).shape == (2, 301)
        logits, values = odd(torch.rand(2, 301))
    assert logits.shape == (2, 3)
    assert values.shape == (2, 3)


def test_a_regressed_code_is_rounded() -> None:
    logits = rounded(torch.tensor([[-0.3], [0.6], [1.4], [2.9]]), 3)
    assert logits.argmax(dim=1).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("separate_features", [False, True])
def test_a_class_conditional_network_uses_the_regressor_of_the_phase(
    separate_features: bool,
) -> None:
    config = {
        "classifier": {**PAPER, "points": 301, "parameters": 0},
        "free": [[0], [0, 1], [0, 2]],
        "parameters": 3,
        "dense": [8],
        "separate_features": separate_features,
    }
    network = build("conditional", config, seed=1)
    profiles = torch.rand(6, 301, generator=torch.Generator().manual_seed(0))
    known = torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        logits, values = network(profiles, known)
        again, predicted = network(profiles)
        features = profiles if separate_features else network.classifier.features(profiles)
        trigonal = network.regressor(2)(features[2:3])
        _, expected = network(profiles, logits.argmax(dim=1))
    assert ((values != 0) == torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]] * 2).bool()).all()
    torch.testing.assert_close(values[2:3, [0, 2]], trigonal)
    torch.testing.assert_close(predicted, expected)
    torch.testing.assert_close(again, logits)
    with pytest.raises(NetworkError, match="Name the free columns"):
        build("conditional", {**config, "free": [[0], [7]]})
    # As saved by the previous version.
    old = {**config, "own_features": config["separate_features"]}  # deprecated key
    del old["separate_features"]
    assert build("conditional", old).config == network.config

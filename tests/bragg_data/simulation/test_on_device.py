import subprocess
import sys

import numpy as np
import pytest
import torch

from bragg_data.campaign import load_campaign
from bragg_data.crystallography.structure import read_phase
from bragg_data.instrument.instprm import TofGrid
from bragg_data.simulation.device import DeviceError
from bragg_data.simulation.kinematic import Simulator
from tests.bragg_data.crystallography.test_structure import RUTILE
from tests.bragg_data.simulation.test_kinematic import errors, reference  # noqa: F401

NEAR = 2e-6  # of the maximum: single precision


@pytest.fixture(scope="module")
def campaign():
    return load_campaign("batio3-nomad")


@pytest.fixture(scope="module")
def simulator(campaign):
    return Simulator(*campaign.setup)


@pytest.fixture(scope="module")
def on_device(campaign):
    return Simulator(*campaign.setup, device="cpu")


def samples(campaign, n):
    """Return phases in turn and cells, and values of every parameter."""
    rng = np.random.default_rng(n)
    phase = np.arange(n) % 3
    rows = [rng.choice(np.flatnonzero(campaign.samples.phase == code)) for code in phase]
    return (phase, campaign.samples.cells[rows]), {
        "u_scale": rng.uniform(0.7, 1.4, n),
        "size": rng.uniform(0.35, 2.0, n),
        "microstrain": rng.uniform(400, 2500, n),
        "tzero": rng.normal(campaign.instrument.tzero, 3, n),
        "difc": campaign.instrument.difc * (1 + rng.normal(0, 3e-4, n)),
        "width_scale": rng.uniform(0.95, 1.05, n),
    }


def agree(ours, theirs):
    assert ours.dtype == np.float32
    np.testing.assert_array_less(np.abs(ours - theirs).max(axis=1) / theirs.max(axis=1), NEAR)


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("kind", ["shared", "u_scale", "general"])
def test_tensors_give_the_patterns_of_the_compiled_loops(campaign, simulator, on_device, n, kind):
    rows, drawn = samples(campaign, n)
    of_kind = {"shared": {}, "u_scale": {"u_scale": drawn["u_scale"]}, "general": drawn}[kind]
    agree(on_device.simulate(*rows, **of_kind), simulator.simulate(*rows, **of_kind))


def test_against_gsas2(on_device, reference):  # noqa: F811
    phase, cells, patterns = reference
    maximum, l2 = errors(on_device.simulate(phase, cells), patterns)
    assert maximum.max() < 6e-5
    assert l2.max() < 4e-5


def test_batches_and_selections_of_any_size_agree(campaign, simulator, monkeypatch):
    module = "bragg_data.simulation.response_on_device"
    monkeypatch.setattr(f"{module}._MOST", 5)
    monkeypatch.setattr(f"{module}._LINES", 40_000)  # of two or three samples
    rows, drawn = samples(campaign, 21)
    small = Simulator(*campaign.setup, device="cpu")
    agree(small.simulate(*rows), simulator.simulate(*rows))
    agree(small.simulate(*rows, **drawn), simulator.simulate(*rows, **drawn))


@pytest.mark.parametrize("name", ["fine", "short", "textbook"])
def test_other_grids_and_conventions(campaign, name):
    phases, instrument, grid, *broadening = campaign.setup
    grid, options = {
        "fine": (TofGrid(3000.0, 3 * grid.relative_step, 500), {}),  # several nodes per point
        "short": (TofGrid(5000.0, grid.relative_step, 90), {}),  # a single tile
        "textbook": (TofGrid(2000.0, grid.relative_step, 900), {"convention": "textbook"}),
    }[name]
    setup = phases, instrument, grid, *broadening
    ours, theirs = Simulator(*setup, device="cpu", **options), Simulator(*setup, **options)
    assert name != "fine" or theirs.response.oversampling > 1
    rows, drawn = samples(campaign, 9)
    agree(ours.simulate(*rows), theirs.simulate(*rows))
    agree(ours.simulate(*rows, **drawn), theirs.simulate(*rows, **drawn))


def test_resonant_elements_and_difb(campaign):
    phase = read_phase(RUTILE.replace("Ti", "Gd"), "with gadolinium")
    instrument = campaign.instrument.with_parameters(difb=3.0)
    setup = [phase], instrument, TofGrid(4000.0, campaign.grid.relative_step, 900), 1.0, 1000.0
    rows = np.zeros(3, dtype=int), phase.lattice.cells(np.array([[4.6, 2.96]] * 3))
    ours, theirs = Simulator(*setup, device="cpu"), Simulator(*setup)
    agree(ours.simulate(*rows), theirs.simulate(*rows))
    agree(ours.simulate(*rows, size=0.5), theirs.simulate(*rows, size=0.5))


def test_displacements(campaign, simulator, on_device):
    cells = campaign.samples.cells[campaign.samples.phase == 1][:4]
    phase, modes = np.ones(4, dtype=int), len(simulator.free_coordinates(1))
    shifts = np.random.default_rng(0).choice([-0.02, 0.0, 0.02], (4, modes))
    for parameters in ({}, {"size": 0.5}):
        ours = on_device.simulate(phase, cells, shifts=shifts, **parameters)
        agree(ours, simulator.simulate(phase, cells, shifts=shifts, **parameters))


def test_tensors_stay_on_the_device(campaign, simulator, on_device):
    rows, _ = samples(campaign, 2)
    patterns = on_device.simulate_on_device(*rows)
    assert isinstance(patterns, torch.Tensor)
    assert not patterns.is_inference()  # so that networks train on it
    with pytest.raises(TypeError, match="device"):
        simulator.simulate_on_device(*rows)


def test_the_precision_of_other_products_stays(campaign, on_device):
    rows, _ = samples(campaign, 1)
    torch.set_float32_matmul_precision("high")
    try:
        on_device.simulate(*rows)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["cuda:99", "graphics card"])
def test_a_device_that_does_not_exist(campaign, name):
    with pytest.raises(DeviceError, match=rf"no device '{name}' here; torch \S+ finds cpu"):
        Simulator(*campaign.setup, device=name)


def test_without_a_device_torch_is_not_loaded():
    program = (
        "import sys, bragg_data.simulation.kinematic as k\n"
        "from bragg_data.campaign import load_campaign\n"
        "k.Simulator(*load_campaign('batio3-nomad').setup)\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(campaign, simulator, compiled):
    rows, drawn = samples(campaign, 300)
    on_gpu = Simulator(*campaign.setup, device="cuda", compiled=compiled)
    agree(on_gpu.simulate(*rows), simulator.simulate(*rows))
    agree(on_gpu.simulate(*rows, **drawn), simulator.simulate(*rows, **drawn))

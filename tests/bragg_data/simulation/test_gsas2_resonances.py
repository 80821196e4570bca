"""Resonant elements: with GSAS-II's scattering lengths the fast simulator gives its patterns."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from bragg_data.campaign import load_campaign
from bragg_data.crystallography import scattering
from bragg_data.crystallography.structure import Phase, phase_from_cif
from bragg_data.instrument.instprm import TofGrid
from bragg_data.simulation import gsas2, kinematic
from bragg_data.simulation.gsas2 import Gsas2Error, Gsas2Options
from tests.bragg_data.crystallography.test_published_structures import cif

OPTIONS = Gsas2Options(os.environ.get("BRAGG_GSAS2_PATH"))
_TABLES = """
import json, sys
from pathlib import Path
path = Path(sys.argv[1])
sys.path.insert(0, str(path.parent if path.name == "GSASII" else path))
import numpy as np
from GSASII import GSASIIElem, atmdata
wavelength = np.linspace(0.15, 6.0, 6000)
tables = {}
for symbol in sys.argv[2:]:
    values = {symbol: ["", atmdata.AtmBlens[symbol + "_"]]}
    real, imaginary = GSASIIElem.BlenResTOF([symbol], values, wavelength)
    tables[symbol] = [(10 * real[0]).tolist(), (-10 * imaginary[0]).tolist()]
print(json.dumps([wavelength.tolist(), tables]))
"""


def installed() -> bool:
    try:
        gsas2.installed_version(OPTIONS.location)
    except Gsas2Error:
        return False
    return OPTIONS.location is not None


pytestmark = [
    pytest.mark.gsas2,
    pytest.mark.skipif(not installed(), reason="GSAS-II (BRAGG_GSAS2_PATH) is not installed"),
    pytest.mark.filterwarnings("ignore:Scattering lengths of"),
]


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """GSAS-II's scattering lengths in fm over wavelengths in Å, as it computes them itself."""
    symbols = ["Er", "Gd", "Sm", "Eu", "Cd"]
    command = [sys.executable, "-c", _TABLES, OPTIONS.location, *symbols]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wavelength, values = json.loads(output.splitlines()[-1])
    return {
        s: (np.array(wavelength), np.array(re) + 1j * np.array(im))
        for s, (re, im) in values.items()
    }


def largest_difference(phase: Phase) -> float:
    """Between the patterns of the fast simulator and of GSAS-II, over the maximum.

    With the flight path for which GSAS-II's wavelengths, difC d / (252.816 L), are 2 d sin θ.
    """
    campaign = load_campaign("batio3-nomad")
    grid = TofGrid(4000.0, campaign.grid.relative_step, 1500)
    sine = math.sin(math.radians(campaign.instrument.two_theta / 2))
    path = campaign.instrument.difc / (252.816 * 2 * sine)
    instrument = campaign.instrument.with_parameters(flight_path=path)
    cell = np.array([phase.cell])
    setup = [phase], instrument, grid, 1.0, 1000.0
    simulator = gsas2.Simulator(*setup, options=OPTIONS)
    expected = simulator.simulate(np.array([0]), cell)[0]
    simulator.close()
    pattern = kinematic.Simulator(*setup).simulate(np.array([0]), cell)[0]
    return float(np.abs(pattern - expected).max() / expected.max())


def structure(symbol: str) -> Phase:
    return phase_from_cif(cif("baddeleyite").replace(" Zr ", f" {symbol} "), "phase")


@pytest.mark.parametrize("symbol", ["Er", "Gd", "Sm", "Eu", "Cd", "Dy"])
def test_with_the_scattering_lengths_of_gsas2_patterns_are_equal(symbol, tables, monkeypatch):
    """So that all of the difference for the tables of Lynn & Seeger is one of the lengths."""
    lynn_seeger = scattering.resonance_table
    monkeypatch.setattr(scattering, "resonance_table", lambda s: tables.get(s) or lynn_seeger(s))
    assert largest_difference(structure(symbol)) < 5e-4

"""Files of TOPAS: every line is of a documented kind, and its equations give our peaks."""

import re

import numpy as np
import pytest

from bragg_data.handover.export import Refinement, export
from bragg_data.handover.topas import inp_of_refinement
from bragg_data.handover.widths import with_bin_variance, with_broadening
from bragg_data.instrument.peak_shape import mixing, peak_shape
from bragg_data.instrument.topas import read_topas_positions
from bragg_data.measurement.readers import read_profiles
from bragg_data.refinement.line_factors import transmission
from tests.bragg_data.handover.refined import mixture

N = r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?"
LINES = [  # of the Technical Reference
    r"'.*",
    r'xdd "(?P<file>[\w.-]+)" xye_format',
    r"neutron_data",
    r"x_calculation_step = Yobs_dx_at\(Xo\) \.5;",
    rf"start_X (?P<start>{N})",
    rf"finish_X (?P<finish>{N})",
    r"TOF_LAM\(0\.001\)",
    rf"TOF_x_axis_calibration\(!t0_\d, {N}, !t1_\d, {N}, !t2_\d, {N}\)",
    r"bkg",
    rf"(?P<bkg>{N}(?: {N})*)",
    r"str",
    r'phase_name "(?P<name>[^"]+)"',
    r'space_group "(?P<group>[^" ]+)"',
    rf"(?P<axis>a|b|c|al|be|ga) (?P<length>{N})",
    rf"scale (?P<scale>{N})",
    rf"site (?P<site>\w+) x (?P<x>{N}) y (?P<y>{N}) z (?P<z>{N}) "
    rf"occ (?P<element>[A-Z][a-z]?) (?P<occupancy>{N}) beq (?P<beq>{N})",
    rf"PO\(!po_\d_\d, (?P<ratio>{N}), , (?P<direction>-?\d -?\d -?\d)\)",
    r"peak_type pv",
    r"local !(?P<local>\w+) = (?P<of_local>[^;]+);",
    r"pv_fwhm = (?P<fwhm>[^;]+);",
    r"pv_lor = (?P<lor>[^;]+);",
    r"exp_conv_const = (?P<exp>[^;]+);",
    r"scale_pks = (?P<pks>[^;]+);",
]


def parsed(text: str) -> list[dict[str, str]]:
    """Return the named parts of each line; an AssertionError for a line of no known kind."""
    rows = []
    for line in filter(str.strip, text.splitlines()):
        matches = [m for m in (re.fullmatch(kind, line.strip()) for kind in LINES) if m]
        assert len(matches) == 1, line
        assert not re.search(r"[-+] *[-+]", line.split("'")[0]) or "e-" in line or "e+" in line
        rows.append({k: v for k, v in matches[0].groupdict().items() if v})
    return rows


def value(equation: str, names: dict[str, object]) -> object:
    """Return an equation of TOPAS, in which names next to each other are multiplied."""
    tokens = re.findall(r"\d+(?:\.\d+)?(?:e[-+]\d+)?|\w+|[-+*/^()]", equation)
    functions = {"Ln": np.log, "Exp": np.exp, "Sqrt": np.sqrt}
    text = ""
    for before, token in zip(["", *tokens], tokens, strict=False):
        operand = re.match(r"\w|\(", token)
        if operand and re.search(r"[\w)]$", before) and before not in functions:
            text += "*"
        text += "**" if token == "^" else token
    return eval(text, {"__builtins__": {}}, functions | names)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return parsed(inp_of_refinement(mixture(), ["a.xye", "b.xye"])[0])


def of(rows, key):
    return [row[key] for row in rows if key in row]


def test_equations_give_the_peaks_of_this_project(rows):
    blocks, current = [], {}
    for row in rows:
        if "name" in row:
            current = {}
            blocks.append(current)
        for key in ("of_local", "fwhm", "lor", "exp", "pks"):
            if key in row and blocks:
                current.setdefault(key, []).append((row.get("local", ""), row[key]))
    assert len(blocks) == 4  # two phases on each of two banks
    d = np.linspace(0.5, 1.8, 20)
    pairs = [(bank, phase) for bank in mixture().banks for phase in mixture().phases]
    for block, (bank, phase) in zip(blocks, pairs, strict=True):
        instrument = with_broadening(with_bin_variance(bank), phase)
        shape = peak_shape(instrument, d, size=np.inf, microstrain=0.0)
        width, share = mixing(shape.variance, shape.fwhm)
        names: dict[str, object] = {"D_spacing": d}
        for name, equation in block["of_local"]:
            names[name] = value(equation, names)
        assert value(block["fwhm"][0][1], names) == pytest.approx(width, rel=1e-5)
        assert value(block["lor"][0][1], names) == pytest.approx(share, rel=1e-4, abs=1e-6)
        early, late = (value(equation, names) for _, equation in block["exp"])
        assert -early == pytest.approx(np.log(1000) / shape.rise, rel=1e-6)
        assert late == pytest.approx(np.log(1000) / shape.decay, rel=1e-6)
        sine = bank.bank.sin_theta
        absorbed = transmission(phase.parameters["absorption"][0] * 2 * sine * d, sine)
        assert value(block["pks"][0][1], names) == pytest.approx(d**4 * absorbed, rel=1e-6)


def test_phases_have_their_structures(rows):
    assert of(rows, "name") == ["silicon", "srtio3"] * 2
    assert of(rows, "group") == ["Fd-3m:2", "I4/mcm"] * 2
    sites = [row for row in rows if "site" in row]
    expected = [site for _ in mixture().banks for p in mixture().phases for site in p.sites]
    for row, site in zip(sites, expected, strict=True):
        assert row["site"] == site.label
        assert row["element"] == site.symbol
        place = [float(row[n]) for n in "xyz"]
        assert place == pytest.approx(site.position, abs=1e-7)
        assert float(row["beq"]) == pytest.approx(8 * np.pi**2 * site.u_iso, abs=1e-5)
    assert of(rows, "direction") == ["0 0 1"] * 2
    lengths = [float(v) for v in of(rows, "length")]
    cells = [phase.cell for phase in mixture().phases] * 2
    assert lengths == pytest.approx(np.concatenate(cells), abs=1e-6)
    # TOPAS's weights are S·M·V, as this project's are.
    scales = np.array([float(v) for v in of(rows, "scale")]).reshape(2, 2)
    for of_bank, bank in zip(scales, mixture().banks, strict=True):
        volumes = [np.prod(phase.cell[:3]) for phase in mixture().phases]
        ratio = of_bank * volumes / bank.scales
        assert ratio[0] == pytest.approx(ratio[1], rel=1e-6)


def test_background_positions_and_data_are_those_of_the_banks(tmp_path):
    written = export(Refinement(mixture(), ()), tmp_path / "mixture.inp")
    text = written.files[0].read_text()
    positions = read_topas_positions(text, "mixture.inp")
    blocks = text.split("xdd ")[1:]
    for bank, p, block, file in zip(
        mixture().banks, positions, blocks, written.files[1:], strict=True
    ):
        i = bank.instrument
        assert (p.t0, p.t1, p.t2) == pytest.approx((i.tzero, i.difc, i.difa), rel=1e-7)
        assert block.startswith(f'"{file.name}"')
        (profile,) = read_profiles(file)
        np.testing.assert_allclose(profile.tof, bank.bank.tof, atol=1e-4)
        np.testing.assert_allclose(profile.intensity, bank.bank.intensity, rtol=1e-6)
        lines = parsed("xdd " + block)
        terms = [float(v) for row in of(lines, "bkg") for v in row.split()]
        start, finish = float(of(lines, "start")[0]), float(of(lines, "finish")[0])
        x = 2 * (bank.bank.tof - start) / (finish - start) - 1
        left = np.polynomial.chebyshev.chebval(x, terms) - bank.background
        assert np.sqrt(np.mean((left / bank.bank.sigma) ** 2)) < 0.06
    assert any("extinction" in note for note in written.notes)

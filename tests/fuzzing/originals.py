"""The files that are damaged: one of each format, as instruments and programs write them."""

import gemmi
import numpy as np
import periodictable

from tests.bragg_data.crystallography.test_published_structures import ROWS, cif

POINTS = 60
EDGES = 2000.0 * 1.004 ** np.arange(POINTS)
LINEAR = 2000.0 + 8.0 * np.arange(POINTS)
COUNTS = np.round(
    400
    + 900 * np.exp(-(((np.arange(POINTS) - 22) / 3) ** 2))
    + 500 * np.exp(-(((np.arange(POINTS) - 41) / 2.5) ** 2))
    + 20 * np.sin(np.arange(POINTS) * 7.7)
)
HEAD = "Sample Run\n# Instrument: NOMAD\n# Total flight path {}m, tth {}deg, DIFC {}\n"


def _in_lines(cells: list[str], per_line: int) -> str:
    return "".join("".join(cells[i : i + per_line]) + "\n" for i in range(0, len(cells), per_line))


def _bank(number: int, binning: str, kind: str, rows: str) -> str:
    return f"BANK {number} {POINTS} {rows.count(chr(10))} {binning} {kind}\n{rows}"


_SLOG = f"SLOG 2000 {EDGES[-1] * 1.004:.1f} 0.004 0"
_FXYE = "".join(
    f"{t:14.4f}{y:14.4f}{np.sqrt(y):10.4f}\n" for t, y in zip(EDGES, COUNTS, strict=True)
)
_NORMALISED = "".join(
    f"{t:14.4f}{y / 7:14.5f}{np.sqrt(y) / (7 + k / 20):10.5f}\n"
    for k, (t, y) in enumerate(zip(EDGES, COUNTS, strict=True))
)
_ALT = _in_lines(
    [
        f"{round(32 * t):8d}{y * 10:7.0f}{np.sqrt(y) * 100:5.0f}"
        for t, y in zip(EDGES, COUNTS, strict=True)
    ],
    4,
)
_ESD = _in_lines([f"{y:8.1f}{np.sqrt(y) / 2:8.3f}" for y in COUNTS], 5)
_STD = _in_lines([f"{2 + k // 20:2d}{y:6.0f}" for k, y in enumerate(COUNTS)], 10)
_XYE = "".join(
    f"{t:.2f} {y / 7:.5f} {np.sqrt(y) / (7 + k / 20):.5f}\n"
    for k, (t, y) in enumerate(zip(EDGES, COUNTS, strict=True))
)

PROFILES: dict[str, str] = {
    "fxye": HEAD.format(20.61, 122, 9113.1)
    + _bank(1, _SLOG, "FXYE", _FXYE)
    + HEAD.format(20.61, 31, 2784.5).split("\n", 2)[2]
    + _bank(2, _SLOG, "FXYE", _NORMALISED),
    "fxy": "Sample\n"
    + _bank(
        1, _SLOG, "FXY", "".join(f"{t:.4f} {y:.1f}\n" for t, y in zip(EDGES, COUNTS, strict=True))
    ),
    "alt": "Sample\n" + _bank(1, "RALF 64000 256 64000 0.004", "ALT", _ALT),
    "esd": "Sample\n" + _bank(1, "CONST 2000 8 0 0", "ESD", _ESD),
    "std": "Sample\n" + _bank(1, "CONST 2000 8 0 0", "STD", _STD),
    "time_map": "Sample\n"
    + f"TIME_MAP 1 7 1 TIME_MAP 100\n 1 20000 80 31 22400 80 {20000 + 80 * POINTS}\n"
    + _bank(1, "TIME_MAP 1", "STD", _STD),
    "xy": "# Sample\n" + "".join(f"{t:.1f} {y:.0f}\n" for t, y in zip(LINEAR, COUNTS, strict=True)),
    "xye": "# Sample\n# 2theta = 122.0 deg\n" + _XYE,
    "csv": "# tof_us,yobs,weight,ycalc (none)\n"
    + "".join(f"{t:.3f},{y / 5:.4f},{25 / y:.6f},0\n" for t, y in zip(EDGES, COUNTS, strict=True)),
}


def complete_cif(name: str) -> str:
    """Return a CIF as databases have them: with operations, volume, formula, Z, density …"""
    text = cif(name)
    small = gemmi.make_small_structure_from_block(gemmi.cif.read_string(text)[0])
    group = gemmi.find_spacegroup_by_name(ROWS[name][1])
    small.spacegroup = group
    small.setup_cell_images()
    atoms = small.get_all_unit_cell_sites()
    symbols = [row.split()[1] for row in ROWS[name][3].split("; ")]
    kinds = [symbols[[s.label for s in small.sites].index(atom.label)] for atom in atoms]
    counts = {kind.lstrip("0123456789"): kinds.count(kind) for kind in kinds}
    units = int(np.gcd.reduce(list(counts.values())))
    formula = " ".join(f"{element}{n // units}" for element, n in counts.items())
    mass = sum(getattr(periodictable, element).mass * n for element, n in counts.items())
    tags = [
        f"_cell_volume {small.cell.volume:.3f}",
        f"_cell_formula_units_Z {units}",
        f"_chemical_formula_sum '{formula}'",
        f"_exptl_crystal_density_diffrn {mass / small.cell.volume / 0.602214076:.3f}",
        f"_space_group_IT_number {group.number}",
        f"_space_group_crystal_system {group.crystal_system_str()}",
        "loop_\n_space_group_symop_operation_xyz",
        *(f"'{op.triplet()}'" for op in group.operations()),
        "loop_\n_atom_site_label\n",
    ]
    head, rows = text.split("loop_\n_atom_site_label\n")
    columns, *_ = rows.partition("_U_iso_or_equiv\n")
    numbers = [sum(a.label == s.label for a in atoms) for s in small.sites]
    lines = rows.partition("_U_iso_or_equiv\n")[2].splitlines()
    lines = [f"{line} {n}" for line, n in zip(lines, numbers, strict=True)]
    columns += "_U_iso_or_equiv\n_atom_site_symmetry_multiplicity\n"
    return head + "\n".join(tags) + columns + "\n".join(lines) + "\n"


def structures() -> list[str]:
    """Return plain and complete CIFs of published structures."""
    names = [name for name in ROWS if name != "garnet"]
    return [cif(name) for name in names[::2]] + [complete_cif(name) for name in names[::3]]


def instrument_bank(number: int, two_theta: float, difc: float) -> str:
    """Return a bank of a .instprm file with all keys that GSAS-II writes."""
    return (
        f"#Bank {number}: GSAS-II instrument parameter file; do not add/delete items!\nType:PNT\n"
        f"Bank:{number}\nfltPath:20.61\n2-theta:{two_theta}\ndifC:{difc}\ndifA:-1.5\ndifB:0.25\n"
        f"Zero:4.8\nalpha:0.2\nbeta-0:0.27\nbeta-1:0.012\nbeta-q:0.03\nsig-0:3.1\nsig-1:284.9\n"
        f"sig-2:119.9\nsig-q:1.5\nX:0.7\nY:1.3\nZ:0.4\nAzimuth:0.0\n"
    )


INSTPRM = instrument_bank(1, 31.0, 2784.5) + instrument_bank(4, 122.0, 9113.1)

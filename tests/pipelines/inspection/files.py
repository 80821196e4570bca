"""Small files of the kinds that people have, with known numbers."""

from pathlib import Path

import numpy as np

POINTS = 1200
TOF = 3000 * 1.001 ** np.arange(POINTS)  # µs, to 9943
DIFC, ANGLE, PATH = 9041.7, 120.4, 20.61  # by the geometry 9041.9

RUTILE = """data_rutile
_cell_length_a 4.594
_cell_length_b 4.594
_cell_length_c 2.959
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_space_group_name_H-M_alt 'P 42/m n m'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
_atom_site_U_iso_or_equiv
Ti1 Ti 0 0 0 1 0.005
O1 O 0.305 0.305 0 1 0.006
"""
WITHOUT_U = RUTILE.replace("_atom_site_U_iso_or_equiv\n", "").replace(" 0.005\n", "\n")
WITHOUT_U = WITHOUT_U.replace(" 0.006\n", "\n")
INSTPRM = """#GSAS-II instrument parameter file; do not add/delete items!
Type:PNT
Bank:4
fltPath:20.61
2-theta:120.4
difC:9050.0
difA:-2.0
difB:0.5
Zero:-3.0
alpha:1.0
beta-0:0.03
beta-1:0.006
beta-q:0.0
sig-0:0.0
sig-1:40.0
sig-2:10.0
sig-q:0.0
X:0.0
Y:0.0
Z:0.0
"""


def counts(scale: float = 1.0) -> np.ndarray:
    """Counts with five peaks over a background, (POINTS,)."""
    peaks = sum(
        np.exp(-0.5 * ((TOF - t) / (0.002 * t)) ** 2) for t in (3700, 4400, 5300, 6600, 8000)
    )
    return np.round(scale * (100 + 3000 * peaks))


def columns(
    x: np.ndarray = TOF, header: str = "# bin centres\n", y: np.ndarray | None = None
) -> str:
    y = counts() if y is None else y
    rows = zip(x, y, np.sqrt(np.maximum(y, 1)), strict=True)
    return header + "".join(f"{t:.6f} {v:.1f} {e:.4f}\n" for t, v, e in rows)


def bank(number: int, difc: float = DIFC, angle: float = ANGLE, scale: float = 1.0) -> str:
    """A bank as Mantid and IDL write it, with the geometry in a comment."""
    text = f"# Total flight path {PATH}m, tth {angle}deg, DIFC {difc}\n# Data for spectrum :1\n"
    text += f"BANK {number} {POINTS} {POINTS} SLOG 3000 9943 0.001 0 FXYE\n"
    rows = zip(TOF, counts(scale), strict=True)
    return text + "".join(f"{t:16.6f} {y:12.3f} {max(y, 1) ** 0.5:10.4f}\n" for t, y in rows)


def gsas(*banks: str, header: str = "# Instrument: NOMAD\n") -> str:
    return f"Diamond\n{header}" + "".join(banks)


def standard(numbers: range, header: str = "") -> str:
    """A GSAS file of counts alone, which names an instrument file, with a bank for each number."""
    cells = [f"{count:8.0f}" for count in counts()]
    rows = "".join("".join(cells[i : i + 10]) + "\n" for i in range(0, POINTS, 10))
    record = "BANK {} 1200 120 SLOG 3000 9943 0.001 0 STD\n"
    title = f"title\nInstrument parameter file:MINE.PRM\n{header}"
    return title + "".join(record.format(number) + rows for number in numbers)


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path

"""The curves of a refined bank as columns, and as a table for spreadsheets."""

import csv
from collections.abc import Sequence
from pathlib import Path

from bragg_data.arrays import Array
from bragg_data.refinement.joint_result import RefinedBank

UNITS = {
    "tof": "µs",
    "d": "Å",
    "measured": "1/µs",
    "su": "1/µs",
    "calculated": "1/µs",
    "background": "1/µs",
    "difference": "1/µs",
}
"""The columns of :func:`curves`, and their units; intensities are in the file's own."""


def curves(bank: RefinedBank) -> dict[str, Array]:
    """Return the columns of a bank, (n,) each: measured points, and what was calculated there.

    The calculated values contain the background; d-spacings are those of the refined calibration.
    """
    measured = bank.bank
    columns = (
        measured.tof,
        bank.instrument.d_spacing_from_tof(measured.tof),
        measured.intensity,
        measured.sigma,
        bank.calculated,
        bank.background,
        measured.intensity - bank.calculated,
    )
    return dict(zip(UNITS, columns, strict=True))


def write_csv(banks: Sequence[RefinedBank], file: Path) -> None:
    """Write the columns of all banks below each other, with the number of the bank in the first."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["bank", *(f"{name} ({unit})" for name, unit in UNITS.items())])
        for bank in banks:
            columns = [values.tolist() for values in curves(bank).values()]
            for row in zip(*columns, strict=True):
                writer.writerow([bank.bank.number, *(f"{value:.8g}" for value in row)])

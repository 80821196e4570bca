"""A refined series as an xarray data set, as it is stored."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.crystallography.cif import file_and_block, read_text
from bragg_data.measurement.resampling import text_of_calibration
from bragg_data.provenance import code_commit
from pipelines.refinement.events import Event
from pipelines.refinement.frames import FrameResult
from pipelines.refinement.result import JointPhase
from pipelines.refinement.series import Strains

_SU, _CALIBRATION = "su_", "su_calibration_"
_ABOUT = {
    **{name: ("angstrom", f"cell length {name}") for name in CELL_PARAMETERS[:3]},
    **{name: ("degree", f"cell angle {name}") for name in CELL_PARAMETERS[3:]},
    **{f"strain_{name}": ("1e-6", f"lattice strain of {name}") for name in "abc"},
    "weight_percent": ("percent", "weight fraction"),
    "inverse_size": ("1/um", "reciprocal size of crystallites"),
    "microstrain": ("1e-6", "microstrain"),
    "u_iso": ("angstrom2", "isotropic displacement parameter"),
    "rwp": ("1", "weighted profile R factor"),
    "reduced_chi2": ("1", "reduced chi squared"),
    "accepted": ("1", "1 if the phases explain the frame, else 0"),
    "signal": ("1/us", "mean of the calculated profile above the background"),
    "difc_offset": ("1", "relative error of difC"),
}
_OF_SAMPLE = {"1/size": "inverse_size", "microstrain": "microstrain"}


class _Variables:
    """Variables that are filled value by value, with their uncertainties."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self._sizes = sizes
        self.known: dict[str, xr.Variable] = {}

    def put(
        self, name: str, dims: Sequence[str], at: tuple[int, ...], *values: float | None
    ) -> None:
        """Set a value, its standard uncertainty, and that of the calibration, if there are such."""
        kinds = "", "standard uncertainty of ", "standard uncertainty, by the calibration, of "
        for prefix, kind, value in zip(("", _SU, _CALIBRATION), kinds, values, strict=False):
            if prefix + name not in self.known:
                units, text = _ABOUT[name]
                empty: Array = np.full([self._sizes[dim] for dim in dims], np.nan)
                attrs = {"units": units, "long_name": kind + text}
                self.known[prefix + name] = xr.Variable(dims, empty, attrs)
            if value is not None:
                self.known[prefix + name].values[at] = value


def series_dataset(
    frames: Sequence[FrameResult], events: Sequence[Event], strains: Strains, label: str
) -> xr.Dataset:
    """Return a series as :func:`bragg_data.store.series.open_series` describes it.

    ``label`` is what it runs along.
    """
    results = [(place, frame, frame.result) for place, frame in enumerate(frames) if frame.result]
    banks = sorted({bank for *_, result in results for bank in result.banks})
    phases = list(dict.fromkeys(p.name for *_, result in results for p in result.phases))
    of_sites = [(p, site) for *_, result in results for p in result.phases for site in p.u_iso]
    sites = list(dict.fromkeys(f"{phase.name} {site}" for phase, site in of_sites))
    files = {frame.number: (str(frame.file), frame.value) for frame in frames}
    names = {"frame": len(files), "bank": len(banks), "phase": len(phases), "site": len(sites)}
    apart = len({result.banks for *_, result in results}) > 1
    dims = ("frame", "bank") if apart else ("frame",)
    variables = _Variables(names)
    for place, frame, result in results:
        here = (frame.number, banks.index(result.banks[0])) if apart else (frame.number,)
        for name in ("rwp", "reduced_chi2", "accepted"):
            variables.put(name, dims, here, getattr(result, name))
        for bank in result.of_banks:
            at = frame.number, banks.index(bank.bank)
            variables.put("signal", ("frame", "bank"), at, bank.signal)
            offset = bank.difc_offset, bank.su_difc_offset
            variables.put("difc_offset", ("frame", "bank"), at, *offset)
        for code, phase in enumerate(result.phases):
            at = (*here, phases.index(phase.name))
            _put_phase(variables, phase, (*dims, "phase"), at)
            for name, strain in strains.get((place, code, phase.name), {}).items():
                values = 1e6 * strain.value, 1e6 * strain.su
                variables.put(f"strain_{name}", (*dims, "phase"), at, *values)
            for site, u_iso in phase.u_iso.items() if phase.cell else ():
                of_site = (*here, sites.index(f"{phase.name} {site}"))
                variables.put("u_iso", (*dims, "site"), of_site, u_iso)
    of_events = {
        "event_frame": ("event", np.array([e.frame for e in events], dtype=np.int64)),
        "event_kind": ("event", np.array([e.kind for e in events], dtype=str)),
        "event_text": ("event", np.array([e.text for e in events], dtype=str)),
    }
    values_along = np.array([files[k][1] for k in range(len(files))])
    return xr.Dataset(
        {**variables.known, **of_events},
        coords={
            "frame": np.arange(len(files)),
            "bank": np.array(banks, dtype=np.int64),
            "phase": np.array(phases, dtype=str),
            "site": np.array(sites, dtype=str),
            "file": ("frame", np.array([files[k][0] for k in range(len(files))], dtype=str)),
            "along": ("frame", values_along, {"long_name": label}),
        },
    )


def _put_phase(
    variables: _Variables, phase: JointPhase, dims: Sequence[str], at: tuple[int, ...]
) -> None:
    if phase.cell and phase.su and phase.su_calibration:
        for name in phase.free_parameters:
            cells = phase.cell, phase.su, phase.su_calibration
            variables.put(name, dims, at, *(cell.values()[name] for cell in cells))
        for name, variable in _OF_SAMPLE.items():
            if value := phase.parameters.get(name):
                variables.put(variable, dims, at, value.value, value.su)
    fraction = phase.weight_percent, phase.su_weight_percent
    variables.put("weight_percent", dims, at, *fraction)


def lineage(
    files: Sequence[Path], instrument: Path, structures: Sequence[str], options: str
) -> dict[str, str]:
    """Return what a series was made of, as attributes: texts, and SHA-256 of its files."""
    digests = [
        hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "" for file in files
    ]
    texts = {name: read_text(file_and_block(name)[0]) for name in structures}
    return {
        "sha256": json.dumps(digests),
        "structures": json.dumps(texts, ensure_ascii=False),
        "instrument": text_of_calibration(instrument),
        "options": options,
        "code_commit": code_commit(),
    }

"""The gallery: from structures and an instrument file to a champion and refined profiles, each with
one command in an empty folder.

    python benchmarks/gallery.py FOLDER [--only NAME …] [--budget MIN] [--out FILE.json]
    python benchmarks/gallery.py FOLDER [--only NAME …] --pictures FOLDER

FOLDER holds the measured profiles, instruments and structures (`real/` and `measured/`); cases
whose files are missing there are left out. Printed are for each case the time, whether the model
became the champion, its errors on held-out simulated measurements (relative, of the lengths), the
coverage of its 90 % intervals, the shares of genuine profiles accepted and of foreign ones
rejected; and for measured profiles the largest relative differences of model and refinement from
the reference, of several banks together. With --pictures nothing is run: a picture of each case is
its refined profile, or else the patterns of the campaign.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bragg_data.campaign_design import DesignOptions, design_campaign
from bragg_data.measurement.load import load_measurements
from bragg_data.refinement.rietveld import Refiner
from pipelines.inspection.designs import draw_design
from pipelines.prediction.figures import Panel
from pipelines.prediction.figures import draw as draw_panels

ROOT = Path(__file__).parents[1]
STRUCTURES = ROOT / "tests/data/structures"
CAMPAIGNS = ROOT / "bragg_data/campaigns"
NOMAD = CAMPAIGNS / "nomad_bank4.instprm"


@dataclass(frozen=True)
class Case:
    """What a user has."""

    cifs: tuple[Path, ...]
    instrument: Path
    profile: Path | None = None
    reference: dict[str, float] | None = None  # lengths in ångström
    options: tuple[str, ...] = ()

    @property
    def missing(self) -> list[Path]:
        """Files that are not there."""
        files = (*self.cifs, self.instrument, *filter(None, [self.profile]))
        return [path for path in files if not path.exists()]


def gallery(folder: Path) -> dict[str, Case]:
    """Return the cases by name."""
    real, measured = folder / "real", folder / "measured"
    batio3 = tuple(CAMPAIGNS / f"batio3_{name}.cif" for name in ("cubic", "tetragonal", "trigonal"))
    powgen = real / "powgen_nac/POWGEN_1066.instprm"
    mn3o4 = real / "powgen_mn3o4"
    silicon = STRUCTURES / "silicon.cif"
    si640e = "NOMAD_2023A_five_banks_Shifter_Si_640e_instrument_file.instprm"
    nomad = measured / "nomad_si640e" / si640e
    return {
        "LaB6, POWGEN": Case((real / "powgen_lab6/lab6_srm660b.cif",), powgen),
        "NAC, POWGEN": Case(
            (real / "powgen_nac/NAC.cif",),
            powgen,
            real / "powgen_nac/PG3_22048.gsa",
            {"a": 10.24841},
        ),
        "Mn3O4, POWGEN": Case(
            (mn3o4 / "Mn3O4-Hausmannite.cif",),
            mn3o4 / "Bank 2.instprm",
            mn3o4 / "PG3_20256-2_60K.xye",
            {"a": 5.76114, "c": 9.44813},
        ),
        "NAC, WISH": Case(
            (real / "powgen_nac/NAC.cif",),
            real / "wish_nac/wish_ncaf_bank5_6.instprm",
            real / "wish_nac/55025-5_6raw.gss",
            {"a": 10.25249},
        ),
        "Si, SEPD": Case(
            (silicon,),
            real / "sepd_si/sepd_si.instprm",
            real / "sepd_si/arg_si.xys",
            {"a": 5.43148},
        ),
        "Si, NOMAD": Case(
            (silicon,),
            nomad,
            measured / "nomad_si640e/bank4_pattern.csv",
            {"a": 5.43118},
            ("--bank", "4", "--two-theta", "120.4"),
        ),
        "diamond, NOMAD, all banks": Case(
            (STRUCTURES / "diamond.cif",),
            nomad,
            measured / "nomad_diamond/NOM_127827.gsa",
            {"a": 3.56713},
            ("--bank", "all"),
        ),
        "SrTiO3, GEM": Case(
            (STRUCTURES / "srtio3.cif",),
            measured / "gem_srtio3/SRTIO3_5K.EXP",
            measured / "gem_srtio3/gem05984.gss",
            {"a": 5.511663, "c": 7.804635},
        ),
        "BaTiO3, four phases, NOMAD": Case((*batio3, STRUCTURES / "batio3_amm2.cif"), NOMAD),
        "hydroxyapatite (hexagonal), NOMAD": Case((STRUCTURES / "hydroxyapatite.cif",), NOMAD),
        "baddeleyite (monoclinic), NOMAD": Case((STRUCTURES / "baddeleyite.cif",), NOMAD),
        "kyanite (triclinic), POWGEN": Case((STRUCTURES / "kyanite.cif",), powgen),
    }


def run(case: Case, budget: float | None) -> dict[str, Any]:
    """Run the command in an empty folder; return its JSON, with the wall time."""
    words = [w for cif in case.cifs for w in ("--cif", str(cif))]
    words += ["--instrument", str(case.instrument), "--json", *case.options]
    words += [] if budget is None else ["--budget", str(budget)]
    words += [] if case.profile is None else ["--profile", str(case.profile)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = [sys.executable, "-m", "pipelines.run", *words]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        seconds = time.monotonic() - began
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:], "wall": seconds}
    return {**json.loads(done.stdout), "wall": seconds}


def draw(case: Case, picture: Path) -> None:
    """Draw the refined profile, or without one the patterns of the campaign, as a small PNG."""
    options = dict(zip(case.options[::2], case.options[1::2], strict=True))
    bank = int(options["--bank"]) if options.get("--bank", "all").isdigit() else None
    two_theta = float(options["--two-theta"]) if "--two-theta" in options else None
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "picture.png"
        stated = DesignOptions(tuple(map(str, case.cifs)), case.instrument, bank)
        design = design_campaign(stated, Path(folder))
        campaign = design.campaign
        if case.profile is None or case.reference is None:
            draw_design(design, drawn)
        else:
            (measurement,) = load_measurements(
                case.profile, campaign, case.instrument, two_theta=two_theta
            )
            phase, gridded = campaign.phases[0], measurement.gridded
            lengths = [case.reference[name] for name in phase.lattice.free_parameters]
            start = phase.lattice.cells([lengths])[0]
            fit = Refiner(campaign).refine(gridded, [(0, start)])[0]
            name = f"{phase.name}, bank {campaign.instrument.bank}"
            panel = Panel(gridded, fit.pattern_fit, name, phase, fit.cell, campaign)
            draw_panels([panel]).savefig(drawn, dpi=100)
        image = Image.open(drawn).convert("RGB")
    image.thumbnail((900, 1200))
    image.quantize(32).save(picture, optimize=True)


def difference(cell: dict[str, float], reference: dict[str, float]) -> float:
    """Return the largest relative difference of lengths."""
    return max(abs(cell[name] / value - 1) for name, value in reference.items())


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", action="append", metavar="NAME")
    parser.add_argument("--budget", type=float)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    results = {}
    print("case | time (s) | champion | MAE | coverage | accepted | rejected | model | refined")
    for name, case in gallery(options.folder.resolve()).items():
        if options.only and not any(part in name for part in options.only):
            continue
        if case.missing:
            print(f"{name} | left out: there is no {case.missing[0].name}")
            continue
        if options.pictures:
            draw(
                case, options.pictures / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
            )
            continue
        result = results[name] = run(case, options.budget)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
        if "error" in result:
            print(f"{name} | {result['wall']:.0f} | {result['error']}", flush=True)
            continue
        e, last = result["expected"], ["", ""]
        if case.reference is not None and result["answers"]:
            answer = result["answers"][0]
            cells = [answer["evidence"][0]["cell"], (answer["refined"] or {}).get("cell")]
            if combined := answer["combined"]:
                of_banks = combined["cell"], combined["refined"]
                cells = [{n: p["value"] for n, p in of.items()} or None for of in of_banks]
            last = ["none" if c is None else f"{difference(c, case.reference):.1e}" for c in cells]
        print(
            f"{name} | {result['wall']:.0f} | {result['champion']} | {e['relative_mae']:.1e} | "
            f"{e['coverage']:.3f} | {e['accepted']:.3f} | {e['rejected']:.3f} | {' | '.join(last)}",
            flush=True,
        )


if __name__ == "__main__":
    main()

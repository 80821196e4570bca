"""Refine real profiles the way a user does, and compare with certified cells and with GSAS-II.

    python benchmarks/real_profiles.py FOLDER [--json OUT] [--gsas2] [--case NAME]

FOLDER holds cases.toml (benchmarks/_real_cases.py has the format): profiles, instruments,
structures and what is known of the sample. Each case is one `bragg refine` in a process of its own,
each profile of a series and of a case to refuse by itself. Printed are for each result the lengths
with statistical and calibration uncertainty, the reference, z = (result − reference) over the
root of the sum of squares of both and the reference's own, R_wp, and the seconds of the refinement
and of the whole command. With --gsas2 GSAS-II refines the same points with the same calibration,
staged as is usual there. A run of all cases replaces the table in docs/measured.md.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a script's own directory is on the path, the project's is not

from benchmarks._gsas2_refinement import refine_by_gsas2  # noqa: E402
from benchmarks._real_cases import Case, CasesError, ProfileFile, load_cases  # noqa: E402

_PAGE = ROOT / "docs/measured.md"
_BEGIN, _END = "<!-- real_profiles.py: begin -->", "<!-- real_profiles.py: end -->"
_SECONDS = 600.0  # time limit of a refinement
_UNCERTAINTIES = "su", "su_calibration"

console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)


def refine(
    case: Case, profiles: Sequence[ProfileFile], directory: Path
) -> tuple[list[dict[str, Any]], str]:
    """Run `bragg refine`; its results, and the error if it refuses.

    Raises a RuntimeError if it fails without saying why.
    """
    instrument, calibration = case.instrument_paths
    words = [sys.executable, "-m", "pipelines.refine"]
    words += list(dict.fromkeys(str(case.path(p.file)) for p in profiles))
    names = {}  # of the case, by those of the files, which the command uses
    for cif, phase in zip(case.cif_paths(directory), case.phases, strict=True):
        words += ["--cif", str(cif)]
        names[cif.stem] = phase.name
    words += ["--instrument", str(instrument), "--json"]
    words += ["--calibration", str(calibration)] if case.calibration else []
    for profile in profiles:
        words += [] if profile.bank is None else ["--bank", str(profile.bank)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            cwd=directory,
            env=environment,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"it took longer than {_SECONDS:g} s") from error
    if done.returncode == 0:
        results: list[dict[str, Any]] = json.loads(done.stdout)
        for phase in (phase for result in results for phase in result["phases"]):
            phase["name"] = names.get(phase["name"], phase["name"])
            for key in ("cell", "su", "su_calibration"):  # null where nothing was determined
                phase[key] = {k: v for k, v in (phase[key] or {}).items() if v is not None}
        return results, ""
    reason = " ".join(done.stderr.split())
    if "Traceback" in reason or not reason:
        raise RuntimeError(f"it failed: {done.stderr[-2000:] or done.stdout[-2000:]}")
    return [], reason


def z_scores(
    cell: Mapping[str, float], uncertainties: Sequence[Mapping[str, float]], case: Case
) -> dict[str, float]:
    """Return (result − reference)/standard uncertainty of each length with a reference.

    ``uncertainties`` are standard uncertainties in Å to be combined with the reference's own.
    """
    scores = {}
    for name, reference in case.reference.items():
        if name in cell:
            parts = *(u.get(name, 0.0) for u in uncertainties), case.uncertainty[name]
            scores[name] = (cell[name] - reference) / max(math.hypot(*parts), 1e-12)
    return scores


def gsas2_result(case: Case, profiles: Sequence[ProfileFile], location: str | None) -> Any:
    """Return cell, esd and Rwp by GSAS-II, or why there are none."""
    began = time.perf_counter()
    try:
        result = refine_by_gsas2(case, profiles, location)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    first = result["phases"][0]
    return result | {
        "cell": first["cell"],
        "esd": first["esd"],
        "rwp": result["rwp"] / 100,
        "seconds": time.perf_counter() - began,
    }


def listed_gsas2(case: Case, profiles: Sequence[ProfileFile]) -> dict[str, Any] | None:
    """Return the result of GSAS-II that the file of cases lists for a single profile."""
    if not case.gsas2 or len(profiles) != 1:
        return None
    values = case.gsas2[case.profiles.index(profiles[0])].model_dump(exclude_none=True)
    names = [name for name in "abc" if name in values]
    return {
        "cell": {name: values[name] for name in names},
        "esd": {name: values.get(f"esd_{name}", 0.0) for name in names},
        "rwp": values["rwp"] / 100,
    }


def row_of(
    case: Case, profiles: Sequence[ProfileFile], gsas2: dict[str, Any] | None, directory: Path
) -> dict[str, Any]:
    """Run a case, or a profile of a series, and compare."""
    began, error = time.perf_counter(), ""
    try:
        results, reason = refine(case, profiles, directory)
    except RuntimeError as failure:  # one case does not take the others' results away
        results, reason = [], ""
        error = str(failure)
    seconds = time.perf_counter() - began
    accepted = [result for result in results if result["accepted"]]
    row: dict[str, Any] = {
        "case": case.name,
        "files": [profile.file for profile in profiles],
        "one_of": len(case.runs),  # refinements of the case
        "phases": [],
        "reference": case.reference,
        "reference_kind": case.reference_kind,
        "z": {},
        "z_gsas2": {},
        "gsas2": gsas2,
        "rwp": None,
        "seconds": round(seconds, 2),
        "refused": not error and len(accepted) < max(len(results), 1),
        "refusal_expected": case.refuse,
        "error": error,
        "reasons": [reason] if reason else [t for r in results for t in r["reasons"]],
        "weight_percent": {},
        "weight_error": {},
    }
    if results:
        best = results[0]
        row |= {"phases": best["phases"], "rwp": best["rwp"]}
        row |= {k: best.get(k) for k in ("banks", "reduced_chi2", "unexplained_lines", "at_bounds")}
        row["refine_seconds"] = best["seconds"]
        first = next(p for p in best["phases"] if p["name"] == case.phases[0].name)
        row["z"] = z_scores(first["cell"], [first[u] for u in _UNCERTAINTIES], case)
        row["weight_percent"] = {p["name"]: p["weight_percent"] for p in best["phases"]}
        row["weight_error"] = {
            name: (row["weight_percent"].get(name) or 0.0) - weighed
            for name, weighed in case.weight_percent.items()
        }
    if gsas2 and "cell" in gsas2 and set(case.reference) <= set(gsas2["cell"]):
        row["z_gsas2"] = z_scores(gsas2["cell"], [gsas2["esd"]], case)
    return row


def with_uncertainties(value: float, *uncertainties: float) -> str:
    """Return a value with its uncertainties in units of its last digit, by the rule of 19."""
    sizes = [u for u in uncertainties if u > 0]
    if not sizes:
        return f"{value:.5f}"
    digits = max(0, -math.floor(math.log10(min(sizes))))
    digits += round(min(sizes) * 10**digits) == 1
    return f"{value:.{digits}f}" + "".join(f"({round(u * 10**digits)})" for u in uncertainties)


def cells_of_table(row: Mapping[str, Any]) -> list[str]:
    """Return the row of the table as text."""
    first = row["phases"][0] if row["phases"] else None
    free = first["free_parameters"] if first else []
    lengths = list(row["reference"]) or [name for name in free if name in "abc"]

    def listed(values: Mapping[str, float], form: str) -> str:
        return ", ".join(f"{name} {format(values[name], form)}" for name in values)

    result = ", ".join(
        f"{n} "
        + with_uncertainties(first["cell"][n], *(first[u].get(n, 0.0) for u in _UNCERTAINTIES))
        for n in lengths
        if first and n in first["cell"]
    )
    expected = listed(row["reference"], ".6g")
    rwp = f"{100 * row['rwp']:.2f} %" if row["rwp"] is not None else ""
    gsas2, theirs = row["gsas2"] or {}, ""
    if "cell" in gsas2:
        theirs = ", ".join(
            f"{n} {with_uncertainties(gsas2['cell'][n], gsas2['esd'][n])}"
            for n in lengths
            if n in gsas2["cell"]
        )
        theirs += f"; {100 * gsas2['rwp']:.2f} %"
    weights = ", ".join(f"{n} {error:+.2f} %" for n, error in row["weight_error"].items())
    status = "refused" if row["refused"] else "failed" if row["error"] else ""
    status += " (expected)" if row["refused"] and row["refusal_expected"] else ""
    status = status or ("accepted, wrongly" if row["refusal_expected"] else "")
    name = row["case"] if row["one_of"] == 1 else f"{row['case']}: {row['files'][0]}"
    z = listed(row["z"], "+.2f")
    notes = "; ".join(filter(None, [status, weights]))
    seconds = ", ".join(f"{row[n]:.1f}" for n in ("refine_seconds", "seconds") if n in row)
    return [name, result, expected, z, rwp, theirs, seconds, notes]


_HEADINGS = ["case", "result (Å)", "reference", "z", "R_wp", "GSAS-II", "s", "notes"]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences about all rows."""
    judged = [row for row in rows if row["reference_kind"] in ("certificate", "published")]
    lines = []
    for name, who in (("z", "this project"), ("z_gsas2", "GSAS-II, without a calibration part")):
        scores = np.array([z for row in judged for z in row[name].values()])
        if len(scores):
            rms = float(np.sqrt((scores**2).mean()))
            largest = float(np.abs(scores).max())
            lines.append(f"{who}: rms z {rms:.2f}, largest |z| {largest:.2f} of {len(scores)}")
    pairs = [
        (row["phases"][0]["cell"][n] - row["gsas2"]["cell"][n])
        / max(math.hypot(row["phases"][0]["su"].get(n, 0.0), row["gsas2"]["esd"][n]), 1e-12)
        for row in rows
        if row["phases"] and row["gsas2"] and "cell" in row["gsas2"]
        for n in row["phases"][0]["free_parameters"]
        if row["gsas2"]["esd"].get(n) and n in row["phases"][0]["cell"]
    ]
    ratios = [
        row["rwp"] / row["gsas2"]["rwp"]
        for row in rows
        if row["rwp"] is not None and row["gsas2"] and "cell" in row["gsas2"]
    ]
    if pairs:
        within = sum(abs(pair) <= 1.5 for pair in pairs)
        lines.append(f"within 1.5 combined statistical uncertainties of GSAS-II: {within} of "
                     f"{len(pairs)} cell parameters")  # fmt: skip
    if ratios:
        lines.append(f"R_wp at most 1.03 of GSAS-II's: {sum(r <= 1.03 for r in ratios)} of "
                     f"{len(ratios)}, median ratio {np.median(ratios):.3f}")  # fmt: skip
    wrong = [
        row["case"] for row in rows if row["error"] or row["refused"] != row["refusal_expected"]
    ]
    lines.append(f"refused or accepted as expected: {len(rows) - len(wrong)} of {len(rows)}"
                 + (f" (not {', '.join(dict.fromkeys(wrong))})" if wrong else ""))  # fmt: skip
    errors = [abs(e) for row in rows for e in row["weight_error"].values()]
    if errors:
        lines.append(f"weight fractions: mean error {np.mean(errors):.2f} %, of {len(errors)}")
    return lines


def page_with_table(page: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a page whose part between the marks is the table and its summary."""
    table = ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    table += [
        "| " + " | ".join(t.replace("|", "/") for t in cells_of_table(r)) + " |" for r in rows
    ]
    text = "\n".join([_BEGIN, "", *table, "", *(f"- {line}" for line in summary(rows)), "", _END])
    if page.count(_BEGIN) != 1 or page.count(_END) != 1:
        return f"{page.rstrip()}\n\n{text}\n".lstrip()
    before, after = page.split(_BEGIN)[0], page.split(_END)[1]
    return before + text + after


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with cases.toml.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the rows to this file.")
    ] = None,
    gsas2: Annotated[bool, typer.Option("--gsas2", help="Refine by GSAS-II, too.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
    gsas2_path: Annotated[
        str | None, typer.Option(envvar="BRAGG_GSAS2_PATH", help="Directory that holds GSASII.")
    ] = None,
    page: Annotated[
        Path, typer.Option(help="Page whose table is replaced when all cases are run.")
    ] = _PAGE,
) -> None:
    try:
        cases = load_cases(folder)
    except CasesError as error:
        sys.exit(str(error))
    names = [c.name for c in cases]
    if unknown := set(case or ()) - set(names):
        sys.exit(f"There is no case {', '.join(sorted(unknown))}: the file has {', '.join(names)}.")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for of_file in cases:
            if case and of_file.name not in case:
                continue
            for profiles in of_file.runs:
                theirs = listed_gsas2(of_file, profiles)
                if gsas2 and not of_file.refuse:
                    theirs = gsas2_result(of_file, profiles, gsas2_path)
                rows.append(row_of(of_file, profiles, theirs, Path(temporary)))
                console.print("  ".join(filter(None, cells_of_table(rows[-1]))), soft_wrap=True)
                for reason in filter(None, [rows[-1]["error"], *rows[-1]["reasons"]]):
                    console.print(f"    {reason}", soft_wrap=True)
    table = Table(*_HEADINGS, title="Lengths with (statistical)(calibration) uncertainties")
    for row in rows:
        table.add_row(*cells_of_table(row))
    console.print(table)
    for line in summary(rows):
        console.print(line, soft_wrap=True)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    if not case:
        content = page.read_text(encoding="utf-8") if page.is_file() else ""
        page.write_text(page_with_table(content, rows), encoding="utf-8")
    sys.exit(any(row["error"] for row in rows))


if __name__ == "__main__":
    typer.run(main)

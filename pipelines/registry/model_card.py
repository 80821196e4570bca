"""The model card: what a model predicts, its training data, its scores, and its limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.model_provenance import ModelProvenance, Scores, SplitSettings
from bragg_models.predictors import Predictor, output_columns
from catalog.gate import BaselineComparison

_SCORES = {
    "n": ("samples", ",.0f"),
    "accuracy": ("accuracy", ".4%"),
    "mse_paper": ("mse_paper", ".3g"),
    **{f"mae_{length}": (f"MAE {length} (Å)", ".3g") for length in "abc"},
    "mae_alpha": ("MAE α (°)", ".3g"),
    "mae_beta": ("MAE β (°)", ".3g"),
    "mae_gamma": ("MAE γ (°)", ".3g"),
}


def model_card(predictor: Predictor, name: str) -> str:
    """Return the card of a trained and scored model, in Markdown.

    Parameters
    ----------
    predictor
        The model; its provenance has ``test`` and ``score``.
    name
        Under which it is registered.
    """
    p = predictor.provenance
    if p.score is None or p.test is None:
        raise ValueError("A model card is written after the test: the provenance has no score.")
    campaign = predictor.campaign
    instrument, grid = campaign.instrument, campaign.grid
    split, data = p.split, p.data
    parts = [
        f"# {p.model} for {p.campaign}",
        f"From a neutron time-of-flight profile to crystal system and cell: among "
        f"{', '.join(f'{x.name} ({x.space_group})' for x in campaign.phases)}.",
        "## Input and output",
        f"Input: profiles of {predictor.points:,} points on T = {grid.start:g} µs · "
        f"exp({grid.relative_step:g} i), without background, in any scale (float32, shape "
        f"(n, {predictor.points})). `{predictor.preprocessing}` is applied inside. Profiles on "
        f"another axis or with another calibration are resampled by `python -m "
        f"pipelines.predict` with the instrument that is part of the model (bank "
        f"{instrument.bank}, 2θ {instrument.two_theta:g}°, difC {instrument.difc:g} µs/Å).",
        _table(
            ("column", "unit", "meaning"),
            [(f"`{c}`", u, m) for c, (u, m) in signature_units(predictor).items()],
        ),
        "Parameters that the lattice ties are equal, or fixed, in every prediction.",
        "## Training data",
        _table(
            ("phase", "crystal system", "space group", "free parameters"),
            [
                (x.name, x.crystal_system.name, x.space_group, ", ".join(_ranges(of)))
                for x, of in zip(campaign.phases, campaign.definition["phases"], strict=True)
            ],
        ),
        f"Data set `{data.tag}`, snapshot `{data.snapshot_id}`, content "
        f"`{data.content_hash[:16]}`, simulated by {data.simulator} "
        f"{data.simulator_version}; {split.name} split, seed {split.seed}. Preset "
        f"{p.preset}, seed {p.seed}, code `{p.code_commit}`, {p.trained_at}.",
        "## Scores",
        f"On {_tested_on(split)}, which it was not trained on (versions are compared by "
        f"{p.score.name}):",
        _scores(p.test),
        *_comparison(p),
        "## Limits",
        f"{_LIMITS[predictor.has_intervals]}"
        f"- Cells outside the ranges above are extrapolated.\n"
        f"- Another bank or instrument than 2θ {instrument.two_theta:g}° has other peak widths.",
        "## Usage",
        f"```\npython -m pipelines.predict FILE --instrument YOURS.instprm --model "
        f"models:/{name}/VERSION\n```",
        "Its files are JSON and safetensors; nothing in them is executed.",
    ]
    return "\n\n".join(parts) + "\n"


_LIMITS = {
    False: "- It predicts one of these phases for any profile, also for one of another sample.\n"
    "- The scores are those of simulated profiles: noise, a wrong background, other displacement "
    "parameters or widths, and above all a wrong calibration (0.1 % of difC is 0.1 % of every "
    "length) cost more than these errors.\n",
    True: "- It predicts one of these phases, with 90 % intervals, and rejects a profile that none "
    "of them explains. A calibration that is wrong by more than in the draws shifts the cell: "
    "0.1 % of difC is 0.1 % of every length.\n",
}
"""Limits of a model in Markdown, by whether it predicts intervals."""


def _comparison(provenance: ModelProvenance) -> Iterable[str]:
    """Yield the comparison with the baselines, if the training recorded one."""
    comparison = BaselineComparison.from_provenance(provenance)
    if comparison is not None:
        beaten = "not better" if comparison.not_beaten else "better"
        yield f"It is {beaten} than the baselines ({comparison})."


def _tested_on(split: SplitSettings) -> str:
    count = split.test_draws
    if count:
        return f"{count:,} draws of measured-looking profiles of each phase"
    return "the test samples of that split"


def signature_units(predictor: Predictor) -> dict[str, tuple[str, str]]:
    """Return unit and meaning of each column of a prediction through MLflow's tools."""
    units = {}
    for column in output_columns(predictor.targets):
        if column in CELL_PARAMETERS:
            units[column] = ("Å" if column in "abc" else "°", "cell of the predicted phase")
        elif column.startswith("p_"):
            units[column] = ("1", f"probability of phase {column.removeprefix('p_')}")
        else:
            units[column] = ("", f"most probable {column.replace('_', ' ')}")
    return units


def _ranges(phase: Mapping[str, Any]) -> Iterable[str]:
    for name, ranges in phase["cell"].items():
        unit = "Å" if name in "abc" else "°"
        spans = (
            f"{float(span['first']):g} to {float(span['last']):g} by {float(span['step']):g}"
            if span["first"] is not None
            else f"{float(span['low']):g} to {float(span['high']):g}"
            for span in ranges
        )
        yield f"{name} {' and '.join(spans)} {unit}"


def _scores(test: Scores) -> str:
    used = [key for key in _SCORES if any(key in values for values in test.values())]
    return _table(
        ("", *(_SCORES[key][0] for key in used)),
        [
            (group, *(format(v[key], _SCORES[key][1]) if key in v else "" for key in used))
            for group, v in test.items()
        ],
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

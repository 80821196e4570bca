"""Fit the intervals of a packaged model again, without training: their powers and their quantiles.

    python benchmarks/recalibrate.py FOLDER [--draws 2000] [--drifted 1000] [--seed 111]

For a package that was written before intervals had powers (bragg_models/networks/robust.py); that
of BaTiO3 on NOMAD has those of the defaults. Draws of each phase, of instruments that were
calibrated and of others, are predicted; probabilities, cells and the limit of rejection stay as
they are, to the bit.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors import torch as tensors

from bragg_data.simulation.measurement_effects import draw_labels, draw_profiles, simulator_for
from bragg_models.networks.calibration import calibrate
from bragg_models.networks.robust import PhaseFits, Robust
from bragg_models.predictors import WEIGHTS, load_predictor
from catalog.packages import Manifest
from pipelines.simulation.draws import Purpose, random_stream, task_sizes

PER_TASK = 100  # draws of each phase
# Of a seed that no model was evaluated on.
PURPOSES = Purpose.EVALUATION, Purpose.DRIFTED_EVALUATION


def main(
    folder: Path,
    draws: Annotated[int, typer.Option(help="Of each phase, with a calibration.")] = 2000,
    drifted: Annotated[int, typer.Option(help="Of each phase, without one.")] = 1000,
    seed: int = 111,
) -> None:
    predictor = load_predictor(folder)
    network, targets, campaign = predictor.model, predictor.targets, predictor.campaign
    if not isinstance(network, Robust):
        raise typer.BadParameter(f"A model of kind '{predictor.kind}' has no intervals.")
    simulator, effects = simulator_for(campaign), campaign.measurement_effects
    fits, phase, values, calibrated = [], [], [], []
    for purpose, count in zip(PURPOSES, (draws, drifted), strict=True):
        is_calibrated = purpose is Purpose.EVALUATION
        for task, size in enumerate(task_sizes(count, PER_TASK)):
            generator = np.random.default_rng(random_stream(purpose, seed, task))
            labels = draw_labels(campaign, size, generator)
            drawn = draw_profiles(simulator, *labels, generator, effects, calibrated=is_calibrated)
            prepared = drawn.prepared()
            rows = prepared.max(axis=1) > 0
            fits.append(network.fit_profiles(predictor._prepared(prepared[rows])))
            phase.append(drawn.phase[rows])
            values.append(targets.encode(drawn.phase[rows], drawn.cells[rows])[0])
            calibrated.append(np.full(rows.sum(), is_calibrated))
            print(f"{purpose.name}, task {task}", flush=True)
    together = PhaseFits(*map(torch.cat, zip(*fits, strict=True)))
    arrays = (np.concatenate(parts) for parts in (phase, values))
    print(calibrate(network, together, *arrays, targets.free, np.concatenate(calibrated)))
    fitted = {name: network.state_dict()[name].contiguous() for name in ("stretch", "sharpness")}
    tensors.save_file(tensors.load_file(folder / WEIGHTS) | fitted, folder / WEIGHTS)
    Manifest.read(folder).write(folder)


if __name__ == "__main__":
    typer.run(main)

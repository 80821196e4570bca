"""The training of this project's networks: guided, and robust for measured profiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import nn

from bragg_data.preprocessing import preprocessing
from bragg_data.splits import Part
from bragg_data.store.schema import campaign_of
from bragg_models.data.batches import Profiles
from bragg_models.networks.build import build
from bragg_models.networks.guided import fill_physics_tables, guided_config
from bragg_models.networks.robust import Robust, calibrate, concatenate_fits
from bragg_models.training.inference import Samples
from pipelines.cli.console import Progress, say
from pipelines.cli.options import ClusterOptions
from pipelines.cluster.client import open_cluster
from pipelines.simulation.draws import Purpose, SimulatedMeasurements, draw_on_cluster
from pipelines.training.presets import Preset
from pipelines.training.stage import (
    FittedModel,
    Stage,
    TrainingContext,
    fit_stage,
    prepared_samples,
)

_ROWS = 512  # rows of a chunk of profiles in memory


def train_guided(context: TrainingContext, preset: Preset) -> FittedModel:
    """Train the proposal network of the guided network; its physics needs no training."""
    fitted = _untrained(context, preset, "guided")
    _fit_proposal(context, fitted, preset, prepared_samples(context, preset.preprocessing))
    return fitted


def _untrained(context: TrainingContext, preset: Preset, kind: str, **config: bool) -> FittedModel:
    """Return a network with the physics of the campaign and seeded initial weights."""
    campaign = campaign_of(context.dataset)
    values = guided_config(campaign, context.targets, **config, **preset.network)
    network = build(kind, values, seed=context.seed)
    fill_physics_tables(network, campaign, context.targets)
    return FittedModel(kind, network.to(context.device), preset.preprocessing)


def _fit_proposal(
    context: TrainingContext, fitted: FittedModel, preset: Preset, samples: Samples
) -> None:
    ((name, settings),) = preset.stages.items()
    proposal: nn.Module = fitted.model.proposal  # type: ignore[union-attr,assignment]
    fit_stage(context, fitted, preset, Stage(name, proposal, samples, settings))


def train_robust(context: TrainingContext, preset: Preset, cluster: ClusterOptions) -> FittedModel:
    """Train the network for measured profiles on simulated measurements, and calibrate it.

    Training (domain randomisation), calibration on instruments that were calibrated, and on
    instruments whose calibration has drifted, have streams of random numbers of their own; the
    cluster draws the profiles.
    """
    fitted = _untrained(context, preset, "robust", sample_parameters=True)
    campaign, seed = campaign_of(context.dataset), context.seed
    count = preset.calibration_draws
    with open_cluster(cluster) as client:
        training = draw_on_cluster(client, campaign, preset.training_draws, Purpose.TRAINING, seed)
        calibration = draw_on_cluster(client, campaign, count, Purpose.CALIBRATION, seed)
        drifted = draw_on_cluster(client, campaign, count, Purpose.DRIFTED_CALIBRATION, seed)
    function = preprocessing(preset.preprocessing).function
    samples, part = _samples_in_memory([training, calibration], function)
    _fit_proposal(replace(context, samples=samples, part=part), fitted, preset, samples)
    network = cast("Robust", fitted.model)
    facts = _calibrate(context, network, [calibration, drifted], function)
    fitted.facts = {
        **facts,
        "draws": [preset.training_draws, preset.calibration_draws],
        "measurement_effects": campaign.measurement_effects.to_json(),
    }
    say(
        f"Calibrated: accuracy {facts['accuracy']:.2%} on the calibration draws, cross entropy "
        f"{facts['cross_entropy']:.3f}"
    )
    return fitted


def _calibrate(
    context: TrainingContext,
    network: Robust,
    draws: Sequence[SimulatedMeasurements],
    function: Callable[[Any], NDArray[np.floating]],
) -> dict[str, float]:
    """Calibrate probabilities, intervals and the rejection limit; return what came out.

    The draws are of calibrated instruments, and of drifted ones.
    """
    network.eval()
    fits = []
    size = sum(len(part.profiles) for part in draws)
    with Progress("Calibrating", size, "profiles") as progress, torch.inference_mode():
        for part in draws:
            prepared = np.asarray(function(part.profiles), dtype=np.float32)
            for low in range(0, len(prepared), network.batch_size):
                batch = torch.from_numpy(prepared[low : low + network.batch_size])
                fits.append(network.fit_phases(batch.to(context.device)))
                progress.advance(len(batch))
    phase = np.concatenate([part.phase for part in draws])
    values, _ = context.targets.encode(phase, np.concatenate([part.cells for part in draws]))
    calibrated = np.arange(size) < len(draws[0].profiles)
    return calibrate(
        network, concatenate_fits(fits), phase, values, context.targets.free, calibrated
    )


def _samples_in_memory(
    draws: Sequence[SimulatedMeasurements], function: Callable[[Any], NDArray[np.floating]]
) -> tuple[Samples, NDArray[np.int8]]:
    """Return draws for training and draws for validation as prepared samples, and their parts."""
    prepared = np.concatenate([function(d.profiles) for d in draws]).astype(np.float32)
    part = np.repeat([Part.training, Part.validation], [len(d.phase) for d in draws])
    # Shuffled, as training takes whole chunks and the phases follow one another.
    order = np.random.default_rng(0).permutation(len(prepared))
    prepared = prepared[order]
    phase = np.concatenate([d.phase for d in draws])[order]
    cells = np.concatenate([d.cells for d in draws])[order]
    intensity = xr.DataArray(prepared, dims=("sample", "tof"))
    profiles = Profiles(intensity, _ROWS, lambda values: values, prepared)
    return Samples(profiles, phase.astype(np.int8), cells), part[order].astype(np.int8)

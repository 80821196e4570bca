"""The fit loop: a generator of epoch results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bragg_models.batches import Profiles, in_order, shuffled
from bragg_models.metrics import Errors, errors, summary
from bragg_models.targets import Targets


class TrainingError(RuntimeError):
    """A training that cannot go on."""


@dataclass(frozen=True)
class Samples:
    """A data set as training sees it: lazy profiles and their labels.

    Attributes
    ----------
    profiles
        n profiles.
    phase : shape (n,)
        Phase codes.
    cells : shape (n, 6)
        In ångström and degrees.
    """

    profiles: Profiles
    phase: NDArray[np.int8]
    cells: NDArray[np.float64]


@dataclass(frozen=True)
class FitSettings:
    """How a network is trained.

    Attributes
    ----------
    epochs, batch_size, learning_rate, weight_decay
        Of Adam; the paper has 500, 512 and 1e-3 (section V-B2).
    schedule
        ``constant``, or ``one_cycle``: a linear rise over the first tenth of the steps, then a
        cosine down to zero.
    balance
        Composition of a batch: the share of a phase goes as its number of training samples to
        this power. 0 gives each phase the same share, values between 0 and 1 lift the rare ones;
        None is every sample exactly once per epoch.
    buffer_chunks
        Chunks in the shuffle buffer.
    regression_weight
        Weight of the mean squared error of the scaled parameters beside the cross entropy.
    mixed_precision
        Compute the network (not the loss, not the weights) in bfloat16 where the processor or the
        GPU has instructions for it. Answers are always computed in single precision.
    """

    epochs: int
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: Literal["constant", "one_cycle"] = "constant"
    balance: float | None = None
    buffer_chunks: int = 32
    regression_weight: float = 1.0
    mixed_precision: bool = True


@dataclass(frozen=True)
class Step:
    """Progress within an epoch, all counted from 1."""

    epoch: int
    step: int
    steps: int
    samples: int
    loss: float


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to.

    Attributes
    ----------
    training
        Mean ``loss``, ``cross_entropy`` and ``mse`` (of scaled parameters) over the epoch's
        batches, and the last ``learning_rate``.
    validation
        The scores of :func:`~bragg_models.metrics.summary`.
    is_best
        Whether these are the best weights so far, by the validation's ``mse_paper``.
    seconds
        Time that the epoch took, validation included.
    out_of_time
        Whether the time limit ended the training here.
    """

    epoch: int
    step: int
    training: dict[str, float]
    validation: dict[str, dict[str, float]]
    is_best: bool
    seconds: float
    out_of_time: bool


def choose_device(name: str = "auto") -> torch.device:
    """Return a device by name; ``auto`` is a GPU where there is one.

    Raises
    ------
    TrainingError
        If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise TrainingError(f"Device '{name}' cannot be used: {reason}. Use cpu.") from error
    return device


def fit(
    network: nn.Module,
    targets: Targets,
    samples: Samples,
    training: NDArray[np.bool_],
    validation: NDArray[np.bool_],
    settings: FitSettings,
    *,
    seed: int,
    device: torch.device | None = None,
    max_seconds: float | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Iterator[EpochResult]:
    """Train a network, yielding after every epoch.

    When the generator ends, or is closed early, the network holds the best weights so far. On one
    CPU, with the same number of threads, the same seed gives the same weights to the last bit.

    Parameters
    ----------
    network
        Gives logits and scaled parameters, as :class:`~bragg_models.networks.Multitask`. If it has
        a loss of its own (as :meth:`~bragg_models.guided.Guided.own_loss`), that is added.
    targets
        What the outputs mean.
    samples
        The data set.
    training, validation : shape (n,)
        Which samples to train on, and on which to choose the best weights.
    settings
        How.
    seed
        Of the order of the samples; each epoch has a stream of its own.
    device
        Where to compute; the network is moved there.
    max_seconds
        Where to end even if epochs are left. The schedule of the learning rate then follows the
        clock where the clock is ahead of the steps, so that it still comes to its end; the result
        depends on the machine if that happens.
    on_step
        Called after every step.

    Raises
    ------
    TrainingError
        If the loss is no longer a finite number.
    """
    device = device or torch.device("cpu")
    network.to(device)
    optimizer = torch.optim.Adam(
        network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    half = settings.mixed_precision and computes_bfloat16(device)
    values, free = targets.encode(samples.phase, samples.cells)
    shares = None
    if settings.balance is not None:
        counts = np.bincount(samples.phase[training], minlength=len(targets.names))
        shares = np.where(counts > 0, counts.astype(float) ** settings.balance, 0.0).tolist()
    own_loss = getattr(network, "own_loss", None)  # of parts that only answer after training
    steps = max(1, math.ceil(int(training.sum()) / settings.batch_size))
    done = 0
    began = time.perf_counter()
    limit = math.inf if max_seconds is None else max_seconds
    elapsed = 0.0
    best, best_score = _weights(network), math.inf
    try:
        for epoch in range(1, settings.epochs + 1):
            start = time.perf_counter()
            network.train()
            sums = np.zeros(3)
            stream = np.random.SeedSequence([seed, epoch, 1]).generate_state(1, np.uint64)
            draws = torch.Generator().manual_seed(int(stream[0] >> np.uint64(1)))
            batches = shuffled(
                samples.profiles,
                training,
                settings.batch_size,
                np.random.default_rng(np.random.SeedSequence([seed, epoch])),
                phase=samples.phase,
                shares=shares,
                buffer_chunks=settings.buffer_chunks,
            )
            step = 0
            for step, batch in enumerate(batches, start=1):
                progress = max(done / (steps * settings.epochs), elapsed / limit)
                rate = _learning_rate(settings, min(progress, 1.0))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    logits, found = network(torch.from_numpy(batch.profiles).to(device))
                losses = _losses(logits, found, batch.rows, samples.phase, values, free)
                loss = losses[0] + settings.regression_weight * losses[1]
                if own_loss is not None:
                    loss = loss + own_loss(
                        torch.from_numpy(batch.profiles).to(device),
                        torch.from_numpy(samples.phase[batch.rows].astype(np.int64)).to(device),
                        torch.from_numpy(values[batch.rows]).to(device),
                        draws,
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                done += 1
                sums += (loss.item(), losses[0].item(), losses[1].item())
                if not math.isfinite(sums[0]):
                    raise TrainingError(
                        f"The loss is {loss.item()} at step {step} of epoch {epoch}. Use a smaller "
                        f"learning rate than {settings.learning_rate:g}."
                    )
                if on_step is not None:
                    on_step(Step(epoch, step, steps, len(batch.rows), loss.item()))
                elapsed = time.perf_counter() - began
                if elapsed >= limit:
                    break
            batches.close()
            scores = summary(targets, evaluate(network, targets, samples, validation, device))
            score = scores["all"]["mse_paper"]
            if is_best := score < best_score:
                best, best_score = _weights(network), score
            means = dict(zip(("loss", "cross_entropy", "mse"), sums / max(step, 1), strict=True))
            means["learning_rate"] = rate
            yield EpochResult(
                epoch, done, means, scores, is_best, time.perf_counter() - start, elapsed >= limit
            )
            if elapsed >= limit:
                return
    finally:
        network.load_state_dict(best)


def evaluate(
    network: nn.Module,
    targets: Targets,
    samples: Samples,
    wanted: NDArray[np.bool_],
    device: torch.device | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Errors:
    """Return the errors of a network on the wanted samples, shape (n,), as sums.

    ``on_batch`` is called with the number of samples of every chunk that is done.
    """
    total: Errors | None = None
    for batch in in_order(samples.profiles, wanted):
        probabilities, values = outputs(network, batch.profiles, device)
        phase = probabilities.argmax(axis=1)
        some = errors(
            targets,
            samples.phase[batch.rows],
            samples.cells[batch.rows],
            phase,
            targets.decode(values, phase),
        )
        total = some if total is None else total + some
        if on_batch is not None:
            on_batch(len(batch.rows))
    if total is None:
        raise TrainingError("There is no sample to evaluate on. Choose a larger part.")
    return total


def outputs(
    network: nn.Module,
    profiles: NDArray[np.float32],
    device: torch.device | None = None,
    batch_size: int = 128,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the probabilities of the phases and the scaled parameters of prepared profiles.

    Parameters
    ----------
    network
        As in :func:`fit`.
    profiles : shape (n, points)
        Prepared.
    device
        Where the network is.
    batch_size
        Profiles at a time: small batches stay in a processor's cache.

    Returns
    -------
    probabilities : shape (n, n_phases)
    values : shape (n, n_parameters)
    """
    network.eval()
    parts = []
    with torch.inference_mode():
        for low in range(0, len(profiles), batch_size):
            some = torch.from_numpy(profiles[low : low + batch_size]).to(device)
            logits, values = network(some)
            parts.append((logits.softmax(dim=1).cpu().numpy(), values.cpu().numpy()))
    return np.concatenate([p for p, _ in parts]), np.concatenate([v for _, v in parts])


def _losses(
    logits: Tensor,
    found: Tensor,
    rows: NDArray[np.intp],
    phase: NDArray[np.int8],
    values: NDArray[np.float32],
    free: NDArray[np.bool_],
) -> tuple[Tensor, Tensor]:
    """Cross entropy, and mean squared error of the scaled parameters that are free."""
    device = logits.device
    wanted = torch.from_numpy(phase[rows].astype(np.int64)).to(device)
    target = torch.from_numpy(values[rows]).to(device)
    mask = torch.from_numpy(free[rows].astype(np.float32)).to(device)
    cross_entropy = nn.functional.cross_entropy(logits.float(), wanted)
    squared = ((found.float() - target) ** 2 * mask).sum() / mask.sum()
    return cross_entropy, squared


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bfloat16, so that it is fast and not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return False


def _learning_rate(settings: FitSettings, progress: float) -> float:
    if settings.schedule == "constant":
        return settings.learning_rate
    rise = 0.1
    if progress < rise:
        return settings.learning_rate * max(progress, 1e-3) / rise
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}

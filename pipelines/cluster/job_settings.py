"""What a SLURM job asks for, and how its workers are started and retire."""

import logging
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import dask

from bragg_data.isolated_process import SINGLE_THREAD
from pipelines.cli.options import ClusterError, SlurmOptions
from pipelines.cluster.scheduler import OPTIONS

_CLOSING_SECONDS = 60.0  # for a worker to start late, and to end in order


def settings_of(options: SlurmOptions, name: str, directory: Path) -> dict[str, object]:
    """Return the arguments of SLURMCluster; None stands for the value of the configuration.

    Raises `ClusterError` if neither the options nor that state the cores and memory of a job.
    """
    cores = options.cores or configured("cores")
    if not cores or not (options.memory or configured("memory")):
        raise ClusterError(
            "SLURM needs to know how many cores and how much memory a job takes: give both as "
            "options, or as 'cores' and 'memory' under jobqueue.slurm in ~/.config/dask/*.yaml."
        )
    environment = {**options.variables, **SINGLE_THREAD}
    prologue = ["export TMPDIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"]  # scratch of the node
    prologue += [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    python = options.python or configured("python")
    if not python:
        # The same Python, which may know this project from the working directory alone.
        project = shlex.quote(str(Path(__file__).resolve().parents[2]))
        prologue.append(f"export PYTHONPATH={project}${{PYTHONPATH:+:$PYTHONPATH}}")
    # Otherwise workers would start and die, each with a task, which would count as its failure.
    prologue.append(
        f"{shlex.quote(python or sys.executable)} -c 'import pipelines.cluster.client' || exit 1"
    )
    scheduler = {
        "dashboard_address": "127.0.0.1:0",
        **OPTIONS,
        **(configured("scheduler-options") or {}),
    }
    if options.host:
        scheduler["host"] = options.host
    same = ("queue", "account", "walltime", "memory", "interface", "python")
    return {
        **{key: getattr(options, key) for key in same},
        "name": name,
        "job_name": name,
        "cores": cores,
        "processes": cores,
        # A job that is preempted or lost is replaced at once; SLURM would let it wait for minutes.
        "job_extra_directives": [
            "--no-requeue",
            *(configured("job-extra-directives") or ()),
            *options.directives,
        ],
        "job_script_prologue": [*(configured("job-script-prologue") or ()), *prologue],
        # The last of two equal arguments counts.
        "worker_extra_args": [
            *lifetime_arguments(options.walltime or configured("walltime") or ""),
            *(configured("worker-extra-args") or ()),
            "--no-dashboard",
        ],
        "log_directory": expanded(configured("log-directory") or str(directory)),
        "scheduler_options": scheduler,
        "silence_logs": logging.ERROR,
    }


def configured(key: str) -> Any:
    """Return an entry of Dask's configuration, section ``jobqueue.slurm``."""
    return dask.config.get(f"jobqueue.slurm.{key}")


def expanded(path: str | Path) -> str:
    """Return a path with its variables, and absolute, as jobs run elsewhere."""
    return str(Path(os.path.expandvars(Path(path).expanduser())).absolute())


def lifetime_arguments(walltime: str) -> list[str]:
    """Return the arguments of ``dask worker`` by which it retires before SLURM kills its job.

    Workers retire one after the other, over 4 % of the walltime, so that their tasks do not all
    move at once. Where SLURM sets no limit, or does not understand the walltime, there are none.
    """
    seconds = seconds_of(walltime)
    if not seconds:
        return []
    stagger = 0.02 * seconds
    lifetime = seconds - 2 * stagger - min(_CLOSING_SECONDS, 0.1 * seconds)
    return ["--lifetime", f"{lifetime:.0f}s", "--lifetime-stagger", f"{stagger:.0f}s"]


def seconds_of(walltime: str) -> int:
    """Return the seconds of a time limit as sbatch takes it; 0 stands for no limit, as there.

    Formats are M, M:S, H:M:S, D-H, D-H:M and D-H:M:S.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", walltime.strip())
    if match is None:
        return 0
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:
        numbers.insert(0, 0)  # no hours
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return 86_400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds

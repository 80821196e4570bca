"""How the schedulers of local and SLURM clusters, which run in the driver, differ from Dask's."""

from collections.abc import Iterable
from typing import Any

from distributed.scheduler import DEFAULT_EXTENSIONS
from distributed.spans import SpansSchedulerExtension

from pipelines.cli.options import ALLOWED_FAILURES


class _Spans(SpansSchedulerExtension):  # type: ignore[misc]
    """Keeps no entry for each task that was ever submitted: of a million they take 400 MiB."""

    def observe_tasks(self, tss: Iterable[Any], code: Any, span_metadata: Any) -> Any:  # noqa: ARG002
        return super().observe_tasks(tss, code, None)


OPTIONS: dict[str, object] = {
    "allowed_failures": ALLOWED_FAILURES,
    "extensions": DEFAULT_EXTENSIONS | {"spans": _Spans},
}

"""The command lines, which alone wire data, models, catalog and compute together."""

import os
import sys

# Dask reads this when it is imported. Its workers then fork from a process that has no threads, and
# imported the libraries once for all of them: they start in half the time.
if sys.platform == "linux":
    os.environ.setdefault("DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD", "forkserver")

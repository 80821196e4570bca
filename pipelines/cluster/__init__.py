"""Where tasks run: local processes, SLURM jobs, or a running Dask scheduler."""

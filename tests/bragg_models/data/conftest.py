"""Profiles for the tests of batches and of their cache."""

import numpy as np
import pytest
import xarray as xr

from bragg_models.data.batches import Profiles

N, ROWS = 1000, 64


@pytest.fixture
def profiles() -> Profiles:
    """Profiles whose values are their row numbers."""
    values = np.arange(N, dtype=np.float32)[:, None] * np.ones(5, dtype=np.float32)
    return Profiles(xr.DataArray(values, dims=("sample", "tof")), ROWS, lambda x: x * 2)

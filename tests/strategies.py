"""Hypothesis strategies shared by the tests."""

import numpy as np
from hypothesis import strategies as st

from bragg_data.crystallography.cell import CELL_PARAMETERS

lengths = st.floats(2.0, 20.0)
angles = st.floats(65.0, 115.0)

cells = st.tuples(lengths, lengths, lengths, angles, angles, angles).map(np.array)
"""Triclinic cells that enclose a volume, shape (6,)."""

assert len(CELL_PARAMETERS) == 6

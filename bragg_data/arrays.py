"""Types of arrays that nearly every signature has."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Floats32 = NDArray[np.float32]
AnyFloats = NDArray[np.floating]  # in any precision
Integers = NDArray[np.integer]  # of any size
Integers8 = NDArray[np.int8]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]

"""The lines of a phase that cells of a like shape need, copied side by side."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

ALIKE = 16
"""Samples that share one selection of lines."""


class SelectedLines(NamedTuple):
    """Lines of a phase, as :class:`bragg_data.crystallography.reflections.Lines` has them.

    ``products`` (n_terms, n) and ``strengths`` (n_pairs, n), both float32.
    """

    products: NDArray[np.float32]
    strengths: NDArray[np.float32]


@njit(nogil=True, cache=True)
def select(metrics, q_high, lines, room):  # type: ignore[no-untyped-def] # pragma: no cover
    """Copy the lines with 1/d² ≤ q_high for some metric within the range of these ones.

    The bound takes the smallest and largest value of each term of the metric, after a common
    scale is divided out, so it is sharp where the cells differ little but in size.

    Parameters
    ----------
    metrics : shape (n, n_terms)
        Independent terms of the reciprocal metric in Å⁻².
    q_high
        Largest 1/d² in Å⁻².
    lines
        All lines, as :class:`SelectedLines`.
    room
        Arrays like those of ``lines``, to which the lines are copied.

    Returns
    -------
    Number of lines that were copied.
    """
    n_terms, n_lines = lines.products.shape
    n_pairs = len(lines.strengths)
    low = np.full(n_terms, np.inf)
    high = np.full(n_terms, -np.inf)
    smallest = np.inf
    for i in range(len(metrics)):
        size = metrics[i, 0]  # of a diagonal element, so it is positive
        smallest = min(smallest, size)
        for t in range(n_terms):
            low[t] = min(low[t], metrics[i, t] / size)
            high[t] = max(high[t], metrics[i, t] / size)
    limit = np.float32(q_high / smallest * (1.0 + 1e-5))
    bound = np.zeros(n_lines, np.float32)
    for t in range(n_terms):
        low32 = np.float32(low[t])
        high32 = np.float32(high[t])
        for r in range(n_lines):
            p = lines.products[t, r]
            bound[r] += min(low32 * p, high32 * p)
    count = 0
    for r in range(n_lines):
        if bound[r] <= limit:
            for t in range(n_terms):
                room.products[t, count] = lines.products[t, r]
            for pair in range(n_pairs):
                room.strengths[pair, count] = lines.strengths[pair, r]
            count += 1
    return count

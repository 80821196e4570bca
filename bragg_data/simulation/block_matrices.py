"""What rows of deposits draw that all have one sample's peak shapes: a pattern and derivatives.

The shapes are summed first, to one matrix for each block of nodes, which serves all rows.
"""

from typing import NamedTuple

import numpy as np

from bragg_data.arrays import AnyFloats, Indices


class Members(NamedTuple):
    """The matrices of a level of a basis of peak shapes."""

    matrix: AnyFloats  # (zones, K · nodes of a block, width): what each shape draws of each node
    ranks: tuple[int, ...]  # shapes that each zone needs, of K
    polynomials: (
        AnyFloats  # (stations, nodes of a zone) between which coefficients are interpolated
    )
    cell: int  # nodes after which the matrices repeat
    step: int  # targets by which they are moved then


def products_of_sample(
    level: AnyFloats, members: Members, coefficients: AnyFloats, changed: Indices
) -> AnyFloats:
    """Return what the blocks of a level (blocks, n, nodes) draw, (blocks, n, width).

    With the first of the ``coefficients`` (1 + m, zones, stations, K). What the others draw of the
    first row is added to the rows that have ``changed``, (m,).
    """
    (blocks, n, size), width, n_sums = level.shape, members.matrix.shape[2], len(coefficients)
    zones, cell, cells = len(members.ranks), members.cell, size // members.cell
    result = np.empty((blocks, n, width), level.dtype)
    # For each node of a block, a sum over the shapes. Nodes at the same place of their cells share
    # members, and so a product. Where their rows, each moved by a step, do not reach it is zero.
    sums = np.zeros((n_sums, blocks // zones, cells, cell * width + members.step), level.dtype)
    of_blocks = sums.reshape(n_sums, blocks // zones, -1)[..., : size * width]
    of_blocks = of_blocks.reshape(n_sums, -1, size, width)
    wide = width - members.step * (cells - 1)
    of_cells = sums.reshape(-1, sums.shape[3])[:, : cell * width].reshape(-1, cell, width)
    of_cells = of_cells[..., :wide].transpose(1, 0, 2)
    for zone, rank in enumerate(members.ranks):
        shares = (members.polynomials.T @ coefficients[:, zone, :, :rank]).reshape(-1, cell, rank)
        shapes = members.matrix[zone, : rank * size].reshape(rank, size, width)[:, :cell, :wide]
        np.matmul(shares.transpose(1, 0, 2), shapes.transpose(1, 0, 2), out=of_cells)
        here, drawn = blocks_of(level, zone, zones), blocks_of(result, zone, zones)
        np.matmul(here, of_blocks[0], out=drawn)
        drawn[:, changed] += (here[:, :1] @ of_blocks[1:])[:, :, 0].swapaxes(0, 1)
    return result


def blocks_of(level: AnyFloats, zone: int, zones: int) -> AnyFloats:
    """Return a zone's blocks of a level."""
    size = len(level) // zones
    return level[zone * size : (zone + 1) * size]

"""Known cells all over a campaign's range, and the most similar of them to a profile."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from bragg_models.networks.guided_config import GuidedConfig
from bragg_models.networks.pattern_layer import Pattern
from bragg_models.networks.perceptron import ROWS

_CANDIDATES = 64  # similar cells among which starts are chosen
_APART = 0.3  # in scaled parameters: of starts, so that they do not all lead to the same minimum
_FEWEST_KNOWN = 256  # known cells of a phase, however small its range
_OVERSAMPLING = 8  # more cells are drawn than used, so that they are even in peak positions


class KnownCells(nn.Module):
    """The pattern layer of a campaign, and cells of its phases with their patterns.

    ``config`` and the buffers ``middle`` and ``half_range``, shape (n_phases, n_parameters), belong
    to it: see :func:`bragg_models.networks.guided.fill_physics_tables`.
    """

    middle: Tensor
    half_range: Tensor

    def __init__(self, config: GuidedConfig) -> None:
        super().__init__()
        self.config = config
        self.pattern = Pattern(config.pattern)
        for name in ("middle", "half_range"):
            shape = len(config.pattern.phases), len(config.pattern.is_length)
            self.register_buffer(name, torch.ones(shape, dtype=torch.float64))
        # Of a phase the least of the blurs under which its known cells cover the range.
        self._retrieval_blurs: dict[int, float] = {}
        self._known: dict[tuple[int, float, torch.device], tuple[Tensor, Tensor]] = {}

    def most_similar(self, code: int, roots: Tensor, blur: float) -> tuple[Tensor, Tensor]:
        """Return the known cells of a phase that are most similar to n profiles, best first.

        Scaled, of shape (n, starts, n_parameters), and their numbers (n, starts) among those of
        :meth:`known_patterns`. ``roots`` (n, compared points) are square roots of profiles, which
        are blurred by a Gaussian of standard deviation ``blur`` (in points), as the patterns of the
        cells are.
        """
        cells, known = self.known_roots(code, blur, roots.device)
        similarity = roots[:, :: thinning(blur)] @ known.T
        if not self.config.blurs:
            number = similarity.topk(min(self.config.starts, len(cells))).indices
            return cells[number], number
        similar = similarity.topk(min(_CANDIDATES, len(cells)))
        number = _apart(cells[similar.indices], similar, min(self.config.starts, len(cells)))
        return cells[number], number

    def known_roots(self, code: int, blur: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """As :meth:`known_patterns`; square roots of blurred patterns, of unit norm, thinned."""
        key = code, blur, device
        if key not in self._known:
            cells, sharp = self.known_patterns(code, device)
            blurred = self.pattern.blurred(sharp, blur)[:, :: thinning(blur)].sqrt()
            self._known[key] = cells, nn.functional.normalize(blurred, dim=1)
        return self._known[key]

    def known_patterns(self, code: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the known cells of a phase, scaled, and patterns (draws, compared points)."""
        key = code, 0.0, device
        if key not in self._known:
            cells = self._known_cells(code).to(device)
            patterns = [
                self.pattern(code, self.physical(part, code), slopes=False)[0]
                for part in torch.split(cells, ROWS)
            ]
            self._known[key] = cells, torch.cat(patterns)
        return self._known[key]

    def _known_cells(self, code: int) -> Tensor:
        """Return cells over the whole range, (n_cells, n_parameters), scaled, always the same.

        Their density is even in the positions of the peaks, not in the parameters: near its limit
        of 120° a rhombohedral angle shifts peaks ten times as far as elsewhere.
        """
        free, half = list(self.config.pattern.phases[code].free), self.half_range[code]
        engine = SobolEngine(len(free), scramble=True, seed=0)  # type: ignore[no-untyped-call]
        drawn = engine.draw(_OVERSAMPLING * self.config.draws)
        cells = torch.zeros(len(drawn), len(half), dtype=torch.float64, device=half.device)
        cells[:, free] = 2 * drawn.to(cells) - 1
        density = []
        for part in torch.split(cells, 32 * ROWS):
            sensitivity = self.pattern.sensitivity(code, self.physical(part, code))
            scaled = sensitivity * half[free, None] * half[free]
            density.append(torch.linalg.det(scaled).clamp(min=1e-12).sqrt())
        count = self.config.draws
        if self.config.blurs:
            # The volume of the range in points^n_free, over that which one start covers.
            volume = 2 ** len(free) * float(torch.cat(density).mean())
            for blur in sorted(self.config.blurs):
                cells_needed = int(volume / blur ** len(free))
                if cells_needed <= count:
                    break
            self._retrieval_blurs[code] = blur
            count = min(count, max(cells_needed, _FEWEST_KNOWN))
        generator = torch.Generator().manual_seed(0)
        chosen = torch.multinomial(torch.cat(density).cpu(), count, generator=generator)
        return cells[chosen.to(cells.device)]

    def physical(self, values: Tensor, code: int | Tensor) -> Tensor:
        """Return scaled parameters (n, n_parameters) in ångström and degrees, same shape.

        ``code`` is the phase of all rows, or that of each, (n,).
        """
        return values * self.half_range[code] + self.middle[code]


def _apart(cells: Tensor, similar: torch.return_types.topk, count: int) -> Tensor:
    """Return the numbers (n, count) of the most similar cells that are apart from each other.

    ``cells`` (n, candidates, n_parameters), scaled, are those of ``similar``, best first. Where
    too few are apart, others fill up.
    """
    rank = similar.values.clone()
    chosen = []
    for _ in range(count):
        best = rank.argmax(dim=1)
        chosen.append(best)
        of_best = cells.gather(1, best[:, None, None].expand(-1, 1, cells.shape[2]))
        near = (cells - of_best).abs().amax(dim=2) < _APART
        rank = torch.where(near, rank - 2.0, rank)  # similarities are between 0 and 1
        rank.scatter_(1, best[:, None], -torch.inf)
    return similar.indices.gather(1, torch.stack(chosen, dim=1))


def thinning(blur: float) -> int:
    """Return how many points apart samples of a blurred pattern may be, without loss."""
    return max(int(blur / 1.25), 1)

"""The proposal network: a perceptron with one head for the phase and one for the cell."""

import torch
from torch import Tensor, nn

from bragg_models.networks.guided_config import PerceptronConfig
from bragg_models.networks.paper import dense

ROWS = 32  # rows that are computed together: their patterns stay in a processor's cache


class Perceptron(nn.Module):
    """Dense layers with one head for the phase and one for the cell parameters."""

    def __init__(self, config: PerceptronConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.points // config.pooling, *config.hidden)
        self.layers = nn.Sequential(*dense(widths, nn.SiLU))
        self.phase = nn.Linear(widths[-1], config.phases)
        self.cell = nn.Linear(widths[-1], config.parameters)

    def forward(self, profiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (n, n_phases) and the scaled cell parameters (n, n_parameters).

        Of square roots of intensities (n, points), of unit norm (``profile_sqrt_unit``).
        """
        if self.training:
            return self._outputs(profiles)
        # Always as many rows: products of other shapes round otherwise, and a search begins here.
        padded = nn.functional.pad(profiles, (0, 0, 0, -len(profiles) % ROWS))
        parts = zip(*map(self._outputs, torch.split(padded, ROWS)), strict=True)
        logits, cells = (torch.cat(part)[: len(profiles)] for part in parts)
        return logits, cells

    def _outputs(self, profiles: Tensor) -> tuple[Tensor, Tensor]:
        pooled = nn.functional.avg_pool1d(profiles[:, None], self.config.pooling)[:, 0]
        # At unit norm a value is about 1/√points.
        hidden = self.layers(pooled * self.config.points**0.5)
        return self.phase(hidden), self.cell(hidden)

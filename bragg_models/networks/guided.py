"""Our integrated network: a perceptron proposes phase and cell, and Bragg's law refines the cell.

The proposal network estimates the phase of a profile and, to about a thousandth of an ångström, its
cell. From there the pattern layer (:mod:`bragg_models.networks.pattern_layer`), which computes the
pattern of a cell, is used to refine the cell until the profile is explained
(:mod:`bragg_models.networks.cell_search`). Where it is not, the search is repeated on blurred
profiles, which converge from cells further away; then from the known cells all over the campaign's
range that look most similar to the profile; and then in the other phases.
"""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from bragg_data.campaign import Campaign
from bragg_models.networks.cell_search import CellSearch, Observed
from bragg_models.networks.guided_config import PerceptronConfig
from bragg_models.networks.paper import NetworkError
from bragg_models.networks.pattern_tables import pattern_tables
from bragg_models.targets import Targets

_BLURS = 5.0, 12.0  # points, the narrower first: peaks so far apart still overlap
_MARGIN = 1.5
_CLEARLY_BETTER = 0.5  # another phase replaces the proposed one below this ratio of misfits


class Guided(CellSearch):
    """Our integrated network; see the module. Only its proposal network is trained."""

    def forward(self, profiles: Tensor, phase: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits (n, n_phases) and the scaled cell parameters in double precision.

        Of square roots of intensities (n, points), of unit norm (``profile_sqrt_unit``); points
        that are zero hold no information and are not compared. ``phase`` (n,) are known phases, if
        the network is not to determine them.
        """
        logits, proposed = self.propose(profiles)
        proposed = proposed.double().clamp(-1, 1)
        values = proposed.clone()
        compared = profiles[:, self.config.pattern.first :].float()
        first = logits.argmax(dim=1) if phase is None else phase
        misfit = torch.full_like(proposed[:, 0], torch.inf)
        for code in range(len(self.config.pattern.phases)):
            rows = torch.nonzero(first == code)[:, 0]
            values[rows], misfit[rows] = self._refined(code, compared[rows], proposed[rows])
        if phase is not None:
            return logits, values
        logits = logits.clone()
        for code in range(len(self.config.pattern.phases)):
            rows = torch.nonzero((misfit > self.config.met) & (first != code))[:, 0]
            refined, refined_misfit = self._refined(code, compared[rows], proposed[rows])
            better = refined_misfit < _CLEARLY_BETTER * misfit[rows]
            rows = rows[better]
            values[rows], misfit[rows] = refined[better], refined_misfit[better]
            # The logits of the two phases are swapped: the probabilities stay those proposed.
            best = logits[rows].argmax(dim=1)
            logits[rows, best], logits[rows, code] = logits[rows, code], logits[rows, best]
        return logits, values

    def _refined(self, code: int, profiles: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best cells of a phase and their misfits, shapes as ``start`` and (n,).

        The search runs from the start, then from where the start leads on blurred profiles, then
        from where known cells lead: each only for profiles that are not explained yet.
        """
        values, misfit = self.search(code, profiles, start)
        for from_start, blur in product((True, False), _BLURS):
            rows = torch.nonzero(misfit > self.config.met)[:, 0]
            if not len(rows):
                break
            roots = self.pattern.blurred(profiles[rows] ** 2, blur).sqrt()
            similar = (
                start[rows][:, None] if from_start else self.most_similar(code, roots, blur)[0]
            )
            count = similar.shape[1]
            roots = roots.repeat_interleave(count, dim=0)
            blurred = Observed(code, roots, torch.ones_like(roots), blur)
            nearer, _ = self.descend(blurred, similar.flatten(0, 1))
            refined, refined_misfit = self.search(
                code, profiles[rows].repeat_interleave(count, dim=0), nearer.clamp(-1, 1)
            )
            best = refined_misfit.reshape(-1, count).argmin(dim=1)
            best += count * torch.arange(len(rows), device=best.device)
            better = refined_misfit[best] < misfit[rows]
            values[rows[better]] = refined[best][better]
            misfit[rows[better]] = refined_misfit[best][better]
        return values, misfit


def guided_config(
    campaign: Campaign,
    targets: Targets,
    *,
    pooling: int | None = 1,
    lorentzian: bool = False,
    **changes: Any,
) -> Mapping[str, Any]:
    """Return the configuration of a network for a campaign, as plain JSON values.

    ``pooling`` is the proposal network's, None for a search without one. With ``lorentzian`` the
    peaks' broadening has the range of the campaign's measurement effects. ``changes`` are values
    other than the defaults of :class:`~bragg_models.networks.guided_config.GuidedConfig`.
    """
    if lorentzian:
        # Microstrain broadens by a constant share of T; the margin is for small crystallites.
        points = 1e-6 / campaign.grid.relative_step
        widest = campaign.measurement_effects.microstrain[1]
        high = _MARGIN * (widest - campaign.microstrain) * points + 2.0
        changes["lorentzian"] = [-campaign.microstrain * points, high]
    proposal = pooling and {
        "points": campaign.grid.points,
        "phases": len(targets.names),
        "parameters": len(targets.parameters),
        "hidden": list(PerceptronConfig.hidden),
        "pooling": pooling,
    }
    pattern = asdict(pattern_tables(campaign, targets, skewed=lorentzian)[0])
    return {"proposal": proposal, "pattern": pattern, **changes}


def fill_physics_tables(network: nn.Module, campaign: Campaign, targets: Targets) -> None:
    """Set the tables of a new network: reflections and peak shapes, and the parameters' scaling.

    Raises `NetworkError` if a table is missing, unknown, or of another shape: the network was
    not built from :func:`guided_config` of the same campaign.
    """
    tables = dict(pattern_tables(campaign, targets)[1])
    tables |= {"middle": targets.middle, "half_range": targets.half_range}
    buffers = {
        name: buffer
        for name, buffer in network.named_buffers()
        if name in ("middle", "half_range") or name.startswith("pattern.")
    }
    values = {n if n in buffers else f"pattern.{n}": torch.as_tensor(t) for n, t in tables.items()}
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    expected = {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    if shapes != expected:
        differing = sorted(n for n in shapes | expected if shapes.get(n) != expected.get(n))
        raise NetworkError(
            f"The tables of the campaign do not fit the network: {', '.join(differing)} missing, "
            f"unknown or of another shape. Build the network from the same campaign."
        )
    state = network.state_dict()
    network.load_state_dict(state | {n: v.to(buffers[n].dtype) for n, v in values.items()})

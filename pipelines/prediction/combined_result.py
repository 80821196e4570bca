"""What several banks of one sample show together, as part of a prediction's result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from pipelines.refinement.result import JointRefinement


@dataclass(frozen=True)
class CombinedParameter:
    """A cell parameter from several banks, in ångström or degrees."""

    value: Annotated[float, Field(description="Mean, weighted by the inverse variances.")]
    uncertainty: Annotated[
        float,
        Field(
            description="Standard uncertainty, by the factor √(χ²/(n - 1)) larger where the n "
            "banks differ by more than theirs."
        ),
    ]
    chi2: Annotated[float, Field(description="χ² of the banks' deviations, n - 1 on average.")]
    banks: Annotated[Mapping[str, float], Field(description="The value of each bank.")]
    discrepant: Annotated[
        tuple[str, ...],
        Field(description="Banks more than 3 standard uncertainties from the others' mean."),
    ]


@dataclass(frozen=True)
class CombinedBanks:
    """What the banks of one sample show together."""

    phase: str
    crystal_system: Annotated[
        str | None, Field(description="null of a phase that no bank alone predicts.")
    ]
    probabilities: Annotated[
        Mapping[str, float],
        Field(description="The banks' probabilities (at least 0.001), multiplied and normalised."),
    ]
    cell: Annotated[
        Mapping[str, CombinedParameter], Field(description="Free parameters, as predicted.")
    ]
    refined: Annotated[
        Mapping[str, CombinedParameter],
        Field(description="As refined, each bank by itself; empty where nothing was refined."),
    ]
    banks: Annotated[tuple[str, ...], Field(description="Banks that take part.")]
    warnings: Annotated[tuple[str, ...], Field(description="Disagreements, and banks left out.")]
    joint: Annotated[
        JointRefinement | None,
        Field(
            description="Refinement of the most plausible phase against all banks at once, on the "
            "measured points; null where there is none."
        ),
    ] = None
    joint_rwp: Annotated[
        Mapping[str, float],
        Field(
            description="R_wp of each phase that was refined so, a fraction; the phase with the "
            "most evidence, that of joint, first."
        ),
    ] = field(default_factory=dict)
    not_joint: Annotated[
        str | None, Field(description="Why there is no joint refinement, where one was asked for.")
    ] = None

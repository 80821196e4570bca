"""Provenance of a trained model: the data, the settings and the code that it comes from.

A saved model carries these values as JSON (``provenance`` in its ``model.json``), so that it can be
traced and trained again without any other file.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

Scores = Mapping[str, Mapping[str, float]]
"""Scores of all samples (``all``) and of each crystal system, by the name of the metric."""


@dataclass(frozen=True)
class SnapshotReference:
    """The snapshot of the store that a model was trained on."""

    tag: str = ""
    snapshot_id: str = ""
    uri: str = ""
    content_hash: str = ""  # SHA-256 over labels and intensities
    identity: str = ""  # SHA-256 over campaign, simulator and its version
    simulator: str = ""
    simulator_version: str = ""
    code_commit: str = ""
    growth: str = ""  # what joined the samples that the campaign drew, as JSON

    @classmethod
    def from_attrs(cls, attrs: Mapping[Any, Any]) -> Self:
        """Return the reference of an opened snapshot, from its attributes or from JSON."""
        return cls(**{f.name: str(attrs.get(f.name, "")) for f in fields(cls)})


@dataclass(frozen=True)
class SplitSettings:
    """How the samples were split: ``random`` or ``blocked``, into which shares."""

    name: str = ""
    seed: int = 0
    test: float = 0.0
    validation: float = 0.0
    test_draws: int | None = None  # held out per phase, for models that are tested on draws

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the settings that :meth:`to_json` wrote."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def to_json(self) -> Mapping[str, str | int | float]:
        """Return plain values; ``test_draws`` is left out if there are none."""
        return {key: value for key, value in asdict(self).items() if value is not None}


ACCEPTED = "accepted"  # scores of the profiles that a model accepts, where it rejects some


@dataclass(frozen=True)
class ModelScore:
    """The number that versions of a model are compared by, on its held-out test; low is good.

    ``name`` is ``mse_paper`` (equation (1) of the paper) or ``error_rate``.
    """

    name: str
    value: float


@dataclass(frozen=True)
class ModelProvenance:
    """Where a trained model comes from."""

    model: str = ""  # such as guided
    campaign: str = ""  # its name
    campaign_toml: str = ""
    cifs: Mapping[str, str] = field(default_factory=dict)  # texts by the names of the phases
    instrument_instprm: str = ""
    units: Mapping[str, str] = field(default_factory=dict)  # of the cell parameters
    data: SnapshotReference = field(default_factory=SnapshotReference)
    split: SplitSettings = field(default_factory=SplitSettings)
    test_set: str = ""  # scores are comparable where this name is the same
    preset: str = ""
    preset_values: Mapping[str, Any] = field(default_factory=dict)
    order: Mapping[str, Any] = field(default_factory=dict)  # the training task as JSON
    seed: int = 0
    device: str = ""
    code_commit: str = "unknown"
    trained_at: str = ""  # ISO 8601
    facts: Mapping[str, Any] = field(default_factory=dict)  # what the training reported
    test: Scores | None = None  # on the held-out test, as the next three; None before it
    draws: Scores | None = None  # on the draws of measured profiles that all models are scored on
    score: ModelScore | None = None
    baselines: Mapping[str, float] | None = None  # their errors in the metric of the score

    @property
    def classifier_uri(self) -> str | None:
        """Address of the registered classifier that a class-conditional model builds on."""
        return self.order.get("classifier")

    @property
    def parent_uri(self) -> str | None:
        """Address of the registered model from whose weights the training continued."""
        return self.order.get("parent")

    @property
    def extra_data(self) -> tuple[str, ...]:
        """Tags of additional data sets that the model was trained on."""
        key = "extra_data" if "extra_data" in self.order else "beside"  # deprecated key
        return tuple(self.order.get(key) or ())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the provenance that :meth:`to_json` wrote; what is missing has its default."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        known["data"] = SnapshotReference.from_attrs(values.get("data", {}))
        known["split"] = SplitSettings.from_json(values.get("split", {}))
        if known.get("score") is not None:
            known["score"] = ModelScore(**values["score"])
        return cls(**known)

    def to_json(self) -> Mapping[str, Any]:
        """Return plain JSON values; what is None is left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        data = {k: v for k, v in asdict(self.data).items() if v or k != "growth"}
        values |= {"data": data, "split": self.split.to_json()}
        if self.score is not None:
            values["score"] = asdict(self.score)
        return {key: value for key, value in values.items() if value is not None}

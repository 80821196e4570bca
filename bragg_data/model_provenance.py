"""Provenance of a trained model: the data, the settings and the code that it comes from.

A saved model carries these values as JSON (``provenance`` in its ``model.json``), so that it can be
traced and trained again without any other file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

Scores = Mapping[str, Mapping[str, float]]
"""Scores of all samples (``all``) and of each crystal system, by the name of the metric."""


@dataclass(frozen=True)
class SnapshotReference:
    """The snapshot of the store that a model was trained on.

    Attributes
    ----------
    tag, snapshot_id, uri
        Its name, its immutable identity, and the store.
    content_hash
        SHA-256 over labels and intensities.
    identity
        SHA-256 over campaign, simulator and its version.
    simulator, simulator_version, code_commit
        What computed it.
    """

    tag: str = ""
    snapshot_id: str = ""
    uri: str = ""
    content_hash: str = ""
    identity: str = ""
    simulator: str = ""
    simulator_version: str = ""
    code_commit: str = ""

    @classmethod
    def from_attrs(cls, attrs: Mapping[Any, Any]) -> SnapshotReference:
        """Return the reference of an opened snapshot, from its attributes or from JSON."""
        return cls(**{f.name: str(attrs.get(f.name, "")) for f in fields(cls)})


@dataclass(frozen=True)
class SplitSettings:
    """How the samples were split.

    Attributes
    ----------
    name
        ``random`` or ``blocked``.
    seed
        Of the split.
    test, validation
        Shares of the samples.
    test_draws
        Held-out draws per phase, for models that are tested on draws; otherwise None.
    """

    name: str = ""
    seed: int = 0
    test: float = 0.0
    validation: float = 0.0
    test_draws: int | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SplitSettings:
        """Return the settings that :meth:`to_json` wrote."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def to_json(self) -> Mapping[str, str | int | float]:
        """Return plain values; ``test_draws`` is left out if there are none."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ModelScore:
    """The number that versions of a model are compared by; lower is better.

    Attributes
    ----------
    name
        ``mse_paper`` (equation (1) of the paper) or ``error_rate``.
    value
        On the model's held-out test.
    """

    name: str
    value: float


@dataclass(frozen=True)
class ModelProvenance:
    """Where a trained model comes from.

    Attributes
    ----------
    model
        Name of the model, such as ``guided``.
    campaign
        Name of the campaign.
    campaign_toml, cifs, instrument_instprm
        Texts of the campaign file, of its structures by their names, and of its instrument.
    units
        Units of the cell parameters.
    data
        The snapshot.
    split
        How its samples were split.
    test_set
        Short name of the test samples: scores are comparable where it is the same.
    preset, preset_values
        Name of the preset, and its values.
    order
        The training task as JSON: ``model``, ``preset``, ``seed``, ``split`` …
    seed, device
        Of the training.
    code_commit, trained_at
        Commit of the code, and the time of the training (ISO 8601).
    facts
        What the training reported, by name.
    test, draws
        Scores on the model's held-out test, and on the pinned draws of measured profiles that all
        models are scored on; None before the test.
    score
        The number that versions are compared by; None before the test.
    baselines
        Errors of the baselines on the held-out test, in the metric of ``score``, by their names.
    """

    model: str = ""
    campaign: str = ""
    campaign_toml: str = ""
    cifs: Mapping[str, str] = field(default_factory=dict)
    instrument_instprm: str = ""
    units: Mapping[str, str] = field(default_factory=dict)
    data: SnapshotReference = field(default_factory=SnapshotReference)
    split: SplitSettings = field(default_factory=SplitSettings)
    test_set: str = ""
    preset: str = ""
    preset_values: Mapping[str, Any] = field(default_factory=dict)
    order: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = ""
    code_commit: str = "unknown"
    trained_at: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    test: Scores | None = None
    draws: Scores | None = None
    score: ModelScore | None = None
    baselines: Mapping[str, float] | None = None

    @property
    def classifier_uri(self) -> str | None:
        """Address of the registered classifier that a class-conditional model builds on."""
        return self.order.get("classifier")

    @property
    def extra_data(self) -> tuple[str, ...]:
        """Tags of additional data sets that the model was trained on."""
        key = "extra_data" if "extra_data" in self.order else "beside"  # deprecated key
        return tuple(self.order.get(key) or ())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelProvenance:
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
        values |= {"data": asdict(self.data), "split": self.split.to_json()}
        if self.score is not None:
            values["score"] = asdict(self.score)
        return {key: value for key, value in values.items() if value is not None}

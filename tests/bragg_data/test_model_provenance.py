"""Provenance of a model: what the version before wrote is read and written again unchanged."""

from bragg_data.model_provenance import ModelProvenance

EARLIER = {
    "model": "robust",
    "campaign": "batio3-nomad",
    "campaign_toml": "name = 'batio3-nomad'",
    "cifs": {"cubic": "data_cubic"},
    "instrument_instprm": "#GSAS-II",
    "units": {"a": "Å", "alpha": "degree"},
    "data": {
        "tag": "batio3-nomad-v1",
        "snapshot_id": "K84HF5SP1R1EVJ7EWASG",
        "uri": "file:///store",
        "content_hash": "2074",
        "identity": "118a",
        "simulator": "kinematic",
        "simulator_version": "1",
        "code_commit": "80c30b6",
    },
    "split": {"name": "random", "seed": 0, "test": 0.2, "validation": 0.05, "test_draws": 1000},
    "test_set": "bb9e485ad11a8eec",
    "preset": "quick",
    "preset_values": {"draws": [3000, 300]},
    "order": {
        "model": "robust",
        "beside": ["more-v1"],  # deprecated
        "classifier": "models:/small/1",
    },
    "seed": 3,
    "device": "auto",
    "code_commit": "80c30b6",
    "trained_at": "2026-11-26T19:06:40+00:00",
    "facts": {"limit": 0.17},
    "test": {"all": {"n": 3000.0, "mse_paper": 0.00123}},
    "score": {"name": "mse_paper", "value": 0.00123},
}


def test_json_of_the_version_before_comes_back_unchanged() -> None:
    provenance = ModelProvenance.from_json(EARLIER)
    assert provenance.to_json() == EARLIER
    assert list(provenance.to_json()) == list(EARLIER)
    assert provenance.split.test_draws == 1000
    assert provenance.data.tag == "batio3-nomad-v1"
    assert provenance.extra_data == ("more-v1",)
    assert provenance.classifier_uri == "models:/small/1"
    clean = {**EARLIER, "split": {"name": "random", "seed": 0, "test": 0.2, "validation": 0.05}}
    assert ModelProvenance.from_json(clean).to_json() == clean


def test_what_is_missing_has_its_default() -> None:
    assert ModelProvenance.from_json({}) == ModelProvenance()
    renamed = ModelProvenance.from_json({"order": {"extra_data": ["more-v1"]}})
    assert renamed.extra_data == ("more-v1",)

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.config import (
    EmbedderConfig,
    ExitHeadConfig,
    ExpertsConfig,
    FeatureConfig,
    GateConfig,
    LatentSpaceConfig,
    PreviewConfig,
    ScorerConfig,
    ThresholdConfig,
    from_dict,
    to_dict,
)
from moe_artifacts.errors import ConfigError

RANGE = (-6.0, 8.0)
SCORER = ScorerConfig(
    name="fashion",
    label="outside the manifold of real images",
    latent_space=LatentSpaceConfig(name="fashion", vae_class="AutoencoderKL", channels=4, scaling_factor=0.9),
    preview=PreviewConfig(kind="linear", channels=4, patch=2),
    embedder=EmbedderConfig(model="custom", embed_dim=32, model_config={"embed_dim": 32, "vision_cfg": {"width": 8}}),
    features=FeatureConfig(embed_dim=32),
    gate=GateConfig(num_experts=3, embed_dim=32, log_snr_range=RANGE),
    experts=ExpertsConfig(num_experts=3, feature_dim=96, hidden_dim=16, log_snr_range=RANGE),
    exit_head=ExitHeadConfig(state_dim=16),
    log_snr_range=RANGE,
    check_progress=(0.15, 0.35, 0.5),
    threshold=ThresholdConfig(rule="patience", threshold=0.4, patience=2, unit="image", scored_steps=(3, 9, 20)),
    provenance={"seed": 0, "parents": ["a", "b"]},
)
LEAVES = [
    ("name",),
    ("latent_space", "scaling_factor"),
    ("preview", "kind"),
    ("embedder", "model_config"),
    ("features", "use_delta"),
    ("gate", "num_experts"),
    ("gate", "log_snr_range"),
    ("gate", "top_k"),
    ("experts", "expert_dim"),
    ("experts", "dropout"),
    ("exit_head", "hidden_dim"),
    ("log_snr_range",),
    ("check_progress",),
    ("threshold",),
    ("threshold", "threshold"),
    ("threshold", "patience"),
    ("threshold", "scored_steps"),
    ("provenance",),
    ("format_version",),
]


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    values = copy.deepcopy(to_dict(SCORER))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return values


def test_a_config_survives_json() -> None:
    assert from_dict(ScorerConfig, json.loads(json.dumps(to_dict(SCORER)))) == SCORER


@pytest.mark.parametrize("path", [("lambda",), ("gate", "num_expert"), ("threshold", "tau")])
def test_unknown_keys_are_refused_at_every_depth(path: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"unknown keys \\['{path[-1]}'\\]"):
        from_dict(ScorerConfig, changed(path, 1))


def test_a_missing_key_is_named() -> None:
    values = to_dict(SCORER)
    del values["gate"]["num_experts"]
    with pytest.raises(ConfigError, match=r"config.gate lacks the keys \['num_experts'\]"):
        from_dict(ScorerConfig, values)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("gate", "num_experts"), "3", "config.gate.num_experts must be int, got '3'"),
        (("gate", "num_experts"), 3.0, "config.gate.num_experts must be int, got 3.0"),
        (("gate", "num_experts"), True, "config.gate.num_experts must be int, got True"),
        (("features", "use_delta"), 1, "config.features.use_delta must be bool, got 1"),
        (("log_snr_range",), "ab", "config.log_snr_range must be a list, got 'ab'"),
        (("log_snr_range",), [0, "b"], r"config.log_snr_range\[1\] must be float, got 'b'"),
        (("experts",), [], "config.experts must be a JSON object, got list"),
        (("preview", "kind"), "magic", "config.preview.kind must be one of"),
        (("embedder", "model_config"), 3, "config.embedder.model_config must be a JSON object, got 3"),
    ],
)
def test_wrong_types_are_refused_and_nothing_is_guessed(path: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ScorerConfig, changed(path, value))


def test_whole_numbers_are_floats_too() -> None:
    config = from_dict(ScorerConfig, changed(("latent_space", "scaling_factor"), 1))
    assert type(config.latent_space.scaling_factor) is float


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("gate", "num_experts"), 10**9),
        (("experts", "num_experts"), 10**9),
        (("experts", "hidden_dim"), 10**30),
        (("experts", "expert_dim"), -1),
        (("exit_head", "hidden_dim"), 0),
        (("embedder", "embed_dim"), 10**9),
        (("gate", "top_k"), 4),
        (("latent_space", "channels"), 10**9),
        (("latent_space", "scaling_factor"), 0),
        (("experts", "dropout"), 1.0),
        (("log_snr_range",), [1.0, 1.0]),
        (("log_snr_range",), [0.0, float("inf")]),
        (("log_snr_range",), [0.0, 1.0, 2.0]),
        (("check_progress",), []),
        (("check_progress",), [0.5, 0.15]),
        (("check_progress",), [0.5, float("nan")]),
        (("threshold", "threshold"), 1.0001),
        (("threshold", "threshold"), float("nan")),
        (("threshold", "patience"), 0),
        (("threshold", "patience"), None),
        (("threshold", "rule"), "q-exit"),  # without q
        (("experts", "feature_dim"), 95),  # not the width of the features
        (("gate", "embed_dim"), 31),
        (("format_version",), 2),
    ],
)
def test_values_out_of_range_fail_before_memory_is_taken(path: tuple[str, ...], value: Any) -> None:
    with pytest.raises(ConfigError):
        from_dict(ScorerConfig, changed(path, value))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
@given(json_values)
def test_a_damaged_file_gives_a_config_or_a_config_error(path: tuple[str, ...], value: Any) -> None:
    try:
        config = from_dict(ScorerConfig, changed(path, value))
    except ConfigError:
        return
    assert from_dict(ScorerConfig, to_dict(config)) == config


def test_configs_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCORER.gate.top_k = 3  # type: ignore[misc]

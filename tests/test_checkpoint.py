import dataclasses
import json
import pickle
import struct

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_artifacts import checkpoint
from moe_artifacts.checkpoint import load_checkpoint, load_state_strict, save_checkpoint
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
    to_dict,
)
from moe_artifacts.errors import CheckpointError, ConfigError

RANGE = (-6.0, 6.0)
CONFIG = ScorerConfig(
    name="test",
    label="made up",
    latent_space=LatentSpaceConfig(name="test", vae_class="AutoencoderKL", channels=4, scaling_factor=0.5),
    preview=PreviewConfig(kind="linear", channels=4),
    embedder=EmbedderConfig(model="ViT-B-32", embed_dim=8, pretrained="openai"),
    features=FeatureConfig(embed_dim=8),
    gate=GateConfig(num_experts=3, embed_dim=8, log_snr_range=RANGE),
    experts=ExpertsConfig(num_experts=3, feature_dim=24, hidden_dim=16, log_snr_range=RANGE),
    exit_head=ExitHeadConfig(state_dim=16),
    log_snr_range=RANGE,
    check_progress=(0.2, 0.5),
    threshold=ThresholdConfig(rule="cumulative", threshold=0.4, scored_steps=(3, 9)),
    provenance={"seed": 0, "parents": ["a", "b"]},
)
STATE = {
    "head.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "head.bias": torch.zeros(3),
    "seen": torch.tensor(7),
}


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "scorer", CONFIG, STATE)
    return tmp_path / "scorer"


def _edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def test_what_is_saved_is_what_is_loaded(folder):
    config, state = load_checkpoint(folder)
    assert config == CONFIG
    assert state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        torch.testing.assert_close(state[name], tensor, atol=0, rtol=0)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]  # nothing left over


def test_strided_and_shared_tensors_are_saved_whole(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    save_checkpoint(tmp_path, CONFIG, {"a": base.T, "b": base, "c": base[:, 1], "d": base.requires_grad_()})
    _, state = load_checkpoint(tmp_path)
    torch.testing.assert_close(state["a"], base.detach().T, atol=0, rtol=0)
    torch.testing.assert_close(state["c"], torch.tensor([1.0, 4.0]), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_weights_arrive_as_float32_and_integers_as_they_are(tmp_path, dtype):
    weights = torch.tensor([1.5, -0.25], dtype=dtype)
    save_checkpoint(tmp_path, CONFIG, {"w": weights, "n": torch.tensor([2**40])})
    _, state = load_checkpoint(tmp_path)
    assert state["w"].dtype == torch.float32 and state["w"].tolist() == [1.5, -0.25]
    assert state["n"].tolist() == [2**40]


def test_a_failed_save_leaves_the_old_checkpoint(folder):
    with pytest.raises(CheckpointError, match=r"'head\.bias' holds NaN"):
        save_checkpoint(folder, CONFIG, {**STATE, "head.bias": torch.tensor([0.0, float("nan"), 0.0])})
    assert load_checkpoint(folder)[0] == CONFIG


@pytest.mark.parametrize("fails", ["save_file", "write_json"])
def test_a_save_that_ends_half_way_leaves_the_old_checkpoint_or_none(folder, monkeypatch, fails):
    other = {name: value + 1 for name, value in STATE.items()}

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, fails, killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(folder, CONFIG, other)
    if fails == "save_file":
        assert all(torch.equal(value, STATE[name]) for name, value in load_checkpoint(folder)[1].items())
    else:  # never the new weights with the old threshold
        with pytest.raises(CheckpointError, match="damaged or incomplete checkpoint"):
            load_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    save_file({"head.bias": torch.tensor([0.0, value], dtype=torch.float16)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'head\.bias' holds NaN or infinity"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"incomplete checkpoint.*{name}"):
        load_checkpoint(folder)


@given(data=st.data())
def test_truncated_weights_are_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("scorer")
    save_checkpoint(folder, CONFIG, STATE)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(folder)


@given(header=st.binary(max_size=64))
def test_garbage_is_refused(tmp_path_factory, header):
    folder = tmp_path_factory.mktemp("scorer")
    save_checkpoint(folder, CONFIG, STATE)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + b"x" + header)
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)
    (folder / "config.json").write_bytes(b"{" + header)
    with pytest.raises((CheckpointError, ConfigError)):
        load_checkpoint(folder)


class _Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)


def test_a_pickle_in_disguise_is_refused_and_not_run(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(CheckpointError, match="Pickles"):
        load_checkpoint(folder)
    torch.save(STATE, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="Pickles"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}',
    ],
    ids=["overlapping", "wrong size", "overflowing"],
)
def test_headers_that_lie_are_refused(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(folder)


def test_a_huge_header_fails_before_memory_is_taken(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(folder)


def test_configs_that_are_not_understood_are_refused(folder):
    _edit_config(folder, colour="red")
    with pytest.raises(ConfigError, match="unknown keys"):
        load_checkpoint(folder)
    _edit_config(folder, format_version=2)
    with pytest.raises(ConfigError, match="upgrade moe-artifacts"):  # and not a complaint about its keys
        load_checkpoint(folder)
    for text in ("[]", "null", '{"name": ', "\xff", "[" * 100_000):
        (folder / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises((CheckpointError, ConfigError)):
            load_checkpoint(folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("gate", {**to_dict(CONFIG.gate), "num_experts": 10**9}),
        ("experts", {**to_dict(CONFIG.experts), "hidden_dim": -1}),
        ("threshold", {**to_dict(CONFIG.threshold), "threshold": 1.5}),
        ("log_snr_range", [6.0, -6.0]),
        ("check_progress", [0.5, 0.2]),
    ],
)
def test_values_out_of_range_are_refused(folder, field, value):
    _edit_config(folder, **{field: value})
    with pytest.raises(ConfigError):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["no-such-checkpoint", "..", "a/b/c", "../x", "/no/such/folder", "owner/..", "", "a b/c"]
)
def test_names_of_nothing_are_refused_without_network(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # ".." is a folder, but holds no checkpoint
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("network"))
    with pytest.raises(CheckpointError):
        load_checkpoint(name)


def test_a_folder_is_taken_before_the_hub_and_a_bundled_name_before_a_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("network"))
    for target in ("owner/name", "plain", "bundle"):
        save_checkpoint(target, dataclasses.replace(CONFIG, name=f"folder {target}"), STATE)
    save_checkpoint("shipped/bundle/scorer", dataclasses.replace(CONFIG, name="shipped"), STATE)
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "shipped")
    assert load_checkpoint("owner/name")[0].name == "folder owner/name"
    assert load_checkpoint("plain")[0].name == "folder plain"
    assert load_checkpoint("bundle")[0].name == "shipped"
    assert load_checkpoint("./bundle")[0].name == "folder bundle"


def test_a_hub_id_asks_for_the_two_files_only(folder, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **kwargs):
        asked.update(kwargs, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config, _ = load_checkpoint("owner/name", revision="v1", cache_dir="/cache", local_files_only=True)
    assert config == CONFIG
    assert asked == {
        "repo_id": "owner/name",
        "revision": "v1",
        "cache_dir": "/cache",
        "local_files_only": True,
        "allow_patterns": ["config.json", "model.safetensors"],
    }


def test_a_hub_id_that_is_not_in_the_cache_is_an_error_of_ours(tmp_path):
    with pytest.raises(CheckpointError, match="the Hub could not give 'owner/name'"):
        load_checkpoint("owner/name", cache_dir=str(tmp_path), local_files_only=True)


def test_strict_loading_names_every_mismatch():
    module = torch.nn.Linear(2, 3)
    state = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    load_state_strict(module, state)
    assert (module.weight == 1).all()
    with pytest.raises(CheckpointError, match=r"lacks bias; has an unexpected scale; has weight of shape \(2, 3\)"):
        load_state_strict(module, {"weight": torch.zeros(2, 3), "scale": torch.zeros(3)})
    assert (module.weight == 1).all()  # nothing was half loaded
    with pytest.raises(CheckpointError, match="and 7 problems more"):
        load_state_strict(torch.nn.Identity(), {str(i): torch.zeros(1) for i in range(12)})

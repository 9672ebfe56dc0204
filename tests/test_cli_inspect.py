import json

import pytest

import moe_artifacts.checkpoint
from moe_artifacts.config import ThresholdConfig, to_dict
from moe_artifacts.preview import LinearPreview
from moe_artifacts.scalar.scorer import ScalarScorer
from tests.commands import refused, run, tiny_bundle, use_bundle
from tests.scorers import tiny_scorer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundled"))


@pytest.fixture(autouse=True)
def _bundled(bundle, monkeypatch):
    use_bundle(monkeypatch, bundle)


def test_inspect_says_what_a_checkpoint_is(bundle):
    done = run("inspect", "fashion")
    assert done.exit_code == 0
    facts = {line[:15].strip(): line[15:] for line in done.stdout.splitlines()}
    assert facts["name"] == "tiny" and facts["label"] == "a test" and facts["provenance"] == "commit abc123"
    assert facts["latent space"].startswith("tiny: AutoencoderKL, 4 channels, scaling 0.18215, shift 0, downsampling 2")
    parameters = sum(t.numel() for t in tiny_scorer().embedder.state_dict().values())
    assert f"{parameters:,} parameters" in facts["embedder"]
    assert facts["threshold"].startswith("abort once the cumulative artifact probability reaches 0.02; stop scoring")
    assert facts["promise"] == (
        "false aborts <= 5 % (95 % sure, over the calibration prompts, DDIM, 6 steps, guidance 1.5); "
        "certified on 3,210 clean images"
    )
    size = (bundle / "fashion" / "scorer" / "model.safetensors").stat().st_size
    assert f"model.safetensors {size:,} bytes" in facts["files"]


def test_inspect_for_machines_holds_the_whole_config(bundle):
    values = json.loads(run("inspect", bundle / "fashion" / "scorer", "--json").stdout)
    config = moe_artifacts.checkpoint.load_checkpoint("fashion")[0]
    assert values["config"] == json.loads(json.dumps(to_dict(config)))
    assert sum(values["parameters"].values()) == sum(t.numel() for t in tiny_scorer().state_dict().values())


def test_inspect_describes_a_scorer_around_a_function_of_ones_own(tmp_path):
    space = tiny_scorer().config.latent_space
    ScalarScorer(len, preview=LinearPreview(4), latent_space=space, siblings=True).save_pretrained(tmp_path / "new")
    done = run("inspect", tmp_path / "new")
    assert done.exit_code == 0
    facts = {line[:15].strip(): line[15:] for line in done.stdout.splitlines()}
    assert facts["name"] == "my-score" and "higher is better; siblings see" in facts["score"]
    assert facts["posterior"].startswith("none: it is not calibrated") and facts["threshold"].startswith("none")
    assert "config.json" in facts["files"] and "model.safetensors" not in facts["files"]
    assert json.loads(run("inspect", tmp_path / "new", "--json").stdout)["config"]["siblings"] is True


def test_inspect_speaks_of_every_kind_of_threshold(tmp_path):
    texts = []
    for number, threshold in enumerate(
        [
            None,
            ThresholdConfig(rule="posterior", threshold=0.7),
            ThresholdConfig(rule="patience", threshold=0.7, patience=3),
            ThresholdConfig(rule="q-exit", threshold=0.7, q=0.5),
        ]
    ):
        tiny_scorer(threshold=threshold).save_pretrained(tmp_path / str(number))
        texts.append(run("inspect", tmp_path / str(number)).stdout)
    assert "none: it can only record" in texts[0]
    assert "abort once the posterior reaches 0.7" in texts[1] and "promises nothing" in texts[1]
    assert "the posterior of 3 checks in a row" in texts[2]
    assert "at the first check with exit_cdf above 0.5, the posterior" in texts[3]


@pytest.mark.parametrize("name", ["nothing", "config.json missing"])
def test_inspect_refuses_what_is_no_checkpoint(tmp_path, name):
    folder = tmp_path / name
    if name != "nothing":
        folder.mkdir()
    assert name.split()[0] in refused("inspect", folder)

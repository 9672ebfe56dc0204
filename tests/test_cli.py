import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import moe_artifacts.bundled
import moe_artifacts.checkpoint
from moe_artifacts import demo
from moe_artifacts.cli import app
from moe_artifacts.config import LatentSpaceConfig, ThresholdConfig, to_dict
from moe_artifacts.judge import Classifier, ManifoldJudge, load_judge
from moe_artifacts.trajectory import Trajectory
from tests import tiny
from tests.scorers import tiny_scorer
from training.data.prompts import SYNONYMS

THRESHOLD = ThresholdConfig(
    rule="cumulative",
    threshold=0.02,
    clear_threshold=0.9,
    max_risk=0.05,
    confidence=0.95,
    unit="image",
    num_clean=3210,
    scheduler="DDIMScheduler",
    num_inference_steps=6,
    guidance_scale=1.5,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle of the shape of the real one: random weights, 32x32 images."""
    folder = tmp_path_factory.mktemp("bundled")
    (folder / "fashion").mkdir()
    tiny.stable_diffusion(sample_size=16).save_pretrained(folder / "fashion" / "pipeline")
    space = LatentSpaceConfig(
        name="tiny", vae_class="AutoencoderKL", channels=4, scaling_factor=0.18215, downsampling=2
    )
    scorer = tiny_scorer(latent_space=space, threshold=THRESHOLD, provenance={"commit": "abc123"})
    scorer.save_pretrained(folder / "fashion" / "scorer")
    torch.manual_seed(0)
    judge = ManifoldJudge(Classifier(10, width=2, feature_dim=4), torch.randn(10, 20, 4), torch.zeros(10), neighbours=3)
    metadata = {"classes": "10", "width": "2", "feature_dim": "4", "neighbours": "3"}
    save_file(judge.tensors(), folder / "fashion" / "judge.safetensors", metadata)
    (folder / "fashion" / "classes.json").write_text(json.dumps(SYNONYMS))
    settings = {"num_inference_steps": 6, "guidance_scale": 1.5}
    (folder / "fashion" / "defaults.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(autouse=True)
def _bundled(bundle, monkeypatch):
    monkeypatch.setattr(moe_artifacts.bundled, "FOLDER", bundle)
    monkeypatch.setattr(moe_artifacts.checkpoint, "BUNDLED", bundle)


@pytest.fixture
def scripted(monkeypatch):
    """Batches of three; in each the second image is stopped at the first step and the third is cleared at the second."""
    scorer = tiny.ScriptedScorer(
        abort_at={1: 0}, clear_at={2: 1}, threshold=dataclasses.replace(THRESHOLD, threshold=0.5)
    )
    monkeypatch.setattr(demo.ArtifactScorer, "from_pretrained", lambda name: scorer)
    monkeypatch.setattr(demo, "BATCH", 3)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def refused(*arguments):
    """The single line on stderr."""
    done = run(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_demo_says_what_became_of_every_image(scripted, bundle, tmp_path):
    done = run("demo", "--prompt", "a bag", "--prompt", "a spaceship", "--images", 5, "--seed", 40, "--out", tmp_path)
    assert done.exit_code == 0 and done.stderr == ""
    results = json.loads((tmp_path / "results.json").read_text())
    images = results["images"]
    assert [image["status"] for image in images] == ["kept", "aborted", "cleared", "kept", "aborted"]
    assert [image["decided_after"] for image in images] == [None, 1, 2, None, 1]
    assert [image["prompt"] for image in images] == ["a bag"] * 3 + ["a spaceship"] * 2
    assert [image["seed"] for image in images] == [40, 41, 42, 43, 44]
    assert results["kept_indices"] == [0, 2, 3]
    assert results["denoiser_steps"] == {"guarded": 3 * 6 + 2 * 1, "unguarded": 5 * 6}
    assert results["max_difference"] <= 1e-5  # the rows of another batch size: float32, other orders of addition
    assert images[3]["judged"] == images[4]["judged"] == "unknown class" and images[3]["margin"] is None
    counted = {fate: sum(counts.values()) for fate, counts in results["truth_table"].items()}
    assert counted == {"aborted": 2, "kept": 3}
    assert results["truth_table"]["kept"]["unknown class"] == results["truth_table"]["aborted"]["unknown class"] == 1
    assert images[1]["curves"]["cumulative_artifact_prob"] == [pytest.approx(0.9)] + [None] * 5

    lines = done.stdout.splitlines()
    assert len([line for line in lines if "a bag" in line or "a spaceship" in line]) == 5
    assert "5 images: 3 kept, 2 aborted at step 1 of 6; 10 of 30 denoiser steps not run" in lines
    assert "denoiser steps: 20 with the guard, 30 without (-33.3%)" in lines
    for name in ("grid.png", "curves.png"):
        assert str(tmp_path / name) in lines
        Image.open(tmp_path / name).verify()


def test_the_judge_sees_what_the_same_seed_gives_without_the_guard(scripted, bundle):
    found = demo.run_demo(["a bag", "a coat"], [7, 8], steps=4)
    pipe, _ = moe_artifacts.bundled.bundled_pipeline()
    alone = pipe(
        "a coat",
        num_inference_steps=4,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(8),
        output_type="pt",
    ).images
    torch.testing.assert_close(found.finished[1], alone[0], atol=1e-4, rtol=0)  # float32 in batches of another size
    margin = load_judge(bundle / "fashion" / "judge.safetensors").margin(alone, torch.tensor([4])).item()
    assert found.margins[1] == pytest.approx(margin, abs=1e-4)
    assert found.judged[1] == ("artifacts" if margin > 0 else "clean")
    assert found.guarded.verdicts[1].status == "aborted"


def test_the_demo_runs_with_the_scorer_of_the_bundle_when_nothing_is_kept(tmp_path):
    done = run("demo", "--images", 3, "--out", tmp_path / "new" / "folder")  # any score reaches a threshold of 0.02
    assert done.exit_code == 0
    results = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert results["kept_indices"] == [] and results["max_difference"] is None
    assert "nothing to compare" in done.stdout
    assert results["promise"].startswith("false aborts <= 5 %")
    assert {image["status"] for image in results["images"]} == {"aborted"}


@pytest.mark.parametrize("scheduler", demo.SCHEDULERS)
def test_kept_images_equal_those_without_the_guard_for_every_scheduler(scripted, scheduler):
    found = demo.run_demo(["a bag", "a coat"], [1, 2], steps=5, scheduler=scheduler)
    assert found.guarded.setting.scheduler == demo.SCHEDULERS[scheduler]
    assert found.guarded.kept_indices == [0]
    assert found.max_difference <= 1e-4


def test_the_help_names_every_scheduler():
    words = run("demo", "--help").stdout.replace(",", " ").replace(".", " ").split()
    assert set(demo.SCHEDULERS) <= set(words)


def test_images_are_shared_out_over_all_ten_classes():
    for images in (10, 24, 100):
        prompts, seeds = demo.plan(None, images, seed=5)
        classes = [moe_artifacts.bundled.class_of(prompt) for prompt in prompts]
        assert set(classes) == set(range(10)) and classes == sorted(classes)
        assert seeds == list(range(5, 5 + images))
    assert all(moe_artifacts.bundled.class_of(prompt) == i // 2 for i, prompt in enumerate(demo.PROMPTS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", 0], "images must be at least 1, got 0"),
        (["--steps", 0], "steps must be at least 1, got 0"),
        (["--steps", 1001], "steps must be at most 1000"),
        (["--seed", -1], "seed must be between 0 and"),
        (["--prompt", " "], "not empty"),
        (
            ["--prompt", "a bag", "--prompt", "a coat", "--images", 1],
            "images must be at least 2, one per prompt, got 1",
        ),
        (["--scheduler", "heun"], "ddim, ddpm, dpm, euler, euler-a, unipc, pndm, got 'heun'"),
        (["--out", __file__], "exists"),
    ],
)
def test_the_demo_refuses_bad_input_in_one_line(tmp_path, arguments, message):
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    assert message in refused("demo", *arguments, *out)


def test_an_empty_prompt_list_is_refused():
    with pytest.raises(moe_artifacts.InputError, match="at least one text"):
        demo.plan([], images=1, seed=0)


def test_a_damaged_bundle_is_named(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(moe_artifacts.bundled, "FOLDER", tmp_path)
    assert "nothing bundled is called 'fashion'" in refused("demo", "--out", tmp_path / "out")


def test_ctrl_c_is_one_line(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupt)
    done = run("demo", "--out", tmp_path)
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")


def test_our_own_mistakes_keep_their_traceback(monkeypatch, tmp_path):
    def fail(*_):
        raise IndexError("ours")

    monkeypatch.setattr(demo, "run_demo", fail)
    with pytest.raises(IndexError, match="ours"):
        run("demo", "--out", tmp_path)


def test_score_writes_scores_and_counts_aborts(bundle, tmp_path):
    trajectory = Trajectory(
        prompts=["a bag", "a coat"],
        seeds=[1, 2],
        step=[2, 9],
        log_snr=torch.tensor([-1.0, 5.0]),
        scores={},
        num_steps=10,
        x0=torch.randn(2, 2, 4, 16, 16),
    )
    trajectory.save(tmp_path / "runs" / "a")
    done = run("score", tmp_path / "runs", "--scorer", "fashion", "--out", tmp_path / "out")
    assert done.exit_code == 0
    (line,) = done.stdout.splitlines()
    scored = Trajectory.load(tmp_path / "out" / "a")
    mean = scored.scores["artifact_prob"][:, -1].mean().item()
    assert line == f"{tmp_path / 'out' / 'a'}: 2 images, mean final artifact_prob {mean:.3f}, 2 would be aborted"
    again = run("score", tmp_path / "runs", "--scorer", "fashion", "--out", tmp_path / "out")
    assert again.stdout == f"{line}, scored before\n"
    assert "not a trajectory folder" in refused("score", tmp_path, "--scorer", "fashion", "--out", tmp_path / "new")


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

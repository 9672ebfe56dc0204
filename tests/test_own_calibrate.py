"""From heads to a scorer with a certified threshold, on trajectories of the latents of a tiny pipeline."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.accumulator import ExitHead
from moe_artifacts.calibration import Calibration
from moe_artifacts.config import ExitHeadConfig, LatentSpaceConfig
from moe_artifacts.errors import CalibrationError, ConfigError, InputError
from moe_artifacts.files import read_json, write_json
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.latent_spaces import LATENT_SPACES
from moe_artifacts.policy import Run, abort_columns
from moe_artifacts.preview import LinearPreview
from moe_artifacts.scorer import ArtifactScorer
from tests import tiny
from tests.own_data import LEVELS, SETTING, Made, write_embedded, write_trajectories
from tests.scorers import TINY_CLIP, tiny_config, tiny_scorer
from training import embed
from training.assembly import assemble, self_contained
from training.clip_towers import build_embedder
from training.embedded import EmbeddedRows
from training.exit_head import ExitData, ExitRecipe, exit_data, train_exit
from training.head_data import labelled
from training.heads import Heads, HeadSpace
from training.own import calibrate as own
from training.own import train as own_train
from training.own.choose import Sampling, calibrate_for, check_progress_of, require_trained_levels, sampling_of
from training.own.cost import measure_check_cost
from training.own.evaluate import read_test_set
from training.own.heads_folder import (
    read_facts,
    read_heads,
    require_new_prompts,
    require_same_embedder,
    require_unseen,
)
from training.rules import (
    Promise,
    candidates,
    certified,
    cheapest,
    economic_candidate,
    economic_out_of_fold,
    fit_calibration,
    halves,
    paths_of,
    run_of,
)

SPACE = LatentSpaceConfig(name="tiny", vae_class="AutoencoderKL", channels=4, scaling_factor=0.18215, downsampling=2)
COUNTS = {"train": 240, "validation": 160, "calibration": 240, "test": 160}
QUICK = ["--num-experts", "2", "--hidden-dim", "16", "--expert-dim", "4", "--steps", "60", "--lr", "0.01"]


@dataclass(frozen=True)
class Road:
    """What each stage left."""

    trajectories: Path
    embedded: Path
    heads: Path
    source: Path  # scorer whose embedder and preview are used
    pipeline: Path
    scorer: Path

    def arguments(self, out: Path) -> list[str]:
        paths = ["--heads", self.heads, "--embedder", self.source, "--pipeline", self.pipeline, "--out", out]
        return [str(self.embedded), *map(str, paths), "--exit-steps", "20", "--device", "cpu"]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """The commands, one after the other."""
    root = tmp_path_factory.mktemp("road")
    found = Road(*(root / name for name in ("trajectories", "embedded", "heads", "source", "pipeline", "scorer")))
    source = tiny_scorer(latent_space=SPACE)
    with torch.no_grad():  # the first channel is what tells bad images here: it is shown as red
        source.preview.factors.weight.normal_(std=0.05)
        source.preview.factors.weight[:4, 0] += 0.4
    source.save_pretrained(found.source)
    tiny.stable_diffusion(sample_size=8).save_pretrained(found.pipeline)
    for seed, (split, count) in enumerate(COUNTS.items()):
        write_trajectories(found.trajectories / split, count, seed)
        folders = [str(found.trajectories / split), "--embedder", str(found.source)]
        assert embed.main([*folders, "--out", str(found.embedded / split)]) == 0
    assert own_train.main([str(found.embedded), "--out", str(found.heads), "--tracker", "none", *QUICK]) == 0
    assert own.main([*found.arguments(found.scorer), "--max-risk", "0.1"]) == 0
    return found


def test_the_scorer_has_a_certified_threshold_and_guards_the_pipeline(road: Road) -> None:
    scorer = ArtifactScorer.from_pretrained(road.scorer)
    rule = scorer.config.threshold
    assert rule is not None
    assert (rule.max_risk, rule.confidence, rule.unit) == (0.1, 0.95, "prompt")
    assert (rule.scheduler, rule.num_inference_steps, rule.guidance_scale) == ("DDIMScheduler", 8, 1.5)
    assert rule.scored_steps is not None and rule.scored_steps[-1] == 7
    assert scorer.config.latent_space.scaling_factor == SPACE.scaling_factor
    assert 60 <= rule.num_clean <= COUNTS["calibration"]  # type: ignore[operator]

    pipe = tiny.stable_diffusion(sample_size=8)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    out = ArtifactGuard(scorer, on_abort="record")(
        pipe, ["a coat", "a bag"], num_inference_steps=8, guidance_scale=1.5, generator=generators
    )
    assert tuple(out.trajectory.step) == rule.scored_steps  # the very steps it was calibrated at
    assert out.trajectory.scores["artifact_prob"].isfinite().all()


def test_every_rule_is_kept_with_the_exit_head_that_it_reads(road: Road) -> None:
    values = read_json(road.scorer / "rules" / "rules.json")
    names = {"cumulative", "cumulative-palbert", "q-exit", "posterior", "patience", "economic"}
    assert set(values["validation_cost"]) == names and values["default"] in values["rules"]
    assert {path.stem for path in (road.scorer / "rules").glob("*.safetensors")} == set(values["rules"])
    assert values["check_cost"] == read_json(road.scorer / "check_cost.json")["check_cost"] > 0
    stored = read_json(road.scorer / "config.json")["threshold"]
    assert stored == values["rules"][values["default"]]
    assert not [path for path in road.scorer.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".ckpt")]


def test_the_threshold_keeps_its_promise_on_the_images_it_comes_from(road: Road) -> None:
    values = read_json(road.scorer / "rules" / "rules.json")
    scorer = ArtifactScorer.from_pretrained(road.scorer)
    test = read_test_set(road.trajectories / "calibration")
    seen = test.score(scorer, test.guarded(scorer))
    rule = scorer.config.threshold
    assert rule is not None
    paths, run = seen.paths(rule), seen.run(0.0)
    aborted = abort_columns(run, paths.statistic, rule.threshold, paths.clear)[0] < len(run.calls)
    assert aborted[~seen.bad].mean() <= values["rules"][values["default"]]["max_risk"] == 0.1


def test_the_same_run_again_comes_to_the_same_scorer(road: Road, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    cost = (road.scorer / "check_cost.json").read_text()
    (tmp_path / "again" / "check_cost.json").write_text(cost)  # as a run that was killed has left it
    assert own.main([*road.arguments(tmp_path / "again"), "--max-risk", "0.1", "--name", "scorer"]) == 0
    for file in sorted(path for path in road.scorer.rglob("*") if path.is_file() and path.name != "evaluation.json"):
        assert (tmp_path / "again" / file.relative_to(road.scorer)).read_bytes() == file.read_bytes(), file.name


def test_the_price_of_a_check_is_measured_again_when_it_is_of_something_else(road: Road, tmp_path: Path) -> None:
    file = tmp_path / "check_cost.json"
    file.write_text((road.scorer / "check_cost.json").read_text())
    same = read_json(file)["of"]
    arguments = [*road.arguments(tmp_path), "--max-risk", "0.1", "--rule", "posterior", "--timed-batch", "2"]
    assert own.main(arguments) == 0
    assert read_json(file)["of"] == same | {"images": 2}
    file.write_text(json.dumps({"check_cost": 0.125, "of": read_json(file)["of"]}))
    assert own.main(arguments) == 0
    assert read_json(tmp_path / "rules" / "rules.json")["check_cost"] == 0.125
    assert own.main([*arguments, "--dtype", "bfloat16"]) == 0
    assert read_json(file)["of"]["dtype"] == "bfloat16" and read_json(file)["check_cost"] != 0.125


def test_images_as_the_unit_and_a_rule_of_choice(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--unit", "image", "--rule", "posterior", "--check-cost", "0.05", "--max-risk", "0.1"]
    assert own.main([*road.arguments(tmp_path), *options]) == 0
    assert "rule posterior, threshold 0." in capsys.readouterr().out
    rule = ArtifactScorer.from_pretrained(tmp_path).config.threshold
    assert rule is not None and (rule.rule, rule.unit) == ("posterior", "image")
    assert not (tmp_path / "check_cost.json").exists()


def test_without_a_pipeline_the_scorer_only_records(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = road.arguments(tmp_path)
    place = arguments.index("--pipeline")
    del arguments[place : place + 2]
    assert own.main(arguments) == 2
    assert "name it with --latent-space, or a --pipeline" in capsys.readouterr().err
    assert own.main([*arguments, "--latent-space", "sd1"]) == 0
    assert "no threshold, since no pipeline was given" in capsys.readouterr().out
    scorer = ArtifactScorer.from_pretrained(tmp_path)
    assert scorer.config.threshold is None and scorer.config.latent_space.name == "sd1"
    with pytest.raises(ConfigError, match="needs a threshold"):
        ArtifactGuard(scorer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-risk", "0.01"], "prompts with as many clean images as these have, got 240; there are 240 images"),
        (["--max-risk", "1.5"], "max_risk must be between 0 and 1"),
        (["--timed-batch", "0"], "timed-batch must be at least 1, got 0"),
        (["--embedder", "fashion"], "the heads were trained behind"),
        (["--pipeline", "/nowhere"], "no pipeline '/nowhere'"),
        (["--heads", "/nowhere"], "cannot read /nowhere/heads.json"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert own.main([*road.arguments(tmp_path), "--check-cost", "0.05", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and message in line


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_price_of_a_check_is_measured_and_nothing_stays_behind(road: Road) -> None:
    pipe, scorer = tiny.stable_diffusion(sample_size=8), ArtifactScorer.from_pretrained(road.scorer)
    cost = measure_check_cost(pipe, scorer, ["a coat"] * 2, {"num_inference_steps": 6, "guidance_scale": 1.5})
    assert 0 < cost < 100
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def test_images_that_the_heads_have_seen_certify_nothing(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*road.arguments(tmp_path / "scorer"), "--check-cost", "0.05", "--max-risk", "0.1"]
    embedded = Path(options[0])

    def refusal(**replaced: str) -> str:
        folder = tmp_path / "embedded"
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("train", "validation", "calibration"):
            shutil.copytree(embedded / replaced.get(name, name), folder / name)
        assert own.main([str(folder), *options[1:]]) == 2
        return capsys.readouterr().err

    assert "are the same images: embed train and calibration each from its own" in refusal(calibration="train")
    assert "are the same images: embed validation and calibration" in refusal(calibration="validation")
    other = EmbeddedRows(embedded / "train")
    other.meta = {**other.meta, "source": {"another": 1}}  # as if it were embedded from other files
    with pytest.raises(InputError, match="the heads were trained on"):
        require_unseen(other, read_facts(road.heads))
    rows = {name: EmbeddedRows(embedded / name) for name in ("train", "validation", "calibration")}
    require_new_prompts(rows)
    with pytest.raises(InputError, match=r"prompts of the calibration images are those of train too, the first is '"):
        require_new_prompts(rows | {"calibration": rows["train"]})


def test_a_preview_of_another_latent_space_is_refused(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.safetensors"
    ArtifactScorer.from_pretrained(road.source).preview.save(file, LATENT_SPACES["sdxl"], {})
    options = ["--preview", str(file), "--check-cost", "0.05", "--max-risk", "0.1"]
    assert own.main([*road.arguments(tmp_path), *options]) == 2
    assert "the preview was made for the latent space 'sdxl', and the pipeline has another" in capsys.readouterr().err


def test_several_settings_cannot_share_a_threshold(tmp_path: Path) -> None:
    one = EmbeddedRows(write_embedded(tmp_path / "one"))
    assert sampling_of(one, one) == Sampling(
        scheduler="DDIMScheduler", num_inference_steps=8, guidance_scale=1.5, num_steps=8
    )
    other = EmbeddedRows(write_embedded(tmp_path / "other", Made(setting=SETTING.replace("8", "9"))))
    with pytest.raises(InputError, match=r"certified for one setting, got 2: .*DDIMScheduler"):
        sampling_of(one, other)


def test_noised_pictures_and_predictions_do_not_mix(road: Road, tmp_path: Path) -> None:
    for name in ("train", "validation"):
        folder = write_embedded(tmp_path / name, Made(seed=len(name)))
        write_json(folder / "meta.json", read_json(folder / "meta.json") | {"shows": "noisy"})
    _, facts = read_heads(road.heads)
    with pytest.raises(InputError, match="has embeddings of noisy latents, expected x0 predictions: a scorer looks at"):
        require_same_embedder(EmbeddedRows(tmp_path / "train"), facts)
    own_train.train(tmp_path, tmp_path / "heads", dataclasses.replace(own_train.RECIPE, num_experts=2, steps=1))
    assert read_heads(tmp_path / "heads")[1].shows == "noisy"


def test_checks_where_nothing_was_learned_are_refused(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("validation", 1)):
        write_embedded(tmp_path / name, Made(seed=seed, levels=(3.0, 4.0)))
    recipe = dataclasses.replace(own_train.RECIPE, num_experts=2, hidden_dim=8, steps=1)
    facts = own_train.train(tmp_path, tmp_path / "heads", recipe)
    require_trained_levels(EmbeddedRows(tmp_path / "train"), facts, "train")
    elsewhere = EmbeddedRows(write_embedded(tmp_path / "other", Made(levels=LEVELS)))
    with pytest.raises(InputError, match=r"calibration has checks at log-SNR -4.00, -1.00, 2.00, 5.00"):
        require_trained_levels(elsewhere, facts, "calibration")


def test_heads_of_noised_images_calibrate_on_trajectories_with_other_checks(road: Road, tmp_path: Path) -> None:
    heads, facts = read_heads(road.heads)
    validation, held_out = (
        labelled(EmbeddedRows(road.embedded / name), name) for name in ("validation", "calibration")
    )
    low, high = facts.space.log_snr_range
    noised = EmbeddedRows(write_embedded(tmp_path, Made(levels=(low + 1, high - 1))))
    noised_rows = labelled(noised, "train")
    found = calibrate_for(
        heads,
        fit_calibration(heads, validation),
        noised_rows,
        validation,
        held_out,
        sampling_of(EmbeddedRows(road.embedded / "validation")),
        0.05,
        Promise(max_risk=0.2, confidence=0.9, unit="image"),
        exit_steps=5,
    )
    assert found.default in found.thresholds


def test_calibration_recorded_elsewhere_is_refused(road: Road, tmp_path: Path) -> None:
    heads, _ = read_heads(road.heads)
    validation = labelled(EmbeddedRows(road.embedded / "validation"), "validation")
    other = labelled(EmbeddedRows(write_embedded(tmp_path, Made(levels=(0.0, 3.0)))), "calibration")
    promise = Promise(max_risk=0.2, confidence=0.9, unit="image")
    sampling = Sampling(scheduler=None, num_inference_steps=None, guidance_scale=None, num_steps=8)
    with pytest.raises(InputError, match="validation has 4 checks and calibration 2"):
        calibrate_for(heads, Calibration((0.0, 1.0)), validation, validation, other, sampling, 0.0, promise)


def test_the_guard_looks_at_the_steps_that_were_chosen(road: Road) -> None:
    rows = EmbeddedRows(road.embedded / "validation")
    log_snr = rows.take(torch.arange(1)).log_snr[0]
    low, high = log_snr[0].item() - 2, log_snr[-1].item()
    places = check_progress_of(rows, (0, 2, 3), (low, high))
    at = (log_snr - low) / (high - low)
    assert len(places) == 2  # the last step is looked at in any case
    assert [int((at >= place).nonzero()[0]) for place in places] == [0, 2]


def test_a_soft_certificate_takes_the_higher_of_two_thresholds(road: Road) -> None:
    """The promise holds at every higher threshold that does not come from the calibration images."""
    heads, _ = read_heads(road.heads)
    validation, held_out = (
        labelled(EmbeddedRows(road.embedded / name), name) for name in ("validation", "calibration")
    )
    calibration, columns = fit_calibration(heads, validation), torch.tensor([0, 1, 3])
    data = exit_data(heads, calibration, held_out, columns)
    head = train_exit(ExitRecipe(name="tiny", steps=3), data)
    candidate = next(c for c in candidates(1.3, data, lambda recipe, data: head) if c.name == "posterior")
    run = run_of(held_out, (0, 1, 3), 8, 0.05)
    promise, prompt = Promise(max_risk=0.1, confidence=0.9, unit="image"), held_out.prompt_id.numpy()
    rule, found = certified(candidate, 0.0, data, prompt, run, promise)
    assert rule.threshold == found.threshold and rule.scored_steps == (1, 4, 7)
    higher, _ = certified(candidate, 0.999, data, prompt, run, promise)
    assert higher.threshold == 0.999
    clean = ~run.bad
    aborted = paths_of(candidate, data).statistic[clean, run.last_saving] >= rule.threshold
    assert aborted.sum() == found.allowed_aborts
    with pytest.raises(CalibrationError, match="needs at least"):
        certified(candidate, 0.0, data, prompt, run, Promise(max_risk=0.001, confidence=0.99, unit="image"))


def test_too_few_images_are_refused_before_anything_is_trained(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, _ = read_heads(road.heads)
    train, validation, held_out = (
        labelled(EmbeddedRows(road.embedded / name), name) for name in ("train", "validation", "calibration")
    )

    def fail(*_: object) -> None:
        raise AssertionError("trained for nothing")

    monkeypatch.setattr("training.rules.choose_checks", fail)
    monkeypatch.setattr("training.rules.candidates", fail)
    promise = Promise(max_risk=0.001, confidence=0.99, unit="prompt")
    sampling = Sampling(scheduler=None, num_inference_steps=None, guidance_scale=None, num_steps=8)
    message = r"needs at least [\d,]+ prompts .* to calibrate on\. The unit \"image\" needs fewer"
    with pytest.raises(CalibrationError, match=message):
        calibrate_for(heads, fit_calibration(heads, validation), train, validation, held_out, sampling, 0.02, promise)


def test_a_boundary_looks_cheaper_on_the_images_that_it_was_fitted_on() -> None:
    costs = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        bad = torch.rand(120, generator=generator) < 0.3
        data = ExitData(
            state=torch.zeros(120, 4, 3),
            prob=torch.rand(120, 4, generator=generator) * 0.6 + 0.15 * bad[:, None],
            log_snr=torch.tensor(LEVELS).repeat(120, 1),
            spent=torch.tensor([0.25, 0.5, 0.75, 1.0]).repeat(120, 1),
            bad=bad.float(),
            log_snr_range=(-6.0, 5.0),
        )
        head, prompt = ExitHead(ExitHeadConfig(state_dim=3)), np.arange(120) // 2
        run = Run(bad.numpy(), np.array([2, 4, 6, 8]), 0.02)
        there = paths_of(economic_candidate(head, data, run, 0.3), data)
        elsewhere = economic_out_of_fold(data, run, prompt, head, 0.3)
        costs.append([cheapest(run, paths, 0.3) for paths in (there, elsewhere)])
    there_mean, elsewhere_mean = np.mean(costs, axis=0)
    assert there_mean < elsewhere_mean < 0


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=60))
def test_halves_keep_prompts_whole_and_share_out_bad_images(images: list[tuple[int, bool]]) -> None:
    prompt, bad = (np.array(column) for column in zip(*images, strict=True))
    second = halves(prompt, bad)
    for name in np.unique(prompt):
        assert len(np.unique(second[prompt == name])) == 1
    most = max(bad[prompt == name].sum() for name in np.unique(prompt))
    assert abs(int(bad[second].sum()) - int(bad[~second].sum())) <= most


def test_tuned_weights_of_a_named_model_travel_with_the_scorer(tmp_path: Path) -> None:
    known = TINY_CLIP | {"text_cfg": TINY_CLIP["text_cfg"] | {"vocab_size": 49_408}}  # that of names
    (tmp_path / "moe-artifacts-test.json").write_text(json.dumps(known))
    open_clip.add_model_config(tmp_path)
    embedder = build_embedder("moe-artifacts-test", seed=3)
    assert embedder.config.model == "moe-artifacts-test" and embedder.config.pretrained is None
    config = tiny_config()
    space = HeadSpace(embed_dim=8, log_snr_range=config.log_snr_range)
    recipe = dataclasses.replace(own_train.RECIPE, num_experts=2, hidden_dim=12, expert_dim=4)
    preview = LinearPreview(channels=4, patch=2)
    exit_head = tiny_scorer().exit_head
    scorer = assemble(
        name="named",
        label="a test",
        latent_space=config.latent_space,
        preview=preview,
        embedder=self_contained(embedder),
        heads=Heads(recipe, space),
        calibration=Calibration(config.log_snr_range),
        exit_head=exit_head,
        check_progress=(0.5,),
    )
    scorer.save_pretrained(tmp_path / "scorer")
    loaded = ArtifactScorer.from_pretrained(tmp_path / "scorer")
    x0 = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(loaded.embed(x0), embedder.embed_images(preview(x0)), atol=1e-6, rtol=1e-6)
    assert torch.equal(loaded.embedder.embed_texts(["a coat"]), embedder.embed_texts(["a coat"]))

"""From trained heads to the bundled scorer with a certified threshold, and the rules it is compared with.

``python -m training.calibrate``: scale and bias of the posterior on validation; exit heads on the training trajectories;
the checks, the price mu and each rule's free numbers by the lowest cost per clean image on validation; thresholds on the
calibration trajectories, which nothing else has seen (:mod:`training.rules`). For a pipeline of one's own:
``python -m training.own.calibrate``.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_artifacts.accumulator import ExitHead
from moe_artifacts.calibration import Calibration
from moe_artifacts.config import ExitHeadConfig, LatentSpaceConfig, to_dict
from moe_artifacts.files import atomic_path, write_json
from moe_artifacts.guard.fingerprint import fingerprint
from moe_artifacts.policy import Run
from moe_artifacts.scorer import ArtifactScorer
from training import rules
from training.assembly import assemble
from training.clip import NUM_CLASSES, PreviewClip, train_clip
from training.collect import DEFAULT, RECORD_SHARES, check_progress, load_pipeline
from training.exit_head import ExitData, exit_data
from training.heads import Heads
from training.rules import Candidate, Paths, Promise
from training.timing import check_cost
from training.train import MAIN, Embedded, embed_split, load_heads, train_posterior
from training.workspace import Stage, work_folder

MAX_RISK, CONFIDENCE = 0.05, 0.95
PROMISE = Promise(max_risk=MAX_RISK, confidence=CONFIDENCE, unit="image")  # each image's prompt is drawn on its own
ALL_CHECKS = tuple(range(len(RECORD_SHARES) + 1))
# Columns of RECORD_SHARES: 14, 24, 34 and 50 %, and the end; then with one more at 20 %, or at 6 %.
CHECK_SETS = ((1, 3, 5, 7, 10), (1, 2, 3, 5, 7, 10), (0, 1, 3, 5, 7, 10))
LABEL = "the finished image is farther from the real images of its class than 95 % of held-out real images"
PROMPT_MIX = "prompts of the ten Fashion-MNIST classes"


def build_scorer(
    heads: Heads, calibration: Calibration, exit_head: ExitHead, checks: tuple[int, ...]
) -> ArtifactScorer:
    """All parts in one scorer, without a threshold."""
    pipe, model = load_pipeline(), PreviewClip()
    model.load_state_dict(load_file(train_clip()))
    progress = (*check_progress(), 1.0)
    return assemble(
        name="fashion",
        label=LABEL,
        latent_space=LatentSpaceConfig(
            name="fashion",
            vae_class=type(pipe.vae).__name__,
            channels=pipe.vae.config.latent_channels,
            scaling_factor=pipe.vae.config.scaling_factor,
            downsampling=pipe.vae_scale_factor,
        ),
        preview=model.preview,
        embedder=model.embedder,
        heads=heads,
        calibration=calibration,
        exit_head=exit_head,
        check_progress=tuple(progress[c] for c in checks if c < len(RECORD_SHARES)),
    )


def run_of(data: Embedded, checks: tuple[int, ...], cost: float) -> Run:
    """The judged trajectories of a split of the default setting."""
    return rules.run_of(data, checks, DEFAULT.steps, cost)


def out_of_fold(data: ExitData, run: Run, exit_head: ExitHead) -> dict[str, Paths]:
    """What the economic rule makes of images that its boundary was not fitted to; every image is its own prompt."""
    return {"economic": rules.economic_out_of_fold(data, run, np.arange(len(run.bad)), exit_head, MAX_RISK)}


def calibrate() -> Path:
    """Write ``scorer/`` and ``rules/``: each rule's certified threshold and the exit head it reads."""
    stage = Stage("calibrate", tracker="none")
    result = work_folder() / "scorer"
    if (result / "config.json").exists():
        return result
    train, validation, held_out = embed_split("train"), embed_split("validation"), embed_split("calibration")
    heads = load_heads(MAIN, train_posterior(MAIN, train, validation))
    calibration = rules.fit_calibration(heads, validation)
    bad_rate = train.label.mean().item()
    price = 1 / (1 - bad_rate)
    untrained = ExitHead(ExitHeadConfig(state_dim=MAIN.hidden_dim))
    pipe = load_pipeline()
    cost = check_cost(pipe, build_scorer(heads, calibration, untrained, ALL_CHECKS))
    stage.log.info("one check costs %.4f of a denoiser call", cost)

    found: dict[tuple[int, ...], dict[str, tuple[Candidate, float]]] = {}
    for checks in CHECK_SETS:
        columns = torch.tensor(checks)
        tried = rules.candidates(price, exit_data(heads, calibration, train, columns))
        tuning, run = exit_data(heads, calibration, validation, columns), run_of(validation, checks, cost)
        tried.append(rules.economic_candidate(tried[0].exit_head, tuning, run, MAX_RISK))
        found[checks] = rules.best_of_each(tried, tuning, run, MAX_RISK, out_of_fold(tuning, run, tried[0].exit_head))
        stage.log.info("checks %s: %s", checks, {name: round(value, 4) for name, (_, value) in found[checks].items()})
    cheapest = min(found, key=lambda c: min(value for _, value in found[c].values()))
    best, columns = found[cheapest], torch.tensor(cheapest)
    tuning, tuning_run = exit_data(heads, calibration, validation, columns), run_of(validation, cheapest, cost)
    judged = out_of_fold(tuning, tuning_run, best["economic"][0].exit_head)
    default = rules.choose_default(best, tuning, tuning_run, MAX_RISK, judged)
    floors = {
        name: rules.floor_of(tuning_run, judged.get(name) or rules.paths_of(candidate, tuning), MAX_RISK)
        for name, (candidate, _) in best.items()
    }
    stage.log.info("checks %s, default rule %s", cheapest, default)

    data, run = exit_data(heads, calibration, held_out, columns), run_of(held_out, cheapest, cost)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    setting = {
        "scheduler": "DDIMScheduler",
        "num_inference_steps": DEFAULT.steps,
        "guidance_scale": DEFAULT.guidance_scale,
        "eta": 0.0,
        "image_size": (side, side),
        "denoiser": fingerprint(pipe.unet),
        "prompt_mix": PROMPT_MIX,
    }
    prompt = held_out.prompt_id.numpy()
    thresholds = {
        name: rules.certified(candidate, floors[name], data, prompt, run, PROMISE, **setting)[0]
        for name, (candidate, _) in best.items()
    }
    write_json(
        work_folder() / "rules" / "rules.json",
        {
            "default": default,
            "checks": list(cheapest),
            "check_cost": cost,
            "price": price,
            "bad_rate": bad_rate,
            "class_rate": [train.label[train.prompt_id == k].mean().item() for k in range(NUM_CLASSES)],
            "validation_cost": {str(c): {n: v for n, (_, v) in rows.items()} for c, rows in found.items()},
            "rules": {name: to_dict(rule) for name, rule in thresholds.items()},
        },
    )
    for name, (candidate, _) in best.items():
        with atomic_path(work_folder() / "rules" / f"{name}.safetensors") as temporary:
            save_file(_contiguous(candidate.exit_head.state_dict()), temporary)
    scorer = build_scorer(heads, calibration, best[default][0].exit_head, cheapest)
    scorer.config = dataclasses.replace(scorer.config, threshold=thresholds[default])
    scorer.save_pretrained(result, torch.float16)  # every part was rounded to it as soon as it was trained
    return result


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.contiguous() for k, v in state.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(calibrate())


if __name__ == "__main__":
    main()

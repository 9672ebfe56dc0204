"""From trained heads to a scorer with a certified threshold, and the rules it is compared with.

``python -m training.calibrate``: scale and bias of the posterior on validation; exit heads on the training trajectories;
the checks, the price mu and each rule's free numbers by the lowest cost per clean image on validation; thresholds on the
calibration trajectories, which nothing else has seen. The default rule is the one that is cheapest on validation; in a tie
(paired interval across zero) the cumulative one.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_artifacts.accumulator import ExitHead, accumulate
from moe_artifacts.calibration import Calibration, certify_image_threshold, fit_scale_bias
from moe_artifacts.config import (
    EmbedderConfig,
    ExitHeadConfig,
    LatentSpaceConfig,
    PreviewConfig,
    ScorerConfig,
    ThresholdConfig,
    to_dict,
)
from moe_artifacts.decision import path_statistic
from moe_artifacts.files import atomic_path, write_json
from moe_artifacts.policy import Run, apply_rule, cheapest_threshold
from moe_artifacts.scorer import ArtifactScorer
from training.clip import EMBED_DIM, MODEL_CONFIG, NUM_CLASSES, PreviewClip, train_clip
from training.collect import DEFAULT, LOG_SNR_RANGE, RECORD_SHARES, check_progress, load_pipeline
from training.exit_head import ExitData, ExitRecipe, exit_data, exit_masses, train_exit
from training.timing import check_cost
from training.train import (
    FEATURES,
    MAIN,
    Embedded,
    Heads,
    embed_split,
    head_configs,
    load_heads,
    round_to_half,
    states_of,
    train_posterior,
)
from training.workspace import Stage, work_folder

MAX_RISK, CONFIDENCE = 0.05, 0.95
ALL_CHECKS = tuple(range(len(RECORD_SHARES) + 1))
# Columns of RECORD_SHARES: 14, 24, 34 and 50 %, and the end; then with one more at 20 %, or at 6 %.
CHECK_SETS = ((1, 3, 5, 7, 10), (1, 2, 3, 5, 7, 10), (0, 1, 3, 5, 7, 10))
PRICE_FACTORS = (1.0, 1.25, 1.5)
LABEL = "the finished image is farther from the real images of its class than 95 % of held-out real images"
PROMPT_MIX = "prompts of the ten Fashion-MNIST classes"


@dataclass(frozen=True)
class Candidate:
    """A rule and the exit head it reads."""

    name: str
    rule: ThresholdConfig
    exit_head: ExitHead


def fit_calibration(heads: Heads, data: Embedded) -> Calibration:
    """Scale and bias per log-SNR band, from all checks of a split."""
    calibration = Calibration(LOG_SNR_RANGE)
    logit, _ = states_of(heads, data, torch.tensor(ALL_CHECKS))
    present = ~data.log_snr.isnan()
    labels = data.bad[:, None].expand_as(logit)
    scale, bias = fit_scale_bias(
        logit[present].numpy(),
        labels[present].numpy(),
        data.log_snr[present].numpy(),
        LOG_SNR_RANGE,
        len(calibration.scale),
    )
    calibration.set(scale, bias)
    return round_to_half(calibration)


def run_of(data: Embedded, checks: tuple[int, ...], cost: float) -> Run:
    """The judged trajectories of a split of one setting."""
    calls = (data.spent[0, list(checks)] * DEFAULT.steps).round().long().numpy()
    return Run(data.bad.numpy().astype(bool), calls, cost)


def statistic_of(candidate: Candidate, data: ExitData) -> np.ndarray:
    """Path statistic [image check] of a rule."""
    acc = accumulate(data.prob, exit_masses(candidate.exit_head, data))
    return path_statistic(candidate.rule, data.prob, acc).numpy()


def candidates(price: float, train: ExitData) -> list[Candidate]:
    """Every rule with every value of its free number that is tried."""
    economic = {f: train_exit(ExitRecipe(name=f"economic-{f}", price=f * price), train) for f in PRICE_FACTORS}
    palbert = train_exit(ExitRecipe(name="palbert", loss="palbert"), train)
    rules = [
        Candidate("cumulative", ThresholdConfig(rule="cumulative", threshold=0.5), head) for head in economic.values()
    ]
    rules += [Candidate("cumulative-palbert", ThresholdConfig(rule="cumulative", threshold=0.5), palbert)]
    rules += [Candidate("q-exit", ThresholdConfig(rule="q-exit", threshold=0.5, q=q), palbert) for q in (0.1, 0.3, 0.5)]
    rules += [Candidate("posterior", ThresholdConfig(rule="posterior", threshold=0.5), palbert)]
    rules += [
        Candidate("patience", ThresholdConfig(rule="patience", threshold=0.5, patience=k), palbert) for k in (2, 3)
    ]
    return rules


def cheapest(run: Run, statistic: np.ndarray) -> float:
    """Lowest cost per clean image with at most ``MAX_RISK`` of these clean images aborted."""
    return apply_rule(run, statistic, cheapest_threshold(run, statistic, MAX_RISK)).cost_per_clean


def best_of_each(found: list[Candidate], data: ExitData, run: Run) -> dict[str, tuple[Candidate, float]]:
    """Per rule the free number with the lowest cost."""
    best: dict[str, tuple[Candidate, float]] = {}
    for candidate in found:
        cost = cheapest(run, statistic_of(candidate, data))
        if candidate.name not in best or cost < best[candidate.name][1]:
            best[candidate.name] = (candidate, cost)
    return best


def choose_default(best: dict[str, tuple[Candidate, float]], data: ExitData, run: Run, repeats: int = 100) -> str:
    """The cheapest rule; the cumulative one if its paired difference to it has an interval across zero."""
    first = min(best, key=lambda name: best[name][1])
    if first == "cumulative":
        return first
    rng = np.random.default_rng(0)
    statistics = [statistic_of(best[name][0], data) for name in ("cumulative", first)]
    differences = []
    for _ in range(repeats):
        rows = rng.integers(len(run.bad), size=len(run.bad))
        part = dataclasses.replace(run, bad=run.bad[rows])
        costs = [cheapest(part, s[rows]) for s in statistics]
        differences.append(costs[0] - costs[1])
    return "cumulative" if np.percentile(differences, 2.5) <= 0 else first


def build_scorer(
    heads: Heads, calibration: Calibration, exit_head: ExitHead, checks: tuple[int, ...]
) -> ArtifactScorer:
    """All parts in one scorer, without a threshold."""
    pipe, embedder_path = load_pipeline(), train_clip()
    model = PreviewClip()
    model.load_state_dict(load_file(embedder_path))
    gate, experts = head_configs(MAIN)
    progress = (*check_progress(), 1.0)
    config = ScorerConfig(
        name="fashion",
        label=LABEL,
        latent_space=LatentSpaceConfig(
            name="fashion",
            vae_class=type(pipe.vae).__name__,
            channels=pipe.vae.config.latent_channels,
            scaling_factor=pipe.vae.config.scaling_factor,
            downsampling=pipe.vae_scale_factor,
        ),
        preview=PreviewConfig(kind="linear", channels=4, patch=4),
        embedder=EmbedderConfig(model="custom", embed_dim=EMBED_DIM, model_config=MODEL_CONFIG),
        features=FEATURES,
        gate=gate,
        experts=dataclasses.replace(experts, dropout=0.0),
        exit_head=ExitHeadConfig(state_dim=MAIN.hidden_dim),
        log_snr_range=LOG_SNR_RANGE,
        check_progress=tuple(progress[c] for c in checks if c < len(RECORD_SHARES)),
    )
    scorer = ArtifactScorer(config)
    assert isinstance(scorer.preview, type(model.preview))
    scorer.preview.load_state_dict(model.preview.state_dict())
    scorer.embedder.load_state_dict(model.embedder.state_dict())
    scorer.gate.load_state_dict(heads.gate.state_dict())
    scorer.experts.load_state_dict(heads.experts.state_dict())
    scorer.exit_head.load_state_dict(exit_head.state_dict())
    scorer.calibration.load_state_dict(calibration.state_dict())
    return scorer.eval().requires_grad_(False)


def certified(candidate: Candidate, floor: float, data: ExitData, run: Run) -> ThresholdConfig:
    """The rule with its threshold and where it comes from.

    ``floor`` is the threshold that was cheapest on validation. Where it is above the lowest certified one it is taken: the
    promise holds for every higher threshold that does not come from the calibration trajectories.
    """
    clean = statistic_of(candidate, data)[~run.bad, run.last_saving]
    found = certify_image_threshold(clean, MAX_RISK, CONFIDENCE)
    return dataclasses.replace(
        candidate.rule,
        threshold=max(found.threshold, floor),
        max_risk=found.max_risk,
        confidence=found.confidence,
        unit=found.unit,
        num_clean=found.num_clean,
        scheduler="DDIMScheduler",
        num_inference_steps=DEFAULT.steps,
        guidance_scale=DEFAULT.guidance_scale,
        scored_steps=tuple(int(c) - 1 for c in run.calls),
        prompt_mix=PROMPT_MIX,
    )


def calibrate() -> Path:
    """Write ``scorer/`` and ``rules/``: each rule's certified threshold and the exit head it reads."""
    stage = Stage("calibrate", tracker="none")
    result = work_folder() / "scorer"
    if (result / "config.json").exists():
        return result
    train, validation, held_out = embed_split("train"), embed_split("validation"), embed_split("calibration")
    heads = load_heads(MAIN, train_posterior(MAIN, train, validation))
    calibration = fit_calibration(heads, validation)
    price = 1 / (1 - train.bad.mean().item())
    untrained = ExitHead(ExitHeadConfig(state_dim=MAIN.hidden_dim))
    cost = check_cost(load_pipeline(), build_scorer(heads, calibration, untrained, ALL_CHECKS))
    stage.log.info("one check costs %.4f of a denoiser call", cost)

    found: dict[tuple[int, ...], dict[str, tuple[Candidate, float]]] = {}
    for checks in CHECK_SETS:
        columns = torch.tensor(checks)
        rules = candidates(price, exit_data(heads, calibration, train, columns))
        found[checks] = best_of_each(
            rules, exit_data(heads, calibration, validation, columns), run_of(validation, checks, cost)
        )
        stage.log.info("checks %s: %s", checks, {name: round(value, 4) for name, (_, value) in found[checks].items()})
    checks = min(found, key=lambda c: min(value for _, value in found[c].values()))
    best, columns = found[checks], torch.tensor(checks)
    tuning, tuning_run = exit_data(heads, calibration, validation, columns), run_of(validation, checks, cost)
    default = choose_default(best, tuning, tuning_run)
    floors = {
        name: cheapest_threshold(tuning_run, statistic_of(candidate, tuning), MAX_RISK)
        for name, (candidate, _) in best.items()
    }
    stage.log.info("checks %s, default rule %s", checks, default)

    data, run = exit_data(heads, calibration, held_out, columns), run_of(held_out, checks, cost)
    thresholds = {name: certified(candidate, floors[name], data, run) for name, (candidate, _) in best.items()}
    write_json(
        work_folder() / "rules" / "rules.json",
        {
            "default": default,
            "checks": list(checks),
            "check_cost": cost,
            "price": price,
            "bad_rate": train.bad.mean().item(),
            "class_rate": [train.bad[train.label == k].mean().item() for k in range(NUM_CLASSES)],
            "validation_cost": {str(c): {n: v for n, (_, v) in rows.items()} for c, rows in found.items()},
            "rules": {name: to_dict(rule) for name, rule in thresholds.items()},
        },
    )
    for name, (candidate, _) in best.items():
        with atomic_path(work_folder() / "rules" / f"{name}.safetensors") as temporary:
            save_file(_contiguous(candidate.exit_head.state_dict()), temporary)
    scorer = build_scorer(heads, calibration, best[default][0].exit_head, checks)
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

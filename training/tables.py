"""The tables of the evaluation, one function each; every row is a flat JSON object."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from moe_artifacts.accumulator import ExitHead
from moe_artifacts.calibration import certify_image_threshold, clopper_pearson
from moe_artifacts.config import ThresholdConfig, from_dict
from moe_artifacts.files import read_json
from moe_artifacts.policy import Run, apply_rule, matched_threshold, perfect
from moe_artifacts.scorer import ArtifactScorer
from training import figures
from training.ancestor import ancestor_score
from training.calibrate import CONFIDENCE, MAX_RISK
from training.collect import DEFAULT, RECORD_SHARES, SHIPPED_WEIGHTS, Recorded, load_judges
from training.data.fashion import load_fashion, to_rgb
from training.figures import Row, rule_row
from training.metrics import auroc, auroc_within, bootstrap
from training.posterior import posterior_auroc
from training.rules import Paths
from training.scored import Scored
from training.train import ABLATIONS, embed_with, load_heads

SHARES = (0.14, 0.24, 0.34, 0.50, 1.0)  # of the steps done: 7, 12, 17, 25 and 50 of 50
FIRST_CHECK_SHARE = 0.14  # where perfect knowledge is placed


def shipped_rules() -> dict[str, Any]:
    """What the calibration stage found: thresholds, and the rate of bad images among the training trajectories."""
    return dict(read_json(SHIPPED_WEIGHTS / "rules" / "rules.json"))


def quality(scored: Scored) -> list[Row]:
    """AUROC, ECE and Brier score at each share of the steps, with bootstrap intervals over images."""
    known = shipped_rules()
    columns = [int(np.abs(scored.calls / scored.total_calls - share).argmin()) for share in SHARES]
    by_class = np.array(known["class_rate"])[scored.prompt]  # all that the prompt alone can say
    return figures.quality(scored, columns, known["bad_rate"], by_class)


def ceiling(data: Recorded) -> list[Row]:
    """What a second, independently trained judge says of the same finished images, and of real ones."""
    test = load_fashion("test")
    confirm = torch.arange(len(test)) % 2 == 1  # the half that set no threshold
    real = {}
    for name, judge in zip(("first", "second"), load_judges(), strict=True):
        margin = judge.margin(to_rgb(test.images[confirm]), test.labels[confirm])
        real[f"real_rate_{name}"] = (margin > 0).float().mean().item()
    first, second = (data.margin > 0).float(), (data.margin_second > 0).float()
    agreement = (first == second).float().mean()
    chance = first.mean() * second.mean() + (1 - first.mean()) * (1 - second.mean())
    return [
        {
            "table": "ceiling",
            **real,
            "bad_rate": first.mean().item(),
            "bad_rate_second": second.mean().item(),
            "agreement": agreement.item(),
            "kappa": ((agreement - chance) / (1 - chance)).item(),
            "auroc_within": auroc_within(data.margin_second.numpy(), first.numpy(), data.label.numpy()),
            "auroc_pooled": auroc(data.margin_second.numpy(), first.numpy()),
        }
    ]


def rules(
    scorer: ArtifactScorer,
    test: Scored,
    held_out: Scored,
    data: tuple[Recorded, Recorded],
    check_cost: float,
) -> list[Row]:
    """Every decision rule, the prompt alone, the ancestor's design, and perfect knowledge at the first check.

    Args:
        data: What ``test`` and ``held_out`` are the scores of.
    """
    stored, run = shipped_rules(), test.run(check_cost)
    rows = []
    for name, values in stored["rules"].items():
        rule = from_dict(ThresholdConfig, values)
        head = ExitHead(scorer.config.exit_head)
        head.load_state_dict(load_file(SHIPPED_WEIGHTS / "rules" / f"{name}.safetensors"))
        paths = test.paths(rule, head)
        for setting, threshold in (
            ("deployed", rule.threshold),
            ("matched", matched_threshold(run, paths.statistic, MAX_RISK, paths.clear)),
        ):
            rows.append({**rule_row(name, run, paths, threshold, setting), "default": name == stored["default"]})

    rate = np.array(stored["class_rate"], dtype=np.float32)
    no_look = Run(test.bad, test.calls, 0.0)  # the prompt is known before the first step and costs nothing
    rows.append(_constant_rule("prompt-only", no_look, rate[test.prompt], rate[held_out.prompt][~held_out.bad]))

    ours, theirs = (ancestor_score(SHIPPED_WEIGHTS / "ancestor.safetensors", recorded) for recorded in data)
    half = Run(test.bad, np.array([DEFAULT.steps // 2 + 1, DEFAULT.steps]), check_cost)
    rows.append(_constant_rule("ancestor", half, ours, theirs[~held_out.bad]))
    rows[-1] |= {"auroc_within": auroc_within(ours, test.bad, test.prompt), "auroc_pooled": auroc(ours, test.bad)}

    first = int(np.abs(test.calls / test.total_calls - FIRST_CHECK_SHARE).argmin())
    ideal = perfect(run, first)
    rows.append(
        {
            "table": "rules",
            "rule": "perfect",
            "setting": "matched",
            "first_check": int(test.calls[first]),
            **ideal.row(),
        }
    )
    for row in rows:
        row["perfect_cost_per_clean"] = ideal.cost_per_clean
        row["share_of_perfect"] = row["cost_per_clean"] / ideal.cost_per_clean
        row["check_cost"] = check_cost
    return rows


def _constant_rule(name: str, run: Run, score: np.ndarray, clean_scores: np.ndarray) -> Row:
    """A design with one score an image, certified on the scores of clean calibration images."""
    threshold = certify_image_threshold(clean_scores, MAX_RISK, CONFIDENCE).threshold
    paths = Paths(np.repeat(score[:, None], len(run.calls), axis=1), None)
    return rule_row(name, run, paths, threshold, "deployed")


def mixture(scorer: ArtifactScorer, data: Recorded) -> list[Row]:
    """Soft experts, hard experts and one head told the log-SNR, at equal parameters, three seeds each, on the test split."""
    test = embed_with(scorer, data)
    columns = [(*RECORD_SHARES, 1.0).index(share) for share in SHARES]
    rows = []
    for recipe in ABLATIONS:
        heads = load_heads(recipe, SHIPPED_WEIGHTS / "heads" / f"{recipe.name}.safetensors")
        values = posterior_auroc(heads, test)
        rows.append(
            {
                "table": "mixture",
                "variant": recipe.variant,
                "seed": recipe.seed,
                "parameters": sum(p.numel() for m in (heads.gate, heads.experts) for p in m.parameters()),
                "auroc_within": float(np.mean([values[c] for c in columns])),
                **{f"auroc_within_{share:.0%}": values[c] for share, c in zip(SHARES, columns, strict=True)},
            }
        )
    return rows


def transfer(scored: Scored, rule: ThresholdConfig, name: str, steps: int, reference: float, promise: str) -> Row:
    """One sampling setting: AUROC at half of the steps, and what the certified threshold really does there."""
    run = scored.run(0.0)
    half = int(np.abs(scored.calls / scored.total_calls - 0.5).argmin())
    prob = scored.prob[:, half].numpy()
    paths = scored.paths(rule)
    found = apply_rule(run, paths.statistic, rule.threshold, paths.clear)
    clean = int((~run.bad).sum())
    low, high = clopper_pearson(round(found.false_abort_rate * clean), clean, 0.95)
    within = auroc_within(prob, scored.bad, scored.prompt)
    within_low, within_high = bootstrap(lambda i: auroc_within(prob[i], scored.bad[i], scored.prompt[i]), len(prob))
    return {
        "scheduler": name,
        "steps": steps,
        "share": float(scored.calls[half] / scored.total_calls),
        "bad_rate": found.bad_rate,
        "auroc_within": within,
        "auroc_within_low": within_low,
        "auroc_within_high": within_high,
        "auroc_drop": reference - within,
        "false_abort_rate": found.false_abort_rate,
        "false_abort_rate_low": low,
        "false_abort_rate_high": high,
        "recall": found.recall,
        "steps_saved": found.steps_saved,
        "guard_says": promise,
    }

"""From trained heads to a scorer: probabilities, the checks, the decision rule, and a threshold that keeps a promise.

``python -m training.own.calibrate EMBEDDED --heads HEADS --embedder ... --preview ... --pipeline PIPELINE --out SCORER`` takes
embedder and preview as :mod:`training.embed` did. On ``EMBEDDED/validation`` it fits scale and bias of the posterior, and chooses
the checks and the rule, and each rule's free numbers, by the lowest cost per clean image; exit heads learn on ``EMBEDDED/train``;
the threshold comes from ``EMBEDDED/calibration``, which nothing else has seen, and which must be trajectories of the pipeline in the
one setting that the promise is for. What a check costs is measured on the pipeline, or given by ``--check-cost``.

Without ``--pipeline`` (rated images that were noised, no trajectories) the scorer has no threshold, and only records: what it
promises about a pipeline has to be measured there.

    SCORER/config.json, model.safetensors     the scorer; its threshold is that of the chosen rule
    SCORER/rules/rules.json                   what every rule costs on validation, and its certified threshold
    SCORER/rules/<rule>.safetensors           the exit head that it reads
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import torch
from torch import nn

from moe_artifacts.accumulator import ExitHead
from moe_artifacts.calibration import Calibration
from moe_artifacts.calibration.risks import Unit
from moe_artifacts.checkpoint import save_state
from moe_artifacts.config import (
    ExitHeadConfig,
    LatentSpaceConfig,
    RuleName,
    ThresholdConfig,
    to_dict,
)
from moe_artifacts.embedder import ClipEmbedder
from moe_artifacts.errors import CalibrationError, ConfigError, InputError, MoeArtifactsError
from moe_artifacts.files import write_json
from moe_artifacts.guard.space import latent_space_of
from moe_artifacts.latent_spaces import LATENT_SPACES
from moe_artifacts.noise import progress
from moe_artifacts.scorer import ArtifactScorer
from training import rules
from training.assembly import assemble, self_contained
from training.clip_towers import load_preview
from training.embed import load_embedder
from training.embedded import EmbeddedRows
from training.exit_head import ExitRecipe, exit_data, train_exit
from training.head_data import HeadData, Subset, at_most, labelled
from training.heads import Heads, round_to_half
from training.own.cost import measure_check_cost
from training.own.heads_folder import HeadFacts, read_heads, require_same_embedder
from training.own.train import describe
from training.row_jobs import complete_shards
from training.rules import Candidate, Promise

CHOOSING_IMAGES = 3_000  # of validation, to choose checks on: some fifty posteriors are computed
VALIDATION_IMAGES = 20_000
EXIT_IMAGES = 30_000
TIMED_BATCH = 8  # images of the run in which a check is timed
HAIR = 1e-4  # of progress, below which rounding is not to hide a step
EVEN_CHECKS = (0.15, 0.3, 0.45, 0.6, 0.8)  # of a scorer that was never calibrated on a pipeline
Rule = str  # a name in ``rules.candidates``, "economic", or "auto"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The one setting of the validation and calibration trajectories."""

    scheduler: str | None
    num_inference_steps: int | None  # as asked for
    guidance_scale: float | None
    num_steps: int  # denoiser calls


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a scorer is made of besides its exit head."""

    name: str
    label: str  # what "has artifacts" means, in words
    latent_space: LatentSpaceConfig
    preview: nn.Module
    embedder: ClipEmbedder
    heads: Heads
    calibration: Calibration
    provenance: dict[str, Any]

    def scorer(self, exit_head: ExitHead, check_progress: tuple[float, ...]) -> ArtifactScorer:
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return assemble(**named, exit_head=exit_head, check_progress=check_progress)


@dataclass(frozen=True)
class Calibrated:
    """What came out for a pipeline."""

    default: str
    checks: tuple[int, ...]  # columns of the data
    check_progress: tuple[float, ...]
    check_cost: float
    candidates: dict[str, Candidate]
    thresholds: dict[str, ThresholdConfig]  # of the rules that could be certified
    costs: dict[str, float]  # per clean image, on validation, at max_risk of its clean images aborted
    price: float

    def record(self, bad_rate: float) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "default": self.default,
            "check_progress": list(self.check_progress),
            "check_cost": self.check_cost,
            "price": self.price,
            "bad_rate": bad_rate,
            "validation_cost": self.costs,
            "rules": {name: to_dict(rule) for name, rule in self.thresholds.items()},
        }


def sampling_of(*splits: EmbeddedRows) -> Sampling:
    """The setting in which all images of these splits were sampled.

    Raises:
        InputError: If there are several, or they were not sampled by a pipeline.
    """
    found = set()
    for data in splits:
        for path in complete_shards(data.folder):
            table = pq.read_table(path, columns=["setting", "num_steps"])
            found |= set(zip(table["setting"].to_pylist(), table["num_steps"].to_pylist(), strict=True))
    settings = {(text, steps) for text, steps in found}
    if len(settings) != 1:
        told = "; ".join(f"{text or 'unknown'} with {steps} denoiser calls" for text, steps in sorted(settings)[:4])
        raise InputError(
            f"a threshold is certified for one setting, got {len(settings)}: {told}. Validation and calibration must be trajectories "
            "of one setting: training.own.collect makes them so"
        )
    ((text, steps),) = settings
    setting = json.loads(text) if text else {}
    names = ("scheduler", "num_inference_steps", "guidance_scale")
    return Sampling(**{name: setting.get(name) for name in names}, num_steps=steps)


def require_trained_levels(data: HeadData, facts: HeadFacts, name: str) -> None:
    """Refuse checks at noise levels that the heads have never seen.

    Raises:
        InputError: Naming the levels.
    """
    low, high = facts.space.log_snr_range
    levels = data.take(torch.arange(min(len(data), 512))).log_snr.flatten()
    levels = levels[levels.isfinite()].unique()
    bands = len(facts.rows_per_band)
    place = ((levels - low) / (high - low) * bands).floor().long().clamp(0, bands - 1)
    unseen = torch.tensor(facts.rows_per_band)[place] == 0
    far = (levels < low - (high - low) / bands) | (levels > high + (high - low) / bands)
    if (unseen | far).any():
        told = ", ".join(f"{value:.2f}" for value in levels[unseen | far][:6].tolist())
        raise InputError(
            f"{name} has checks at log-SNR {told}, where the heads were trained on nothing: they know {low:.2f} to {high:.2f}, with "
            f"{list(facts.rows_per_band)} checks in bands of equal width; train on the noise levels of the pipeline"
        )


def check_progress_of(data: HeadData, checks: Sequence[int], log_snr_range: tuple[float, float]) -> tuple[float, ...]:
    """Where in progress these columns lie, a hair below so that rounding cannot skip a step; the last is left out."""
    log_snr = data.take(torch.arange(1)).log_snr[0]
    places = [progress(log_snr[c].item(), log_snr_range) for c in checks if c < data.checks - 1]
    return tuple(round(max(place - HAIR, 0.0), 6) for place in places)


def calibrate_for(
    parts: Parts,
    train: HeadData,
    validation: HeadData,
    held_out: HeadData,
    sampling: Sampling,
    check_cost: float,
    promise: Promise,
    *,
    rule: Rule = "auto",
    prompt_mix: str | None = None,
    exit_steps: int = ExitRecipe.steps,
) -> Calibrated:
    """Checks, rules and certified thresholds for one setting of a pipeline.

    Args:
        train: Labelled; for the exit heads.
        validation: Labelled, of the setting; everything is chosen on it.
        held_out: Labelled, of the setting; thresholds come from it.
        rule: "auto": the cheapest on validation.
    Raises:
        CalibrationError: If there are too few images or prompts; it says how many are needed.
    """
    heads, calibration, most = parts.heads, parts.calibration, promise.max_risk
    whole = tuple(range(validation.checks))
    few = at_most(validation, CHOOSING_IMAGES, seed=0)
    checks = rules.choose_checks(
        heads, calibration, few, rules.run_of(few, whole, sampling.num_steps, check_cost), most
    )
    columns = torch.tensor(checks)
    log.info("checks after %s of the steps", _shares(validation, checks))

    learning = exit_data(heads, calibration, at_most(train, EXIT_IMAGES, seed=0), columns)
    price = 1 / max(1 - train.label.mean().item(), 0.01)
    tuning, run = (
        exit_data(heads, calibration, validation, columns),
        rules.run_of(validation, checks, sampling.num_steps, check_cost),
    )
    tried = rules.candidates(price, learning, steps=exit_steps)
    tried.append(rules.economic_candidate(tried[0].exit_head, tuning, run, most))
    best = rules.best_of_each(tried, tuning, run, most)
    costs = {name: value for name, (_, value) in best.items()}
    default = rules.choose_default(best, tuning, run, most) if rule == "auto" else rule
    log.info("cost per clean image on validation: %s", "  ".join(f"{k} {v:+.2%}" for k, v in costs.items()))

    last = exit_data(heads, calibration, held_out, columns)
    final = rules.run_of(held_out, checks, sampling.num_steps, check_cost)
    setting = {
        "scheduler": sampling.scheduler,
        "num_inference_steps": sampling.num_inference_steps or sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "prompt_mix": prompt_mix,
    }
    thresholds = {}
    for name, (candidate, _) in best.items():
        floor = rules.floor_of(run, rules.paths_of(candidate, tuning), most)
        try:
            thresholds[name], _ = rules.certified(
                candidate, floor, last, held_out.prompt_id.numpy(), final, promise, **setting
            )
        except CalibrationError as error:
            if name == default:
                raise CalibrationError(f"{_promise_hint(error, promise, held_out)}") from error
            log.info("the rule %s is left out: %s", name, error)
    return Calibrated(
        default=default,
        checks=checks,
        check_progress=check_progress_of(validation, checks, heads.space.log_snr_range),
        check_cost=check_cost,
        candidates={name: candidate for name, (candidate, _) in best.items()},
        thresholds=thresholds,
        costs=costs,
        price=price,
    )


def write(parts: Parts, found: Calibrated, bad_rate: float, out: Path) -> None:
    """The scorer with its threshold, and every rule beside it."""
    for name in found.thresholds:
        save_state(out / "rules" / f"{name}.safetensors", found.candidates[name].exit_head.state_dict())
    write_json(out / "rules" / "rules.json", found.record(bad_rate))
    scorer = parts.scorer(found.candidates[found.default].exit_head, found.check_progress)
    scorer.config = dataclasses.replace(scorer.config, threshold=found.thresholds[found.default])
    scorer.save_pretrained(out)


def without_threshold(parts: Parts, train: HeadData, out: Path, exit_steps: int = ExitRecipe.steps) -> None:
    """The scorer of images that no pipeline has made: it records, at checks spread evenly, and decides nothing."""
    data = at_most(train, EXIT_IMAGES, seed=0)
    learning = exit_data(parts.heads, parts.calibration, data, torch.arange(data.checks))
    price = 1 / max(1 - train.label.mean().item(), 0.01)
    head = train_exit(ExitRecipe(name="economic", price=price, steps=exit_steps), learning)
    parts.scorer(head, EVEN_CHECKS).save_pretrained(out)


def _shares(data: HeadData, checks: Sequence[int]) -> str:
    spent = data.take(torch.arange(1)).spent[0, list(checks)]
    return ", ".join(f"{share:.0%}" for share in spent.tolist())


def _promise_hint(error: CalibrationError, promise: Promise, held_out: HeadData) -> str:
    prompts = len(held_out.prompt_id.unique())
    hint = (
        ". Where the prompt of every image was drawn on its own, --unit image counts images"
        if promise.unit == "prompt"
        else ""
    )
    return f"{error}: {len(held_out)} images of {prompts} prompts are there to calibrate on{hint}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "embedded", type=Path, metavar="EMBEDDED", help="with the folders train, validation, calibration"
    )
    parser.add_argument("--heads", required=True, type=Path, help="folder of training.own.train")
    parser.add_argument("--embedder", required=True, help="as given to training.embed")
    parser.add_argument("--pretrained", help="as given to training.embed")
    parser.add_argument("--preview", help="as given to training.embed, or to training.forward_noise")
    parser.add_argument("--pipeline", help="a bundled name, a folder or a Hub id; without it: no threshold")
    parser.add_argument("--arguments", default="{}", help="further arguments of the pipeline as JSON, e.g. height")
    parser.add_argument(
        "--latent-space",
        choices=sorted(LATENT_SPACES),
        help="without a pipeline (that of the preview, where it knows it)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="SCORER")
    parser.add_argument("--max-risk", type=float, default=0.05, help="clean images aborted, at most (%(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="that it is so (%(default)s)")
    parser.add_argument(
        "--unit",
        choices=get_args(Unit),
        default="prompt",
        help="what was drawn independently; image only where each has its own drawn prompt (%(default)s)",
    )
    parser.add_argument(
        "--rule", choices=("auto", *get_args(RuleName)), default="auto", help="auto: the cheapest (%(default)s)"
    )
    parser.add_argument("--check-cost", type=float, help="of one image, in its denoiser calls (measured)")
    parser.add_argument("--name", help="of the scorer (the name of its folder)")
    parser.add_argument(
        "--label", default="artifacts, as labelled by the judge of the data", help="what bad means, in words"
    )
    parser.add_argument("--prompt-mix", help="which prompts these are, in words")
    parser.add_argument("--exit-steps", type=int, default=ExitRecipe.steps, help="of each exit head (%(default)s)")
    parser.add_argument("--device", help="of the pipeline (cuda where there is one, else cpu)")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        print(_run(args))
    except (MoeArtifactsError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> str:
    heads, facts = read_heads(args.heads)
    names = ("train", "validation") if args.pipeline is None else ("train", "validation", "calibration")
    rows = {name: EmbeddedRows(args.embedded / name) for name in names}
    data: dict[str, Subset] = {}
    for name, source in rows.items():
        require_same_embedder(source, facts)
        data[name] = labelled(source, name)
        log.info("%s", describe(name, source, data[name]))
        require_trained_levels(data[name], facts, name)
    embedder, preview = load_embedder(args.embedder, args.pretrained)
    preview = preview if args.preview is None and preview is not None else _preview(args.preview)
    _require_embedder(facts, embedder, preview)
    pipe, call = _pipeline(args)
    validation = at_most(data["validation"], VALIDATION_IMAGES, seed=0)
    parts = Parts(
        name=args.name or args.out.resolve().name,
        label=args.label,
        latent_space=_latent_space(args, pipe, preview),
        preview=preview,
        embedder=self_contained(embedder),
        heads=round_to_half(heads),
        calibration=rules.fit_calibration(heads, validation),
        provenance={
            "trained_by": "python -m training.own.calibrate",
            "images": {name: len(part) for name, part in data.items()},
            "bad_rate": facts.bad_rate,
            "auroc_validation": facts.auroc,
            "log_snr_range": list(facts.space.log_snr_range),
        },
    )
    if pipe is None:
        without_threshold(parts, data["train"], args.out, args.exit_steps)
        return (
            f"{args.out}: no threshold, since no pipeline was given: the scorer only records. Collect trajectories of a "
            "pipeline, embed them, and calibrate with --pipeline"
        )
    sampling = sampling_of(rows["validation"], rows["calibration"])
    cost = args.check_cost
    if cost is None:
        cost = _measured_cost(parts, pipe, call, sampling, rows["validation"])
        log.info("one check costs %.4f of a step's denoiser calls", cost)
    promise = Promise(max_risk=args.max_risk, confidence=args.confidence, unit=args.unit)
    found = calibrate_for(
        parts,
        data["train"],
        validation,
        data["calibration"],
        sampling,
        cost,
        promise,
        rule=args.rule,
        prompt_mix=args.prompt_mix,
        exit_steps=args.exit_steps,
    )
    write(parts, found, facts.bad_rate, args.out)
    rule = found.thresholds[found.default]
    units = "prompts" if rule.unit == "prompt" else "clean images"
    lines = [
        f"{args.out}: rule {found.default}, threshold {rule.threshold:.6g}",
        f"clean images aborted <= {args.max_risk:.3g}, {args.confidence:.3g} sure, from {rule.num_clean} {units}, for "
        f"{sampling.scheduler or 'this scheduler'} with {rule.num_inference_steps} steps",
        f"cost per clean image on validation {found.costs[found.default]:+.1%}, scoring included",
    ]
    repeated = len(data["calibration"]) - len(data["calibration"].prompt_id.unique())
    if args.unit == "image" and repeated:
        lines.append(
            f"note: {repeated} of {len(data['calibration'])} images share their prompt with others: the promise holds only if "
            "the prompt of every image was drawn on its own"
        )
    return "\n".join(lines)


def _preview(name: str | None) -> nn.Module:
    if name is None:
        raise InputError(
            "a scorer needs a preview: name the one that training.embed or training.forward_noise was given"
        )
    preview = load_preview(name, "latents")
    assert preview is not None
    return preview


def _require_embedder(facts: HeadFacts, embedder: ClipEmbedder, preview: nn.Module) -> None:
    from moe_artifacts.embedder import state_sha256

    found = {"embedder": embedder.weights_sha256(), "preview": state_sha256(preview.state_dict())}
    for name, sha256 in found.items():
        expected = getattr(facts, f"{name}_sha256")
        if expected is not None and expected != sha256:
            raise ConfigError(
                f"--{name} has weights with SHA-256 {sha256}, the heads were trained behind {expected}: name the one that "
                "training.embed was given"
            )


def _pipeline(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    if args.pipeline is None:
        return None, {}
    from training.own.collect import parse_arguments
    from training.own.pipelines import load_pipeline

    pipe, defaults = load_pipeline(args.pipeline, device=args.device)
    return pipe, defaults | parse_arguments(args.arguments)


def _latent_space(args: argparse.Namespace, pipe: Any, preview: nn.Module) -> LatentSpaceConfig:
    if pipe is not None:
        return latent_space_of(pipe, args.name or args.out.resolve().name)
    if args.latent_space is not None:
        return LATENT_SPACES[args.latent_space]
    space = getattr(preview, "space", None)
    if space is None or space.vae_class == "AutoencoderTiny":  # which takes latents of several spaces
        raise InputError(
            "the preview does not say what latent space it is for: name it with --latent-space, or a --pipeline"
        )
    return space


def _measured_cost(parts: Parts, pipe: Any, call: dict[str, Any], sampling: Sampling, data: EmbeddedRows) -> float:
    prompts = pq.read_table(complete_shards(data.folder)[0], columns=["prompt"])["prompt"].to_pylist()
    prompts = (prompts * TIMED_BATCH)[:TIMED_BATCH]
    asked = {"num_inference_steps": sampling.num_inference_steps, "guidance_scale": sampling.guidance_scale}
    arguments = call | {name: value for name, value in asked.items() if value is not None}
    untrained = ExitHead(ExitHeadConfig(state_dim=parts.heads.experts.config.hidden_dim))
    scorer = parts.scorer(untrained, EVEN_CHECKS).to(pipe._execution_device)
    return measure_check_cost(pipe, scorer, prompts, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""From trained heads to a scorer: probabilities, the checks, the decision rule, and a threshold that keeps a promise.

``python -m training.own.calibrate EMBEDDED --heads HEADS --embedder ... --preview ... --pipeline PIPELINE --out SCORER`` takes
embedder and preview as :mod:`training.embed` did. On ``EMBEDDED/validation`` it fits scale and bias of the posterior, and chooses
the checks and the rule, and each rule's free numbers, by the lowest cost per clean image; exit heads learn on ``EMBEDDED/train``;
the threshold comes from ``EMBEDDED/calibration``, which nothing else has seen, and which must be trajectories of the pipeline in the
one setting that the promise is for. What a check costs is measured on the pipeline, or given by ``--check-cost``.

Without ``--pipeline`` (rated images that were noised, no trajectories) the scorer has no threshold, and only records: what it
promises about a pipeline has to be measured there.

    SCORER/config.json, model.safetensors     the scorer; its threshold is that of the chosen rule
    SCORER/check_cost.json                    what a check costs, where it was measured, and of what; delete it to measure again
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
from typing import Any, Literal, get_args

import pyarrow.parquet as pq
import torch
from torch import nn

from moe_artifacts.accumulator import ExitHead
from moe_artifacts.calibration import Calibration
from moe_artifacts.calibration.risks import Unit
from moe_artifacts.checkpoint import CONFIG_NAME, save_state
from moe_artifacts.config import ExitHeadConfig, LatentSpaceConfig, RuleName
from moe_artifacts.embedder import ClipEmbedder, state_sha256
from moe_artifacts.errors import ConfigError, InputError, LatentSpaceError, MoeArtifactsError
from moe_artifacts.files import read_json, write_json
from moe_artifacts.guard.space import latent_space_of
from moe_artifacts.latent_spaces import LATENT_SPACES, differences
from moe_artifacts.loading import DTYPES, load_pipeline
from moe_artifacts.scorer import ArtifactScorer
from training import rules
from training.assembly import assemble, self_contained
from training.clip_towers import load_preview
from training.embed import load_embedder
from training.embedded import EmbeddedRows
from training.exit_head import ExitRecipe, train_exit
from training.head_data import HeadData, Subset, at_most, labelled
from training.heads import Heads, round_to_half
from training.own.choose import (
    Calibrated,
    Sampling,
    calibrate_for,
    exit_training_data,
    require_enough,
    require_trained_levels,
    sampling_of,
)
from training.own.cost import measure_check_cost
from training.own.heads_folder import (
    HeadFacts,
    read_heads,
    require_distinct,
    require_new_prompts,
    require_same_embedder,
    require_unseen,
)
from training.own.train import describe
from training.row_jobs import complete_shards
from training.rules import Promise

VALIDATION_IMAGES = 20_000
COST_NAME = "check_cost.json"
EVEN_CHECKS = (0.15, 0.3, 0.45, 0.6, 0.8)  # of a scorer that was never calibrated on a pipeline

log = logging.getLogger(__name__)


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
    shows: Literal["x0", "noisy"]
    provenance: dict[str, Any]

    def scorer(self, exit_head: ExitHead, check_progress: tuple[float, ...]) -> ArtifactScorer:
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return assemble(**named, exit_head=exit_head, check_progress=check_progress)


def write(parts: Parts, found: Calibrated, bad_rate: float, out: Path) -> None:
    """The scorer with its threshold, and every rule beside it."""
    (out / CONFIG_NAME).unlink(missing_ok=True)  # of an earlier scorer, whose rules are about to be replaced
    for name in found.thresholds:
        save_state(out / "rules" / f"{name}.safetensors", found.candidates[name].exit_head.state_dict())
    write_json(out / "rules" / "rules.json", found.record(bad_rate))
    scorer = parts.scorer(found.candidates[found.default].exit_head, found.check_progress)
    scorer.config = dataclasses.replace(scorer.config, threshold=found.thresholds[found.default])
    scorer.save_pretrained(out)


def without_threshold(parts: Parts, train: HeadData, out: Path, exit_steps: int = ExitRecipe.steps) -> None:
    """The scorer of images that no pipeline has made: it records, at checks spread evenly, and decides nothing."""
    every = tuple(range(train.checks))
    learning = exit_training_data(parts.heads, parts.calibration, train, torch.tensor(every), every)
    price = 1 / max(1 - train.label.mean().item(), 0.01)
    head = train_exit(ExitRecipe(name="economic", price=price, steps=exit_steps), learning)
    parts.scorer(head, EVEN_CHECKS).save_pretrained(out)


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
    parser.add_argument(
        "--timed-batch", type=int, default=8, help="images of the run in which it is measured (%(default)s)"
    )
    parser.add_argument("--name", help="of the scorer (the name of its folder)")
    parser.add_argument(
        "--label", default="artifacts, as labelled by the judge of the data", help="what bad means, in words"
    )
    parser.add_argument("--prompt-mix", help="which prompts these are, in words")
    parser.add_argument("--exit-steps", type=int, default=ExitRecipe.steps, help="of each exit head (%(default)s)")
    parser.add_argument("--device", help="of the pipeline (cuda where there is one, else cpu)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the pipeline, as its users run it (%(default)s)"
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        print(_run(args))
    except (MoeArtifactsError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> str:
    promise = Promise(max_risk=args.max_risk, confidence=args.confidence, unit=args.unit)
    if args.timed_batch < 1:
        raise InputError(f"timed-batch must be at least 1, got {args.timed_batch}")
    heads, facts = read_heads(args.heads)
    names = ("train", "validation") if args.pipeline is None else ("train", "validation", "calibration")
    rows = {name: EmbeddedRows(args.embedded / name) for name in names}
    data: dict[str, Subset] = {}
    require_distinct(rows)
    if "calibration" in rows:
        require_unseen(rows["calibration"], facts)
        if args.unit == "prompt":
            require_new_prompts(rows)
    for name, source in rows.items():
        require_same_embedder(source, facts)
        data[name] = labelled(source, name)
        log.info("%s", describe(name, source, data[name]))
        require_trained_levels(data[name], facts, name)
    if "calibration" in data:
        require_enough(promise, data["calibration"])  # before the pipeline is read, and anything is trained
    embedder, preview = load_embedder(args.embedder, args.pretrained)
    preview = preview if args.preview is None and preview is not None else _preview(args.preview)
    _require_embedder(facts, embedder, preview)
    sampling = None if args.pipeline is None else sampling_of(rows["validation"], rows["calibration"])
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
        shows=facts.shows,
        provenance={
            "trained_by": "python -m training.own.calibrate",
            "images": {name: len(part) for name, part in data.items()},
            "bad_rate": facts.bad_rate,
            "auroc_validation": facts.auroc,
            "log_snr_range": list(facts.space.log_snr_range),
        },
    )
    if sampling is None:
        without_threshold(parts, data["train"], args.out, args.exit_steps)
        return (
            f"{args.out}: no threshold, since no pipeline was given: the scorer only records. Collect trajectories of a "
            "pipeline, embed them, and calibrate with --pipeline"
        )
    cost = args.check_cost
    if cost is None:
        cost = _measured_cost(args, parts, pipe, call, sampling, rows["validation"])
    found = calibrate_for(
        parts.heads,
        parts.calibration,
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
    prompts = len(data["calibration"].prompt_id.unique())
    if args.unit == "image" and prompts < len(data["calibration"]):
        lines.append(
            f"note: {len(data['calibration'])} images of {prompts} prompts: the promise is for images of these prompts, each "
            "drawn on its own; --unit prompt makes one for prompts like these"
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

    pipe, defaults = load_pipeline(args.pipeline, getattr(torch, args.dtype), args.device)
    return pipe, defaults | parse_arguments(args.arguments)


def _latent_space(args: argparse.Namespace, pipe: Any, preview: nn.Module) -> LatentSpaceConfig:
    if pipe is not None:
        found, own = latent_space_of(pipe, args.name or args.out.resolve().name), getattr(preview, "space", None)
        if own is None or own.vae_class == "AutoencoderTiny":  # which takes latents of several spaces
            return found
        if told := differences(dataclasses.replace(own, packing=found.packing), found):
            raise LatentSpaceError(
                f"the preview was made for the latent space {own.name!r}, and the pipeline has another: {', '.join(told)}; "
                "fit one to this pipeline (training.fit_preview), then embed, train and calibrate again"
            )
        return found
    if args.latent_space is not None:
        return LATENT_SPACES[args.latent_space]
    space = getattr(preview, "space", None)
    if space is None or space.vae_class == "AutoencoderTiny":  # which takes latents of several spaces
        raise InputError(
            "the preview does not say what latent space it is for: name it with --latent-space, or a --pipeline"
        )
    return space


def _measured_cost(
    args: argparse.Namespace, parts: Parts, pipe: Any, call: dict[str, Any], sampling: Sampling, data: EmbeddedRows
) -> float:
    """Measured once: a run that was killed goes on with the same number, and comes to the same scorer."""
    path = args.out / COST_NAME
    asked = {"num_inference_steps": sampling.num_inference_steps, "guidance_scale": sampling.guidance_scale}
    arguments = call | {name: value for name, value in asked.items() if value is not None}
    of = {
        "pipeline": args.pipeline,
        "dtype": args.dtype,
        "device": pipe._execution_device.type,
        "images": args.timed_batch,
        "arguments": arguments,
        "embedder_sha256": parts.embedder.weights_sha256(),
        "preview_sha256": state_sha256(parts.preview.state_dict()),
    }
    found = read_json(path) if path.exists() else {}
    if found.get("of") == json.loads(json.dumps(of)):
        cost = float(found["check_cost"])
    else:
        prompts = pq.read_table(complete_shards(data.folder)[0], columns=["prompt"])["prompt"].to_pylist()
        untrained = ExitHead(ExitHeadConfig(state_dim=parts.heads.experts.config.hidden_dim))
        scorer = parts.scorer(untrained, EVEN_CHECKS).to(pipe._execution_device)
        cost = measure_check_cost(pipe, scorer, (prompts * args.timed_batch)[: args.timed_batch], arguments)
        write_json(path, {"check_cost": cost, "of": of})
    log.info("one check costs %.4f of a step's denoiser calls (%s)", cost, path)
    return cost


if __name__ == "__main__":
    sys.exit(main())

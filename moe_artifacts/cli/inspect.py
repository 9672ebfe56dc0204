"""The command ``moe-artifacts inspect``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_artifacts.cli.shared import errors_in_one_line
from moe_artifacts.config import EmbedderConfig, LatentSpaceConfig, ScorerConfig, ThresholdConfig, to_dict

if TYPE_CHECKING:  # it brings numpy and what depends on it
    from moe_artifacts.scalar.config import ScalarConfig


def inspect(
    name: Annotated[str, typer.Argument(help="A bundled name, a folder or a Hub id (owner/name).")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Print what a scorer checkpoint is.

    Its label, latent space, parts and threshold, and where they come from.
    """
    with errors_in_one_line():
        from moe_artifacts.checkpoint import CONFIG_NAME, WEIGHTS_NAME, find_checkpoint
        from moe_artifacts.scalar.checkpoint import is_scalar

        folder = find_checkpoint(name)
        config, state, describe = _load_scalar(folder) if is_scalar(folder / CONFIG_NAME) else _load(folder)
        numbers: Counter[str] = Counter()
        for key, tensor in state.items():
            numbers[key.partition(".")[0]] += tensor.numel()
        files = [file for file in (CONFIG_NAME, WEIGHTS_NAME) if (folder / file).exists()]
        sizes = {file: (folder / file).stat().st_size for file in files}
        if as_json:
            values = {"folder": str(folder), "bytes": sizes, "parameters": numbers, "config": to_dict(config)}
            typer.echo(json.dumps(values, indent=2))
            return
        for title, text in describe(config, numbers).items():
            typer.echo(f"{title:15}{text}")
        typer.echo(f"{'files':15}{folder}: " + ", ".join(f"{file} {size:,} bytes" for file, size in sizes.items()))


def _load(folder: Path) -> tuple[Any, dict[str, Any], Callable[[Any, Mapping[str, int]], dict[str, str]]]:
    from moe_artifacts.checkpoint import load_checkpoint

    return *load_checkpoint(folder), _description


def _load_scalar(folder: Path) -> tuple[Any, dict[str, Any], Callable[[Any, Mapping[str, int]], dict[str, str]]]:
    from moe_artifacts.checkpoint import WEIGHTS_NAME, read_weights
    from moe_artifacts.scalar.checkpoint import load

    config, _, _ = load(folder)
    return config, {} if config.fitted is None else read_weights(folder / WEIGHTS_NAME), _scalar_description


def _description(config: ScorerConfig, numbers: Mapping[str, int]) -> dict[str, str]:
    """A checkpoint in words; ``numbers`` counts the weights of each of its parts."""
    preview, low_high = config.preview, config.log_snr_range
    features = config.features
    seen = ["embedding"] + [n for n in ("delta", "prompt", "noisy") if getattr(features, f"use_{n}")]
    experts = config.experts.num_experts
    return {
        "name": config.name,
        "label": config.label,
        "latent space": _space(config.latent_space),
        "preview": f"{preview.kind}, {preview.channels} channels, of "
        + ("the noisy latents" if config.shows == "noisy" else "the x0 prediction")
        + (f", a patch of {preview.patch}x{preview.patch} pixels for each" if preview.kind == "linear" else ""),
        "embedder": _embedder(config.embedder, numbers["embedder"]),
        "features": f"{', '.join(seen)}: {features.width} numbers",
        "experts": f"{experts} with {numbers['experts']:,} parameters, {config.gate.kind} gate, top {config.gate.top_k}"
        if experts
        else f"none, a single head with {numbers['experts']:,} parameters",
        "log-SNR": f"{low_high[0]:g} to {low_high[1]:g} nats",
        "checks": f"at progress {', '.join(f'{c:g}' for c in config.check_progress)}, and at the last step",
        **_threshold(config.threshold),
        "provenance": _provenance(config.provenance),
    }


def _scalar_description(config: ScalarConfig, numbers: Mapping[str, int]) -> dict[str, str]:
    """A scorer around a function of the user's, which is not part of the checkpoint."""
    fitted = config.fitted
    if fitted is None:
        posterior, levels = "none: it is not calibrated, and scores every step", "all"
    else:
        exits = "with" if fitted.has_exit else "without"
        posterior = f"{numbers['posterior']:,} numbers, fitted to the scores; {exits} an exit distribution"
        levels = "; ".join(
            f"{level:.4g} nats, {share:.3g} of the calls"
            for level, share in zip(fitted.log_snr, fitted.share, strict=True)
        )
    return {
        "name": config.name,
        "label": config.label,
        "latent space": _space(config.latent_space),
        "score": "a function of your own, "
        + ("higher" if config.higher_is_better else "lower")
        + " is better; "
        + ("siblings see each other's scores" if config.siblings else "each image alone"),
        "posterior": posterior,
        "noise levels": levels,
        **_threshold(config.threshold),
        "provenance": _provenance(config.provenance),
    }


def _space(space: LatentSpaceConfig) -> str:
    return (
        f"{space.name}: {space.vae_class}, {space.channels} channels, scaling {space.scaling_factor:g}, "
        f"shift {space.shift_factor:g}, downsampling {space.downsampling}"
    )


def _provenance(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items()) or "not stated"


def _embedder(config: EmbedderConfig, parameters: int) -> str:
    if config.is_named:
        tag = f" ({config.pretrained})" if config.pretrained else ""
        return f"{config.model}{tag} of open_clip, {config.embed_dim} wide, weights not in the checkpoint"
    vision = (config.model_config or {}).get("vision_cfg")
    tower = vision.get("timm_model_name") if isinstance(vision, dict) else None
    return f"{tower or config.model}, {config.embed_dim} wide, {parameters:,} parameters with its text tower"


def _threshold(rule: ThresholdConfig | None) -> dict[str, str]:
    """The rule, and what it promises where."""
    if rule is None:
        return {"threshold": "none: it can only record"}
    from moe_artifacts.guard.output import Setting, promise

    quantity = {
        "cumulative": "the cumulative artifact probability",
        "posterior": "the posterior",
        "patience": f"the posterior of {rule.patience} checks in a row",
        "q-exit": f"at the first check with exit_cdf above {rule.q}, the posterior",
        "economic": "the posterior, less a boundary that depends on the noise level, plus 1, halved,",
    }[rule.rule]
    text = f"abort once {quantity} reaches {rule.threshold:.6g}"
    if rule.clear_threshold is not None:
        text += f"; stop scoring once the cumulative clean probability reaches {rule.clear_threshold:g}"
    # In its own setting, so that the promise is stated as it was made.
    own = Setting(rule.scheduler or "", rule.num_inference_steps, rule.guidance_scale or 0.0, rule.scored_steps or ())
    parts = [promise(rule, own)]
    if rule.num_clean is not None:
        parts.append(f"certified on {rule.num_clean:,} {'prompts' if rule.unit == 'prompt' else 'clean images'}")
    if rule.scored_steps is not None:
        parts.append(f"scored after steps {', '.join(str(step + 1) for step in rule.scored_steps)}")
    return {"threshold": text, "promise": "; ".join(parts)}

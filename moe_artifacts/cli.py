"""The command ``moe-artifacts``: demo, score, calibrate, inspect.

Whatever is heavy is imported by the command that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_artifacts.config import EmbedderConfig, RuleName, ScorerConfig, ThresholdConfig, to_dict
from moe_artifacts.errors import InputError, MoeArtifactsError

# OpenMP reads it when torch is imported. Threads that spin while they wait make torch up to a hundred times slower on a
# machine that does something else too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Watch a diffusion run step by step and stop an image once it is going wrong.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to generate, may be repeated.  [default: two prompts per class]")
    ] = None,
    images: Annotated[int, typer.Option(help="How many images, shared out evenly over the prompts.")] = 48,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: as calibrated]")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="ddim, ddpm, dpm, euler, euler-a, unipc or pndm.  [default: as calibrated]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first image; the others follow.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for grid.png, curves.png and results.json.")] = Path("demo-out"),
) -> None:
    """Generate with and without the guard.

    Uses the bundled pipeline, and says of every image what the guard decided and what the judge says of the finished
    one; of the whole, what was saved.
    """
    with _errors_in_one_line():
        from moe_artifacts.demo import plan, run_demo

        _no_loading_bars()
        prompts, seeds = plan(prompt, images, seed)
        out.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be made should not cost a run
        run = run_demo(prompts, seeds, steps, scheduler)
        typer.echo(run.text())
        typer.echo("")
        for path in run.save(out):
            typer.echo(path)


@app.command()
def score(
    trajectories: Annotated[Path, typer.Argument(help="A trajectory folder, or a folder of them; with latents.")],
    scorer: Annotated[str, typer.Option(help="A bundled name, a folder or a Hub id (owner/name).")],
    out: Annotated[Path, typer.Option(help="Folder for the scored trajectories; what is done is not done again.")],
    keep_latents: Annotated[bool, typer.Option("--keep-latents", help="Copy the latents too.")] = False,
) -> None:
    """Score recorded trajectories.

    Says of each folder how many images the scorer's threshold would stop.
    """
    with _errors_in_one_line():
        from moe_artifacts.offline import score_folders
        from moe_artifacts.scorer import ArtifactScorer

        for done in score_folders(trajectories, ArtifactScorer.from_pretrained(scorer), out, keep_latents):
            parts = [f"{done.images} images", f"mean final artifact_prob {done.artifact_prob:.3f}"]
            if done.aborted is None:
                parts.append("no threshold")
            else:
                parts.append(f"{done.aborted} would be aborted")
            parts += [f"{done.rejected} would be rejected at the last step"] if done.rejected else []
            parts += [f"{done.errors} not finite"] if done.errors else []
            parts += ["scored before"] if done.resumed else []
            typer.echo(f"{done.folder}: {', '.join(parts)}")


@app.command()
def calibrate(
    trajectories: Annotated[
        Path, typer.Argument(help="Trajectory folder, or a folder of them; or a file: .parquet, .csv or .npz.")
    ],
    rule: Annotated[RuleName, typer.Option(help="What decides.")] = "economic",
    risk: Annotated[
        Literal["per-image", "per-prompt", "miss", "wrong-aborts"],
        typer.Option(
            help="What is promised: clean images aborted, of all clean ones (per-image) or on average over prompts "
            "(per-prompt); bad images not aborted (miss); clean ones among the aborted (wrong-aborts)."
        ),
    ] = "per-image",
    max_risk: Annotated[float, typer.Option(help="It is at most this ...")] = 0.05,
    confidence: Annotated[float, typer.Option(help="... with this probability.")] = 0.95,
    unit: Annotated[
        Literal["prompt", "image"],
        typer.Option(help="What was drawn independently: prompts, or images that all have a prompt of their own."),
    ] = "prompt",
    check_cost: Annotated[float, typer.Option(help="Price of scoring one image once, in denoiser calls.")] = 0.02,
    q: Annotated[float, typer.Option(help="q-exit: decide once exit_cdf is above this.")] = 0.5,
    patience: Annotated[int, typer.Option(help="patience: this many alarms in a row.")] = 2,
    column: Annotated[
        str | None,
        typer.Option(
            "--score", help="Column of a plain score.  [default: artifact_prob and what belongs to it, or score]"
        ),
    ] = None,
    key: Annotated[str | None, typer.Option(help="Array [prompt image step] of an .npz.")] = None,
    label_from_final: Annotated[
        float | None, typer.Option(help="Label this share of the images, with the lowest final scores, as bad.")
    ] = None,
    label_within: Annotated[
        Literal["pooled", "prompt"], typer.Option(help="That share of all images, or of each prompt's.")
    ] = "pooled",
    num_steps: Annotated[
        int | None, typer.Option(help="Denoiser calls of a whole run, where the file does not say it.")
    ] = None,
    drop_incomplete: Annotated[
        bool, typer.Option("--drop-incomplete", help="Leave out images without a posterior at every step.")
    ] = False,
    choose_steps: Annotated[
        bool | None,
        typer.Option(
            "--choose-steps/--all-steps",
            help="Plain scores: look only at the steps that pay.  [default: where all images have all scores]",
        ),
    ] = None,
    siblings: Annotated[
        int, typer.Option(help="Plain scores: images of a prompt in one batch, which see each other's scores.")
    ] = 1,
    shares: Annotated[
        str, typer.Option(help="Of the prompts: fitted on, threshold from, held back for the report.")
    ] = "0.3,0.5,0.2",
    seed: Annotated[int, typer.Option(help="Of that split.")] = 0,
    scorer: Annotated[str | None, typer.Option(help="Folder of the scorer to write to.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the threshold into that folder.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for curves.png and calibration.json.")] = None,
) -> None:
    """Find a threshold that keeps a promise.

    From recorded runs with labels; prints what it promises, and what it does on prompts that took no part in it.
    docs/which-threshold.md says which rule and promise to take, moe_artifacts/records.py which columns a file needs.
    """
    with _errors_in_one_line():
        if write and scorer is None:
            raise InputError("--write needs --scorer, the folder to write to")
        from moe_artifacts.calibrate import calibrate as find_threshold
        from moe_artifacts.calibrated import Request
        from moe_artifacts.records import read_records

        request = Request(
            rule=rule,
            risk=risk,
            max_risk=max_risk,
            confidence=confidence,
            unit=unit,
            check_cost=check_cost,
            q=q,
            patience=patience,
            choose_steps=choose_steps,
            siblings=siblings,
            shares=_shares(shares),
            seed=seed,
        )
        folder = None
        if scorer is not None and write:
            from moe_artifacts.write_back import own_folder

            folder = own_folder(scorer)  # refused before the work, not after it
        records = read_records(
            trajectories,
            score=column,
            key=key,
            label_from_final=label_from_final,
            label_within=label_within,
            num_steps=num_steps,
            drop_incomplete=drop_incomplete,
        )
        found = find_threshold(records, request)
        typer.echo(found.text())
        if out is not None:
            from moe_artifacts.files import write_json
            from moe_artifacts.report import save_calibration

            save_calibration(out / "curves.png", found)
            write_json(out / "calibration.json", found.summary())
            typer.echo(f"\n{out / 'curves.png'}\n{out / 'calibration.json'}")
        if folder is not None:
            from moe_artifacts.write_back import write_threshold

            typer.echo(f"\nwritten to {write_threshold(folder, found)}")
        else:
            typer.echo("\nnot written to any scorer: that takes --scorer FOLDER --write")


def _shares(text: str) -> tuple[float, float, float]:
    try:
        first, second, third = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--shares must be three numbers such as 0.3,0.5,0.2, got {text!r}") from error
    return first, second, third


@app.command()
def inspect(
    name: Annotated[str, typer.Argument(help="A bundled name, a folder or a Hub id (owner/name).")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Print what a scorer checkpoint is.

    Its label, latent space, parts and threshold, and where they come from.
    """
    with _errors_in_one_line():
        from moe_artifacts.checkpoint import CONFIG_NAME, WEIGHTS_NAME, find_checkpoint, load_checkpoint

        folder = find_checkpoint(name)
        config, state = load_checkpoint(folder)
        numbers: Counter[str] = Counter()
        for key, tensor in state.items():
            numbers[key.partition(".")[0]] += tensor.numel()
        sizes = {file: (folder / file).stat().st_size for file in (CONFIG_NAME, WEIGHTS_NAME)}
        if as_json:
            values = {"folder": str(folder), "bytes": sizes, "parameters": numbers, "config": to_dict(config)}
            typer.echo(json.dumps(values, indent=2))
            return
        for title, text in _description(config, numbers).items():
            typer.echo(f"{title:15}{text}")
        typer.echo(f"{'files':15}{folder}: " + ", ".join(f"{file} {size:,} bytes" for file, size in sizes.items()))


def _description(config: ScorerConfig, numbers: Mapping[str, int]) -> dict[str, str]:
    """A checkpoint in words; ``numbers`` counts the weights of each of its parts."""
    space, preview, low_high = config.latent_space, config.preview, config.log_snr_range
    features = config.features
    seen = ["embedding"] + [n for n in ("delta", "prompt", "noisy") if getattr(features, f"use_{n}")]
    experts = config.experts.num_experts
    return {
        "name": config.name,
        "label": config.label,
        "latent space": f"{space.name}: {space.vae_class}, {space.channels} channels, scaling {space.scaling_factor:g}, "
        f"shift {space.shift_factor:g}, downsampling {space.downsampling}",
        "preview": f"{preview.kind}, {preview.channels} channels"
        + (f", a patch of {preview.patch}x{preview.patch} pixels for each" if preview.kind == "linear" else ""),
        "embedder": _embedder(config.embedder, numbers["embedder"]),
        "features": f"{', '.join(seen)}: {features.width} numbers",
        "experts": f"{experts} with {numbers['experts']:,} parameters, {config.gate.kind} gate, top {config.gate.top_k}"
        if experts
        else f"none, a single head with {numbers['experts']:,} parameters",
        "log-SNR": f"{low_high[0]:g} to {low_high[1]:g} nats",
        "checks": f"at progress {', '.join(f'{c:g}' for c in config.check_progress)}, and at the last step",
        **_threshold(config.threshold),
        "provenance": ", ".join(f"{key} {value}" for key, value in config.provenance.items()) or "not stated",
    }


def _embedder(config: EmbedderConfig, parameters: int) -> str:
    if config.model != "custom":
        tag = f" ({config.pretrained})" if config.pretrained else ""
        return f"{config.model}{tag} of open_clip, {config.embed_dim} wide, weights not in the checkpoint"
    assert config.model_config is not None  # the config saw to it
    vision = config.model_config.get("vision_cfg")
    tower = vision.get("timm_model_name") if isinstance(vision, dict) else None
    return f"{tower or 'custom'}, {config.embed_dim} wide, {parameters:,} parameters with its text tower"


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


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """What the caller can do something about ends in one line and exit code 2; our own mistakes keep their traceback."""
    try:
        yield
    except (MoeArtifactsError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None  # 128 + SIGINT, as shells have it


def _no_loading_bars() -> None:
    """The libraries' progress bars for reading files, which they draw even into a pipe."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()

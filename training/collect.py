"""Record on-policy trajectories of a pipeline, judged by their finished images.

``python -m training.collect`` writes one trajectory folder per batch under ``trajectories/<split>``: x0 predictions at the
check steps, log-SNR, prompts, seeds, and beside them ``final.safetensors`` with the finished latents, the class asked for
and both judges' margins. A batch is named by its number and drawn from it, so a killed run goes on with the missing ones.

The splits share no seed; train and validation use the training prompts, calibration and test the held-out ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_artifacts.bundled import bundled_judge, bundled_pipeline
from moe_artifacts.files import atomic_path
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.guard.tap import SchedulerTap, TappedStep
from moe_artifacts.judge import ManifoldJudge, load_judge
from moe_artifacts.noise import progress as noise_progress
from moe_artifacts.noise import variance_preserving
from moe_artifacts.schedulers import set_scheduler
from moe_artifacts.trajectory import Trajectory
from training.data.prompts import draw_prompts
from training.workspace import Stage, compile_if_possible, progress, work_folder

SHIPPED_WEIGHTS = Path(__file__).parent.parent / "benchmarks" / "weights"
LOG_SNR_RANGE = (-5.1, 6.8)  # from the first timestep of any run, 999 at the noisiest, to the last, 1
# Steps 3, 7, 10, 12, 15, 17, 21, 25, 33, 41 and 50 of DDIM with 50 steps; the last step is always recorded too.
RECORD_SHARES = (0.06, 0.14, 0.20, 0.24, 0.30, 0.34, 0.42, 0.50, 0.66, 0.82)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of sampling."""

    scheduler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 1.0


DEFAULT = Setting()
# What the scorer learns from: mostly the default scheduler at several lengths, and the others, so that it carries over.
TRAIN_SETTINGS = (
    Setting(steps=25), Setting(scheduler="dpm", steps=12), Setting(steps=50), Setting(scheduler="euler-a", steps=25),
    Setting(steps=20), Setting(scheduler="unipc", steps=12), Setting(steps=25), Setting(scheduler="euler-a", steps=12),
    Setting(steps=12), Setting(scheduler="dpm", steps=25), Setting(steps=50), Setting(scheduler="euler-a", steps=50),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Split:
    """Trajectories for one purpose. Seeds are ``first_seed + i``."""

    name: str
    count: int
    first_seed: int
    prompts: Literal["train", "held-out"]
    settings: tuple[Setting, ...] = (DEFAULT,)
    batch: int = 250
    bfloat16: bool = False  # twice as fast; only to train on, the other splits are what a user's pipeline makes


SPLITS = (
    Split(name="calibration", count=5_000, first_seed=10_000_000, prompts="held-out"),
    Split(name="validation", count=3_000, first_seed=20_000_000, prompts="train"),
    Split(
        name="train",
        count=60_000,
        first_seed=30_000_000,
        prompts="train",
        settings=TRAIN_SETTINGS,
        batch=500,
        bfloat16=True,
    ),
    Split(name="test", count=5_000, first_seed=40_000_000, prompts="held-out"),
)


def record_batch(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    setting: Setting,
    record_steps: Sequence[int] | None = None,
    bfloat16: bool = False,
) -> tuple[Trajectory, Tensor, Tensor]:
    """Run the pipeline once and record x0 predictions; returns the trajectory, x_t at half way, and the finished latents.

    ``record_steps`` defaults to the steps nearest to ``RECORD_SHARES`` of the default setting's progress.
    """
    set_scheduler(pipe, setting.scheduler)
    seen: list[tuple[int, float, Tensor]] = []
    noisy: list[Tensor] = []
    wanted: list[int] = list(record_steps or [])

    def observe(step: TappedStep) -> None:
        if not wanted:
            wanted.extend(record_steps_of([level.log_snr for level in step.levels]))
        if step.index in wanted:
            seen.append((step.index, step.level.log_snr, step.x0.half()))
        if step.index == step.num_steps // 2:
            noisy.append(variance_preserving(step.sample, step.level).half())

    with (
        SchedulerTap(pipe.scheduler, observe, LiveRows(len(prompts))),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        final = pipe(
            prompts,
            height=pipe.unet.config.sample_size * pipe.vae_scale_factor,
            width=pipe.unet.config.sample_size * pipe.vae_scale_factor,
            num_inference_steps=setting.steps,
            guidance_scale=setting.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
    trajectory = Trajectory(
        prompts=prompts,
        seeds=list(seeds),
        step=[index for index, _, _ in seen],
        log_snr=torch.tensor([log_snr for _, log_snr, _ in seen]),
        scores={},
        num_steps=len(pipe.scheduler.timesteps),
        x0=torch.stack([x0 for _, _, x0 in seen], dim=1),
        meta={"setting": asdict(setting)},
    )
    return trajectory, noisy[0], final


def record_steps_of(log_snrs: list[float]) -> list[int]:
    """Steps to record in a run with these levels: the first at or past each recorded level of the default, and the last."""
    grid = default_grid()
    wanted = [grid[round(share * len(grid)) - 1] for share in RECORD_SHARES]
    last = len(log_snrs) - 1
    found = {next((i for i, value in enumerate(log_snrs) if value >= w - 1e-4), last) for w in wanted}
    return sorted(found | {last})


def default_grid() -> list[float]:
    """log-SNR of every step of the default setting."""
    from moe_artifacts.noise import noise_levels
    from training.generator import build_scheduler

    scheduler = build_scheduler()
    scheduler.set_timesteps(DEFAULT.steps)
    return [level.log_snr for level in noise_levels(scheduler)]


def check_progress() -> tuple[float, ...]:
    """``RECORD_SHARES`` of the default setting as progress in ``LOG_SNR_RANGE``, a hair below so that rounding cannot skip."""
    grid = default_grid()
    return tuple(
        round(noise_progress(grid[round(share * len(grid)) - 1], LOG_SNR_RANGE) - 1e-4, 5) for share in RECORD_SHARES
    )


@torch.no_grad()
def decode(pipe: StableDiffusionPipeline, latents: Tensor, batch: int = 250) -> Tensor:
    """Finished images, RGB in [0, 1]."""
    parts = [pipe.vae.decode(part.float() / pipe.vae.config.scaling_factor).sample for part in latents.split(batch)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def collect(split: Split, pipe: StableDiffusionPipeline, judges: tuple[ManifoldJudge, ManifoldJudge]) -> Path:
    """Record the batches of a split that are not there yet."""
    stage = Stage("collect", tracker="none")
    folder = work_folder() / "trajectories" / split.name
    total = -(-split.count // split.batch)
    with progress(total, 0, f"collect {split.name}") as bar:
        for number in range(total):
            bar.update()
            shard = folder / f"{number:05d}"
            if (shard / "final.safetensors").exists():
                continue
            start = number * split.batch
            count = min(split.batch, split.count - start)
            first = split.first_seed + start
            prompts, labels = draw_prompts(count, split.prompts, torch.Generator().manual_seed(first))
            setting = split.settings[number % len(split.settings)]
            seeds = list(range(first, first + count))
            trajectory, noisy, final = record_batch(pipe, prompts, seeds, setting, bfloat16=split.bfloat16)
            images = decode(pipe, final)
            margins = [judge.margin(images, labels) for judge in judges]
            if not (margins[0].isfinite().all() and margins[1].isfinite().all()):
                raise RuntimeError(
                    f"{shard}: some finished images are not finite, hence neither clean nor bad; check the pipeline"
                )
            replace(trajectory, label=(margins[0] > 0).float()).save(shard)
            with atomic_path(shard / "final.safetensors") as temporary:  # last: a shard without it is done again
                save_file(
                    {
                        "final": final.half().contiguous(),
                        "noisy": noisy.contiguous(),
                        "class": labels,
                        "margin_first": margins[0],
                        "margin_second": margins[1],
                    },
                    temporary,
                )
            bad = (margins[0] > 0).float().mean().item()
            stage.log.info("%s batch %d of %d  %s  bad %.3f", split.name, number + 1, total, setting, bad)
    return folder


@dataclass(frozen=True)
class Recorded:
    """All trajectories of a split with one row per image; check steps that a short run merged are marked as missing."""

    x0: Tensor  # float16 [image check 4 8 8]
    log_snr: Tensor  # [image check], NaN where there is no such check
    step: Tensor  # int64 [image check], -1 where there is no such check
    num_steps: Tensor  # int64 [image]
    prompts: list[str]
    label: Tensor  # int64 [image], the class asked for
    margin: Tensor  # [image], of the first judge
    margin_second: Tensor
    seeds: Tensor
    noisy: Tensor  # float16 [image 4 8 8], x_t at half of the steps, of variance one
    final: Tensor  # float16 [image 4 8 8], the finished latents

    @property
    def bad(self) -> Tensor:
        """1.0 where the finished image has artifacts."""
        return (self.margin > 0).float()


def load_split(name: str, limit: int | None = None) -> Recorded:
    """Read a split back, checks padded at the front to the longest run."""
    shards = sorted((work_folder() / "trajectories" / name).glob("*/final.safetensors"))
    if not shards:
        raise FileNotFoundError(
            f"no trajectories for {name!r} in {work_folder()}: run python -m training.collect first"
        )
    columns: dict[str, list[Tensor]] = {k: [] for k in Recorded.__annotations__ if k != "prompts"}
    prompts: list[str] = []
    width = len(RECORD_SHARES) + 1
    for path in shards:
        if limit is not None and len(prompts) >= limit:
            break
        trajectory, final = Trajectory.load(path.parent), load_file(path)
        assert trajectory.x0 is not None
        count, checks = trajectory.x0.shape[:2]
        x0 = torch.zeros(count, width, *trajectory.x0.shape[2:], dtype=torch.float16)
        x0[:, width - checks :] = trajectory.x0
        log_snr = torch.full((width,), torch.nan)
        log_snr[width - checks :] = trajectory.log_snr
        step = torch.full((width,), -1)  # no such check
        step[width - checks :] = torch.tensor(trajectory.step)
        prompts += trajectory.prompts
        for key, value in {
            "x0": x0,
            "log_snr": log_snr.expand(count, -1),
            "step": step.expand(count, -1),
            "num_steps": torch.full((count,), trajectory.num_steps),
            "label": final["class"],
            "margin": final["margin_first"],
            "margin_second": final["margin_second"],
            "seeds": torch.tensor(trajectory.seeds),
            "noisy": final["noisy"],
            "final": final["final"],
        }.items():
            columns[key].append(value)
    return Recorded(prompts=prompts, **{k: torch.cat(v) for k, v in columns.items()})


def load_pipeline() -> StableDiffusionPipeline:
    """The pipeline just trained, or the bundled one where there is none; float32, quiet."""
    folder = work_folder() / "pipeline"
    if not folder.exists():
        return bundled_pipeline("fashion")[0]
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_judges() -> tuple[ManifoldJudge, ManifoldJudge]:
    """The judge that labels and the independent one, just trained or as shipped."""
    folder = work_folder() / "judges"
    if (folder / "second.safetensors").exists():
        return load_judge(folder / "first.safetensors"), load_judge(folder / "second.safetensors")
    return bundled_judge("fashion"), load_judge(SHIPPED_WEIGHTS / "judge-second.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[s.name for s in SPLITS])
    args = parser.parse_args()
    judges = load_judges()
    pipe = load_pipeline()
    compile_if_possible(pipe.unet, Stage("collect", tracker="none").log)
    for split in SPLITS:
        if args.only in (None, split.name):
            print(collect(split, pipe, judges))


if __name__ == "__main__":
    main()

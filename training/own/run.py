"""From prompts to a scorer of one's own pipeline with one command: every stage of training.own, one after the other.

    python -m training.own.run PIPELINE --prompts FILE --judge JUDGE --model CONFIG --out FOLDER

Each stage is the command that docs/train-your-own.md shows, with the arguments printed, so that any of them can be run again by
hand. All stages resume: a run that was killed is started again with the same arguments.

    FOLDER/trajectories    of training.own.collect        FOLDER/embedded     of training.embed, a folder for each split
    FOLDER/preview.safetensors, of training.fit_preview   FOLDER/heads        of training.own.train
    FOLDER/clip            of training.clip_tune          FOLDER/scorer       of training.own.calibrate, and evaluation.json
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_artifacts.files import write_json
from training.own.prompts import SPLITS

EVALUATED_SHARES = "0.15,0.25,0.35,0.5,1"


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """What differs between pipelines; further arguments of a stage go to it as they are."""

    pipeline: str
    prompts: Path
    judge: str
    model: str  # of open_clip: a name, or a configuration
    out: Path
    preview_size: int  # pixels of a side of the images that the preview is fitted to
    patch: int = 1  # preview pixels per latent
    unit: str = "prompt"
    against: str | None = None
    collect: Sequence[str] = ()
    tune: Sequence[str] = ()
    train: Sequence[str] = ()
    calibrate: Sequence[str] = ()

    def stages(self) -> list[tuple[str, list[str]]]:
        """Each stage's module and arguments, in order."""
        trajectories, embedded = self.out / "trajectories", self.out / "embedded"
        preview, clip, heads, scorer = (self.out / name for name in ("preview.safetensors", "clip", "heads", "scorer"))
        shown = ["--embedder", str(clip), "--preview", str(preview)]
        common = ["--prompts", str(self.prompts), "--judge", self.judge, "--keep-images"]
        found: list[tuple[str, list[str]]] = [
            ("training.own.collect", [self.pipeline, *common, "--out", str(trajectories), *self.collect])
        ]
        if not preview.exists():
            # The validation images are enough for a linear map, and every image goes through the VAE twice.
            images = ["--vae", vae_of(self.pipeline), "--images", str(trajectories / "validation")]
            size = ["--size", str(self.preview_size), "--patch", str(self.patch)]
            found.append(("training.fit_preview", [*images, *size, "--out", str(preview)]))
        data = ["--data", str(trajectories / "train"), "--preview", str(preview)]
        found.append(("training.clip_tune", ["--model", self.model, *data, "--out", str(clip), *self.tune]))
        found += [
            ("training.embed", [str(trajectories / split), *shown, "--out", str(embedded / split)])
            for split in SPLITS
            if split != "test"  # the evaluation embeds for itself, as the guard does
        ]
        found.append(("training.own.train", [str(embedded), "--out", str(heads), *self.train]))
        certified = ["--heads", str(heads), *shown, "--pipeline", self.pipeline, "--unit", self.unit]
        found.append(("training.own.calibrate", [str(embedded), *certified, "--out", str(scorer), *self.calibrate]))
        against = [] if self.against is None else ["--against", self.against]
        shares = ["--shares", EVALUATED_SHARES]
        found.append(("training.own.evaluate", [str(scorer), str(trajectories / "test"), *shares, *against]))
        return found


def vae_of(pipeline: str) -> str:
    """Where the VAE of a pipeline is: a bundled one's folder, else what was given."""
    from moe_artifacts.bundled import FOLDER

    folder = FOLDER / pipeline / "pipeline"
    return str(folder) if pipeline.isidentifier() and folder.is_dir() else pipeline


def run(own: OwnRun, before: Sequence[tuple[str, list[str]]] = ()) -> None:
    """All stages; how long each took in this run is written to ``FOLDER/seconds.json``.

    Args:
        before: Stages that make the pipeline itself.
    Raises:
        subprocess.CalledProcessError: If one fails; it has said why.
    """
    seconds: dict[str, float] = {}
    for module, arguments in [*before, *own.stages()]:
        print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", module, *arguments], check=True)
        seconds[f"{module} {len(seconds)}"] = time.perf_counter() - start
        write_json(own.out / "seconds.json", seconds)
    print(f"\n{sum(seconds.values()) / 60:.0f} minutes; {own.out / 'scorer'} is the scorer")


def failed(error: subprocess.CalledProcessError) -> int:
    """The exit status of a command whose stage failed, after a line that says which."""
    print(f"error: python -m {error.cmd[2]} failed; the stages before it are done and are kept", file=sys.stderr)
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", metavar="PIPELINE", help="a bundled name, a folder or a Hub id")
    parser.add_argument("--prompts", required=True, type=Path, help="as of training.own.collect")
    parser.add_argument("--judge", required=True, help="as of training.own.collect")
    parser.add_argument("--model", required=True, help="of open_clip: a name, or a configuration, .json")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--preview-size", type=int, default=512, help="side of the images in pixels (%(default)s)")
    parser.add_argument("--patch", type=int, default=1, help="preview pixels per latent (%(default)s)")
    parser.add_argument("--unit", choices=("image", "prompt"), default="prompt", help="of the promise (%(default)s)")
    parser.add_argument("--against", help="a scorer to compare with")
    for name in ("collect", "tune", "train", "calibrate"):
        parser.add_argument(f"--{name}", type=shlex.split, default=[], help="further arguments of that stage, quoted")
    own = OwnRun(**vars(parser.parse_args(arguments)))
    try:
        run(own)
    except subprocess.CalledProcessError as error:
        return failed(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""From prompts to a scorer of one's own pipeline with one command: every stage of training.own, one after the other.

    python -m training.own.run PIPELINE --prompts FILE --judge JUDGE --model MODEL --pretrained TAG --out FOLDER

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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_artifacts.files import read_json, write_json
from moe_artifacts.preview import LinearPreview
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
    pretrained: str | None = None  # of the model, as of training.clip_tune
    device: str | None = None  # None: each stage's own
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
        device = [] if self.device is None else ["--device", self.device]
        found: list[tuple[str, list[str]]] = [
            ("training.own.collect", [self.pipeline, *common, *device, "--out", str(trajectories), *self.collect])
        ]
        if not self._has_preview(preview):
            # The validation images are enough for a linear map, and every image goes through the VAE twice.
            images = ["--vae", vae_of(self.pipeline), "--images", str(trajectories / "validation")]
            size = ["--size", str(self.preview_size), "--patch", str(self.patch)]
            found.append(("training.fit_preview", [*images, *size, *device, "--out", str(preview)]))
        data = ["--data", str(trajectories / "train"), "--validation", str(trajectories / "validation")]
        data += ["--preview", str(preview)]
        model = ["--model", self.model, *([] if self.pretrained is None else ["--pretrained", self.pretrained])]
        found.append(("training.clip_tune", [*model, *data, *device, "--out", str(clip), *self.tune]))
        found += [
            ("training.embed", [str(trajectories / split), *shown, *device, "--out", str(embedded / split)])
            for split in SPLITS
            if split != "test"  # the evaluation embeds for itself, as the guard does
        ]
        found.append(("training.own.train", [str(embedded), *device, "--out", str(heads), *self.train]))
        certified = ["--heads", str(heads), *shown, "--pipeline", self.pipeline, "--unit", self.unit, *device]
        found.append(("training.own.calibrate", [str(embedded), *certified, "--out", str(scorer), *self.calibrate]))
        against = [] if self.against is None else ["--against", self.against]
        shares = ["--shares", EVALUATED_SHARES]
        found.append(("training.own.evaluate", [str(scorer), str(trajectories / "test"), *shares, *against]))
        return found

    def _has_preview(self, path: Path) -> bool:
        """Whether it is there, fitted as is asked for now."""
        if not path.exists():
            return False
        facts = LinearPreview.facts(path)
        return (facts.get("size"), facts.get("patch")) == (self.preview_size, self.patch)


def vae_of(pipeline: str) -> str:
    """Where the VAE of a pipeline is: a bundled one's folder, else what was given."""
    from moe_artifacts.bundled import FOLDER

    folder = FOLDER / pipeline / "pipeline"
    return str(folder) if pipeline.isidentifier() and folder.is_dir() else pipeline


def run(own: OwnRun, before: Sequence[tuple[str, list[str]]] = ()) -> None:
    """All stages; how long each has taken, in all runs so far, is written to ``FOLDER/seconds.json``, but for what a kill -9 cut off.

    Args:
        before: Stages that make the pipeline itself.
    Raises:
        subprocess.CalledProcessError: If one fails; it has said why.
    """
    path = own.out / "seconds.json"
    seconds: dict[str, float] = read_json(path) if path.exists() else {}
    times = Counter[str]()  # not the place among all: a resumed run leaves out the preview that it has
    for module, arguments in [*before, *own.stages()]:
        print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)
        times[module] += 1
        start, name = time.perf_counter(), f"{module} {times[module]}"
        try:
            subprocess.run([sys.executable, "-m", module, *arguments], check=True)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            write_json(path, seconds)
    print(f"\n{sum(seconds.values()) / 60:.0f} minutes; {own.out / 'scorer'} is the scorer")


def add_stage_option(parser: argparse.ArgumentParser, name: str) -> None:
    """Further arguments of a stage, as one option."""
    # With the equals sign: a value that begins with a dash would be taken for an option.
    parser.add_argument(
        f"--{name}", type=shlex.split, default=[], help=f"further arguments of that stage: --{name}='--seed 1'"
    )


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
    parser.add_argument("--pretrained", help="weights of the model, as of training.clip_tune")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--preview-size", type=int, default=512, help="side of the images in pixels (%(default)s)")
    parser.add_argument("--patch", type=int, default=1, help="preview pixels per latent (%(default)s)")
    parser.add_argument("--unit", choices=("image", "prompt"), default="prompt", help="of the promise (%(default)s)")
    parser.add_argument("--device", help="of all stages (each one's own)")
    parser.add_argument("--against", help="a scorer to compare with")
    for name in ("collect", "tune", "train", "calibrate"):
        add_stage_option(parser, name)
    own = OwnRun(**vars(parser.parse_args(arguments)))
    try:
        run(own)
    except subprocess.CalledProcessError as error:
        return failed(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

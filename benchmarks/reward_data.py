"""Published score trajectories of FLUX and SDXL, in the format of ../shared/data/README.md: reading, labels, splits.

The arrays are called ``<model>_<reward>_<scorer>`` and hold [prompt image step] scores, higher is better; ``base`` is the
public reward model, whose score at the last step is the one of the finished image, ``naft`` the same model fine-tuned per
noise level. A step s is scored after s + 1 denoiser calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_artifacts.errors import InputError
from moe_artifacts.recorded import ScoredRuns

DEFAULT_DATA = Path(__file__).parents[2] / "shared" / "data" / "reward_trajectories.npz"
MODELS = ("flux", "sdxl")
REWARDS = ("imr", "pic", "hps")
CALL_TFLOPS, CHECK_TFLOPS = 9.9, 1.2  # published costs of one denoiser call and one scored step
CHECK_COST = CHECK_TFLOPS / CALL_TFLOPS  # of a scored step, in denoiser calls


@dataclass(frozen=True)
class Rewards:
    """Distinct trajectories of one model and reward, images of a prompt one after the other."""

    model: str
    reward: str
    scores: np.ndarray  # [image step], higher is better; only the steps that have scores
    step: np.ndarray  # [step], their place in the run
    final: np.ndarray  # [image], score of the finished image
    prompt: np.ndarray  # [image]
    num_steps: int

    def runs(self, bad: np.ndarray) -> ScoredRuns:
        """With a label per image."""
        return ScoredRuns(
            scores=self.scores,
            label=bad.astype(float),
            prompt=self.prompt,
            calls=self.step + 1,
            total_calls=self.num_steps,
            final=self.final,
        )


def load_rewards(path: Path, model: str, reward: str, scorer: str = "naft") -> Rewards:
    """Read one model and reward, repeats of a trajectory within a prompt removed.

    Raises:
        InputError: If the file lacks the arrays, or they do not have the same shape.
    """
    with np.load(path, allow_pickle=False) as file:
        names = [f"{model}_{reward}_{scorer}", f"{model}_{reward}_base"]
        if missing := [name for name in names if name not in file]:
            raise InputError(f"{path} lacks {missing}; it has {sorted(file)}")
        scores, base = (file[name].astype(np.float64) for name in names)
    if scores.ndim != 3 or scores.shape != base.shape:
        raise InputError(f"{path}: {names} must be [prompt image step] alike, got {scores.shape} and {base.shape}")
    distinct = [np.sort(np.unique(rows, axis=0, return_index=True)[1]) for rows in base]
    prompt = np.repeat(np.arange(len(base)), [len(rows) for rows in distinct])
    image = np.concatenate(distinct)
    step = np.flatnonzero(~np.isnan(scores).any(axis=(0, 1)))
    return Rewards(
        model=model,
        reward=reward,
        scores=scores[prompt, image][:, step],
        step=step,
        final=base[prompt, image, -1],
        prompt=prompt,
        num_steps=base.shape[-1],
    )


def worst(final: np.ndarray, prompt: np.ndarray, share: float, label: str) -> np.ndarray:
    """Bool [image]: the worst ``share`` of the final scores, of all images ("pooled") or of each prompt ("within")."""
    if label == "pooled":
        return final < np.quantile(final, share)
    bad = np.zeros(len(final), dtype=bool)
    for group in np.unique(prompt):
        rows = prompt == group
        bad[rows] = final[rows] < np.quantile(final[rows], share)
    return bad


def prompt_splits(
    prompt: np.ndarray, num_splits: int, shares: tuple[float, ...], seed: int
) -> Iterator[list[np.ndarray]]:
    """Random parts of the prompts, no prompt in two of them; yields the image masks of the parts of each split."""
    groups = np.unique(prompt)
    ends = np.round(np.cumsum(shares) * len(groups)).astype(int)
    for number in range(num_splits):
        order = np.random.default_rng([seed, number]).permutation(groups)
        yield [np.isin(prompt, part) for part in np.split(order, ends)[: len(shares)]]


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """The options every benchmark on such a file has."""
    parser.add_argument(
        "--data", type=_existing, default=str(DEFAULT_DATA), help="npz in the format of ../shared/data/README.md"
    )
    parser.add_argument("--model", choices=MODELS, help="only this model")
    parser.add_argument("--reward", choices=REWARDS, help="only this reward")
    parser.add_argument("--out", type=Path, help="result file, by default in benchmarks/results")


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no {path}; the scores are not shipped: name a file of that format")
    return Path(path)


def chosen_pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The pairs of model and reward asked for, all by default."""
    return [(m, r) for m in MODELS for r in REWARDS if args.model in (None, m) and args.reward in (None, r)]

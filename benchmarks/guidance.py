"""Why the demo samples without guidance, and what the guard gives against simply raising it.

``python -m benchmarks.guidance`` writes ``benchmarks/results/guidance.json``: for each guidance scale the share of images with
artifacts, how much of the real images is covered (share of real images with a generated one nearer than their own
``neighbours``-th real neighbour: Naeem et al. 2020, arXiv:2002.09797), and denoiser evaluations per clean image; and the same
for the guard at the default scale. Guidance above 1 evaluates the denoiser twice a step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import write_results
from moe_artifacts import ArtifactGuard, ArtifactScorer
from moe_artifacts.bundled import bundled_judge, bundled_pipeline
from moe_artifacts.judge import ManifoldJudge
from training.data.prompts import draw_prompts

SCALES = (1.0, 1.5, 2.0, 3.0)


@torch.no_grad()
def coverage(judge: ManifoldJudge, images: Tensor, labels: Tensor, real: int) -> float:
    """Mean over classes of the share of ``real`` reference images that have a generated image in their neighbourhood."""
    features = judge.features(images)
    shares = []
    for label, reference in enumerate(judge.reference[:, :real]):
        generated = features[labels == label]
        if len(generated) == 0:
            continue
        own = torch.cdist(reference, reference)
        radius = own.kthvalue(judge.neighbours + 1, dim=1).values  # the nearest is the image itself
        shares.append((torch.cdist(reference, generated).amin(dim=1) <= radius).float().mean())
    return torch.stack(shares).mean().item()


def measure(count: int, batch: int, seed: int) -> list[dict[str, Any]]:
    """One row per guidance scale, and one for the guard."""
    pipe, defaults = bundled_pipeline("fashion")
    judge = bundled_judge("fashion")
    guard = ArtifactGuard(ArtifactScorer.from_pretrained("fashion"))
    rows = []
    for scale, guarded in [*((scale, False) for scale in SCALES), (defaults["guidance_scale"], True)]:
        settings = {**defaults, "guidance_scale": scale, "output_type": "pt"}
        images, labels, calls = [], [], 0
        for first in range(seed, seed + count, batch):
            prompts, classes = draw_prompts(batch, "held-out", torch.Generator().manual_seed(first))
            generators = [torch.Generator().manual_seed(first + i) for i in range(batch)]
            if guarded:
                out = guard(pipe, prompts, generator=generators, **settings)
                images.append(out.images)
                labels.append(classes[out.kept_indices])
                calls += out.steps_run
            else:
                images.append(pipe(prompts, generator=generators, **settings).images)
                labels.append(classes)
                calls += batch * settings["num_inference_steps"] * (2 if scale > 1 else 1)
        shown, classes = torch.cat(images), torch.cat(labels)
        bad = judge.margin(shown, classes) > 0
        rows.append(
            {
                "guidance_scale": scale,
                "guard": guarded,
                "images": len(shown),
                "bad_rate": bad.float().mean().item(),
                "coverage": coverage(judge, shown, classes, real=count // len(judge.reference)),
                "calls_per_clean": calls / int((~bad).sum()),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=70_000_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write_results("guidance", measure(args.images, args.batch, args.seed), seed=args.seed, out=args.out)


if __name__ == "__main__":
    main()

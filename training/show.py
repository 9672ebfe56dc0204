"""Pictures of what the judge says: ``python -m training.show`` writes ``docs/judged.png``.

The first 50 test trajectories of each verdict, five per class, in the order of their seeds: nothing is picked by hand.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch

from training.collect import decode, load_pipeline, load_split
from training.data.prompts import CLASS_NAMES

ROOT = Path(__file__).parent.parent
PER_CLASS = 5


def draw(path: Path) -> None:
    """Left the clean images, right those with artifacts; one row per class."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data, pipe = load_split("test"), load_pipeline()
    figure, axes = plt.subplots(len(CLASS_NAMES), 2 * PER_CLASS + 1, figsize=(11, 10))
    for axis in axes.flat:
        axis.set_axis_off()
    for label, name in enumerate(CLASS_NAMES):
        axes[label, 0].text(1.0, 0.5, name, ha="right", va="center", transform=axes[label, 0].transAxes)
        for side, bad in enumerate((0.0, 1.0)):
            rows = ((data.label == label) & (data.bad == bad)).nonzero().flatten()[:PER_CLASS]
            images = decode(pipe, data.final[rows].float())
            for column, (row, image) in enumerate(zip(rows.tolist(), images, strict=True)):
                axis = axes[label, 1 + side * PER_CLASS + column]
                axis.imshow(image.permute(1, 2, 0))
                axis.set_title(f"{data.margin[row]:+.2f}", fontsize=8, pad=2, color="tab:red" if bad else "tab:green")
    figure.suptitle(
        "Judged clean (left) and with artifacts (right); above each image the judge's margin, artifacts above 0"
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=90)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with torch.no_grad():
        draw(ROOT / "docs" / "judged.png")


if __name__ == "__main__":
    main()

"""The design this library grew out of, trained on the same trajectories, as a baseline.

A linear preview of the noisy latents at one noise level, half of the steps; a CLIP embedding; an MLP without activations,
hence a linear map; regression of a rating from 0 to 5. It is given the CLIP model of part 1 of ``training.clip``, which is
tuned to previews, where the ancestor's had never seen one.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_artifacts.files import atomic_path
from training.clip import EMBED_DIM, MARGIN_SCALE, PreviewClip
from training.collect import Recorded, load_split
from training.state import step_generator
from training.workspace import work_folder


def rating(margin: Tensor) -> Tensor:
    """The judge's margin as an artifact rating from 0 to 5, 2.5 at the border."""
    return 5 * (0.5 + margin / (4 * MARGIN_SCALE)).clamp(0, 1)


class Ancestor(nn.Module):
    """Five linear layers in a row, as the ancestor had them."""

    def __init__(self) -> None:
        super().__init__()
        widths = (EMBED_DIM, 128, 64, 32, 16, 1)
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))

    def forward(self, embedding: Tensor) -> Tensor:
        """Predicted rating of each row of embeddings."""
        return self.layers(embedding).squeeze(-1)


@torch.no_grad()
def embed_noisy(model: PreviewClip, data: Recorded) -> Tensor:
    """CLIP embeddings of linear previews of x_t at half of the steps."""
    model.eval()
    return torch.cat([model(part.float()) for part in data.noisy.split(1000)])


def train_ancestor(seed: int = 60, steps: int = 1_500) -> Path:
    """Mean squared error on the rating, Adam, as in the original; writes ``ancestor.safetensors``."""
    result = work_folder() / "ancestor" / "ancestor.safetensors"
    if result.exists():
        return result
    data = load_split("train")
    torch.manual_seed(seed)
    clip = PreviewClip()
    clip.load_state_dict(load_file(work_folder() / "clip-contrastive" / "contrastive.safetensors"))
    embedding, target = embed_noisy(clip, data), rating(data.margin)
    net = Ancestor()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(steps):
        rows = torch.randint(len(target), (1_024,), generator=step_generator(seed, step))
        loss = F.mse_loss(net(embedding[rows]), target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with atomic_path(result) as temporary:
        save_file(
            {
                f"{name}.{k}": v.half().contiguous()
                for name, m in (("clip", clip), ("net", net))
                for k, v in m.state_dict().items()
            },
            temporary,
        )
    return result


@torch.no_grad()
def ancestor_score(path: Path, data: Recorded) -> np.ndarray:
    """Predicted rating over 5, clamped to [0, 1], of every trajectory."""
    clip, net = PreviewClip(), Ancestor()
    state = load_file(path)
    for name, module in (("clip.", clip), ("net.", net)):
        module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
    return (net(embed_noisy(clip, data)) / 5).clamp(0, 1).numpy()


if __name__ == "__main__":
    print(train_ancestor())

"""How well frozen embeddings tell artifacts, one band of noise levels at a time: a linear probe, judged on other images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from moe_artifacts.shapes import PerImage, Rows
from training.clip_towers import Towers
from training.data.pairs import MicroBatches, PreviewPairs
from training.head_data import is_bad
from training.metrics import auroc


@dataclass(frozen=True)
class Bands:
    """Bands of equal width over a range of log-SNR, numbered from the noisiest."""

    count: int
    log_snr_range: tuple[float, float]  # nats

    def of(self, log_snr: PerImage) -> Int64[Tensor, " batch"]:
        """The band of each row; the ends belong to the first and the last, and what lies beyond them too.

        Example:
            >>> Bands(2, (-4.0, 4.0)).of(torch.tensor([-9.0, -0.1, 0.1, 4.0]))
            tensor([0, 0, 1, 1])
        """
        low, high = self.log_snr_range
        return ((log_snr - low) / (high - low) * self.count).floor().long().clamp(0, self.count - 1)


def bands_with_both_kinds(pairs: PreviewPairs, rows: Rows, bands: Bands) -> set[int]:
    """Bands in which some of the rows are bad and others are not."""
    band, bad = bands.of(pairs.log_snr[rows]).numpy(), is_bad(pairs.label[rows])
    return set(band[bad].tolist()) & set(band[~bad].tolist())


@dataclass(frozen=True)
class Embedded:
    """What the probe sees of some rows; all of one length."""

    features: np.ndarray  # [row feature]
    bad: np.ndarray
    prompt: np.ndarray
    band: np.ndarray

    def within(self, band: int) -> Embedded:
        rows = self.band == band
        return Embedded(self.features[rows], self.bad[rows], self.prompt[rows], self.band[rows])

    @property
    def both_kinds(self) -> bool:
        return len(np.unique(self.bad)) == 2


def band_scores(train: Embedded, validation: Embedded, bands: Bands) -> list[float]:
    """AUROC on validation of a probe of its own for each band; NaN where a kind of image is missing, here or there.

    It is the mean within prompts, or over all rows where no prompt of the band has images of both kinds.
    """
    scores = []
    for band in range(bands.count):
        seen, unseen = train.within(band), validation.within(band)
        if not (seen.both_kinds and unseen.both_kinds):
            scores.append(math.nan)
            continue
        # Strongly regularised: embeddings are wide and bad images few.
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1_000)).fit(seen.features, seen.bad)
        score = probe.decision_function(unseen.features)
        rows_of = [unseen.prompt == prompt for prompt in np.unique(unseen.prompt)]
        within = [value for rows in rows_of if math.isfinite(value := auroc(score[rows], unseen.bad[rows]))]
        scores.append(float(np.mean(within)) if within else auroc(score, unseen.bad))
    return scores


@torch.no_grad()
def embed_rows(towers: Towers, pairs: PreviewPairs, rows: Rows, bands: Bands, micro_batch: int) -> Embedded:
    """Embed labelled rows."""
    towers.eval()
    features = []
    for batch in MicroBatches(pairs, rows, micro_batch):
        image, text = towers(batch)
        # The product tells what neither can by itself: whether the image fits its prompt.
        features.append(torch.cat([image, image * text], dim=1).cpu())
    prompt, band = pairs.prompt[rows].numpy(), bands.of(pairs.log_snr[rows]).numpy()
    return Embedded(torch.cat(features).numpy(), is_bad(pairs.label[rows]), prompt, band)

"""Shards of noised pictures: what :mod:`training.forward_noise` writes, by :mod:`training.row_jobs`.

    meta.json                   what was asked for: source, latent space, schedulers, noise
    000000.parquet              one row per picture and noise level
    000000.safetensors          row i belongs to row i: ``previews``, uint8 [row 3 pixel_h pixel_w], RGB from 0 to 255; or
                                ``latents``, float16 [row channel height width], noisy, scaled to alpha**2 + sigma**2 = 1;
                                or both. A shard of no rows has no tensors
    rejects/000000.parquet      one row per picture that could not be used: key, reason, detail

Rows of a picture follow one another, noisiest first:

    key, prompt     of the picture; prompts may be empty or hold any Unicode
    label           share of raters who saw artifacts, in [0, 1]; null where the source knows none
    seed            of the picture's noise (``torch.Generator``); from the run's seed and the key
    scheduler       as it was asked for, e.g. "ddim" or "euler:30"
    step            place in a run of that scheduler, 0 first
    log_snr         nats; always finite
"""

from __future__ import annotations

import pyarrow as pa

COLUMNS = pa.schema(
    {
        "key": pa.string(),
        "prompt": pa.string(),
        "label": pa.float32(),
        "seed": pa.int64(),
        "scheduler": pa.string(),
        "step": pa.int32(),
        "log_snr": pa.float32(),
    }
)

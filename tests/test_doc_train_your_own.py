"""docs/train-your-own.md runs from top to bottom, on the bundled pipeline and on a small DiffusionDB, at a small size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusiondb_fixture import write_diffusiondb
from PIL import Image
from transformers import CLIPTextModelWithProjection

from moe_artifacts import ArtifactGuard, ArtifactScorer, bundled_pipeline
from moe_artifacts.bundled import FOLDER
from moe_artifacts.label.images import find_images
from moe_artifacts.label.table import ARTIFACT, CLEAN, Table, table_path
from moe_artifacts.preview import VaePreview
from training.clip import MODEL_CONFIG
from training.data.prompts import prompts_of

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "train-your-own.md").read_text(encoding="utf-8")
TUNE = "--noise-steps 4 --classify-steps 8 --batch 64 --micro-batch 32 --classify-batch 64 --probe-rows 200"


def blocks(heading: str) -> list[tuple[str, str]]:
    """The kind and text of each block under a heading."""
    section = next(part for part in DOC.split("\n## ") if part.startswith(heading))
    return re.findall(r"```(sh|python)\n(.*?)```", section, re.DOTALL)


def names_of(block: str) -> list[str]:
    return re.findall(r"^([A-Z]+)=", block, re.MULTILINE)


def run(script: str, folder: Path, values: dict[str, str]) -> str:
    """Run shell lines with variables of the test's own."""
    program = Path(sys.executable).parent
    environment = {**os.environ, **values, "PYTHONPATH": str(ROOT), "MOE_ARTIFACTS_TRACKER": "none"}
    environment["PATH"] = f"{program}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def say(folder: Path) -> None:
    """Verdicts of somebody who takes dark images for broken: something that so short a training can learn."""
    images = find_images(folder)
    light = [np.asarray(Image.open(image.path)).mean() for image in images]
    table = Table(table_path(folder), images)
    for image, mean in zip(images, light, strict=True):
        table.put(image, ARTIFACT if mean < np.quantile(light, 0.4) else CLEAN)


def small_sdxl() -> StableDiffusionXLPipeline:
    """With random weights, and both text encoders."""
    parts = tiny.stable_diffusion()
    encoder = CLIPTextModelWithProjection(parts.text_encoder.config).eval()
    width = parts.text_encoder.config.hidden_size
    unet = UNet2DConditionModel.from_config(
        {
            **{key: value for key, value in parts.unet.config.items() if not key.startswith("_")},
            "cross_attention_dim": 2 * width,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + encoder.config.projection_dim,
        }
    )
    pipe = StableDiffusionXLPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        text_encoder_2=encoder,
        tokenizer=parts.tokenizer,
        tokenizer_2=parts.tokenizer,
        unet=unet.eval(),
        scheduler=parts.scheduler,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fashion", "sdxl"])
def test_the_road_from_a_pipeline(tmp_path: Path, kind: str) -> None:
    if kind == "fashion":
        name, (pipe, _) = kind, bundled_pipeline(kind)
    else:
        name, pipe = str(tmp_path / "pipeline"), small_sdxl()
        pipe.save_pretrained(name)
    described = [prompt for label in range(10) for prompt in prompts_of(label, "all")]
    # Enough for the promise of the page: a prompt is seen once.
    prompts = [
        f"{words}{prompt}" for words in ("", "new, ", "old, ", "dark, ", "light, ", "small, ") for prompt in described
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    (tmp_path / "model.json").write_text(json.dumps(MODEL_CONFIG), encoding="utf-8")
    values = {
        "PIPELINE": name,
        "PROMPTS": "prompts.txt",
        "WORK": "work",
        "COUNT": "train=120,validation=60,calibration=400,test=60",
        "SETTINGS": "ddim:8,dpm:6",
        "RUN": "--batch 40",
        "IMAGES": "work/trajectories/unlabelled/validation",
        "MODEL": "model.json",
        "TUNE": TUNE,
        "SIZE": str(pipe(["a coat"], num_inference_steps=1, output_type="pt").images.shape[-1]),
        "ON": "--device cpu",
    }
    (_, variables), *rest = blocks("From trajectories of the pipeline")
    assert names_of(variables) == list(values)
    scripts = [text for kind, text in rest if kind == "sh"]
    assert len(scripts) == 5
    for script in scripts:
        if kind == "fashion":
            script = script.replace("--vae $PIPELINE", f"--vae {FOLDER / 'fashion' / 'pipeline'}")
        script = script.replace("--dtype float16", "--dtype float32")
        if "moe-artifacts label" in script:  # what a person does at the terminal
            script = re.sub(r"^moe-artifacts label .*\n", "", script)
            say(tmp_path / "work" / "trajectories" / "unlabelled")
        out = run(script, tmp_path, values)
    assert "false aborts" in out  # of moe-artifacts inspect, the last command
    scorer = ArtifactScorer.from_pretrained(tmp_path / "work" / "scorer")
    assert scorer.config.threshold is not None and scorer.config.threshold.max_risk == 0.05

    [(_, guard)] = [block for block in rest if block[0] == "python"]
    code = re.sub(r"^pipe = .*$", "", guard, flags=re.MULTILINE).replace("steps=30, guidance_scale=7.5", "steps=8")
    names = {"WORK": str(tmp_path / "work"), "pipe": pipe}
    exec(compile(code, "train-your-own.md", "exec"), names)
    assert len(names["out"].verdicts) == 4


@pytest.mark.slow
def test_the_road_from_rated_images(tmp_path: Path) -> None:
    """Every filter finds what was planted for it, and a scorer comes out that loads and says that it only records."""
    db = write_diffusiondb(tmp_path / "db", images=400, size=32)
    (tmp_path / "model.json").write_text(json.dumps(MODEL_CONFIG), encoding="utf-8")
    values = {
        "METADATA": str(db.metadata),
        "RATINGS": str(db.ratings),
        "PARTS": str(db.parts),
        "VAE": str(FOLDER / "fashion" / "pipeline"),
        "RATED": "rated",
        "NOISE": "--schedulers ddim:20,euler:12 --levels-per-image 4 --size 32",
        "MODEL": "model.json",
        "TUNE": TUNE,
        "ON": "--device cpu",
    }
    (_, variables), (_, script) = blocks("From rated images")
    assert names_of(variables) == list(values)
    printed = run(script, tmp_path, values)
    for fault in {fault for fault in db.faults if fault is not None and not fault.startswith("picture")}:
        assert fault in printed
    pipe, _ = bundled_pipeline("fashion")
    scorer = ArtifactScorer.from_pretrained(tmp_path / "rated" / "scorer", preview=VaePreview(pipe.vae))
    assert scorer.config.threshold is None and scorer.config.shows == "noisy"
    out = ArtifactGuard(scorer, on_abort="record")(pipe, ["a coat"], num_inference_steps=4, guidance_scale=1.0)
    assert out.trajectory.scores["artifact_prob"].isfinite().all()

"""Put what was trained where it is shipped from.

``python -m training.bundle``: pipeline, scorer and first judge into ``moe_artifacts/bundled/fashion``; what only the evaluation
needs (second judge, exit heads of the other rules, ablations, the ancestor's design) into ``benchmarks/weights``.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.results import write_results
from moe_artifacts.files import sha256_file, write_json
from moe_artifacts.scorer import ArtifactScorer
from training.collect import DEFAULT, LOG_SNR_RANGE, SPLITS
from training.data.prompts import SYNONYMS
from training.workspace import work_folder

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "moe_artifacts" / "bundled" / "fashion"
WEIGHTS = ROOT / "benchmarks" / "weights"
LIMIT_MB = 25


def bundle() -> None:
    """Copy everything; the scorer with its provenance."""
    work = work_folder()
    shutil.copytree(work / "pipeline", BUNDLED / "pipeline", dirs_exist_ok=True)
    shutil.copyfile(work / "judges" / "first.safetensors", BUNDLED / "judge.safetensors")
    write_json(
        BUNDLED / "defaults.json", {"num_inference_steps": DEFAULT.steps, "guidance_scale": DEFAULT.guidance_scale}
    )
    write_json(BUNDLED / "classes.json", [list(words) for words in SYNONYMS])
    scorer = ArtifactScorer.from_pretrained(work / "scorer")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    provenance = {
        "trained_by": "python -m training.recipes bundled",
        "commit": commit,
        "data": "Fashion-MNIST (MIT licence), trajectories of the bundled pipeline",
        "trajectories": {split.name: split.count for split in SPLITS},
        "log_snr_range": list(LOG_SNR_RANGE),
        "wise_ft": {
            **_metadata(work / "clip-wise-ft" / "embedder.safetensors"),
            "pretrained_sha256": sha256_file(work / "clip-contrastive" / "contrastive.safetensors"),
            "finetuned_sha256": sha256_file(work / "clip-finetune" / "finetuned.safetensors"),
        },
    }
    embedder = dataclasses.replace(scorer.config.embedder, weights_sha256=scorer.embedder.weights_sha256())
    scorer.config = dataclasses.replace(scorer.config, embedder=embedder, provenance=provenance)
    scorer.save_pretrained(BUNDLED / "scorer", torch.float16)
    shipped = ArtifactScorer.from_pretrained(BUNDLED / "scorer").state_dict()
    if changed := [k for k, v in scorer.state_dict().items() if not torch.equal(v, shipped[k])]:
        raise SystemExit(f"float16 changes {changed[:5]}: the thresholds were certified with other weights")

    WEIGHTS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / "judges" / "second.safetensors", WEIGHTS / "judge-second.safetensors")
    shutil.copytree(work / "rules", WEIGHTS / "rules", dirs_exist_ok=True)
    for path in sorted((work / "heads").glob("*.safetensors")):
        (WEIGHTS / "heads").mkdir(exist_ok=True)
        shutil.copyfile(path, WEIGHTS / "heads" / path.name)
    shutil.copyfile(work / "ancestor" / "ancestor.safetensors", WEIGHTS / "ancestor.safetensors")
    total = sum(p.stat().st_size for p in BUNDLED.rglob("*") if p.is_file()) / 1e6
    print(f"{BUNDLED}: {total:.1f} MB")
    if total > LIMIT_MB:
        raise SystemExit(f"the bundled default is over {LIMIT_MB} MB")


def write_training_log() -> None:
    """The numbers that the stages logged on their way, as ``benchmarks/results/fashion_training.json``."""
    rows = []
    for name in ("vae", "denoiser", "judges", "clip-contrastive", "clip-finetune", "clip-wise-ft", "heads"):
        for line in (work_folder() / name / "log.txt").read_text().splitlines():
            if match := re.search(r" step (\d+)  (.+)$", line):
                words = match[2].split()
                values = {k: float(v) for k, v in zip(words[::2], words[1::2], strict=True)}
                rows.append({"table": name, "step": int(match[1]), **values})
    write_results("fashion_training", rows, seed=0)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    bundle()
    write_training_log()


if __name__ == "__main__":
    main()

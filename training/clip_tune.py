"""Tune a CLIP model to the previews of one's own pipeline: to noise, to the verdict, and as far between as validation says.

``python -m training.clip_tune --model ViT-B-32 --pretrained TAG --data FOLDER --preview FILE --out FOLDER`` runs three parts, each
resumable, on trajectories or on shards of :mod:`training.forward_noise` (:mod:`training.data.pairs`):

1. noise tuning: image and text tower on previews of all noise levels and their prompts, with the loss of CLIP or SigLIP. The
   batch may be as large as one likes: memory is that of ``--micro-batch`` (:mod:`training.cached_contrastive`).
2. classification: both towers and a head that is told the log-SNR, end to end on the label and, where it is known, on how far
   the judge sees the image from the border.
3. WiSE-FT: weights between the two, by the within-prompt AUROC of a linear probe in each band of noise levels, on rows held
   out: those of a share of the prompts, or of ``--validation``.

It writes to ``--out``: ``plain``, ``noise_tuned``, ``classified`` and ``embedder.safetensors``, each with the weights of an
open_clip model; ``embedder.json``, the configuration of the last one for a scorer; ``wise_ft.json``, the table of part 3.

``accelerate launch -m training.clip_tune ...`` shares out the batches of parts 1 and 2 over GPUs; the loss is that of the whole batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_artifacts.checkpoint import read_weights, save_state
from moe_artifacts.config import to_dict
from moe_artifacts.embedder import state_sha256
from moe_artifacts.errors import ConfigError, InputError, MoeArtifactsError
from moe_artifacts.files import read_json, write_json
from moe_artifacts.loading import checked_device
from moe_artifacts.shapes import Embedding, Rows
from training.band_probe import Bands, band_scores, bands_with_both_kinds, embed_rows
from training.cached_contrastive import cached_backward, clip_loss, siglip_loss
from training.clip_towers import Head, Towers, build_embedder, chosen_weights, load_preview
from training.data.pairs import MicroBatches, PreviewPairs, RowSampler, hold_out, read_pairs
from training.loop import StepBatch, TrainingLoop, cosine_schedule
from training.margins import margin_loss, margin_scale
from training.processes import Processes
from training.state import step_generator
from training.trackers import add_tracker_option, chosen_tracker, open_tracker
from training.wise_ft import MIXES, as_rows, best_mix, best_per_band, sweep, write_mix

HIGHEST_SCALE = 100.0  # of the logits, as in open_clip


@dataclass(frozen=True, kw_only=True)
class TuneRecipe:
    """How long, how fast, and on how much at once."""

    loss: Literal["clip", "siglip"] = "clip"
    noise_steps: int = 1_000  # 0: the noise-tuned model is the plain one
    noise_lr: float = 1e-5
    batch: int = 4_096  # pairs that are compared with each other
    micro_batch: int = 64  # pairs that go through the towers at once, in all parts
    classify_steps: int = 1_000  # 0: the classification-tuned model is the noise-tuned one
    classify_lr: float = 1e-5
    classify_batch: int = 512
    head_lr: float = 1e-3
    hidden_dim: int = 192  # of the head
    weight_decay: float = 0.1
    margin_weight: float = 1.0  # of the judge's margin beside the label, in part 2
    held_out: float = 0.2  # share of the prompts; not used with a validation set of one's own
    bands: int = 5  # of equal width in log-SNR
    probe_rows: int = 20_000  # at most, to fit the linear probe of part 3, and as many to judge it
    mixes: tuple[float, ...] = MIXES
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast in the towers
    save_every: int = 50  # steps
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "micro_batch", "classify_batch", "hidden_dim", "bands", "probe_rows", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("noise_steps", "classify_steps", "margin_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, known in (("loss", ("clip", "siglip")), ("precision", ("fp32", "bf16"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.mixes or not all(0 <= mix <= 1 for mix in self.mixes):
            raise ConfigError(f"mixes must be numbers in [0, 1], at least one, got {self.mixes}")


class Tuning:
    """A run: its model, its data, and the folder with its files.

    Raises:
        ConfigError: If the recipe does not suit the model, or the folder holds another run.
        InputError: If the data do not suit the recipe.
    """

    def __init__(
        self,
        towers: Towers,
        pairs: PreviewPairs,
        recipe: TuneRecipe,
        out: Path,
        tracker: str = "none",
        validation: PreviewPairs | None = None,
    ) -> None:
        self.processes = Processes(towers.embedder.clip.logit_scale.device)
        self.towers, self.recipe, self.out = towers.to(self.processes.device), recipe, out
        if recipe.loss == "siglip" and getattr(towers.embedder.clip, "logit_bias", None) is None:
            raise ConfigError('loss="siglip" needs a model with a logit_bias: set "init_logit_bias": -10 in its JSON')
        self.log = logging.getLogger(__name__)
        self.log.info("%d rows; %d left out as not finite", len(pairs), pairs.left_out)
        self.train, self.validation = self._split(pairs, validation)
        low, high = self.train.log_snr.aminmax()
        middle, half = (low + high).item() / 2, max((high - low).item() / 2, 0.5)  # half a nat, if all have one level
        self.bands = Bands(recipe.bands, (middle - half, middle + half))
        self._find_labels()
        self.processes.on_main(partial(self._claim_folder, pairs, validation))
        self._accelerator = None if tracker == "none" or not self.processes.is_main else open_tracker(tracker, out)

    def run(self) -> Path:
        """All three parts; the file of the chosen embedder."""
        self.processes.on_main(partial(self._write, "plain"))
        self.tune_to_noise()
        self.tune_to_labels()
        return Path(self.processes.on_main(lambda: str(self.choose_mix())))

    def tune_to_noise(self) -> Path:
        """Part 1; writes ``noise_tuned.safetensors``."""
        recipe, embedder = self.recipe, self.towers.embedder
        clip = embedder.clip
        self._read("plain")
        sampler = RowSampler(self.train)
        optimizer = torch.optim.AdamW(
            _parameter_groups(self.towers, recipe.noise_lr, recipe.weight_decay), betas=(0.9, 0.98), eps=1e-6
        )

        def loss_of(batch: StepBatch) -> Tensor:
            same = batch.gather(self.train.prompt[batch.rows].to(batch.device))

            def loss(image: Embedding, text: Embedding) -> Tensor:
                if recipe.loss == "siglip":
                    return siglip_loss(image, text, clip.logit_scale.exp(), clip.logit_bias, same)
                return clip_loss(image, text, clip.logit_scale.exp(), same)

            micro_batches = MicroBatches(self.train, batch.rows, recipe.micro_batch)
            return cached_backward(self._training_towers(), micro_batches, loss, batch.gather, self.processes.count)

        loop = self._loop("noise_tuned", recipe.noise_steps, {"embedder": embedder}, optimizer)
        return self._part(loop, loss_of, partial(sampler.draw, recipe.batch), backward=False)

    def tune_to_labels(self) -> Path:
        """Part 2; writes ``classified.safetensors``. WiSE-FT, not early stopping, keeps it from going too far."""
        recipe = self.recipe
        self._read("noise_tuned")
        torch.manual_seed(recipe.seed)
        head = Head(self.towers.embedder.config.embed_dim, recipe.hidden_dim, self.bands.log_snr_range).to(self._device)
        known = self.train.subset(self.labelled) if recipe.classify_steps else self.train  # without steps: not used
        sampler = RowSampler(known)
        groups = _parameter_groups(self.towers, recipe.classify_lr, recipe.weight_decay)
        optimizer = torch.optim.AdamW(groups + _parameter_groups(head, recipe.head_lr, recipe.weight_decay))
        scale = margin_scale(known.margin)

        def loss_of(batch: StepBatch) -> Tensor:
            pairs = known.batch(batch.rows)
            logit, margin = head(*self._training_towers()(pairs), pairs.log_snr)
            loss = F.binary_cross_entropy_with_logits(logit, pairs.label.to(logit.device))
            return loss + recipe.margin_weight * margin_loss(margin, pairs.margin.to(margin.device), scale)

        modules = {"embedder": self.towers.embedder, "head": head}
        loop = self._loop("classified", recipe.classify_steps, modules, optimizer, recipe.micro_batch)
        return self._part(loop, loss_of, partial(sampler.draw, recipe.classify_batch))

    def choose_mix(self) -> Path:
        """Part 3; writes ``embedder.safetensors``, ``embedder.json`` and ``wise_ft.json``."""
        path, table = self._file("embedder"), self.out / "wise_ft.json"
        if path.exists() and table.exists():
            return path
        names = ("noise_tuned", "classified") if self.recipe.classify_steps else ("plain", "noise_tuned")
        pretrained, finetuned = (self._file(name) for name in names)
        mix, rows, best = 1.0, [], []
        if not self.measurable:
            self.log.info("no band has labels to choose a mix by: the tuned weights are taken as they are")
        else:

            def measure(state: dict[str, Tensor]) -> list[float]:
                self.towers.embedder.clip.load_state_dict(state)
                size = self.recipe.micro_batch
                seen = embed_rows(self.towers, self.train, self.probe_rows[0], self.bands, size)
                unseen = embed_rows(self.towers, self.validation, self.probe_rows[1], self.bands, size)
                scores = band_scores(seen, unseen, self.bands)
                self.log.info("AUROC per band, the noisiest first: %s", "  ".join(f"{score:.4f}" for score in scores))
                return scores

            scores = sweep(read_weights(pretrained), read_weights(finetuned), measure, self.recipe.mixes)
            mix, rows, best = best_mix(scores), as_rows(scores), best_per_band(scores)
        state = write_mix(path, pretrained, finetuned, mix)
        config = dataclasses.replace(self.towers.embedder.config, pretrained=None, weights_sha256=state_sha256(state))
        write_json(self.out / "embedder.json", to_dict(config))
        told = {
            "parents": list(names),
            "mix": mix,
            "best_per_band": best,
            "log_snr_range": list(self.bands.log_snr_range),
        }
        write_json(table, told | {"rows": rows})  # the last: the run is complete
        return path

    def _loop(
        self,
        name: str,
        steps: int,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        micro_batch: int | None = None,
    ) -> TrainingLoop:
        recipe = self.recipe
        return TrainingLoop(
            modules=modules,
            optimizer=optimizer,
            steps=steps,
            seed=recipe.seed,
            name=name,
            schedule=cosine_schedule(steps, warmup=steps // 20),
            state=self.out / f"{name}.state.safetensors",
            save_every=recipe.save_every,
            log_every=recipe.save_every,
            micro_batch=micro_batch,
            track=lambda step, **values: self._track(name, step, **values),
            accelerator=self.processes.accelerator,
        )

    def _part(
        self,
        loop: TrainingLoop,
        loss_of: Callable[[StepBatch], Tensor],
        draw: Callable[[torch.Generator], Rows],
        backward: bool = True,
    ) -> Path:
        """Train one part, unless it was done before, and write its weights."""
        path = self._file(loop.name)
        if not self.processes.on_main(path.exists):
            loop(loss_of, draw, after_step=self._clamp_scale, backward=backward)
            self.processes.on_main(partial(self._write, loop.name))
            loop.forget()
        return path

    def _training_towers(self) -> Towers:
        return self.towers.train()  # but for the preview and BatchNorm, which a loop cannot know

    @torch.no_grad()
    def _clamp_scale(self, step: int) -> None:
        self.towers.embedder.clip.logit_scale.clamp_(0, math.log(HIGHEST_SCALE))

    def _split(self, pairs: PreviewPairs, validation: PreviewPairs | None) -> tuple[PreviewPairs, PreviewPairs]:
        """What to train on, and what to choose the mix by."""
        if validation is None:
            return hold_out(pairs, self.recipe.held_out, self.recipe.seed)
        if validation.kind != pairs.kind:
            raise InputError(f"validation must hold {pairs.kind} as the data do, got {validation.kind}")
        if validation.identity() == pairs.identity():
            raise InputError("validation must be other images than those trained on, got the same")
        return pairs, validation

    def _find_labels(self) -> None:
        """Which rows have a label, and whether they suffice for parts 2 and 3: better now than after hours of training."""
        recipe, generator = self.recipe, step_generator(self.recipe.seed, 0)
        known = [(~pairs.label.isnan()).nonzero().squeeze(1) for pairs in (self.train, self.validation)]
        self.labelled = known[0]
        self.probe_rows = [rows[torch.randperm(len(rows), generator=generator)][: recipe.probe_rows] for rows in known]
        sets = zip((self.train, self.validation), self.probe_rows, strict=True)
        seen, unseen = (bands_with_both_kinds(pairs, rows, self.bands) for pairs, rows in sets)
        self.measurable = seen & unseen
        self.log.info(
            "%d and %d rows with a label, to train on and held out; bands with images of both kinds: %s of %d",
            *map(len, known),
            sorted(self.measurable) or "none",
            recipe.bands,
        )
        if recipe.classify_steps and not self.measurable:
            raise InputError(
                "classification needs labels of images with and without artifacts, of some noise level, both to train on "
                f"and in what is held out; got {len(known[0])} and {len(known[1])} labels. Label more images, let the judge be "
                "more or less strict, or set classify_steps=0"
            )

    @property
    def _device(self) -> torch.device:
        return self.towers.embedder.clip.logit_scale.device

    def _file(self, name: str) -> Path:
        return self.out / f"{name}.safetensors"

    def _read(self, name: str) -> None:
        self.towers.embedder.clip.load_state_dict(read_weights(self._file(name)))

    def _write(self, name: str) -> None:
        if not self._file(name).exists():
            save_state(self._file(name), self.towers.embedder.clip.state_dict())

    def _track(self, part: str, step: int, **values: float) -> None:
        self.log.info("%s step %d  %s", part, step, "  ".join(f"{name} {value:.5g}" for name, value in values.items()))
        if self._accelerator is not None:
            self._accelerator.log({f"{part}/{name}": value for name, value in values.items()}, step=step)

    def _claim_folder(self, pairs: PreviewPairs, validation: PreviewPairs | None) -> None:
        """A run is continued only with what it was started with: anything else would be a mixture of two."""
        preview = self.towers.preview
        own = {
            "embedder": to_dict(self.towers.embedder.config),
            "plain_sha256": self.towers.embedder.weights_sha256(),
            "preview_sha256": None if preview is None else state_sha256(preview.state_dict()),
            **pairs.identity(),
            "validation": None if validation is None else validation.identity(),
        }
        values = json.loads(json.dumps(to_dict(self.recipe) | own))  # as it is read back: no tuples
        path = self.out / "run.json"
        found = read_json(path) if path.exists() else values
        if different := [name for name in values if values[name] != found.get(name)]:
            raise ConfigError(
                f"{self.out} holds a run that differs in {', '.join(different)}; use what it was started with, or choose "
                "another folder"
            )
        write_json(path, values)


def _parameter_groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; norms, biases, temperatures, which have fewer than two axes, do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed, others = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    return [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": others, "lr": lr, "weight_decay": 0.0},
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a name of open_clip, or a configuration of it, .json")
    parser.add_argument(
        "--pretrained",
        help="tag of open_clip, .safetensors file, or none: random weights, which a configuration has by default",
    )
    parser.add_argument("--data", required=True, type=Path, help="folder of trajectories or of training.forward_noise")
    parser.add_argument(
        "--validation", type=Path, help="another such folder, of other prompts or images (a share of the prompts)"
    )
    parser.add_argument("--images", choices=("x0", "latents"), default="x0", help="of trajectories (%(default)s)")
    parser.add_argument(
        "--preview", help="for latents: file of training.fit_preview, sdxl, or folder or Hub id of a VAE, tiny or full"
    )
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cpu", help="without a launcher (%(default)s)")
    add_tracker_option(parser)
    options = parser.add_argument_group("recipe", "documented at TuneRecipe")
    for field in dataclasses.fields(TuneRecipe):
        kind = _numbers if field.name == "mixes" else type(field.default)
        options.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="(%(default)s)"
        )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        recipe = TuneRecipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TuneRecipe)})
        device, tracker = checked_device(args.device), chosen_tracker(args.tracker)
        pretrained = chosen_weights(args.model, args.pretrained)
        pairs = read_pairs(args.data, args.images)
        validation = None if args.validation is None else read_pairs(args.validation, args.images)
        embedder = build_embedder(args.model, pretrained, recipe.seed)
        towers = Towers(embedder, load_preview(args.preview, pairs.kind), recipe.precision).to(device)
        path = Tuning(towers, pairs, recipe, args.out, tracker, validation).run()
    except (MoeArtifactsError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())

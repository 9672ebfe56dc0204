"""What a check costs, in denoiser calls of the bundled pipeline."""

from __future__ import annotations

from benchmarks.ablation.designs import PreviewKind
from benchmarks.ablation.inputs import SHARES, Inputs
from benchmarks.ablation.pictures import build_preview
from benchmarks.ablation.towers import build
from moe_artifacts.accumulator import ExitHead
from moe_artifacts.calibration import Calibration
from moe_artifacts.config import ExitHeadConfig
from moe_artifacts.files import read_json, write_json
from moe_artifacts.latent_spaces import space_of_vae
from training.assembly import assemble
from training.clip import EMBED_DIM
from training.collect import LOG_SNR_RANGE
from training.heads import HeadRecipe, Heads, HeadSpace
from training.timing import check_cost


def check_price(inputs: Inputs, preview: PreviewKind) -> float:
    """Time of a check over that of a denoiser call, measured once for each preview.

    The weights do not matter: training changes nothing in what a scorer computes. Nor is it measured for each kind of head: what
    they differ by is less than what two measurements do.
    """
    path = inputs.folder / "prices" / f"{preview}.json"
    if not path.exists():
        heads = Heads(HeadRecipe(name=""), HeadSpace(embed_dim=EMBED_DIM, log_snr_range=LOG_SNR_RANGE))
        exit_head = ExitHead(ExitHeadConfig(state_dim=heads.margin.in_features))
        scorer = assemble(
            name="ablation",
            label="artifacts",
            latent_space=space_of_vae(inputs.pipe.vae, "ablation"),
            preview=build_preview(inputs, preview),
            embedder=build(),
            heads=heads,
            calibration=Calibration(LOG_SNR_RANGE),
            exit_head=exit_head,
            check_progress=SHARES,
        )
        write_json(path, {"check_cost": check_cost(inputs.pipe, scorer, repeats=inputs.scale.repeats)})
    return read_json(path)["check_cost"]

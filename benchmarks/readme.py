"""Fill the tables of the pages from ``benchmarks/results``: ``python -m benchmarks.readme``; ``--check`` only compares.

A table stands between ``<!-- name -->`` and ``<!-- /name -->``; nothing else of a page is touched.
"""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path

from benchmarks import reward_tables
from benchmarks.ablation import page as ablation_page
from benchmarks.results import RESULTS
from benchmarks.tables import Row, interval, markdown, percent, rows_of, three
from moe_artifacts.files import atomic_path, read_json

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = (
    ROOT / "README.md",
    DOCS / "rewards.md",
    DOCS / "ablation.md",
    DOCS / "ceiling.md",
    DOCS / "train-your-own.md",
    DOCS / "decisions" / "0010-the-judge.md",
)


def quality() -> str:
    """AUROC and calibration by share of the steps."""
    header = ["steps done", "AUROC within class", "pooled", "class alone", "ECE", "ECE of the base rate", "Brier"]
    rows = [
        [
            f"{row['share']:.0%}",
            interval(row, "auroc_within", three),
            three(row["auroc_pooled"]),
            three(row["auroc_prompt_only"]),
            three(row["ece"]),
            three(row["ece_base_rate"]),
            three(row["brier"]),
        ]
        for row in rows_of("fashion", table="quality")
    ]
    return markdown(header, rows)


def rules() -> str:
    """Decision rules with certified thresholds."""
    header = ["rule", "false aborts", "bad found", "steps saved", "bad among kept", "cost per clean image"]
    rows = [
        [
            row["rule"] + (" (default)" if row.get("default") else ""),
            percent(row["false_abort_rate"]),
            percent(row["recall"]),
            percent(row["steps_saved"]),
            f"{percent(row['bad_rate'])} to {percent(row['bad_left'])}",
            interval(row, "cost_per_clean", percent),
        ]
        for row in rows_of("fashion", table="rules", setting="deployed")
    ]
    ideal = rows_of("fashion", table="rules", rule="perfect")[0]
    knows = f"perfect knowledge after {ideal['first_check']} calls"
    rows.append([knows, "0 %", "100 %", percent(ideal["steps_saved"]), "", percent(ideal["cost_per_clean"])])
    return markdown(header, rows)


def mixture() -> str:
    """The mixture against its ablations, mean over seeds and shares."""
    rows = []
    for variant in ("soft", "hard", "single-head"):
        found = rows_of("fashion", table="mixture", variant=variant)
        values = [row["auroc_within"] for row in found]
        spread = f"{min(values):.4f} to {max(values):.4f}"
        rows.append([variant, f"{found[0]['parameters']:,}", f"{sum(values) / len(values):.4f}", spread])
    return markdown(["head", "parameters", "AUROC within class, mean of three seeds", "range over seeds"], rows)


def transfer() -> str:
    """Other schedulers and numbers of steps."""
    header = ["scheduler", "steps", "artifacts", "AUROC at half", "drop", "false aborts", "bad found"]
    rows = [
        [
            row["scheduler"],
            str(row["steps"]),
            percent(row["bad_rate"]),
            three(row["auroc_within"]),
            f"{row['auroc_drop']:+.3f}",
            interval(row, "false_abort_rate", percent),
            percent(row["recall"]),
        ]
        for row in rows_of("fashion_transfer")
    ]
    return markdown(header, rows)


def headroom() -> str:
    """Share of what perfect knowledge would save, by what is known after the first check and by the limit on false aborts."""
    rows = rows_of("headroom")
    limits = list(dict.fromkeys(row["max_false_aborts"] for row in rows))
    cells = {(row["knowledge"], row["max_false_aborts"]): row for row in rows}
    header = ["known", *(f"false aborts at most {limit:.0%}" for limit in limits)]
    names = dict.fromkeys(row["knowledge"] for row in rows)
    return markdown(
        header,
        [[name, *(interval(cells[name, limit], "share_of_perfect", whole) for limit in limits)] for name in names],
    )


def whole(value: float) -> str:
    """A fraction as a percentage without decimals."""
    return f"{value:.0%}"


def tuning() -> str:
    """AUROC within class on validation while CLIP was tuned for the classification, by the share of the steps done."""
    steps = (6, 11, 16, 24, 49)  # of 50, counted from 0
    rows = [
        [f"{row['step']:,}", *(three(row[f"auroc_{step}"]) for step in steps)]
        for row in rows_of("fashion_training", table="clip-finetune")
        if row["step"] % 1000 == 0
    ]
    return markdown(["tuned for", *(f"after {step + 1} of 50 steps" for step in steps)], rows)


def twins() -> str:
    """What the first half of a run decides, and what the scorer sees of it."""
    header = ["scheduler", "steps", "artifacts", "AUROC of the twins", "AUROC of the scorer"]
    rows = [
        [
            row["scheduler"],
            str(row["steps"]),
            percent(row["bad_rate"]),
            interval(row, "auroc_twins", three),
            interval(row, "auroc_within", three),
        ]
        for row in rows_of("twins")
    ]
    return markdown(header, rows)


def guidance() -> str:
    """Guidance scales without the guard, and the guard at the default."""
    header = ["guidance", "guard", "artifacts", "coverage of real images", "denoiser evaluations per clean image"]
    rows = [
        [
            f"{row['guidance_scale']:g}",
            "yes" if row["guard"] else "no",
            percent(row["bad_rate"]),
            percent(row["coverage"]),
            f"{row['calls_per_clean']:.1f}",
        ]
        for row in rows_of("guidance")
    ]
    return markdown(header, rows)


def judge_features() -> str:
    """What two judges trained apart agree on, by the features they measure distances in."""
    header = [
        "features",
        "bad",
        "kappa",
        "AUROC of a judge's margin for the other's verdicts",
        "noise called bad, worst class",
    ]
    rows = [
        [
            row["features"],
            f"{percent(row['bad_rate'])}, {percent(row['bad_rate_second'])}",
            three(row["kappa"]),
            three(row["auroc_within"]),
            percent(row["noise_bad"]),
        ]
        for row in rows_of("judge_features")
    ]
    return markdown(header, rows)


def savings() -> str:
    """Prices measured in one run for each batch size and processor that was tried."""
    rows = []
    names = ("savings_batch24", "savings", "savings_batch96")
    for name in (*names, *(f"{name}_epyc" for name in names)):
        processor = read_json(RESULTS / f"{name}.json")["hardware"].partition(",")[0]
        rows += [
            [
                str(row["batch"]),
                processor.replace("(R)", ""),
                f"{row['images']:,}",
                percent(row["scoring_share"]),
                percent(row["steps_saved"]),
                interval(row, "wall_clock_per_clean", percent),
            ]
            for row in rows_of(name)
        ]
    return markdown(
        ["batch", "processor", "images", "scoring, of denoising time", "steps saved", "wall clock per clean image"],
        rows,
    )


def overhead() -> str:
    """What watching costs on a U-Net of the size of Stable Diffusion 1.5, and what dropping saves there."""
    rows = [
        [row["what"], f"{1000 * row['seconds']:.0f} ms", f"{100 * row['of_denoiser_call']:.2f} %", spread(row)]
        for row in rows_of("overhead", table="cost")
    ]
    saving = rows_of("overhead", table="saving")[0]
    saved = f"{percent(saving['wall_clock_saved'])} of the time for {percent(saving['steps_saved'])} of the steps"
    rows.append([f"dropping, {saving['rows_run'].replace(' ', ' to ')} rows, scored at every step", "", saved, ""])
    return markdown(["", "time", "of a denoiser call", "lowest to highest"], rows)


def training_scale() -> str:
    """What the stages of training cost at each size: rate, memory, disk."""
    growth = {row["stage"]: row for row in rows_of("scale_training", table="growth")}
    rows = []
    for row in rows_of("scale_training", table="sizes"):
        found = growth.get(row["stage"], {})
        largest = found.get("rows") == row["rows"]
        rows.append(
            [
                row["stage"],
                f"{row['rows']:,}",
                f"{row['rows_per_s']:,.0f}",
                f"{row['peak_mb']:,.0f} MB" if "peak_mb" in row else "",
                f"{row['bytes_per_row']:,.0f}" if "bytes_per_row" in row else "",
                percent(row["share_of_backbone"]) if "share_of_backbone" in row else "",
                three(found["time_exponent"]) if largest else "",
                f"{found['memory_ratio']:.2f}" if largest else "",
            ]
        )
    header = ["stage", "rows", "rows a second", "peak memory", "bytes a row", "of the bare tower's rate"]
    return markdown([*header, "time grows as rows to the power", "memory against a tenth of the rows"], rows)


def spread(row: Row) -> str:
    """Lowest and highest share of the repeats."""
    return f"{100 * row['low']:.2f} % to {100 * row['high']:.2f} %"


TABLES = (
    {
        table.__name__: table
        for table in (
            quality,
            rules,
            headroom,
            tuning,
            mixture,
            transfer,
            twins,
            guidance,
            savings,
            overhead,
            judge_features,
            training_scale,
        )
    }
    | reward_tables.TABLES
    | ablation_page.TABLES
)


def filled(text: str) -> str:
    """The page with every marked table made anew."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text):
            text = pattern.sub(partial(_with, table()), text)
    return text


def _with(content: str, match: re.Match[str]) -> str:
    return f"{match[1]}{content}\n{match[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if args.check and filled(text) != text:
            raise SystemExit(f"{page.name} does not agree with benchmarks/results")
        if not args.check:
            with atomic_path(page) as temporary:
                temporary.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()

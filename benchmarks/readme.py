"""Fill the tables of README.md from ``benchmarks/results``: ``python -m benchmarks.readme``; ``--check`` only compares.

A table stands between ``<!-- name -->`` and ``<!-- /name -->``; nothing else of the page is touched.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_artifacts.files import atomic_path, read_json

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def _rows(name: str, **where: Any) -> list[Row]:
    rows = read_json(RESULTS / f"{name}.json")["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(row: Row, name: str, form: Callable[[float], str]) -> str:
    return f"{form(row[name])} ({form(row[name + '_low'])} to {form(row[name + '_high'])})"


def _three(value: float) -> str:
    return f"{value:.3f}"


def quality() -> str:
    """AUROC and calibration by share of the steps."""
    header = ["steps done", "AUROC within class", "pooled", "class alone", "ECE", "ECE of the base rate", "Brier"]
    rows = [
        [
            f"{row['share']:.0%}",
            _interval(row, "auroc_within", _three),
            _three(row["auroc_pooled"]),
            _three(row["auroc_prompt_only"]),
            _three(row["ece"]),
            _three(row["ece_base_rate"]),
            _three(row["brier"]),
        ]
        for row in _rows("fashion", table="quality")
    ]
    return _table(header, rows)


def rules() -> str:
    """Decision rules with certified thresholds."""
    header = ["rule", "false aborts", "bad found", "steps saved", "bad among kept", "cost per clean image"]
    rows = [
        [
            row["rule"] + (" (default)" if row.get("default") else ""),
            _percent(row["false_abort_rate"]),
            _percent(row["recall"]),
            _percent(row["steps_saved"]),
            f"{_percent(row['bad_rate'])} to {_percent(row['bad_left'])}",
            _interval(row, "cost_per_clean", _percent),
        ]
        for row in _rows("fashion", table="rules", setting="deployed")
    ]
    ideal = _rows("fashion", table="rules", rule="perfect")[0]
    knows = f"perfect knowledge after {ideal['first_check']} calls"
    rows.append([knows, "0 %", "100 %", _percent(ideal["steps_saved"]), "", _percent(ideal["cost_per_clean"])])
    return _table(header, rows)


def mixture() -> str:
    """The mixture against its ablations, mean over seeds and shares."""
    rows = []
    for variant in ("soft", "hard", "single-head"):
        found = _rows("fashion", table="mixture", variant=variant)
        values = [row["auroc_within"] for row in found]
        spread = f"{min(values):.4f} to {max(values):.4f}"
        rows.append([variant, f"{found[0]['parameters']:,}", f"{sum(values) / len(values):.4f}", spread])
    return _table(["head", "parameters", "AUROC within class, mean of three seeds", "range over seeds"], rows)


def transfer() -> str:
    """Other schedulers and numbers of steps."""
    header = ["scheduler", "steps", "artifacts", "AUROC at half", "drop", "false aborts", "bad found"]
    rows = [
        [
            row["scheduler"],
            str(row["steps"]),
            _percent(row["bad_rate"]),
            _three(row["auroc_within"]),
            f"{row['auroc_drop']:+.3f}",
            _interval(row, "false_abort_rate", _percent),
            _percent(row["recall"]),
        ]
        for row in _rows("fashion_transfer")
    ]
    return _table(header, rows)


def guidance() -> str:
    """Guidance scales without the guard, and the guard at the default."""
    header = ["guidance", "guard", "artifacts", "coverage of real images", "denoiser evaluations per clean image"]
    rows = [
        [
            f"{row['guidance_scale']:g}",
            "yes" if row["guard"] else "no",
            _percent(row["bad_rate"]),
            _percent(row["coverage"]),
            f"{row['calls_per_clean']:.1f}",
        ]
        for row in _rows("guidance")
    ]
    return _table(header, rows)


def savings() -> str:
    """Prices measured in one run for each batch size that was tried."""
    rows = [row for name in ("savings_batch24", "savings", "savings_batch96") for row in _rows(name)]
    return _table(
        ["batch", "scoring, of denoising time", "steps saved", "wall clock per clean image"],
        [
            [
                str(row["batch"]),
                _percent(row["scoring_share"]),
                _percent(row["steps_saved"]),
                _interval(row, "wall_clock_per_clean", _percent),
            ]
            for row in rows
        ],
    )


TABLES = {table.__name__: table for table in (quality, rules, mixture, transfer, guidance, savings)}


def filled(text: str) -> str:
    """The page with every marked table made anew."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text):
            content = table()
            text = pattern.sub(lambda match, content=content: match[1] + content + "\n" + match[2], text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    if args.check:
        raise SystemExit(0 if filled(text) == text else "README.md does not agree with benchmarks/results")
    with atomic_path(README) as temporary:
        temporary.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()

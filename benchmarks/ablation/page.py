"""The tables of docs/ablation.md."""

from __future__ import annotations

from benchmarks.results import RESULTS
from benchmarks.tables import Row, interval, markdown, percent, rows_of, three

NOT_YET = "Not measured yet: `python -m benchmarks.ablation`."


def ablation() -> str:
    """Every variant, mean over the seeds."""
    header = [
        "wish",
        "variant",
        "samples",
        "labelled images",
        "of them seen by the backbone",
        "AUROC at 14 %",
        "34 %",
        "100 %",
        "cost per clean image",
        "deployed",
        "a check, in calls",
        "CPU seconds to train",
    ]
    rows = [
        [
            row["wish"],
            row["variant"],
            *(f"{row[name]:,.0f}" for name in ("samples", "labels", "backbone_labels")),
            *(interval(row, f"auroc_within_{share}", three) for share in ("14%", "34%", "100%")),
            interval(row, "cost_per_clean_matched", percent),
            percent(row["cost_per_clean_deployed"]),
            f"{row['check_cost']:.3f}",
            f"{row['train_seconds']:.0f}",
        ]
        for row in _rows()
    ]
    return markdown(header, rows) if rows else NOT_YET


def wishes() -> str:
    """Each variant against the one without the wish."""
    header = ["wish", "variant", "against", "AUROC", "cost per clean image", "helps"]
    rows = [
        [
            row["wish"],
            row["variant"],
            row["against"],
            interval(row, "minus_auroc_within", _signed),
            interval(row, "minus_cost_per_clean_matched", _points),
            row["helps"],
        ]
        for row in _rows()
        if row.get("helps")
    ]
    return markdown(header, rows) if rows else NOT_YET


def _rows() -> list[Row]:
    return rows_of("ablation", table="variants") if (RESULTS / "ablation.json").exists() else []


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


TABLES = {table.__name__: table for table in (ablation, wishes)}

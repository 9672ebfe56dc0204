"""Tables of docs/rewards.md and the README from the benchmarks on published FLUX and SDXL scores."""

from __future__ import annotations

from benchmarks.tables import Row, markdown, percent, rows_of

NAMES = {"imr": "ImageReward", "pic": "PickScore", "hps": "HPSv2", "flux": "FLUX", "sdxl": "SDXL"}
RULES = ("single", "posterior", "patience", "q-exit", "cumulative", "cumulative-palbert", "economic")


def _pair(row: Row) -> str:
    return f"{NAMES[row['model']]} {NAMES[row['reward']]}"


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return percent(low) if percent(low) == percent(high) else f"{percent(low)} to {percent(high)}"


def policy() -> str:
    """Cost per clean image of each rule at the same false-abort rate, per pair and label."""
    cases: dict[tuple[str, str, float], dict[str, Row]] = {}
    for row in rows_of("policy", setting="matched"):
        cases.setdefault((_pair(row), row["label"], row["worst"]), {})[row["rule"]] = row
    header = ["scores", "bad", *RULES, "economic minus single", "perfect"]
    lines = []
    for (pair, label, worst), rules in cases.items():
        ours = rules["economic"]
        gain = f"{percent(ours['minus_single'])} ({percent(ours['single_low'])} to {percent(ours['single_high'])})"
        costs = [percent(rules[name]["cost_per_clean"]) for name in RULES]
        lines.append([pair, f"worst {worst:.0%}, {label}", *costs, gain, percent(ours["perfect_cost_per_clean"])])
    return markdown(header, lines)


def policy_means() -> str:
    """Every rule, averaged over pairs and labels."""
    lines = []
    settings = {name: rows_of("policy", setting=name) for name in ("matched", "deployed")}
    for rule in dict.fromkeys(row["rule"] for row in settings["matched"]):
        cells = [rule]
        for rows in settings.values():
            found = [row for row in rows if row["rule"] == rule]
            cells += [
                percent(sum(row[column] for row in found) / len(found))
                for column in ("false_abort_rate", "recall", "steps_saved", "cost_per_clean")
            ]
        lines.append(cells)
    columns = ("false aborts", "bad found", "steps saved", "cost per clean image")
    return markdown(["rule", *(f"{c}, {s}" for s in settings for c in columns)], lines)


def certification() -> str:
    """How often each promise was certified, reached and broken, over pairs of model and reward."""
    header = [
        "promise",
        "prompts",
        "certified",
        "rate reached, median",
        "broken",
        "allowed",
        "broken, images as the unit",
    ]
    groups: dict[tuple[str, float, float, int], dict[str, list[Row]]] = {}
    for row in rows_of("certification", table="real"):
        key = (row["risk"], row["max_risk"], row["confidence"], row["prompts"])
        groups.setdefault(key, {}).setdefault(row["unit"], []).append(row)
    lines = []
    for (risk, max_risk, confidence, prompts), units in groups.items():
        by_prompt, by_image = units["prompt"], units["image"]
        lines.append(
            [
                f"{risk}, {max_risk:.0%} at {confidence:.0%}",
                str(prompts),
                _range([row["certified"] for row in by_prompt]),
                _range([row["rate_median"] for row in by_prompt if row["rate_median"] is not None]),
                _range([row["violations"] for row in by_prompt]),
                percent(by_prompt[0]["violations_limit"]),
                _range([row["violations"] for row in by_image]),
            ]
        )
    return markdown(header, lines)


def best_of_n() -> str:
    """Reward of the image that is found, minus that of TTSnap's schedule, by budget."""
    rows = rows_of("best_of_n", method="ours")
    budgets = sorted({row["budget"] for row in rows})
    pairs: dict[str, dict[int, Row]] = {}
    for row in rows:
        pairs.setdefault(_pair(row), {})[row["budget"]] = row

    def cell(row: Row) -> str:
        return f"{row['minus_ttsnap']:+.2g} ({row['low']:+.2g} to {row['high']:+.2g})"

    lines = [[pair, *(cell(cells[budget]) for budget in budgets)] for pair, cells in pairs.items()]
    return markdown(["scores", *(f"{budget} TFLOPs" for budget in budgets)], lines)


def siblings() -> str:
    """What looking at the siblings of the same prompt changes, bad being relative to the prompt."""
    pairs: dict[str, dict[int, Row]] = {}
    for row in rows_of("siblings", label="within", setting="matched"):
        pairs.setdefault(_pair(row), {})[row["batch"]] = row
    lines = []
    for pair, by_batch in pairs.items():
        cells = [percent(by_batch[1]["cost_per_clean"])]
        for batch in (2, 4, 8):
            row = by_batch[batch]
            change = percent(row["cost_per_clean_minus_alone"])
            ends = f"{percent(row['cost_per_clean_low'])} to {percent(row['cost_per_clean_high'])}"
            cells.append(f"{change} ({ends})")
        lines.append([pair, *cells])
    return markdown(["scores", "alone", "change at batch 2", "at batch 4", "at batch 8"], lines)


def scale() -> str:
    """Time and memory of certification and of the economic boundary."""
    lines = [
        [
            row["stage"],
            f"{row['images']:,} x {row['steps']}",
            f"{row['seconds']:.2f}",
            f"{row['peak_mb']:.0f}",
            f"{row['time_exponent']:.2f}" if "time_exponent" in row else "",
        ]
        for row in rows_of("scale_policy")
    ]
    return markdown(["stage", "images x steps", "seconds", "memory, MB", "growth exponent of time"], lines)


TABLES = {table.__name__: table for table in (policy, policy_means, certification, best_of_n, siblings, scale)}

"""docs/audit.md: its commands run, and its table is what the function works out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from moe_artifacts.audit import Tally, false_abort_rate, miss_rate, plan_audit, wrong_abort_share
from moe_artifacts.guard.run_folder import read_run
from tests.commands import run, tiny_bundle, use_bundle

DOC = Path(__file__).parents[1] / "docs" / "audit.md"
TRUE_RATES = (0.02, 0.08, 0.1, 0.15, 0.2)
AUDIT_RATES = (0.02, 0.05, 0.1, 0.5)


def plans(true_rate):
    values = {"max_risk": 0.05, "true_rate": true_rate, "clean_share": 0.75, "recall": 0.6}
    return [plan_audit(audit_rate=audit_rate, **values) for audit_rate in AUDIT_RATES]


def test_the_table_is_what_it_takes():
    rows = []
    for true_rate in TRUE_RATES:
        found = plans(true_rate)
        at_low_rates = found[0]  # the number of audits hardly depends on their rate
        most = "at most" if true_rate < 0.05 else "at least"
        cells = [f"{100 * true_rate:g} %", at_low_rates.audits, f"{most} {at_low_rates.wrong}"]
        rows.append(f"| {' | '.join(map(str, cells))} | {' | '.join(f'{plan.images:,}' for plan in found)} |")
        assert all(abs(plan.audits - at_low_rates.audits) <= 0.1 * at_low_rates.audits for plan in found)
    text = DOC.read_text(encoding="utf-8")
    assert "\n".join(rows) in text


def test_what_it_shows_is_what_these_numbers_give():
    found = Tally(
        audit_rate=0.1,
        aborts=580,
        audited=58,
        audited_labelled=58,
        audited_clean=16,
        kept=1882,
        kept_labelled=1882,
        kept_clean=1673,
    )
    text = DOC.read_text(encoding="utf-8")
    for measure in (false_abort_rate, wrong_abort_share, miss_rate):
        rate = measure([found], 0.95)
        assert f"{100 * rate.value:.1f} % ({100 * rate.low:.1f} % to {100 * rate.high:.1f} %)" in text
    assert f"at least {100 * false_abort_rate([found], 0.95).low:.1f} %, at most 5 % promised" in text


def test_its_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_bundle(monkeypatch, tiny_bundle(tmp_path))
    Path("prompts.txt").write_text("a bag\na coat\n")
    (block,) = re.findall(r"```sh\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "moe-artifacts"
        done = run(*arguments)
        assert done.exit_code == 0, done.output
        audited = [attempt.file for attempt in read_run("run").attempts if attempt.audited]
        Path("labels.csv").write_text("\n".join(["file,artifact", *(f"{file},0" for file in audited)]) + "\n")
    assert f"{len(audited)} of {len(audited)} audited images" in done.stdout

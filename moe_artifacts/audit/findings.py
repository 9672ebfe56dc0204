"""What an audit found, beside what the threshold promises."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_artifacts.audit.counts import Labels, counted, read_runs, tallies
from moe_artifacts.audit.labels import judge_labels, read_labels
from moe_artifacts.audit.rates import Measure, Rate, Tally, false_abort_rate, miss_rate, more_audits, wrong_abort_share
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.errors import InputError
from moe_artifacts.guard.output import promise, setting_differences
from moe_artifacts.guard.run_folder import RunRecord

Reading = Literal["kept", "broken", "not enough audits", "nothing to compare with"]

CONFIDENCE = 0.95  # where the threshold has none of its own
# By the words under which the risk is stored with a threshold (calibrated.RISK_WORDS).
MEASURES: dict[str, tuple[str, Measure]] = {
    "false_abort_rate": ("clean images aborted", false_abort_rate),
    "wrong aborts among the aborts": ("clean ones among the aborted", wrong_abort_share),
    "missed bad images": ("bad images not aborted", miss_rate),
}


@dataclass(frozen=True)
class Audit:
    """What runs of one threshold say about its promise."""

    runs: list[RunRecord]
    labels: Labels
    confidence: float  # of every interval
    first: list[Tally]  # of as many attempts of each prompt as images were asked for: what a promise speaks of
    all: list[Tally]

    @property
    def rule(self) -> ThresholdConfig:
        return self.runs[0].rule

    @property
    def promised(self) -> Rate | None:
        """The rate that is promised, as measured; None: nothing is promised, or something an audit does not measure."""
        if self.rule.max_risk is None or self.rule.risk not in MEASURES:
            return None
        return MEASURES[self.rule.risk][1](self.first, self.confidence)

    @property
    def reading(self) -> Reading:
        """Whether the promise is kept; "kept" and "broken" only where all of the interval is on that side."""
        rate, max_risk = self.promised, self.rule.max_risk
        if rate is None or max_risk is None or self.uncertified:
            return "nothing to compare with"
        if rate.low > max_risk:
            return "broken"
        return "kept" if rate.high <= max_risk else "not enough audits"

    @property
    def uncertified(self) -> dict[str, list[str]]:
        """Folders of runs that were not sampled as the promise says, and what is different there."""
        found: dict[str, list[str]] = {}
        for run in self.runs:
            told = dict.fromkeys(text for wave in run.waves for text in setting_differences(run.rule, wave.setting))
            if told:
                found[str(run.folder)] = list(told)
        return found

    @property
    def missing_audits(self) -> int | None:
        """How many more would do, if it goes on as it did; None: no number can be named."""
        if self.reading != "not enough audits" or self.rule.max_risk is None:
            return None
        return more_audits(self.first, self.confidence, self.rule.max_risk, MEASURES[self.rule.risk][1])

    def text(self) -> str:
        """All of it, as the command prints it."""
        return "\n".join([*self._data(), "", *self._table(), "", f"{'verdict':15}{self._verdict()}", *self._notes()])

    def summary(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {
            "runs": [str(run.folder) for run in self.runs],
            "labels": self.labels.source,
            "rule": dataclasses.asdict(self.rule),
            "confidence": self.confidence,
            "reading": self.reading,
            "uncertified": self.uncertified,
            "missing_audits": self.missing_audits,
            **{
                name: {
                    "tallies": [dataclasses.asdict(tally) for tally in found],
                    "rates": {risk: dataclasses.asdict(rate) for risk, rate in self._rates(found).items()},
                }
                for name, found in (("first_attempts", self.first), ("all_attempts", self.all))
            },
        }

    def _rates(self, found: Sequence[Tally]) -> dict[str, Rate]:
        return {risk: measure(found, self.confidence) for risk, (_, measure) in MEASURES.items()}

    def _data(self) -> list[str]:
        found = _sum(self.all)
        errors = sum(
            attempt.status == "error" and not attempt.audited
            for run in self.runs
            for attempt in counted(run, self.labels, first_only=False)
        )
        parts = [
            f"{found['kept']:,} kept",
            f"{found['aborts']:,} aborted, {found['audited']:,} of them finished for the audit",
            *([f"{found['rejected']:,} rejected at the last step"] if found["rejected"] else []),
            *([f"{errors:,} with non-finite latents or scores"] if errors else []),
        ]
        labels = (
            f"{found['audited_labelled']:,} of {found['audited']:,} audited images and {found['kept_labelled']:,} of "
            f"{found['kept']:,} kept ones, from {self.labels.source}"
        )
        promises = dict.fromkeys(promise(run.rule, wave.setting) for run in self.runs for wave in run.waves)
        return [
            f"{'runs':15}{', '.join(str(run.folder) for run in self.runs)}",
            f"{'images':15}{found['kept'] + found['aborts'] + found['rejected'] + errors:,}: {'; '.join(parts)}",
            f"{'labels':15}{'none' if self.labels.source is None else labels}",
            *(f"{'promise':15}{text}" for text in promises),
        ]

    def _table(self) -> list[str]:
        columns = {"first attempts": self._rates(self.first)}
        if self.all != self.first:
            columns["all attempts"] = self._rates(self.all)
        head = "".join(f"{name:28}" for name in columns)
        lines = [f"{f'intervals {100 * self.confidence:g} % sure':34}{head}".rstrip()]
        for risk, (title, _) in MEASURES.items():
            cells = "".join(f"{_words(rates[risk]):28}" for rates in columns.values())
            lines.append(f"  {title:32}{cells}".rstrip())
        return lines

    def _verdict(self) -> str:
        rate, rule = self.promised, self.rule
        if rule.max_risk is None:
            return f"{self.reading}: the threshold does not come from a calibration, so it promises nothing"
        if rate is None:
            return f"{self.reading}: the promise is about {rule.risk}, which an audit of single images does not measure"
        if self.uncertified:
            told = "; ".join(f"{folder} has {', '.join(texts)}" for folder, texts in self.uncertified.items())
            advice = "; audit the other runs without it" if len(self.uncertified) < len(self.runs) else ""
            return f"{self.reading}: the threshold is certified for another setting: {told}{advice}"
        title = MEASURES[rule.risk][0]
        promised = f"at most {100 * rule.max_risk:g} % promised"
        if self.reading == "kept":
            return f"kept: {title} at most {_percent(rate.high)}, {promised}"
        if self.reading == "broken":
            return f"BROKEN: {title} at least {_percent(rate.low)}, {promised}"
        return f"{self.reading}: {title} {_words(rate)}, {promised}; {self._what_would_do()}"

    def _what_would_do(self) -> str:
        found = _sum(self.first)
        if not found["audited_labelled"]:
            event = "audited" if found["aborts"] else "aborted"
            return "label the audited images" if found["audited"] else f"no image was {event} yet"
        if self.missing_audits is not None:
            return f"if it goes on like this, about {self.missing_audits:,} more audited images would do"
        if not found["kept_labelled"] and self.rule.risk != "wrong aborts among the aborts":
            return "label the kept images, or a random sample of them"
        return "the rate is too close to what is promised to be told apart from it"

    def _notes(self) -> list[str]:
        found, notes = _sum(self.all), []
        if self.labels.left_out:
            count = sum(attempt.prompt in self.labels.left_out for run in self.runs for attempt in run.attempts)
            notes.append(f"{count:,} images were left out: {self.labels.source} has no class for their prompts")
        if 0 < found["audited_labelled"] < found["audited"]:
            notes.append("audited images without a label are taken to be like those with one")
        if 0 < found["kept_labelled"] < found["kept"]:
            notes.append("kept images with a label are taken for a random sample of all")
        if found["kept"] and not found["kept_labelled"]:
            notes.append("no kept image has a label: all of them may be clean, so their rates have one end only")
        return [f"{'note':15}{note}" for note in notes]


def audit(
    folders: Sequence[str | os.PathLike[str]],
    *,
    labels: str | os.PathLike[str] | None = None,
    judge: str | None = None,
    confidence: float | None = None,
) -> Audit:
    """Compare runs of one threshold, made with an ``audit_rate``, with what the threshold promises.

    Args:
        folders: Of runs, as ``generate_clean`` writes them.
        labels: Table that says which images have artifacts (``labels.read_labels``): the audited ones, and the kept ones
            or a random sample of them.
        judge: A bundled judge that says so instead.
        confidence: Of the intervals, in (0, 1). None: that of the promise.
    Raises:
        InputError: For runs or labels that cannot be used.
        CheckpointError: If there is no such judge.
    """
    if labels is not None and judge is not None:
        raise InputError("labels and judge both say which images have artifacts: give one of them")
    runs = read_runs(folders)
    if labels is not None:
        known = read_labels(labels, runs)
    elif judge is not None:
        known = judge_labels(judge, runs)
    else:
        known = Labels(source=None, artifact={})
    if confidence is None:
        confidence = runs[0].rule.confidence or CONFIDENCE
    first, every = (tallies(runs, known, first_only=only) for only in (True, False))
    return Audit(runs, known, confidence, first, every)


def _sum(found: Sequence[Tally]) -> Counter[str]:
    """Counts of all audit rates together."""
    total: Counter[str] = Counter()
    for tally in found:
        total.update({name: value for name, value in dataclasses.asdict(tally).items() if name != "audit_rate"})
    return total


def _words(rate: Rate) -> str:
    if (rate.low, rate.high) == (0, 1):
        return "unknown"
    if rate.value is None:
        return f"at least {_percent(rate.low)}" if rate.high == 1 else f"at most {_percent(rate.high)}"
    return f"{_percent(rate.value)} ({_percent(rate.low)} to {_percent(rate.high)})"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"

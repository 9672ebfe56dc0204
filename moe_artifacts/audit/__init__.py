"""How often the guard stops good images in production: a seeded share of its would-be aborts is finished and looked at.

counts.py     runs and the labels of their images -> how many of each kind there are
labels.py     labels from a file, or from a judge
rates.py      what those numbers say about a rate, with exact intervals
planning.py   how many audits it takes
findings.py   all of it beside the promise of the threshold, and how it reads

docs/audit.md says what an audit costs and buys.
"""

from moe_artifacts.audit.findings import Audit, audit
from moe_artifacts.audit.planning import AuditPlan, plan_audit
from moe_artifacts.audit.rates import Rate, Tally, false_abort_rate, miss_rate, wrong_abort_share

__all__ = [
    "Audit",
    "AuditPlan",
    "Rate",
    "Tally",
    "audit",
    "false_abort_rate",
    "miss_rate",
    "plan_audit",
    "wrong_abort_share",
]

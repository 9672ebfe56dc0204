"""The command ``moe-artifacts``: one file per command, which does little more than name what is to be done.

Whatever is heavy is imported by the command that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os

import typer

from moe_artifacts.cli import audit, calibrate, demo, generate, inspect, label, score

# OpenMP reads it when torch is imported. Threads that spin while they wait make torch up to a hundred times slower on a
# machine that does something else too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Watch a diffusion run step by step and stop an image once it is going wrong.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    demo.demo,
    generate.generate,
    label.label,
    audit.audit,
    score.score,
    calibrate.calibrate,
    inspect.inspect,
):
    app.command()(command)

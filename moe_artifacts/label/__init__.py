"""Verdicts of people on finished images, made with keys in a terminal.

images.py      which images of a folder are to be looked at, in an order that tells nothing
table.py       the table of one rater: read, and written again after every key
agreement.py   how well two raters agree
session.py     keys to verdicts, with undo
terminal.py    the terminal: one key at a time, and the picture in it or in a viewer
pictures.py    pictures as the terminals take them: kitty, iTerm2, sixel, blocks of colour

docs/labelling.md shows how it is used.
"""

from moe_artifacts.label.agreement import Agreement, agreement, rater_tables
from moe_artifacts.label.images import LabelImage, find_images
from moe_artifacts.label.session import Outcome, label_images
from moe_artifacts.label.table import Table, read_verdicts, table_path
from moe_artifacts.label.terminal import Terminal

__all__ = [
    "Agreement",
    "LabelImage",
    "Outcome",
    "Table",
    "Terminal",
    "agreement",
    "find_images",
    "label_images",
    "rater_tables",
    "read_verdicts",
    "table_path",
]

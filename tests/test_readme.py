"""The README says what the results say, and its first block runs."""

from __future__ import annotations

import re

from benchmarks.readme import README, TABLES, filled


def test_tables_are_those_of_the_result_files():
    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- (\w+) -->", text)) == set(TABLES)
    assert filled(text) == text


def test_the_first_block_runs(capsys):
    block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block[1], "README.md", "exec"), {})
    assert re.match(r"8 images: \d kept", capsys.readouterr().out)

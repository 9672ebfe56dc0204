"""The pages say what the results say, and the first block of the README runs."""

from __future__ import annotations

import re

from benchmarks.readme import PAGES, TABLES, filled


def test_tables_are_those_of_the_result_files():
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert set(re.findall(r"<!-- (\w+) -->", "".join(texts))) == set(TABLES)
    assert [filled(text) for text in texts] == texts


def test_the_first_block_runs(capsys):
    block = re.search(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block[1], "README.md", "exec"), {})
    assert re.match(r"8 images: \d kept", capsys.readouterr().out)

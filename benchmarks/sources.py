"""Which program made a benchmark's figures: a hash of each file behind them, so that none is reused after it has changed."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("benchmarks", "moe_artifacts", "training")


def source_hashes(start: str) -> dict[str, str]:
    """SHA-256 of a file and of each of ours that it imports, there or further down; by path from the checkout's root.

    Comments, docstrings and layout do not count: they change no figure.

    Args:
        start: The path of the first one, from the root.
    """
    found: dict[Path, str] = {}
    left = [ROOT / start]
    while left:
        path = left.pop()
        if path not in found:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            left += imported(tree)
            found[path] = code_sha256(tree)
    return {str(path.relative_to(ROOT)): found[path] for path in sorted(found)}


def code_sha256(tree: ast.Module) -> str:
    """SHA-256 of what a file does.

    Example:
        >>> one = ast.parse("def f(x):\\n    return x + 1")
        >>> other = ast.parse("def f(x):\\n    'Adds one.'\\n    return x + 1  # or more")
        >>> code_sha256(one) == code_sha256(other)
        True
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def imported(tree: ast.Module) -> Iterator[Path]:
    """Files of ours that a file names in its imports, wherever they stand. The packages around them are left out."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:  # a module, or a name in one
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = ROOT.joinpath(*name.split("."))
            if name.partition(".")[0] in PACKAGES:
                yield from (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.exists())

"""``python -m benchmarks.<name>``: each prints one table and writes ``benchmarks/results/<name>.json``."""

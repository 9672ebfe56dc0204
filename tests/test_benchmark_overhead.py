"""The benchmark of the guard's cost, at a size where it takes a second: its arithmetic, and that it times what it says."""

from __future__ import annotations

import json
import time

import pytest

from benchmarks import overhead
from benchmarks.overhead import ROWS_RUN, SIZES, Run, build_pipeline, call_rows, cost_row, run, saving_row, timed


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("overhead") / "overhead.json"
    overhead.main(["--size", "tiny", "--repeats", "2", "--out", str(path)])
    return json.loads(path.read_text())["rows"]


def test_every_measurement_has_its_row(rows):
    assert [row["table"] for row in rows] == ["cost"] * 4 + ["saving"] + ["calls"] * 3
    assert all((row["size"], row["device"], row["dtype"]) == ("tiny", "cpu", "float32") for row in rows)
    costs = {row["what"]: row for row in rows if row["table"] == "cost"}
    assert [row["goal"] for row in costs.values()] == [0.01, 0.02, None, 0.02]
    scored = ("linear preview", "TAESD", "linear preview, bfloat16")
    assert list(costs) == ["tap and bookkeeping", *(f"scoring, {how}, custom" for how in scored)]
    for row in costs.values():
        assert row["low"] <= row["of_denoiser_call"] <= row["high"]
    (saving,) = (row for row in rows if row["table"] == "saving")
    assert saving["rows_run"] == "4 2 1"
    assert saving["steps_saved"] == pytest.approx(5 / 12)
    assert [row["batch"] for row in rows if row["table"] == "calls"] == [1, 2, 4]


def test_the_costs_of_a_run_by_hand():
    # Two repeats: 2 % and 4 % of calls of one second and of half a second.
    row = cost_row("scoring", [0.02, 0.02], [1.0, 0.5], 0.02)
    assert (row["seconds"], row["low"], row["high"]) == (0.02, 0.02, 0.04)
    assert (row["of_denoiser_call"], row["met"]) == (pytest.approx(0.03), False)
    assert cost_row("scoring", [0.02], [1.0], 0.02)["met"]
    assert cost_row("scoring", [0.02], [1.0], None)["met"] is None


def test_the_saving_of_a_run_by_hand():
    # Five of twelve row-steps saved: 5 s of 12. The second repeat takes 2 s of 24 longer; 1.2 s and 2.4 s are scoring.
    full, dropped = [Run(12.0, 0.0), Run(24.0, 0.0)], [Run(7.0, 1.2), Run(16.0, 2.4)]
    row = saving_row(full[:1], dropped[:1])
    assert (row["wall_clock_saved"], row["unscored"]) == (pytest.approx(5 / 12), pytest.approx(6.2 / 12))
    assert (row["of_steps_saved"], row["met"]) == (pytest.approx(1), True)
    row = saving_row(full, dropped)
    assert (row["low"], row["high"]) == (pytest.approx(4 / 12), pytest.approx(5 / 12))
    assert (row["of_steps_saved"], row["met"]) == (pytest.approx(0.9), False)


def test_calls_are_compared_per_row():
    rows = call_rows([Run(0, 0, [(4, 8.0), (2, 6.0)]), Run(0, 0, [(4, 8.0), (1, 5.0)])])
    assert [(row["batch"], row["seconds_per_row"], row["of_largest_batch"]) for row in rows] == [
        (1, 5.0, 2.5),
        (2, 3.0, 1.5),
        (4, 2.0, 1.0),
    ]


def test_what_is_not_the_denoiser_is_told_apart_from_it(monkeypatch):
    """A denoiser that takes 20 ms longer, and a scheduler that takes 50 ms longer, show where they belong."""
    pipe = build_pipeline(SIZES["tiny"], "cpu", overhead.torch.float32)
    run(pipe, 2, 2)
    forward, step = pipe.unet.forward, pipe.scheduler.step

    def slowed(method, seconds):
        def slow(*args, **kwargs):
            time.sleep(seconds)
            return method(*args, **kwargs)

        return slow

    monkeypatch.setattr(pipe.unet, "forward", slowed(forward, 0.02))
    monkeypatch.setattr(pipe.scheduler, "step", slowed(step, 0.05))
    found = run(pipe, 2, 2)
    assert [rows for rows, _ in found.calls] == [2, 2]
    assert found.denoiser >= 0.04  # a sleep is never shorter
    assert found.elsewhere >= 0.1
    assert found.total >= found.denoiser + found.elsewhere


def test_a_timed_method_is_put_back():
    class Thing:
        def method(self):
            return 1

    thing, seen = Thing(), []
    for owner in (thing, Thing):
        before = dict(vars(owner))
        with pytest.raises(RuntimeError), timed(owner, "method", lambda args, s: seen.append(s), lambda: None):
            assert thing.method() == 1
            raise RuntimeError
        assert dict(vars(owner)) == before
    assert len(seen) == 2


def test_the_batch_of_the_saving_table_shrinks_at_every_step():
    assert list(ROWS_RUN) == sorted(set(ROWS_RUN), reverse=True)

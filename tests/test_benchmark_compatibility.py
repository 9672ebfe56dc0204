"""The compatibility table: how the batch shrinks in it, what is counted, and the page made of it."""

from __future__ import annotations

import pytest

from benchmarks import compatibility, compatibility_page
from moe_artifacts.guard.pipelines import REFUSED, SPECS
from moe_artifacts.noise import REFUSED_SCHEDULERS


@pytest.mark.parametrize("images", [2, 3, 4, 8])
@pytest.mark.parametrize("steps", [2, 4, 12])
def test_the_batch_shrinks_to_half_to_one_and_to_none(images, steps):
    found = compatibility.leavings(images, steps)
    assert [images - len(leaving) for leaving in found.values()] == [(images + 1) // 2, 1, 0]
    for leaving in found.values():
        assert all(0 <= step <= max(steps - 2, 0) for step in leaving.values())  # some step is left to be saved
    if images > 2 and steps > 3:
        assert len(set(found["to one"].values())) == 2  # one first, then the others at once


def row(**changes):
    return {
        "pipeline": "flux",
        "class": "FluxPipeline",
        "scheduler": "flow-euler",
        "guidance": "none",
        "images_per_prompt": 1,
        "record": "equal",
        "drop": "equal",
        "max_abs_difference": 5e-7,
        "why": "",
    } | changes


ROWS = [
    row(),
    row(guidance="true-cfg", max_abs_difference=2e-6),
    row(scheduler="flow-dpm", drop="different", why="to one: kept [2]"),
    row(pipeline="sd", **{"class": "StableDiffusionPipeline"}, scheduler="ddim"),
    row(pipeline="mine", **{"class": "MinePipeline"}, record="refused", drop="refused", why="it is not known"),
]


def test_the_totals_count_every_combination():
    told = compatibility_page.totals(ROWS)
    assert told.startswith("5 combinations of a pipeline (3), a scheduler (3) and a way of guiding")
    assert "record: 4 equal, 1 refused; drop: 3 equal, 1 refused, 1 different" in told
    assert told.endswith("Largest difference 2.0e-06.")


def test_the_page_says_what_works_and_what_is_missing_for_the_rest():
    text = compatibility_page.text_of(ROWS)
    lines = text.splitlines()
    assert "| flux | FluxPipeline | flow (2) | none, true-cfg | equal | equal and different | 2.0e-06 |" in lines
    assert not any(line.startswith("| mine |") for line in lines)
    assert "| MinePipeline | flow-euler | it is not known |" in lines
    for name, why in (REFUSED | REFUSED_SCHEDULERS).items():
        assert any(name in line and why in line for line in lines)
    for spec in SPECS.values():
        for argument, why in spec.refused_arguments.items():
            assert any(f"`{argument}`" in line and why in line for line in lines)


def test_a_call_that_diffusers_itself_refuses_is_no_row():
    cases = compatibility.family_cases()
    pipe = cases["qwen-image"].pipe()
    pipe.scheduler = cases["sd3"].schedulers["flow-heun"]()  # takes no sigmas
    with pytest.raises(compatibility.NotRun, match="does not support custom"):
        compatibility.compare_runs(pipe, lambda: cases["qwen-image"].call(2, "none"))

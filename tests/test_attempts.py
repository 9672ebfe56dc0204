"""Which attempts come next, against outcomes drawn at random; and their seeds."""

from __future__ import annotations

import random
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
from test_run_folder import PROMPTS, attempt

from moe_artifacts.guard.attempts import AttemptQueue
from moe_artifacts.seeds import attempt_seed

PER_PROMPT = st.integers(1, 3)
MAX_ATTEMPTS = st.integers(1, 4)
BATCH_SIZE = st.integers(1, 7)


def run(per_prompt, max_attempts, batch_size, outcomes, waves=10**6, queue=None):
    """The waves of one run, as lists of (place, kept); ``outcomes`` says what becomes of each place."""
    queue = queue or AttemptQueue(PROMPTS, per_prompt, max_attempts, seed=0)
    made = []
    while len(made) < waves and (places := queue.next(batch_size)):
        queue.settle(attempt(*place, "kept" if outcomes(place) else "aborted") for place in places)
        made.append([(place, outcomes(place)) for place in places])
    return made, queue


def attempts(waves):
    return [made for wave in waves for made in wave]


def drawn(seed, share):
    return lambda place: random.Random(f"{seed} {place}").random() < share


@given(PER_PROMPT, MAX_ATTEMPTS, BATCH_SIZE, st.integers(0, 99), st.floats(0, 1))
def test_every_image_wanted_is_kept_once_or_has_used_up_its_attempts(per_prompt, most, batch_size, seed, share):
    waves, queue = run(per_prompt, most, batch_size, drawn(seed, share))
    tried = dict(attempts(waves))
    assert len(tried) == len(attempts(waves)), "an attempt was made twice"
    lacking = dict.fromkeys(range(len(PROMPTS)), 0)
    for index in range(len(PROMPTS)):
        for image in range(per_prompt):
            numbers = [n for i, n in tried if i == index and n % per_prompt == image]
            kept = [n for n in numbers if tried[index, n]]
            assert numbers == [image + per_prompt * k for k in range(len(numbers))], "a number was left out"
            assert kept == numbers[-1:] or (kept == [] and len(numbers) == most)
            lacking[index] += not kept
    assert queue.missing() == {index: (count, 0) for index, count in lacking.items() if count}


@given(PER_PROMPT, MAX_ATTEMPTS, BATCH_SIZE, st.integers(0, 99), st.floats(0, 1))
def test_waves_are_full_as_long_as_there_is_work(per_prompt, most, batch_size, seed, share):
    waves, _ = run(per_prompt, most, batch_size, drawn(seed, share))
    open_images = len(PROMPTS) * per_prompt
    for wave in waves:
        assert len(wave) == min(batch_size, open_images)
        settled = [kept or number + per_prompt >= per_prompt * most for (_, number), kept in wave]
        open_images -= sum(settled)
    assert open_images == 0


@given(PER_PROMPT, MAX_ATTEMPTS, BATCH_SIZE, st.integers(0, 99), st.floats(0, 1))
def test_what_was_aborted_is_attempted_again_in_the_next_wave(per_prompt, most, batch_size, seed, share):
    waves, _ = run(per_prompt, most, batch_size, drawn(seed, share))
    for wave, after in zip(waves, [*waves[1:], []], strict=True):
        followers = {(i, n + per_prompt) for (i, n), kept in wave if not kept and n + per_prompt < per_prompt * most}
        assert followers <= {place for place, _ in after}


@given(PER_PROMPT, MAX_ATTEMPTS, BATCH_SIZE, BATCH_SIZE, st.integers(0, 99), st.floats(0, 1))
def test_the_attempts_made_do_not_depend_on_the_batch_size(per_prompt, most, one, other, seed, share):
    waves, others = (run(per_prompt, most, size, drawn(seed, share))[0] for size in (one, other))
    assert sorted(attempts(waves)) == sorted(attempts(others))


@given(PER_PROMPT, MAX_ATTEMPTS, BATCH_SIZE, st.integers(0, 99), st.integers(0, 9))
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(per_prompt, most, batch_size, seed, waves):
    whole, _ = run(per_prompt, most, batch_size, drawn(seed, 0.5))
    begun, _ = run(per_prompt, most, batch_size, drawn(seed, 0.5), waves)
    resumed = AttemptQueue(PROMPTS, per_prompt, most, seed=0)
    resumed.settle(attempt(*place, "kept" if kept else "aborted") for wave in begun for place, kept in wave)
    rest, _ = run(per_prompt, most, batch_size, drawn(seed, 0.5), queue=resumed)
    assert begun + rest == whole


@given(PER_PROMPT, MAX_ATTEMPTS, MAX_ATTEMPTS, st.integers(0, 99))
def test_limits_may_change_between_sessions(per_prompt, first, then, seed):
    begun, _ = run(per_prompt, first, 4, drawn(seed, 0.3))
    resumed = AttemptQueue(PROMPTS, per_prompt, then, seed=0)
    resumed.settle(attempt(*place, "kept" if kept else "aborted") for wave in begun for place, kept in wave)
    rest, queue = run(per_prompt, then, 4, drawn(seed, 0.3), queue=resumed)
    at_once, _ = run(per_prompt, max(first, then), 4, drawn(seed, 0.3))
    assert sorted(attempts(begun + rest)) == sorted(attempts(at_once))
    assert all(tried > 0 and untried == 0 for tried, untried in queue.missing().values())


def test_every_attempt_has_a_seed_of_its_own():
    queue = AttemptQueue([*PROMPTS, "a bag"], images_per_prompt=50, max_attempts=4, seed=0)  # "a bag" is there thrice
    seeds = [queue.seed_of((index, number)) for index in range(4) for number in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_seeds_do_not_change_with_the_rest_of_the_list():
    long = AttemptQueue(["a coat", "a bag", "a shirt", "a bag"], 2, 4, seed=5)
    short = AttemptQueue(["a bag", "a bag"], 2, 4, seed=5)
    assert [long.seed_of((index, 3)) for index in (1, 3)] == [short.seed_of((index, 3)) for index in (0, 1)]


def test_seeds_depend_on_each_part():
    parts = {"seed": 3, "prompt": "a1", "attempt": 1, "occurrence": 0}
    changed = [parts | {"seed": 4}, parts | {"prompt": "a"}, parts | {"attempt": 0}, parts | {"occurrence": 1}]
    assert len({attempt_seed(**given) for given in [parts, *changed]}) == 5


def test_seeds_are_the_same_in_another_process():
    code = "from moe_artifacts.seeds import attempt_seed; print(attempt_seed(7, 'Schuh \\u20ac', 2, 1))"
    environment = {"PYTHONHASHSEED": "12345"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(printed.stdout) == attempt_seed(7, "Schuh \u20ac", 2, 1)

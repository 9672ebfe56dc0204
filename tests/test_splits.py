import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.errors import InputError
from training.data.splits import SPLITS, assign_splits, linked_groups, same_prompt, split_summary

SHARES = (0.8, 0.1, 0.1)
numbers = st.integers(0, 40).map(str)
images = st.lists(st.tuples(numbers.map("p{}".format), st.none() | numbers.map("u{}".format)), min_size=1, max_size=60)


def slow_groups(prompts, users):
    """Merge the sets of any two images that share a prompt or a user, until nothing changes."""
    sets = [{i} for i in range(len(prompts))]
    for i in range(len(prompts)):
        for j in range(i):
            if prompts[i] == prompts[j] or (users[i] is not None and users[i] == users[j]):
                one, other = (next(s for s in sets if k in s) for k in (i, j))
                if one is not other:
                    one |= other
                    sets.remove(other)
    return {frozenset(s) for s in sets}


def as_sets(groups):
    return {frozenset(np.flatnonzero(groups == g).tolist()) for g in set(groups.tolist())}


@given(images)
def test_groups_are_what_hangs_together_by_prompts_and_users(rows):
    prompts, users = map(list, zip(*rows, strict=True))
    groups = linked_groups(prompts, users)
    assert as_sets(groups) == slow_groups(prompts, users)
    assert list(dict.fromkeys(groups.tolist())) == list(range(groups.max() + 1))  # numbered as they appear
    assert as_sets(linked_groups(prompts)) == slow_groups(prompts, [None] * len(prompts))


def test_a_chain_of_prompts_and_users_is_one_group():
    #                     cat by 1, dog by 1, dog by 2, bird by 2, and two unknown users of other prompts
    groups = linked_groups(["cat", "dog", "Dog ", "bird", "fish", "frog"], ["1", "1", "2", "2", None, None])
    assert groups.tolist() == [0, 0, 0, 0, 1, 2]


def test_prompts_are_compared_without_case_blanks_and_width():
    assert same_prompt("A\tcat\n ") == same_prompt("\uff41 CAT") == "a cat"
    assert same_prompt("cafe\u0301") == same_prompt("CAF\u00c9")
    assert same_prompt("a cat") != same_prompt("a cat.")


@given(images, st.integers(0, 5), st.randoms(use_true_random=False))
def test_no_prompt_and_no_user_is_in_two_splits_whatever_the_order_of_rows(rows, seed, shuffler: random.Random):
    prompts, users = map(list, zip(*rows, strict=True))
    keys = [f"k{i}" for i in range(len(rows))]
    try:
        splits = assign_splits(keys, linked_groups(prompts, users), SHARES, seed)
    except InputError as error:
        assert "hang together by prompts and users" in str(error)
        return
    for values in (prompts, [user for user in users if user is not None]):
        for value in set(values):
            assert len({s for s, p, u in zip(splits, prompts, users, strict=True) if value in (p, u)}) == 1
    assert set(splits) == set(SPLITS)

    order = shuffler.sample(range(len(rows)), len(rows))
    shuffled = linked_groups([prompts[i] for i in order], [users[i] for i in order])
    assert assign_splits([keys[i] for i in order], shuffled, SHARES, seed) == [splits[i] for i in order]


def test_shares_are_kept_and_the_seed_matters():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 400, 2_000)
    keys = [str(i) for i in range(2_000)]
    splits = assign_splits(keys, groups, SHARES, 0)
    found = [splits.count(name) / 2_000 for name in SPLITS]
    assert found == pytest.approx(SHARES, abs=0.005)  # the last groups, of five images, fit nowhere else
    assert splits != assign_splits(keys, groups, SHARES, 1)
    assert set(assign_splits(keys, groups, (0.9, 0.1, 0), 0)) == {"train", "validation"}


def test_a_group_too_large_for_the_held_out_images_is_trained_on():
    groups = np.array([0] * 60 + list(range(1, 41)))
    for seed in range(10):
        splits = assign_splits([str(i) for i in range(100)], groups, SHARES, seed)
        assert set(splits[:60]) == {"train"} and [splits.count(name) for name in SPLITS] == [80, 10, 10]


def test_shares_and_data_that_cannot_be_split_are_refused():
    for shares in ((0.5, 0.4, 0.2), (1.1, -0.1, 0.0), (0.0, 0.5, 0.5), (0.5, 0.5)):
        with pytest.raises(InputError, match="shares must be three numbers"):
            assign_splits(["a"], np.array([0]), shares, 0)
    with pytest.raises(
        InputError, match=r"split 'validation': the 50 images hang together .* 1 groups, the largest of 50"
    ):
        assign_splits([str(i) for i in range(50)], np.zeros(50, dtype=np.int64), SHARES, 0)
    with pytest.raises(InputError, match="users must be as many as prompts, 2, got 1"):
        linked_groups(["a", "b"], ["1"])


def test_the_summary_counts_each_split():
    table = pa.table(
        {
            "split": ["train", "train", "train", "test"],
            "label": [0.0, 0.5, 1.0, 0.25],
            "prompt": ["a", "a", "b", "c"],
            "group": [0, 0, 3, 1],
        }
    )
    assert [line.split() for line in split_summary(table).splitlines()[1:]] == [
        ["train", "3", "0.500", "2", "2", "2"],
        ["test", "1", "0.250", "1", "1", "1"],
    ]

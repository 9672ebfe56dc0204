"""Prompts to collect trajectories of: what is read, what is dropped, which split each goes to, which an image takes."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.errors import InputError
from training.data.splits import same_prompt
from training.own.prompts import HELD_OUT, SHARES, SPLITS, PromptSplits, draw_prompts, read_prompts


def everything(found: PromptSplits) -> list[str]:
    return [prompt for split in SPLITS for prompt in found.prompts[split]]


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_prompt_a_line_and_what_is_dropped_is_counted(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\n  A  CAT \n\u00fcber \u732b \U0001f431\n   \na\u2028b\nlast".encode())
    found = read_prompts(file)
    # U+2028 breaks a line for str.splitlines, and not for a text editor
    assert sorted(everything(found)) == sorted(["a cat", "\u00fcber \u732b \U0001f431", "a\u2028b", "last"])
    assert (found.counts["empty"], found.counts["duplicate"], found.counts.left("prompts")) == (2, 1, 4)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_may_have_splits_and_groups_and_further_columns(tmp_path, kind):
    file = tmp_path / f"prompts.{kind}"
    if kind == "csv":
        file.write_text('id,prompt,split\n1,"a, ""b""\nc",train\n2,dog,test\n3,,test\n4,dog,test\n', encoding="utf-8")
    else:
        prompts = ['a, "b"\nc', "dog", None, "dog"]
        table(file, id=[1, 2, 3, 4], prompt=prompts, split=["train", "test", "test", "test"])
    found = read_prompts(file)
    assert found.prompts == {"train": ['a, "b"\nc'], "validation": [], "calibration": [], "test": ["dog"]}
    assert (found.counts["empty"], found.counts["duplicate"]) == (1, 1)


def test_given_splits_may_share_prompts_only_where_nothing_is_learned_from_one_and_measured_on_the_other(tmp_path):
    prompts, splits = ["a", "a", "b", "b"], ["train", "validation", "calibration", "test"]
    found = read_prompts(table(tmp_path / "p.parquet", prompt=prompts, split=splits))
    assert found.prompts == {"train": ["a"], "validation": ["a"], "calibration": ["b"], "test": ["b"]}
    with pytest.raises(InputError, match=r"1 prompts of calibration or test are in train or validation too.*'A'"):
        read_prompts(table(tmp_path / "p.parquet", prompt=["a", "A ", "b"], split=["validation", "test", "test"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"caf\xe9\n", "must be a text file in UTF-8"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"", "holds no prompt"),
        ("p.csv", b"text\na cat\n", "no column 'prompt'; its columns are .'text'"),
        ("p.csv", b"prompt,split\na cat,eval\n", "split of the prompt 'a cat' must be one of train.*got 'eval'"),
        ("p.csv", b"prompt,split\na cat,train,x\n", "cannot be read as csv"),
        ("p.csv", b"prompt\ncaf\xe9\n", "cannot be read as csv"),
        ("p.parquet", b"PAR1", "cannot be read as parquet"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


def test_a_table_needs_its_prompts_and_every_split(tmp_path):
    with pytest.raises(InputError, match="no column 'prompt'"):
        read_prompts(table(tmp_path / "p.parquet", text=["a cat"]))
    with pytest.raises(InputError, match=r"split of the prompt 'b' must be one of.*got None"):
        read_prompts(table(tmp_path / "p.parquet", prompt=["a", "b"], split=["train", None]))
    for name in ("missing.txt", "missing.csv", "missing.parquet"):
        with pytest.raises(InputError, match=name):
            read_prompts(tmp_path / name)


# --- splits ----------------------------------------------------------------------------------------------------------


def hashed(path, prompts, groups=None, seed=0):
    columns = {"prompt": prompts} if groups is None else {"prompt": prompts, "group": groups}
    return read_prompts(table(path, **columns), seed)


@given(st.lists(st.sampled_from("abcdefgh "), min_size=1, max_size=60), st.data())
def test_no_two_splits_share_a_prompt_and_groups_stay_together(tmp_path_factory, prompts, data):
    groups = data.draw(st.lists(st.sampled_from(["x", "y", "", None]), min_size=len(prompts), max_size=len(prompts)))
    if not any(prompt.strip() for prompt in prompts):
        return
    found = hashed(tmp_path_factory.mktemp("p") / "p.parquet", prompts, pa.array(groups, pa.string()))
    split_of = {prompt: split for split, texts in found.prompts.items() for prompt in texts}
    assert sum(len(texts) for texts in found.prompts.values()) == len(split_of) == len(set(prompts) - {" "})
    first_group = {
        prompt: group for prompt, group in reversed(list(zip(prompts, groups, strict=True))) if prompt != " "
    }
    for name in ("x", "y"):
        assert len({split_of[prompt] for prompt, group in first_group.items() if group == name}) <= 1


def test_a_prompt_of_several_groups_goes_with_the_first(tmp_path):
    groups = [str(i) for i in range(50)]
    found = hashed(tmp_path / "p.parquet", ["a"] * 50 + [f"b {i}" for i in range(50)], groups * 2)
    (split_of_a,) = [split for split in SPLITS if "a" in found.prompts[split]]
    assert "b 0" in found.prompts[split_of_a] and found.counts["duplicate"] == 49


def test_shares_are_those_asked_for_and_new_prompts_leave_the_old_ones_where_they_were(tmp_path):
    prompts = [f"prompt {i}" for i in range(4_000)]
    before, after = hashed(tmp_path / "a.parquet", prompts[:1_000]), hashed(tmp_path / "b.parquet", prompts[::-1])
    for split, share in SHARES.items():
        assert set(before.prompts[split]) <= set(after.prompts[split])
        standard_error = (4_000 * share * (1 - share)) ** 0.5
        assert abs(len(after.prompts[split]) - 4_000 * share) < 4 * standard_error
    other = hashed(tmp_path / "c.parquet", prompts, seed=1)
    assert set(other.prompts["test"]) != set(after.prompts["test"])
    assert len({found.sha256() for found in (before, after, other)}) == 3


def test_nobody_measures_on_what_was_trained_on_however_it_is_written(tmp_path):
    written = [text.format(i) for i in range(200) for text in ("a cat {}", "A  Cat {}", "\uff41 cat {}")]
    found = hashed(tmp_path / "p.parquet", written)
    trained, measured = (
        {same_prompt(prompt) for split in SPLITS if (split in HELD_OUT) == held_out for prompt in found.prompts[split]}
        for held_out in (False, True)
    )
    assert len(trained) + len(measured) == 200 and trained.isdisjoint(measured)


# --- drawing ---------------------------------------------------------------------------------------------------------

some_prompts = st.lists(st.text(max_size=3), min_size=1, max_size=7, unique=True)


@given(some_prompts, st.integers(0, 12), st.integers(0, 12), st.integers(1, 4), st.integers(0, 2**40))
def test_what_an_image_takes_does_not_depend_on_its_batch(prompts, start, count, copies, seed):
    whole = draw_prompts(prompts, range(0, start + count), seed, copies)
    assert draw_prompts(prompts, range(start, start + count), seed, copies) == whole[start:]


@given(some_prompts, st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_every_prompt_is_there_equally_often_and_siblings_stand_together(prompts, turns, copies, seed):
    drawn = draw_prompts(prompts, range(turns * copies * len(prompts)), seed, copies)
    assert Counter(drawn) == dict.fromkeys(prompts, turns * copies)
    assert all(drawn[i] == drawn[i - i % copies] for i in range(len(drawn)))


def test_a_prompt_has_other_neighbours_in_every_turn():
    prompts = [str(i) for i in range(100)]
    drawn = draw_prompts(prompts, range(400), seed=3)
    turns = [drawn[i : i + 100] for i in range(0, 400, 100)]
    assert len({tuple(turn) for turn in turns}) == 4
    assert draw_prompts(prompts, range(100), seed=4) != turns[0]

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.errors import CalibrationError, InputError
from moe_artifacts.records import read_records, split_parts, worst_share
from tests.recorded import NUM_STEPS, STEPS, arrays, long_form, made_up, trajectory, write

RUNS = made_up(prompts=6, images=4)
FORMATS = (".csv", ".parquet", ".npz")


def stored(folder, suffix, runs=RUNS, **changes):
    """The file; ``changes`` are of the columns that all formats share."""
    if suffix == ".npz":
        return write(folder / "runs.npz", arrays(runs, **changes))
    steps = len(STEPS)
    return write(
        folder / f"runs{suffix}",
        long_form(runs, **{name: v if v is None else np.repeat(v, steps) for name, v in changes.items()}),
    )


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_runs(tmp_path, suffix):
    records = read_records(stored(tmp_path, suffix))
    runs = records.runs
    np.testing.assert_allclose(runs.scores, RUNS["scores"], rtol=1e-12)  # CSV keeps all digits
    np.testing.assert_allclose(runs.final, RUNS["final"], rtol=1e-12)
    assert np.array_equal(runs.label, RUNS["label"]) and np.array_equal(runs.prompt, RUNS["prompt"])
    assert runs.calls.tolist() == [2, 5, 8] and runs.total_calls == NUM_STEPS
    assert records.kind == "score" and records.exits == {} and len(records.prompts) == 6


def test_trajectory_folders_give_the_posterior_and_the_setting(tmp_path):
    trajectory(RUNS, slice(0, 10)).save(tmp_path / "a")
    trajectory(RUNS, slice(10, 24)).save(tmp_path / "b")
    records = read_records(tmp_path)
    assert records.kind == "posterior" and set(records.exits) == {
        "exit_cdf",
        "cumulative_artifact_prob",
        "cumulative_clean_prob",
    }
    assert np.array_equal(records.runs.prompt, RUNS["prompt"]) and np.array_equal(records.runs.label, RUNS["label"])
    assert records.runs.calls.tolist() == [2, 5, 8] and records.meta["scheduler"] == "DDIMScheduler"
    assert records.log_snr.tolist() == [-3, 0, 3]
    as_score = read_records(tmp_path, score="artifact_prob")
    assert as_score.kind == "score" and np.array_equal(as_score.runs.scores, records.runs.scores)


def test_rows_may_come_in_any_order_and_steps_may_be_missing(tmp_path):
    table = long_form(RUNS)
    order = np.random.default_rng(0).permutation(len(table["step"]))[:-5]  # five rows are not there
    shuffled = {name: np.array(column)[order] for name, column in table.items()}
    found = read_records(write(tmp_path / "runs.parquet", shuffled)).runs
    whole = read_records(write(tmp_path / "whole.parquet", table)).runs
    assert np.isnan(found.scores).sum() == 5
    ids = np.array(shuffled["image"])
    appeared = [int(i) for i in dict.fromkeys(ids.tolist())]  # ids are the places in the whole file
    there = ~np.isnan(found.scores)
    assert np.array_equal(found.scores[there], whole.scores[appeared][there])
    assert np.array_equal(found.label, whole.label[appeared])


def test_calls_can_be_others_than_the_steps(tmp_path):
    table = long_form(RUNS, calls=[3, 9, 15] * 24, num_steps=None)
    runs = read_records(write(tmp_path / "runs.csv", table), num_steps=20).runs
    assert runs.calls.tolist() == [3, 9, 15] and runs.total_calls == 20


def test_numbers_as_prompts_and_ids_with_leading_zeros_are_text(tmp_path):
    table = long_form(RUNS, prompt=[str(p) for p in RUNS["prompt"] for _ in STEPS])
    assert read_records(write(tmp_path / "runs.csv", table)).prompts == ["0", "1", "2", "3", "4", "5"]


def published(repeats):
    """An array as ../shared/data/README.md has it: 3 prompts of 4 images, the last ones exact repeats, 5 steps."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(3, 4, 5)).astype(np.float32)
    base[:, 4 - repeats :] = base[:, :repeats]
    tuned = base + 1
    tuned[:, :, [0, 4]] = math.nan  # not published
    return {"sd_imr_base": base, "sd_imr_naft": tuned, "other_imr_base": base[:1]}


def test_a_published_array_is_read_by_its_key(tmp_path):
    values = published(repeats=1)
    path = write(tmp_path / "rewards.npz", values)
    records = read_records(path, key="sd_imr_naft", label_from_final=0.34)
    assert records.runs.scores.shape == (9, 3) and records.runs.calls.tolist() == [2, 3, 4]
    assert records.runs.total_calls == 5 and records.runs.prompt.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(records.runs.final, values["sd_imr_base"][:, :3, 4].ravel())
    assert records.notes == ["3 exact repeats of an image of the same prompt were left out"]
    assert records.runs.bad.sum() == 3
    with pytest.raises(InputError, match=r"lacks the arrays \['flux_imr_naft', 'flux_imr_base'\]; it has"):
        read_records(path, key="flux_imr_naft")
    with pytest.raises(InputError, match="Is a --key wanted"):
        read_records(path)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_the_worst_share_is_of_all_images_or_of_each_prompt():
    final, prompt = np.array([1.0, 2, 3, 4, 5, 6, 7, 8]), np.repeat([0, 1], 4)
    assert worst_share(final, prompt, 0.5, "pooled").tolist() == [True] * 4 + [False] * 4
    assert worst_share(final, prompt, 0.5, "prompt").tolist() == [True, True, False, False] * 2
    assert not worst_share(np.ones(8), prompt, 0.5, "pooled").any()  # nothing is worse than the rest


@given(
    number=st.integers(1, 40),
    share=st.floats(0.01, 0.99),
    ties=st.integers(1, 40),
    within=st.sampled_from(["pooled", "prompt"]),
    seed=st.integers(0, 100),
)
def test_never_more_than_the_share_and_all_of_it_without_ties(number, share, ties, within, seed):
    rng = np.random.default_rng(seed)
    prompt = np.repeat([0, 1, 2], number)
    final = rng.permutation(3 * number) // ties
    groups = [np.arange(3 * number)] if within == "pooled" else np.split(np.arange(3 * number), 3)
    count = [math.floor(share * len(rows) + 1e-9) for rows in groups]
    if max(count) == 0:
        with pytest.raises(InputError, match="less than one image: record at least"):
            worst_share(final.astype(float), prompt, share, within)
        return
    bad = worst_share(final.astype(float), prompt, share, within)
    for rows, most in zip(groups, count, strict=True):
        assert bad[rows].sum() <= most
        if ties == 1:
            assert bad[rows].sum() == most
        if bad[rows].any() and not bad[rows].all():
            assert final[rows][bad[rows]].max() < final[rows][~bad[rows]].min()


def test_labels_from_the_final_score_replace_the_column(tmp_path):
    path = stored(tmp_path, ".csv", label=None)
    with pytest.raises(InputError, match=r"no column label.*--label-from-final 0.2"):
        read_records(path)
    for within in ("pooled", "prompt"):
        runs = read_records(path, label_from_final=0.25, label_within=within).runs
        assert np.array_equal(runs.bad, worst_share(RUNS["final"], RUNS["prompt"], 0.25, within))
    with pytest.raises(InputError, match="share between 0 and 1"):
        read_records(path, label_from_final=20.0)


def test_a_score_after_the_last_call_is_the_final_score(tmp_path):
    table = long_form(RUNS, final=None, label=None, num_steps=[8] * 72)
    runs = read_records(write(tmp_path / "runs.csv", table), label_from_final=0.25).runs
    np.testing.assert_allclose(runs.final, RUNS["scores"][:, -1], rtol=1e-12)
    path = write(tmp_path / "early.csv", long_form(RUNS, final=None, label=None))
    with pytest.raises(InputError, match="need a column final"):
        read_records(path, label_from_final=0.25)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("value", "name"), [(0.0, "clean"), (1.0, "bad")])
def test_one_class_only_is_refused(tmp_path, suffix, value, name):
    path = stored(tmp_path, suffix, label=np.full(24, value))
    with pytest.raises(CalibrationError, match=f"both classes, but all 24 images are {name}"):
        read_records(path)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("wrong", [1.5, -0.1])
def test_labels_outside_0_to_1_are_refused(tmp_path, suffix, wrong):
    label = RUNS["label"].copy()
    label[3] = wrong
    with pytest.raises(InputError, match=rf"label must be in \[0, 1\].* got 1 others, the first is {wrong}"):
        read_records(stored(tmp_path, suffix, label=label))


@pytest.mark.parametrize("column", ["label", "final"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_nan_in_what_belongs_to_an_image_is_refused(tmp_path, suffix, column):
    values = RUNS[column].copy()
    values[3] = math.nan
    with pytest.raises(InputError, match=column):
        read_records(stored(tmp_path, suffix, **{column: values}))


@pytest.mark.parametrize("suffix", FORMATS)
def test_infinite_scores_and_images_without_any_are_refused(tmp_path, suffix):
    for wrong, message in ((math.inf, "1 are infinite"), (math.nan, "1 images have no score at any step")):
        runs = RUNS | {"scores": RUNS["scores"].copy()}
        runs["scores"][2, 1 if wrong == math.inf else slice(None)] = wrong
        with pytest.raises(InputError, match=message):
            read_records(stored(tmp_path, suffix, runs))


def test_doubled_ids_are_refused(tmp_path):
    table = long_form(RUNS)
    table["image"] = [table["image"][0]] * 6 + table["image"][6:]
    with pytest.raises(InputError, match="3 pairs of image and step have more than one row, the first is image '0000'"):
        read_records(write(tmp_path / "runs.csv", table | {"label": [0.0] * 6 + [1.0] * 66}))
    with pytest.raises(InputError, match="1 images are there more than once, the first is 7"):
        read_records(write(tmp_path / "runs.npz", arrays(RUNS, image=np.array([7, *range(23)]))))
    trajectory(RUNS, slice(0, 10)).save(tmp_path / "runs" / "a")
    trajectory(RUNS, slice(9, 24)).save(tmp_path / "runs" / "b")
    with pytest.raises(InputError, match="1 images are there more than once, the first is 'prompt 2', seed 9"):
        read_records(tmp_path / "runs")


def test_an_id_of_two_images_is_found_by_what_belongs_to_an_image(tmp_path):
    table = long_form(RUNS)
    table["prompt"] = ["another", *table["prompt"][1:]]
    with pytest.raises(
        InputError, match="'prompt' must be the same in all rows of an image, but differs for image '0000'"
    ):
        read_records(write(tmp_path / "runs.csv", table))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_prompt_in_two_parts_is_refused(tmp_path, suffix):
    split = np.repeat(["fit", "calibrate", "report"], 8)
    records = read_records(stored(tmp_path, suffix, split=split))
    parts = split_parts(records, (0.3, 0.5, 0.2), seed=0)
    assert [np.flatnonzero(part).tolist() for part in parts] == [list(range(8 * k, 8 * k + 8)) for k in range(3)]
    split[9] = "fit"  # the others of its prompt are not
    with pytest.raises(InputError, match="1 prompts are in more than one part of the column split, the first is '"):
        read_records(stored(tmp_path, suffix, split=split))
    split[9] = "train"
    with pytest.raises(InputError, match=r"split must be one of fit, calibrate, report, got \['train'\]"):
        read_records(stored(tmp_path, suffix, split=split))


def test_images_that_left_early_are_refused_or_left_out(tmp_path):
    whole = trajectory(RUNS)
    scores = {name: values.clone() for name, values in whole.scores.items()}
    for values in scores.values():
        values[5, 1:] = math.nan
    dataclasses.replace(whole, scores=scores).save(tmp_path / "runs")
    with pytest.raises(
        InputError, match=r'1 images lack a posterior at some step, the first is image 5.*on_abort="record"'
    ):
        read_records(tmp_path / "runs")
    records = read_records(tmp_path / "runs", drop_incomplete=True)
    assert len(records) == 23 and records.notes == ["1 images without a posterior at every step were left out"]
    assert np.array_equal(records.runs.label, np.delete(RUNS["label"], 5))
    dataclasses.replace(whole, scores={n: v * math.nan for n, v in scores.items()}).save(tmp_path / "runs")
    with pytest.raises(InputError, match="no image has a posterior"):
        read_records(tmp_path / "runs", drop_incomplete=True)


def test_a_posterior_outside_0_to_1_is_refused(tmp_path):
    whole = trajectory(RUNS)
    dataclasses.replace(whole, scores=whole.scores | {"exit_cdf": torch.full((24, 3), 1.5)}).save(tmp_path / "runs")
    with pytest.raises(InputError, match=r"exit_cdf must be in \[0, 1\], got 72 others, the first is 1.5"):
        read_records(tmp_path / "runs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, r"lacks the columns \['prompt'\]; it has"),
        ({"num_steps": None}, "add a column num_steps, or give --num-steps"),
        ({"num_steps": [9, 10] * 36}, r"num_steps must be the same for all rows, got \[9.0, 10.0\]"),
        ({"calls": [2, 5, 8] * 23 + [2, 5, 9]}, "calls must be the same for all images at a step"),
        ({"score": None}, r"no column 'score'; the columns of scores are \[\]"),
        ({"score": ["no", *["0.5"] * 71]}, "the column 'score' holds text in some row"),
        ({"calls": [1.5, 2.5, 3.5] * 24}, r"calls must hold whole numbers, got \[1.5 2.5 3.5\]"),
        ({"num_steps": [9.5] * 72}, "num_steps must hold whole numbers"),
        ({"label": ["no"] * 72}, "'label' must hold numbers, got string"),
        ({"step": [0.5, 1, 2] * 24}, "step must be whole numbers"),
        ({"step": [1, 4, 10] * 24}, "calls must rise from 1 to at most total_calls=10"),
        ({"label": np.arange(72) % 2.0}, "'label' must be the same in all rows of an image"),
        ({"label": [None, *[1.0] * 71]}, "'label' must be filled in every row, 1 are empty"),
    ],
)
def test_other_mistakes_in_a_table_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_records(write(tmp_path / "runs.csv", long_form(RUNS, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, r"lacks the arrays \['prompt'\]"),
        ({"total_calls": None}, "lacks total_calls"),
        ({"label": np.zeros(5)}, r"label must have shape \(24,\), one per image, got \(5,\)"),
        ({"prompt": np.array([{}] * 24, dtype=object)}, "as an npz of plain arrays"),  # a pickle
        ({"label": np.array(["a"] * 24)}, "label must hold numbers, got an array of <U1"),
        ({"scores": np.full((24, 3), "a")}, "scores must hold numbers, got an array of <U1"),
        ({"total_calls": np.full(24, 9)}, r"total_calls must be one number, .* got shape \(24,\)"),
        ({"total_calls": np.array(9.5)}, "total_calls must hold whole numbers"),
        ({"calls": np.array(3)}, r"calls must have one dimension, got shape \(\)"),
        ({"calls": np.array([1.2, 2.7, 3.9])}, "calls must hold whole numbers"),
    ],
)
def test_other_mistakes_in_an_npz_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_records(write(tmp_path / "runs.npz", arrays(RUNS, **changes)))


def test_what_is_no_file_of_a_known_kind_is_refused(tmp_path):
    for name in ("runs.csv", "runs.parquet", "runs.npz", "runs.txt"):
        with pytest.raises(InputError, match="there is no file or folder"):
            read_records(tmp_path / name)
        (tmp_path / name).write_bytes(b"\x00 nothing of the kind")
        with pytest.raises(InputError, match=r"cannot read|must be a trajectory folder, or end in|lacks the columns"):
            read_records(tmp_path / name)
    with pytest.raises(InputError, match="a key names an array of an npz"):
        read_records(stored(tmp_path, ".csv"), key="flux_imr_naft")
    with pytest.raises(InputError, match="not a trajectory folder"):
        read_records(tmp_path)


def test_damaged_and_misnamed_files_are_refused_in_our_words(tmp_path):
    path = stored(tmp_path, ".npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="as an npz of plain arrays: File is not a zip file"):
        read_records(path)
    middle = whole.index(b"scores.npy") + 400
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(InputError, match="as an npz of plain arrays"):
        read_records(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="as an npz of plain arrays"):
        read_records(path)
    table = pa.table(long_form(RUNS))
    pq.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="has no rows"):
        read_records(tmp_path / "empty.parquet")
    twice = table.append_column("score", table["score"])
    pyarrow.csv.write_csv(twice, tmp_path / "twice.csv")
    with pytest.raises(InputError, match="more than one column of the name 'score'"):
        read_records(tmp_path / "twice.csv")


@pytest.mark.parametrize("name", ["scheduler", "guidance_scale", "eta", "image_size", "denoiser", "scorer"])
def test_runs_in_different_settings_or_of_two_scorers_are_refused(tmp_path, name):
    first, second = trajectory(RUNS, slice(0, 12)), trajectory(RUNS, slice(12, 24))
    first.save(tmp_path / "runs" / "a")
    dataclasses.replace(second, meta=second.meta | {name: "another"}).save(tmp_path / "runs" / "b")
    with pytest.raises(InputError, match=f"{name} is 'another' in part 1 and .* calibrate each setting by itself"):
        read_records(tmp_path / "runs")


# --- parts -----------------------------------------------------------------------------------------------------------


def test_no_prompt_is_in_two_parts_and_the_seed_decides_which(tmp_path):
    records = read_records(write(tmp_path / "runs.npz", arrays(made_up(prompts=20, images=2))))
    first = split_parts(records, (0.3, 0.5, 0.2), seed=0)
    assert [part.sum() for part in first] == [12, 20, 8]
    assert np.array_equal(sum(part.astype(int) for part in first), np.ones(40))
    owners = [set(records.runs.prompt[part]) for part in first]
    assert sum(map(len, owners)) == 20
    again, other = (split_parts(records, (0.3, 0.5, 0.2), seed=seed) for seed in (0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.6, 0.2), (-0.1, 0.9, 0.2)])
def test_shares_that_are_none_are_refused(tmp_path, shares):
    records = read_records(stored(tmp_path, ".npz"))
    with pytest.raises(InputError, match="three numbers >= 0 that add up to 1"):
        split_parts(records, shares, seed=0)


def test_too_few_prompts_for_three_parts_are_refused(tmp_path):
    records = read_records(stored(tmp_path, ".npz"))
    with pytest.raises(InputError, match="no prompt is left for the part 'report': 6 prompts"):
        split_parts(records, (0.5, 0.5, 0.0), seed=0)

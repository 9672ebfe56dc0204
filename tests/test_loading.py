"""The pipeline and the device that a command line names."""

from __future__ import annotations

import pytest
import torch

from moe_artifacts.bundled import FOLDER
from moe_artifacts.errors import CheckpointError, InputError
from moe_artifacts.loading import checked_device, is_bundled, load_pipeline


def test_a_device_is_there_or_refused():
    assert checked_device("cpu") == torch.device("cpu")
    assert checked_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("abacus", "cuda:99", "cpu:one"):
        with pytest.raises(InputError, match=f"device '{name}' cannot be used here: "):
            checked_device(name)


def test_a_bundled_pipeline_brings_the_arguments_that_it_was_made_for():
    pipe, defaults = load_pipeline("fashion", torch.bfloat16, "cpu")
    assert defaults["num_inference_steps"] == 50
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


def test_a_folder_is_read_in_the_precision_asked_for():
    pipe, defaults = load_pipeline(str(FOLDER / "fashion" / "pipeline"), device="cpu")
    assert defaults == {}
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


@pytest.mark.parametrize("name", ["nothing", "../fashion", "a/b/c", ""])
def test_what_is_neither_is_refused(name):
    assert not is_bundled(name)
    with pytest.raises(CheckpointError, match="neither bundled, nor a folder, nor a Hub id"):
        load_pipeline(name)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pipeline(str(tmp_path))

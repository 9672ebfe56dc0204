from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
from diffusers import HunyuanDiTPipeline

from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.truncation import truncated_prompts
from tests.guarded import settings

LIMIT = 24  # tokens of the tiny tokenizer, the first and the last of which stand for begin and end


def words(count):
    return " ".join(["a"] * count)


class T5Tokenizer:
    """A token for each word, and one for the end. Its own limit is not what a pipeline uses."""

    model_max_length = 10**30

    def __call__(self, text, truncation, verbose):
        assert not truncation
        return SimpleNamespace(input_ids=self.encode(text))

    def encode(self, text):
        return [*text.split(), "</s>"]

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return " ".join(f"<{m['role']}> {m['content']} <end>" for m in messages)


class Processor:
    """Of images and text: its tokenizer is inside, and its chats hold their content in parts."""

    tokenizer = T5Tokenizer()

    def apply_chat_template(self, messages, tokenize):
        parts = [{"role": m["role"], "content": m["content"][0]["text"]} for m in messages]
        return self.tokenizer.apply_chat_template(parts, tokenize)


def pipeline(name="FluxPipeline", tokenizers=(), **more):
    """Stands for a pipeline: a class of that name with these components."""
    components = {f"tokenizer{'' if i == 0 else f'_{i + 1}'}": tokenizer for i, tokenizer in enumerate(tokenizers)}
    return type(name, (), {"components": components, **more})()


def test_the_verdict_says_which_prompts_were_cut():
    """What the pipeline itself does with them: the last words make no difference any more."""
    pipe = tiny.stable_diffusion()
    prompts = [words(LIMIT - 2), words(LIMIT - 1), "a shoe", words(LIMIT - 1) + " b c"]
    output = ArtifactGuard(tiny.ScriptedScorer())(pipe, prompts, **settings())
    assert [verdict.prompt_truncated for verdict in output.verdicts] == [False, True, False, True]
    used = pipe.tokenizer(prompts, padding="max_length", truncation=True, max_length=LIMIT).input_ids
    assert used[0] == used[1] == used[3]


def test_embeddings_have_no_end_to_be_cut():
    pipe = tiny.stable_diffusion()
    long = [words(LIMIT + 5)] * 4
    positive, negative = pipe.encode_prompt(long, "cpu", 1, True)
    given = settings(prompt_embeds=positive, negative_prompt_embeds=negative)
    output = ArtifactGuard(tiny.ScriptedScorer())(pipe, prompts=long, **given)
    assert not any(verdict.prompt_truncated for verdict in output.verdicts)
    assert truncated_prompts(pipeline(tokenizers=[None, None]), long, {}) == [False] * 4


def test_a_prompt_is_whole_if_one_encoder_reads_it_whole():
    clip, t5 = tiny.stable_diffusion().tokenizer, T5Tokenizer()
    both, asked = pipeline(tokenizers=[clip, t5]), {"max_sequence_length": 40}
    assert truncated_prompts(both, [words(30), words(39), words(40)], asked) == [False, False, True]
    assert truncated_prompts(pipeline(tokenizers=[clip, None]), [words(30)], asked) == [True]
    assert truncated_prompts(pipeline(tokenizers=[clip, clip]), [words(22), words(23)], {}) == [False, True]


def test_the_limits_of_hunyuan_cannot_be_changed_by_the_caller():
    pipe = pipeline(HunyuanDiTPipeline.__name__, [T5Tokenizer(), T5Tokenizer()])
    assert truncated_prompts(pipe, [words(100), words(255), words(256)], {}) == [False, False, True]


@pytest.mark.parametrize(
    ("pipe", "asked", "room"),
    [
        (pipeline("Lumina2Pipeline", [T5Tokenizer()], system_prompt="be good"), {}, 40 - 2 - 2 - 1),
        (
            pipeline("Lumina2Pipeline", [T5Tokenizer()], system_prompt="be good"),
            {"system_prompt": "be"},
            40 - 1 - 2 - 1,
        ),
        # Qwen reads more by the tokens of the template that it cuts off again.
        (
            pipeline(
                "QwenImagePipeline",
                [T5Tokenizer()],
                prompt_template_encode="<system> say <user> {} <end>",
                prompt_template_encode_start_idx=3,
            ),
            {},
            40 + 3 - 3 - 1,
        ),
        # Sana reads more by its instruction, less the two tokens that begin and end it.
        (pipeline("SanaPipeline", [T5Tokenizer()]), {"complex_human_instruction": ["say", "it "]}, 40 + 3 - 2 - 2 - 1),
        (pipeline("ZImagePipeline", [T5Tokenizer()]), {}, 40 - 1 - 1),
        (pipeline("Flux2Pipeline", [Processor()], system_message="be good"), {}, 40 - 4 - 1 - 1),
    ],
    ids=["lumina2", "lumina2-own", "qwen", "sana", "z-image", "flux2"],
)
def test_what_stands_before_the_prompt_takes_up_room(pipe, asked, room):
    asked = {"max_sequence_length": 40, **asked}
    assert truncated_prompts(pipe, [words(room), words(room + 1)], asked) == [False, True]


def test_a_word_that_stands_for_several_tokens_counts_as_many():
    pipe = pipeline(
        tokenizers=[T5Tokenizer()], maybe_convert_prompt=lambda self, text, _: text.replace("<x>", words(9))
    )
    assert truncated_prompts(pipe, ["<x>", "a"], {"max_sequence_length": 8}) == [True, False]


def test_captions_are_counted_as_the_pipeline_cleans_them():
    pipe = pipeline(
        tokenizers=[T5Tokenizer()],
        _text_preprocessing=lambda self, text, clean_caption: [text[: clean_caption or None]],
    )
    asked = {"max_sequence_length": 8, "clean_caption": True}
    assert truncated_prompts(pipe, [words(9)], asked) == [False]
    assert truncated_prompts(pipe, [words(9)], asked | {"clean_caption": False}) == [True]

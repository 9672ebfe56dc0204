"""A CLIP tokenizer with a small vocabulary, trained on the prompts themselves."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from moe_artifacts.errors import InputError

START, END = "<|startoftext|>", "<|endoftext|>"
MIN_VOCABULARY = 600
MAX_LENGTH = 77  # tokens of a prompt, as CLIP's own
# As CLIP's own tokenizer writes a word: other letters than those of ASCII as one visible sign for each byte of theirs.
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def build_tokenizer(prompts: Sequence[str], folder: Path, max_length: int) -> CLIPTokenizer:
    """Byte-pair merges over the words of ``prompts``; any other word falls into letters, any other sign to the end token."""
    words = {word for prompt in prompts for word in prompt.lower().split()}
    foreign = sorted({sign for word in words if not word.isascii() for sign in _visible(word) if not sign.isascii()})
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation, *foreign]
    alphabet = [*characters, *(c + "</w>" for c in characters)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), _BYTES])
    # The alphabet as special tokens gives its signs fixed places: merges that are equally frequent go by those places, and
    # would otherwise come in another order each time.
    every_word = len(alphabet) + sum(
        len(word.encode()) for word in words
    )  # the most that merging each into one can take
    trainer = trainers.BpeTrainer(
        vocab_size=max(MIN_VOCABULARY, every_word),
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=1,
        special_tokens=alphabet,
    )
    tokenizer.train_from_iterator((prompt.lower() for prompt in prompts), trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *("".join(m) for m in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=max_length,
        pad_token=END,
        unk_token=END,
    )


def fit_context(tokenizer: CLIPTokenizer, prompts: Sequence[Sequence[str]], shortest: int) -> None:
    """Set the tokenizer's length to that of the longest prompt, within ``shortest`` and ``MAX_LENGTH``.

    Args:
        prompts: Of each class.
    Raises:
        InputError: If two classes then have a prompt of the same tokens.
    """
    tokenizer.model_max_length = MAX_LENGTH
    rows = [tokenizer(list(group), truncation=True).input_ids for group in prompts]
    tokenizer.model_max_length = max(shortest, max(len(row) for group in rows for row in group))
    owner: dict[tuple[int, ...], int] = {}
    for label, group in enumerate(rows):
        for row, prompt in zip(group, prompts[label], strict=True):
            other = owner.setdefault(tuple(row), label)
            if other != label:
                raise InputError(
                    f"the tokens of {prompt!r} are those of a prompt of the class {prompts[other][0]!r}: names must differ "
                    f"within the first {MAX_LENGTH} tokens; rename the folder of one"
                )


def _visible(word: str) -> str:
    return "".join(piece for piece, _ in _BYTES.pre_tokenize_str(word))

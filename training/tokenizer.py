"""A CLIP tokenizer with a small vocabulary, trained on the prompts themselves."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(prompts: Iterable[str], folder: Path, max_length: int) -> CLIPTokenizer:
    """Byte-pair merges over the words of ``prompts``; any other word falls into letters, any other sign to the end token."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    alphabet = [*characters, *(c + "</w>" for c in characters)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # The alphabet as special tokens gives its signs fixed places: merges that are equally frequent go by those places, and
    # would otherwise come in another order each time.
    trainer = trainers.BpeTrainer(
        vocab_size=600, end_of_word_suffix="</w>", show_progress=False, min_frequency=1, special_tokens=alphabet
    )
    tokenizer.train_from_iterator(prompts, trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *("".join(m) for m in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=max_length,
        pad_token=END,
        unk_token=END,
    )

"""Prompts whose end the pipeline cuts off, because they are longer than its text encoders read.

A prompt counts as truncated if its end reaches none of the encoders: Flux and Stable Diffusion 3 show 77 tokens of it to
CLIP and several hundred to T5. What a pipeline writes before the prompt takes up room too.

Source: ``encode_prompt`` of the pipelines of diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_FIXED = {"HunyuanDiTPipeline": {"tokenizer": 77, "tokenizer_2": 256}}  # tokens, whatever is asked for
_AROUND_A_CHAT = ("ZImage", "Flux2")  # beginnings of the names of pipelines that put the prompt into a chat template


def truncated_prompts(pipe: Any, prompts: Iterable[str], asked: Mapping[str, Any]) -> list[bool]:
    """Whether the end of each prompt is lost; False where it cannot be told, as without a tokenizer.

    Args:
        asked: The arguments of the call of ``pipe``, defaults included.
    """
    prompts = list(prompts)
    lost = {prompt: _is_truncated(pipe, prompt, asked) for prompt in dict.fromkeys(prompts)}
    return [lost[prompt] for prompt in prompts]


def _is_truncated(pipe: Any, prompt: str, asked: Mapping[str, Any]) -> bool:
    tokenizers = {name: part for name, part in pipe.components.items() if name.startswith("tokenizer") and part}
    cut = []
    for name, tokenizer in tokenizers.items():
        text = _text(pipe, tokenizer, prompt, asked)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor for images and text
        # Without `verbose=False` it would warn of a length that is no concern here.
        tokens = len(tokenizer(text, truncation=False, verbose=False).input_ids)
        cut.append(tokens > _limit(pipe, name, tokenizer, asked))
    return bool(cut) and all(cut)


def _limit(pipe: Any, name: str, tokenizer: Any, asked: Mapping[str, Any]) -> int:
    """Tokens that are read, those of the text before the prompt included."""
    if type(pipe).__name__ in _FIXED:
        return _FIXED[type(pipe).__name__][name]
    limit = asked.get("max_sequence_length")
    if limit is None or "CLIP" in type(tokenizer).__name__:
        return tokenizer.model_max_length
    if asked.get("complex_human_instruction"):  # Sana
        return len(tokenizer.encode(_instruction(asked))) + limit - 2
    return limit + getattr(pipe, "prompt_template_encode_start_idx", 0)  # Qwen cuts its template off afterwards


def _text(pipe: Any, tokenizer: Any, prompt: str, asked: Mapping[str, Any]) -> str:
    """What is tokenised, up to the end of the prompt."""
    if hasattr(pipe, "maybe_convert_prompt"):  # textual inversion: one word may stand for several tokens
        prompt = pipe.maybe_convert_prompt(prompt, tokenizer)
    if hasattr(pipe, "_text_preprocessing"):
        [prompt] = pipe._text_preprocessing(prompt, clean_caption=bool(asked.get("clean_caption")))
    if asked.get("complex_human_instruction"):
        return _instruction(asked) + prompt
    if hasattr(pipe, "system_prompt"):  # Lumina 2
        return f"{asked.get('system_prompt') or pipe.system_prompt} <Prompt Start> {prompt}"
    if hasattr(pipe, "prompt_template_encode"):  # Qwen
        return pipe.prompt_template_encode.split("{}")[0] + prompt
    if type(pipe).__name__.startswith(_AROUND_A_CHAT):
        before, found, _ = _chat(pipe, tokenizer, prompt).rpartition(prompt.strip())
        return before + found if found else prompt
    return prompt


def _instruction(asked: Mapping[str, Any]) -> str:
    return "\n".join(asked["complex_human_instruction"])


def _chat(pipe: Any, tokenizer: Any, prompt: str) -> str:
    def said(role: str, text: str) -> dict[str, Any]:
        # A processor for images and text wants its content in parts.
        return {"role": role, "content": [{"type": "text", "text": text}] if hasattr(tokenizer, "tokenizer") else text}

    system = [said("system", pipe.system_message)] if hasattr(pipe, "system_message") else []
    return tokenizer.apply_chat_template([*system, said("user", prompt)], tokenize=False)

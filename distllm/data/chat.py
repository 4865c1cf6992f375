"""Chats and prompts with responses as token ids, and which of them are to be learned: the assistant's, with its end token.

A tokenizer with a chat template renders a conversation by it. One without has this plain form, a line a message, where END is
the tokenizer's end-of-document token:

    System: Be brief.
    User: What is 2 + 3?
    Assistant: 5END

What is learned of it is ` 5END`, so a prompt for generation ends with `Assistant:` and no space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from distllm.config.errors import DataError
from distllm.data.rows import Messages, Row

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Encoded = tuple[np.ndarray, np.ndarray]  # ids int64 [n], flags uint8 [n]


def messages_of(row: Row) -> Messages:
    """The conversation of an sft row: its chat, or its prompt and response."""
    if row.messages is not None:
        return row.messages
    prompt = [{"role": "user", "content": row.text}]
    return prompt if row.target is None else [*prompt, {"role": "assistant", "content": row.target}]


def load_chat_encoder(folder: Path) -> Callable[[Sequence[Row]], list[Encoded]]:
    """Make the encoder of sft rows.

    Args:
        folder: of the tokenizer.

    Returns:
        Rows to (ids int64 [n], flags uint8 [n]), 1 where a token is to be learned.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    if not tokenizer.chat_template:
        plain.encode_special_tokens = True  # what looks like a special token in a message is text
        return lambda rows: [_plain(messages_of(row), plain, tokenizer.eos_token_id) for row in rows]

    def encode(rows: Sequence[Row]) -> list[Encoded]:
        rendered = [_render(row, tokenizer) for row in rows]
        encodings = plain.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [_flagged(encoding, spans) for encoding, (_, spans) in zip(encodings, rendered, strict=True)]

    return encode


def prompt_text(messages: Messages, tokenizer: Any) -> str:
    """The text after which a model writes the assistant's next turn.

    Args:
        messages: the conversation so far, the user's turn last.
        tokenizer: of transformers. Without a chat template the text marks the end of each earlier answer by its end token.
    """
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ends = {True: f"{tokenizer.eos_token}\n", False: "\n"}
    return "".join(f"{_name(m)}: {m['content']}{ends[m['role'] == 'assistant']}" for m in messages) + "Assistant:"


def _name(message: dict[str, Any]) -> str:
    return str(message["role"]).capitalize()


def _plain(messages: Messages, tokenizer: Tokenizer, end: int) -> Encoded:
    """The plain form. An answer is tokenised on its own, as a model that continues the prompt would write it."""
    ids: list[int] = []
    flags: list[int] = []

    def add(text: str, flag: int) -> None:
        new = tokenizer.encode(text, add_special_tokens=False).ids
        ids.extend(new)
        flags.extend([flag] * len(new))

    before = ""
    for message in messages:
        if message["role"] != "assistant":
            before += f"{_name(message)}: {message['content']}\n"
            continue
        add(f"{before}Assistant:", 0)
        add(f" {message['content']}", 1)
        ids.append(end)
        flags.append(1)
        before = "\n"
    if before.strip():
        add(before, 0)
    return np.array(ids, dtype=np.int64), np.array(flags, dtype=np.uint8)


def _render(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """A conversation by its template, and the [start, end) of the characters to learn."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, template = messages_of(row), tokenizer.get_chat_template()
    try:
        if GENERATION.search(template):
            texts, spans = render_jinja_template(
                [messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
            )
            return texts[0], [(int(a), int(b)) for a, b in spans[0]]
        return _turn_by_turn(messages, tokenizer)
    except (TemplateError, TypeError, ValueError) as error:
        wrong = " ".join(str(error).split())[:200]
        raise DataError(f"{row.place}: the tokenizer's chat template does not take this conversation ({wrong})") from None


def _turn_by_turn(messages: Messages, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Find the assistant's turns by rendering the conversation up to each of them, without and with it."""

    def render(count: int, *, prompt: bool) -> str:
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str)
        return text

    whole = render(len(messages), prompt=False)
    specials = tuple(tokenizer.all_special_tokens)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(turn, prompt=True) if turn else ""
        after = render(turn + 1, prompt=False)
        if not after.startswith(before) or not whole.startswith(after):
            raise ValueError(f"it writes the turns before or in message {turn + 1} otherwise once another follows; mark the "
                             "assistant's part with {% generation %} in the template")  # fmt: skip
        trimmed = after.rstrip()  # the newline after an end token is the template's, not the assistant's
        spans.append((len(before), len(trimmed) if trimmed.endswith(specials) else len(after)))
    return whole, spans


def _flagged(encoding: Any, spans: Sequence[tuple[int, int]]) -> Encoded:
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    flags = np.zeros(len(offsets), dtype=np.uint8)
    for start, end in spans:
        flags[(offsets[:, 1] > start) & (offsets[:, 0] < end)] = 1
    return np.array(encoding.ids, dtype=np.int64), flags

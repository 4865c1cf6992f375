"""Writing on with what was trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from distllm.config.errors import ConfigError
from distllm.data.chat import prompt_text
from distllm.data.clean import clean
from distllm.data.tokenizer import id_count
from distllm.generate import Sampling, decode_stream, encode_prompts, sample_text, stream
from distllm.train.ensemble import Ensemble
from distllm.train.tasks import WRITES


def generate_source(
    ensemble: Ensemble, *, prompts: Sequence[str], sampling: Sampling, seed: int = 1
) -> Iterator[str]:
    """Continue prompts, cleaned as the texts of the training; with a model of conversations (sft) each is what the user says.

    Args:
        ensemble: one causal language model or several.
        prompts: one is streamed piece by piece; several are continued as one batch and given whole, in order.
        sampling: how many tokens, and how each is chosen.
        seed: of the choices.

    Yields:
        Pieces of text of the one prompt, or a whole text for each of several; without the prompts.

    Raises:
        ConfigError: a model that does not continue texts.
    """
    first = ensemble.first
    if first.kind not in WRITES:
        what = "translates" if first.kind == "seq2seq" else f"is for {first.kind}"
        raise ConfigError([f"{first.name}: {what} and continues no text; use distllm predict, with --input FILE --output FILE"])
    prompts = [clean(prompt, first.config.data.clean) for prompt in prompts]
    generator = torch.Generator(first.device).manual_seed(seed)
    if first.kind == "sft":
        prompts = [prompt_text([{"role": "user", "content": prompt}], first.tokenizer) for prompt in prompts]
    if len(prompts) > 1:
        yield from sample_text(
            ensemble.models, tokenizer=first.tokenizer, prompts=prompts, sampling=sampling, max_len=ensemble.max_len,
            generator=generator, device=first.device, weights=ensemble.weights, chat=first.kind == "sft",
        )  # fmt: skip
        return
    ids, mask = encode_prompts(first.tokenizer, prompts, device=first.device, chat=first.kind == "sft")
    tokens = stream(
        ensemble.models, input_ids=ids, attention_mask=mask, sampling=sampling, eos_id=first.tokenizer.eos_token_id,
        vocab_size=id_count(first.tokenizer), max_len=ensemble.max_len, generator=generator, weights=ensemble.weights,
    )  # fmt: skip
    yield from decode_stream(first.tokenizer, (int(token[0]) for token in tokens), after=ids[0].tolist())

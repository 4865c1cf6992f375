"""Generation against transformers' own, the cache against recomputing, and sampling on logits made by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from distllm.config.errors import DataError
from distllm.config.schema import Config, DataConfig, ModelConfig
from distllm.data.chat import prompt_text
from distllm.generate import Sampling, choose, decode_stream, encode_prompts, keep_likely, sample_text, stream
from distllm.models.build import resolve_spec
from tests.models.families import filled, random_ids, spec_of


def generate(model: torch.nn.Module | list[torch.nn.Module], *, input_ids: torch.Tensor, **rest: Any) -> torch.Tensor:
    """The prompts and their continuations, int64 [B, S + new]."""
    tokens = stream(model, input_ids=input_ids, **rest)
    return torch.cat([input_ids, *(token[:, None] for token in tokens)], dim=1)


def model_of(kind: str, *, positions: int = 64) -> torch.nn.Module:
    """A tiny model with large weights, so that its choices differ from place to place."""
    spread = "init_std" if kind == "opt" else "initializer_range"
    return filled(spec_of(kind, seq_len=positions, **{spread: 0.5}))


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = random_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4], mask[2, :7] = 0, 0
    return ids * mask, mask


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "opt", "mixtral"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_transformers(kind: str, use_cache: bool) -> None:
    model = model_of(kind)
    ids, mask = padded_batch()
    theirs = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    ours = generate(model, input_ids=ids, attention_mask=mask, sampling=Sampling(12, temperature=0.0), use_cache=use_cache)
    assert torch.equal(ours, theirs)
    assert len(set(ours[0, 9:].tolist())) > 2, "the test needs a model that does not repeat itself"


def test_a_padded_row_is_as_if_alone() -> None:
    model = model_of("llama")
    ids, mask = padded_batch()
    together = generate(model, input_ids=ids, attention_mask=mask, sampling=Sampling(8, temperature=0.0))
    for row, own, real in zip(together, ids, mask.bool(), strict=True):
        alone = generate(model, input_ids=own[real][None], sampling=Sampling(8, temperature=0.0))
        assert torch.equal(row[9:], alone[0, -8:])


def test_the_cache_is_used_and_equals_recomputing() -> None:
    model, widths = model_of("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: widths.append(args[0].shape[1]))
    sampled = [
        generate(model, input_ids=random_ids(2, 5), sampling=Sampling(10, top_k=20, top_p=0.9), use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*sampled)
    assert widths == [5] + [1] * 9 + list(range(5, 15))


def test_several_models_answer_with_their_mean_probability() -> None:
    pair, ids = [model_of("llama"), model_of("gpt2")], random_ids(2, 5)
    greedy = Sampling(6, temperature=0.0)
    first, second = (generate(model, input_ids=ids, sampling=greedy) for model in pair)
    assert not torch.equal(first, second)
    assert torch.equal(generate(pair, input_ids=ids, sampling=greedy, weights=[1.0, 1e-9]), first)
    assert torch.equal(generate(pair, input_ids=ids, sampling=greedy, weights=[1e-9, 2.0]), second)
    together = generate(pair, input_ids=ids, sampling=greedy, weights=[3.0, 1.0])
    for end in range(5, 11):
        with torch.no_grad():
            one, other = (model(input_ids=together[:, :end]).logits[:, -1].softmax(-1) for model in pair)
        assert torch.equal((0.75 * one + 0.25 * other).argmax(-1), together[:, end])


def test_an_own_module_without_cache_and_mask() -> None:
    config = Config(model=ModelConfig(spec="distllm.models.ngram_mlp:spec"), data=DataConfig(seq_len=16))
    model = filled(resolve_spec(config, vocab_size=300))
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    both = generate(model, input_ids=ids, attention_mask=mask, sampling=Sampling(5, temperature=0.0))
    alone = generate(model, input_ids=ids[:1, 3:], sampling=Sampling(5, temperature=0.0))
    assert torch.equal(both[0, 9:], alone[0, 6:])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_beyond_the_positions_the_text_slides(kind: str) -> None:
    model = model_of(kind, positions=16)
    out = generate(model, input_ids=random_ids(2, 12), sampling=Sampling(12, temperature=0.0))
    assert out.shape == (2, 24)
    for end in range(16, 24):
        with torch.no_grad():
            assert torch.equal(model(input_ids=out[:, end - 16 : end]).logits[:, -1].argmax(-1), out[:, end])
    long = generate(model, input_ids=random_ids(1, 40), sampling=Sampling(2, temperature=0.0))
    assert long.shape == (1, 42)


def test_seeds_and_the_global_random_state() -> None:
    model, ids = model_of("llama"), random_ids(2, 4)
    state = torch.get_rng_state()

    def sampled(seed: int) -> torch.Tensor:
        return generate(model, input_ids=ids, sampling=Sampling(10), generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sampled(1), sampled(1)) and not torch.equal(sampled(1), sampled(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off_while_it_runs_and_the_mode_comes_back() -> None:
    model = model_of("gpt2").train()
    outs = [generate(model, input_ids=random_ids(1, 4), sampling=Sampling(6, temperature=0.0)) for _ in range(2)]
    assert torch.equal(*outs) and model.training
    tokens = stream(model, input_ids=random_ids(1, 4), sampling=Sampling(6))
    next(tokens)
    tokens.close()
    assert model.training


def test_a_text_ends_at_its_end() -> None:
    model, ids = model_of("llama"), random_ids(3, 4)
    free = generate(model, input_ids=ids, sampling=Sampling(10, temperature=0.0))[:, 4:]
    end = int(free[0, 3])
    out = generate(model, input_ids=ids, sampling=Sampling(10, temperature=0.0), eos_id=[end, 299])[:, 4:]
    for row, plain in zip(out.tolist(), free.tolist(), strict=True):
        stop = plain.index(end) if end in plain else len(plain)
        assert row[: stop + 1] == plain[: stop + 1] and set(row[stop:]) <= {end}
    alone = generate(model, input_ids=ids[:1], sampling=Sampling(10, temperature=0.0), eos_id=end)
    assert alone.shape[1] == 4 + free[0].tolist().index(end) + 1


def test_wrong_input() -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, input_ids=torch.zeros(1, 0, dtype=torch.long), sampling=Sampling(1))
    with pytest.raises(ValueError, match="padded on the left"):
        mask = torch.tensor([[1, 1, 0]])
        generate(model, input_ids=random_ids(1, 3), attention_mask=mask, sampling=Sampling(1))


LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.5, 0.05, 0.05, 0.4]]).log()


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (2, 1.0, [[1, 3], [0, 3]]),
        (9, 1.0, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (0, 0.65, [[1, 3], [0, 3]]),
        (0, 0.45, [[1, 3], [0]]),
        (0, 0.01, [[1], [0]]),
        (3, 0.75, [[1, 3], [0, 3]]),  # of the three left, 0.4 and 0.3 of 0.9 make 0.78
    ],
)
def test_what_top_k_and_top_p_keep(top_k: int, top_p: float, kept: list[list[int]]) -> None:
    out = keep_likely(LOGITS, top_k=top_k, top_p=top_p)
    assert [row.isfinite().nonzero()[:, 0].tolist() for row in out] == kept
    assert torch.equal(out[out.isfinite()], LOGITS[out.isfinite()])


def test_sampling_has_the_right_frequencies() -> None:
    many = LOGITS[:1].expand(20_000, -1)
    source = torch.Generator().manual_seed(1)
    for temperature in (1.0, 0.5):
        chosen = choose(many, Sampling(1, temperature), generator=source)
        wanted = (LOGITS[0] / temperature).softmax(-1)
        shares = torch.bincount(chosen, minlength=4) / len(chosen)
        torch.testing.assert_close(shares, wanted, atol=0.015, rtol=0)
    assert choose(LOGITS, Sampling(1, 0.0), generator=source).tolist() == [1, 0]


def test_ids_that_the_tokenizer_has_not_are_never_chosen() -> None:
    out = generate(model_of("llama"), input_ids=random_ids(4, 4), sampling=Sampling(20), vocab_size=50)
    assert out[:, 4:].max() < 50


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE that cuts Chinese characters and emoji into bytes."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["return the value of the function " * 9], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def test_streamed_text_never_cuts_a_character(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    text = "the värde 一二三 🙂🙃 of function\n" * 12
    ids = tokenizer(text)["input_ids"]
    pieces = list(decode_stream(tokenizer, iter(ids)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and len(pieces) > 50


@pytest.mark.parametrize("seed", range(5))
def test_streamed_bytes_that_are_no_text(tokenizer: transformers.PreTrainedTokenizerFast, seed: int) -> None:
    ids = torch.randint(1, len(tokenizer), (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    assert "".join(decode_stream(tokenizer, ids)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_streamed_bytes_of_a_byte_fallback_tokenizer() -> None:
    """Llama's own kind shows one replacement character for each byte of an unfinished character."""
    inner = Tokenizer(models.BPE(vocab={f"<0x{i:02X}>": i for i in range(256)}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    assert list(decode_stream(tokenizer, "一🙂a".encode())) == ["一", "🙂", "a"]
    # Bytes that are no text do not stop the stream for good.
    assert len("".join(decode_stream(tokenizer, "一".encode() + b"\xff" * 9))) == 12
    assert len(list(decode_stream(tokenizer, "一".encode() + b"\xff" * 30))) > 10


def test_prompts_to_text(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    ids, mask = encode_prompts(tokenizer, ["the function", ""], device=torch.device("cpu"))
    assert mask[1].tolist() == [0] * (ids.shape[1] - 1) + [1] and ids[1, -1] == tokenizer.eos_token_id
    model, device = model_of("llama"), torch.device("cpu")
    texts = sample_text(model, tokenizer=tokenizer, prompts=["the function", ""], sampling=Sampling(12), device=device)
    assert len(texts) == 2 and all(texts) and not any("<|end|>" in text for text in texts)
    again = sample_text(model, tokenizer=tokenizer, prompts=["the function", ""], sampling=Sampling(12), device=device)
    assert Counter(again) == Counter(texts)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="an empty prompt needs"):
        encode_prompts(tokenizer, [""], device=device)


def test_ranks_that_share_a_model_all_go_to_the_end() -> None:
    """A rank whose texts ended early would leave the others waiting; the text is the same."""
    tokenizer = byte_tokenizer()
    model, calls = model_of("llama"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    free = generate(model, input_ids=torch.tensor([[5]]), sampling=Sampling(10, temperature=0.0), vocab_size=256)[0, 1:].tolist()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[3])
    arguments = {"tokenizer": tokenizer, "prompts": [tokenizer.decode([5])], "sampling": Sampling(10, temperature=0.0)}
    texts = []
    for to_the_end in (False, True):
        del calls[:]
        texts.append(sample_text(model, device=torch.device("cpu"), to_the_end=to_the_end, **arguments))
        assert len(calls) == (10 if to_the_end else free.index(free[3]) + 1)
    assert texts[0] == texts[1]


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As sentencepiece's: a word begins with its space, which a text's first loses; every text is put between <s> and </s>."""
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "▁the": 3, "▁cat": 4, "▁sat": 5, "▁on": 6, "ting": 7}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_text_that_goes_on_keeps_the_space_before_its_first_word() -> None:
    tokenizer = word_tokenizer()
    cases = (([0, 3], [4, 5], " cat sat"), ([0, 5], [7, 6], "ting on"), ([0], [4, 5], "cat sat"), ([], [4], "cat"))
    for after, ids, text in cases:
        assert "".join(decode_stream(tokenizer, ids, after=after)) == text
    model = model_of("llama")
    texts = sample_text(
        model, tokenizer=tokenizer, prompts=["the cat", "the"], sampling=Sampling(9, temperature=0.0), device=torch.device("cpu")
    )
    assert all(not text or text.startswith((" ", "ting")) for text in texts) and any(texts)


def test_a_prompt_goes_on_where_it_ends_and_a_chat_has_its_special_tokens_once() -> None:
    tokenizer, device = word_tokenizer(), torch.device("cpu")
    assert encode_prompts(tokenizer, ["the cat"], device=device)[0].tolist() == [[0, 3, 4]]
    assert encode_prompts(tokenizer, ["the</s>"], device=device)[0].tolist() == [[0, 3, 1]]
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    prompt = prompt_text([{"role": "user", "content": "the cat"}], tokenizer)
    assert encode_prompts(tokenizer, [prompt], device=device, chat=True)[0].tolist() == [[0, 3, 4]]

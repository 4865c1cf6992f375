"""Beam search against trying everything, against transformers' own, in batches against alone, cached against recomputed."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from distllm.beam import Writing, beam_search, translate
from distllm.config.schema import DecodeConfig

PAD, START, END, MASK = 0, 1, 2, 3
BART: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "forced_eos_token_id": None,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.1},
    "bart": BART,
    "marian": BART,
}  # fmt: skip


@cache
def model_of(kind: str, *, vocab: int = 24, seed: int = 2) -> Any:
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocab, **SIZES[kind], **ids)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        return taught(model, vocab=vocab, seed=seed)


def taught(model: nn.Module, *, vocab: int, seed: int, steps: int = 40) -> nn.Module:
    """A model that half knows how to copy: one with random weights writes one token for ever, or nothing."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(steps):
        lengths = torch.randint(1, 6, (16,), generator=torch.Generator().manual_seed(step)).tolist()
        ids, mask = sources(lengths, vocab=vocab, seed=100 * seed + step)
        labels = torch.cat([ids, torch.zeros(16, 1, dtype=torch.long)], dim=1)
        labels[range(16), lengths] = END
        decoder = torch.cat([torch.full((16, 1), START), labels[:, :-1]], dim=1)
        out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD).backward()
        optimizer.step()
    return model.eval()


def sources(lengths: list[int], *, vocab: int = 24, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, vocab, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def writing(end: int = END, **more: Any) -> Writing:
    return Writing(start=START, end=end, pad=PAD, forbid=(PAD, START, MASK), **more)


class Attending(nn.Module):
    """A small encoder-decoder of one's own, with the three functions for one step at a time."""

    def __init__(self, vocab: int = 24, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.cell = nn.GRUCell(2 * width, width)
        self.head = nn.Linear(width, vocab)
        self.steps = 0

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.embedding(input_ids), attention_mask

    def first_state(self, memory: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return ((memory[0] * memory[1][..., None]).sum(1).tanh(),)

    def decode_step(self, memory: Any, state: Any, tokens: torch.Tensor) -> Any:
        self.steps += 1
        keys, mask = memory
        scores = (keys @ state[0][..., None])[..., 0].masked_fill(mask == 0, -torch.inf)
        context = (scores.softmax(-1)[:, None] @ keys)[:, 0]
        hidden = self.cell(torch.cat([self.embedding(tokens), context], dim=-1), state[0])
        return self.head(hidden), (hidden,)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        memory = self.encode(input_ids, attention_mask)
        state, rows = self.first_state(memory), []
        for tokens in decoder_input_ids.T:
            logits, state = self.decode_step(memory, state, tokens)
            rows.append(logits)
        return torch.stack(rows, dim=1)


@cache
def own_model(seed: int = 0, vocab: int = 24) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return taught(Attending(vocab), vocab=vocab, seed=seed)


@torch.no_grad()
def all_targets(
    models: list[Any], ids: torch.Tensor, mask: torch.Tensor, *, longest: int, vocab: int
) -> dict[tuple[int, ...], float]:
    """Every target of one source with its log probability, by the mean of the models' probabilities."""
    letters = [i for i in range(vocab) if i not in (PAD, START, END, MASK)]
    bodies = torch.tensor(list(itertools.product(letters, repeat=longest - 1)))
    decoder = torch.cat([torch.full((len(bodies), 1), START), bodies], dim=1)
    inputs = {"input_ids": ids.expand(len(bodies), -1), "attention_mask": mask.expand(len(bodies), -1)}
    outs = [model(**inputs, decoder_input_ids=decoder) for model in models]
    mean = torch.stack([(o if isinstance(o, torch.Tensor) else o.logits).softmax(-1) for o in outs]).mean(0).log()
    found = {}
    for row, body in enumerate(bodies.tolist()):
        for length in range(1, longest + 1):
            for last in [END, *letters] if length == longest else [END]:
                target = [*body[: length - 1], last]
                found[tuple(target)] = mean[row, range(length), target].sum().item()
    return found


def test_a_wide_beam_finds_the_best_of_all() -> None:
    models = [model_of("bart", vocab=7, seed=1), model_of("t5", vocab=7, seed=1), own_model(vocab=7)]
    ids, mask = sources([5, 3, 4], vocab=7)
    lengths = set()
    for several in ([models[0]], [models[1]], [models[2]], models):
        every = [all_targets(several, ids[row : row + 1], mask[row : row + 1], longest=4, vocab=7) for row in range(3)]
        for penalty in (0.0, 1.0, 2.0):
            decode = DecodeConfig(beams=40, length_penalty=penalty, max_tokens=4)
            ours = beam_search(several, input_ids=ids, attention_mask=mask, writing=writing(), decode=decode)
            for row, found in zip(ours, every, strict=True):
                best = max(found, key=lambda target: found[target] / len(target) ** penalty)
                assert row == [token for token in best if token != END]
                lengths.add(len(row))
    assert len(lengths) > 1, "the test needs targets of several lengths"


@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (4, 1.0), (4, 0.0), (3, 2.0)])
def test_beams_equal_those_of_transformers(kind: str, beams: int, penalty: float) -> None:
    ids, mask = sources([9, 4, 7, 2, 6])
    lengths = set()
    model = model_of(kind)
    for end in (END, 4, 7, 10):  # each as the end gives targets of other lengths
        theirs = model.generate(
            input_ids=ids, attention_mask=mask, num_beams=beams, length_penalty=penalty, max_new_tokens=20, do_sample=False,
            eos_token_id=end, early_stopping=False, suppress_tokens=[PAD, START, MASK], bad_words_ids=None,
        )  # fmt: skip
        decode = DecodeConfig(beams=beams, length_penalty=penalty, max_tokens=20)
        ours = beam_search(model, input_ids=ids, attention_mask=mask, writing=writing(end), decode=decode)
        for row, other in zip(ours, theirs[:, 1:].tolist(), strict=True):
            cut = next((i for i, token in enumerate(other) if token in (end, PAD)), len(other))
            assert row == other[:cut]
            lengths.add(len(row))
    assert len(lengths) > 2, "the test needs targets of several lengths"


@pytest.mark.parametrize("make", [lambda: model_of("t5"), lambda: model_of("bart"), own_model])
def test_batch_alone_cached_and_recomputed_agree(make: Any) -> None:
    model = make()
    ids, mask = sources([9, 4, 7, 2, 6])
    lengths = set()
    for end in (END, 4, 7, 10):
        arguments: dict[str, Any] = {"writing": writing(end), "decode": DecodeConfig(beams=3, max_tokens=12)}
        together = beam_search(model, input_ids=ids, attention_mask=mask, **arguments)
        lengths |= {len(row) for row in together}
        for more in ({"use_cache": False}, {"to_the_end": True}):
            assert beam_search(model, input_ids=ids, attention_mask=mask, **arguments, **more) == together
        for row, length in enumerate(mask.sum(1).tolist()):
            own = {"input_ids": ids[row : row + 1, :length], "attention_mask": mask[row : row + 1, :length]}
            assert beam_search(model, **own, **arguments) == [together[row]]
    assert len(lengths) > 2, "the test needs targets of several lengths"


def test_sources_that_are_done_leave_the_batch_and_the_encoder_runs_once() -> None:
    model, rows, encoded = model_of("t5"), [], []
    model.decoder.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    ids, mask = sources([9, 4, 7, 2, 6])
    decode = DecodeConfig(beams=3, max_tokens=20, length_penalty=0.0)
    left = set()
    for end in (END, 4, 7, 10):
        rows.clear(), encoded.clear()
        beam_search(model, input_ids=ids, attention_mask=mask, writing=writing(end), decode=decode)
        assert rows[0] == 5 and rows[1:] == sorted(rows[1:], reverse=True) and encoded == [1]
        left |= set(rows[1:])
        rows.clear()
        beam_search(model, input_ids=ids, attention_mask=mask, writing=writing(end), decode=decode, to_the_end=True)
        assert rows == [5] + [15] * 19
    assert len(left) > 2, left


def test_a_module_of_ones_own_is_stepped_where_it_can() -> None:
    model = own_model()
    ids, mask = sources([5, 3])
    decode = DecodeConfig(beams=2, max_tokens=6, length_penalty=0.0)
    model.steps = 0
    beam_search(model, input_ids=ids, attention_mask=mask, writing=writing(), decode=decode)
    stepped, model.steps = model.steps, 0
    beam_search(model, input_ids=ids, attention_mask=mask, writing=writing(), decode=decode, use_cache=False)
    assert stepped <= 6 and model.steps == stepped * (stepped + 1) // 2


def test_weights_of_an_ensemble() -> None:
    pair = [model_of("t5"), model_of("bart")]
    ids, mask = sources([5, 3, 8])
    decode = DecodeConfig(beams=3, max_tokens=8)

    def found(models: Any, weights: tuple[float, ...] = ()) -> list[list[int]]:
        return beam_search(models, input_ids=ids, attention_mask=mask, writing=writing(), decode=decode, weights=weights)

    first, second = (found(model) for model in pair)
    assert first != second
    assert found(pair, (1.0, 1e-9)) == first and found(pair, (1e-9, 5.0)) == second
    assert found([pair[0], pair[0]]) == first


def test_what_is_never_written_and_the_longest() -> None:
    model = model_of("bart").train()
    ids, mask = sources([5, 3, 8, 4])
    decode = DecodeConfig(beams=3, max_tokens=12)
    found = beam_search(model, input_ids=ids, attention_mask=mask, writing=writing(vocab_size=9, max_len=3), decode=decode)
    assert all(3 < token < 9 for row in found for token in row) and max(map(len, found)) == 3
    assert model.training
    liked = found[0][0]
    never = Writing(start=START, end=END, pad=PAD, forbid=(PAD, START, MASK, liked), vocab_size=9, max_len=3)
    other = beam_search(model, input_ids=ids, attention_mask=mask, writing=never, decode=decode)
    assert all(liked not in row for row in other)


def test_many_sources_come_in_batches_and_none_is_lost() -> None:
    model = model_of("t5")
    lengths = [3, 9, 1, 4, 4, 8, 2]
    ids, _ = sources(lengths)
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    decode, device = DecodeConfig(beams=2, max_tokens=8), torch.device("cpu")
    parts = list(translate(model, rows, writing=writing(), decode=decode, device=device, batch=3))
    assert [sorted(part) for part in parts] == [[1, 3, 5], [0, 4, 6], [2]]
    merged = {number: target for part in parts for number, target in part.items()}
    for number, row in enumerate(rows):
        alone = translate(model, [row], writing=writing(), decode=decode, device=device)
        assert next(alone) == {0: merged[number]}

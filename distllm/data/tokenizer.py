"""Tokenizers: a byte-level BPE trained here, characters, bytes, or one of Hugging Face's.

Each is saved as a Hugging Face folder, which plain transformers loads.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from distllm.config.errors import DataError
from distllm.config.machine import reachable
from distllm.config.places import missing
from distllm.config.roles import Roles
from distllm.config.schema import Config, TokenizerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"
PAD, BEGIN, MASK = "<pad>", "<s>", "<mask>"
log = logging.getLogger("distllm.data")


def roles_of(tokenizer: Any) -> Roles:
    """The ids of a transformers tokenizer's special tokens by what they are for.

    Raises:
        DataError: the tokenizer marks no end.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer marks no end of a document; set its eos_token and save it again")
    begin, separator = tokenizer.cls_token_id, tokenizer.sep_token_id
    return Roles(
        eos=eos,
        pad=tokenizer.pad_token_id,
        begin=tokenizer.bos_token_id if begin is None else begin,
        separator=eos if separator is None else separator,
        mask=tokenizer.mask_token_id,
    )


def never_written(roles: Roles, *, start: int | None) -> tuple[int, ...]:
    """The ids that no text written by an encoder-decoder holds, rising.

    Args:
        roles: of its tokenizer.
        start: what its decoder's input begins with.
    """
    return tuple(sorted({i for i in (roles.pad, roles.begin, roles.mask, start) if i is not None} - {roles.eos}))


def check_roles(roles: Roles, config: Config) -> None:
    """Refuse a tokenizer that lacks a token which the task needs.

    Args:
        roles: of the run's tokenizer.
        config: `task`, `data.augment` and `data.tokenizer` are read.

    Raises:
        DataError: there is no mask token or no padding token, and the task needs one.
    """
    task = config.task
    masks = task.kind in ("masked_lm", "translation_lm") or any(head.kind == "masked_lm" for head in task.tasks.values())
    pads = task.kind not in ("causal_lm", "sft", "masked_lm")  # those three are packed
    what = None
    if masks and roles.mask is None:
        what = f"has no mask token, which task.kind={task.kind} needs"
    elif config.data.augment.mask and roles.mask is None:
        what = f"has no mask token, which data.augment.mask={config.data.augment.mask} needs"
    elif pads and roles.pad is None:
        what = f"has no padding token, which task.kind={task.kind} needs"
    if what is None:
        return
    name = "mask_token" if "mask token" in what else "pad_token (of a decoder that classifies, its eos_token will do)"
    choice = config.data.tokenizer
    key = f"data.tokenizer.path={choice.path}" if choice.kind == "hf" else f"data.tokenizer.kind={choice.kind}"
    raise DataError(f"{key}: {what}; set its {name} and save it again, or use data.tokenizer.kind=bpe")


def train_bpe(texts: Iterable[str], *, vocab_size: int, roles: bool = False) -> Tokenizer:
    """Learn a byte-level BPE with GPT-2's pre-tokenizer; the same text gives the same merges whatever the threads.

    Args:
        texts: the documents to learn from.
        vocab_size: ids in all: the end-of-document token (0), the 256 bytes and the merges; fewer if the text is small.
        roles: also tokens for padding (1), the beginning (2) and the mask (3).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD, BEGIN, MASK] if roles else [EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        log.warning("the text gives a BPE of %d ids, not data.tokenizer.vocab_size=%d: no more pairs to join", found, vocab_size)
    return tokenizer


def chars(texts: Iterable[str], *, roles: bool = False) -> Tokenizer:
    """One id a character seen, in the order of code points, then the end-of-document token, then those of `roles`.

    A character that was never seen becomes the end-of-document token, as in GPT-2's tokenizer, which has no other.
    """
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    vocab = {character: i for i, character in enumerate(sorted(seen))}
    tokenizer = Tokenizer(models.WordLevel({**vocab, EOS: len(vocab)}, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(_specials(roles))
    return tokenizer


def byte_letters() -> list[str]:
    """The letter that stands for each of the 256 bytes in a byte-level vocabulary (GPT-2's table)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in set(visible) else chr(next(hidden)) for b in range(256)]


def bytes_(*, roles: bool = False) -> Tokenizer:
    """The id of a byte is its value; 256 is the end-of-document token, 257 to 259 are those of `roles`."""
    vocab = {letter: i for i, letter in enumerate(byte_letters())}
    tokenizer = Tokenizer(models.BPE({**vocab, EOS: 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_specials(roles))
    return tokenizer


def _specials(roles: bool) -> list[AddedToken]:
    """Special tokens in the order of their ids; those that the vocabulary lacks get the ids after it."""
    return [AddedToken(token, special=True, normalized=False) for token in ([EOS, PAD, BEGIN, MASK] if roles else [EOS])]


def wrap(tokenizer: Tokenizer, *, has_unknown: bool, roles: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers knows it; decoding gives back the text as it was.

    Args:
        tokenizer: with the special tokens in its vocabulary.
        has_unknown: what it does not know becomes the end-of-document token.
        roles: name the tokens for padding, beginning and mask. Plain transformers then puts the special tokens around a
            text as distllm does: `<s> text <|endoftext|>`, for a pair `<s> text <|endoftext|> text <|endoftext|>`.
    """
    from transformers import PreTrainedTokenizerFast

    names: dict[str, Any] = {"unk_token": EOS} if has_unknown else {}
    if roles:
        names |= {"sep_token": EOS, "pad_token": PAD, "bos_token": BEGIN, "cls_token": BEGIN, "mask_token": MASK}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {EOS}",
            pair=f"{BEGIN} $A {EOS} $B:1 {EOS}:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BEGIN, EOS)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False, **names
    )  # fmt: skip


def load_hf(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Load a tokenizer by folder, `tokenizer.json` or hub name, with an end-of-document token.

    Raises:
        DataError: it is not there, has no fast version, or marks no end.
    """
    import huggingface_hub
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = config.path
    if not path:
        raise DataError("data.tokenizer.path: kind=hf needs a folder, a tokenizer.json or a hub name")
    try:
        if os.path.isfile(path):
            loaded = PreTrainedTokenizerFast(tokenizer_file=path)
        else:
            cached = os.path.isdir(path) or not reachable(huggingface_hub.constants.ENDPOINT)
            loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=cached)
    except Exception as error:  # the hub, tokenizers and json have no common error class
        if not os.path.exists(path):
            rule = "no such folder, and the hub has no such tokenizer or cannot be reached"
            raise DataError(missing("data.tokenizer.path", path, what=rule, wanted=Path.exists)) from None
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"data.tokenizer.path={path}: no tokenizer can be loaded: {reason}") from None
    if not loaded.is_fast:
        raise DataError(f"data.tokenizer.path={path}: has no fast version (tokenizer.json); convert it with transformers first")
    if loaded.eos_token is None:
        ends = [t for t in (EOS, "</s>", "[SEP]", "<|end_of_text|>") if t in loaded.get_vocab()]
        if not ends:
            raise DataError(f"data.tokenizer.path={path}: marks no end of a document; set its eos_token and save it again")
        loaded.eos_token = ends[0]
    return loaded


def make_tokenizer(config: TokenizerConfig, texts: Iterator[str], folder: Path, *, roles: bool = False) -> None:
    """Make the tokenizer that `config` asks for and save it as a Hugging Face folder.

    Args:
        config: which one.
        texts: documents, read as far as needed (bpe: what to learn from; chars: all).
        folder: where; it appears only when it is whole.
        roles: give one that is made here tokens for padding, beginning and mask too; kind=hf keeps what it has.

    Raises:
        DataError: there is nothing to learn from, or no such tokenizer.
    """
    if config.kind == "hf":
        made = load_hf(config)
    elif config.kind == "bytes":
        made = wrap(bytes_(roles=roles), has_unknown=False, roles=roles)
    else:
        first = next(texts, None)
        if first is None:
            raise DataError(f"data.tokenizer.kind={config.kind} learns from text, and no source has any; use kind=hf or bytes")
        every = chain([first], texts)
        by_characters = config.kind == "chars"
        tokenizer = chars(every, roles=roles) if by_characters else train_bpe(every, vocab_size=config.vocab_size, roles=roles)
        made = wrap(tokenizer, has_unknown=by_characters, roles=roles)
    staging = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    made.save_pretrained(str(staging))
    if not (staging / "tokenizer.json").is_file():
        raise DataError(f"data.tokenizer.path={config.path}: cannot be saved as tokenizer.json; use a fast tokenizer")
    with contextlib.suppress(FileExistsError):
        staging.rename(folder)


def id_count(tokenizer: Any) -> int:
    """The number of rows that an embedding needs for a tokenizer: its largest id and one, as its ids may have gaps.

    Args:
        tokenizer: of `tokenizers` or of transformers; their `len` counts the tokens, gaps left out.
    """
    return int(max(tokenizer.get_vocab().values())) + 1


def folder_digest(folder: Path) -> str:
    """The digest of what decides the ids: `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        DataError: the folder has no tokenizer.json.
    """
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"{folder}: no tokenizer.json in it; the store cannot be used without its tokenizer, prepare it again")
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def spec_digest(config: TokenizerConfig, *, roles: bool = False) -> str:
    """What names a tokenizer before it is made: its settings, and for a local one the content of its files.

    Args:
        config: which one.
        roles: as in `make_tokenizer`.
    """
    if config.kind == "bpe":
        facts = f"bpe {config.vocab_size} {config.train_bytes}"
    elif config.kind == "hf" and config.path and os.path.isdir(config.path):
        files = sorted(f for f in Path(config.path).glob("*token*") if f.is_file())  # a run keeps its own in a folder `tokenizer`
        facts = "hf " + " ".join(hashlib.sha256(f.read_bytes()).hexdigest() for f in files)
    elif config.kind == "hf" and config.path and os.path.isfile(config.path):
        facts = "hf " + hashlib.sha256(Path(config.path).read_bytes()).hexdigest()
    else:
        facts = f"{config.kind} {config.path if config.kind == 'hf' else ''}"
    if roles and config.kind != "hf":
        facts += " roles"
    return hashlib.sha256(facts.encode()).hexdigest()

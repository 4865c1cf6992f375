"""The options of `data`: where text comes from, and how it becomes samples. `schema.py` says what holds of all sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distllm.config.section import Fraction, NonNegative, Positive, Section, Share


class SourceConfig(Section):
    """One source of text or tokens."""

    kind: Literal["embedded", "text", "jsonl", "csv", "tsv", "parquet", "hub", "parallel", "tokens"] = "embedded"
    """embedded: the source code of the running Python's standard library. tsv: a table with tabs, without quoting. parallel: two text files, line by line. tokens: a Megatron .bin/.idx pair, already tokenised."""
    path: str | None = None
    """A path, a glob, or a hub name; for tokens the path without `.bin`. Relative to the working folder."""
    target_path: str | None = None
    """For parallel: the file whose line n is the target of line n of `path`."""
    name: str | None = None
    """For hub: the name of the data set's configuration."""
    split: str = "train"
    """For hub: the split to read."""
    column: str = "text"
    """For tables (jsonl, csv, tsv, parquet, hub): the column that holds the text, or the prompt."""
    pair_column: str | None = None
    """For tables: the column of the second text of a pair."""
    label_column: str = "label"
    """For tables: the column of the label (classification) or number (regression)."""
    target_column: str = "target"
    """For tables: the column of the target text (seq2seq, translation_lm) or the response (sft)."""
    messages_column: str | None = None
    """For sft in jsonl and parquet: the column of a chat, a list of {role, content}; then `column` and `target_column` are not read."""
    names: list[str] = []
    """For csv and tsv without a header line: the names of the columns."""
    prefix: str = ""
    """Put before every text, as T5 names its task."""
    task: str | None = None
    """For multi_task: which of `task.tasks` this source is for."""
    document: Literal["file", "line", "paragraph"] = "file"
    """For text: what one document is. A paragraph ends at an empty line."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """The share of this source in the mixture, relative to the others' weights. With one source it changes nothing."""
    hint: str | None = None
    """What to tell the user when the path does not exist, such as where to get the file."""


class TokenizerConfig(Section):
    """How text becomes token ids."""

    kind: Literal["bpe", "chars", "bytes", "hf"] = "bpe"
    """bpe: a byte-level BPE trained on the sources. chars: the characters seen. bytes: the 256 bytes. hf: a Hugging Face tokenizer."""
    vocab_size: Annotated[int, Field(ge=257)] = 8192
    """For bpe: the number of ids, special tokens included."""
    path: str | None = None
    """For hf: a folder, a tokenizer.json, or a hub name."""
    train_bytes: Positive = 100_000_000
    """For bpe: how many bytes of text to learn the merges from, at most."""


class CleanConfig(Section):
    """Cleaning of texts before they are tokenised; off unless asked for."""

    unicode: Literal["none", "NFC", "NFKC", "NFD", "NFKD"] = "none"
    """The Unicode normal form."""
    lowercase: bool = False
    """Write everything in lower case. What the model is asked later, by prediction or evaluation, is cleaned in the same way."""
    control: bool = False
    """Drop control characters but tab and newline, and zero-width ones."""
    whitespace: bool = False
    """Make every run of white space one space, and trim the ends."""
    html: bool = False
    """Drop tags, scripts and styles, and resolve entities."""


class DedupConfig(Section):
    """Removal of repeated examples or documents from the training sources."""

    exact: bool = False
    """Keep the first of equal texts (after cleaning; the pair or target counts as part of the text)."""
    near: Fraction = 0.0
    """Also drop a text whose words, in runs of `ngram`, overlap an earlier one's by at least this Jaccard similarity (MinHash, Broder 1997); 0 does not."""
    ngram: Positive = 3
    """Words of one run."""


class AugmentConfig(Section):
    """Changes of training texts, each a pure function of (seed, sample, epoch); a probability of 0 is off."""

    delete: Share = 0.0
    """The probability that a token is dropped; at least one stays."""
    swap: Share = 0.0
    """The probability that a token changes places with its right neighbour."""
    insert: Share = 0.0
    """The probability that a random token of the same text is put after a token."""
    mask: Share = 0.0
    """The probability that a token becomes the mask token."""
    synonym: Share = 0.0
    """The probability that a word which `synonyms` lists becomes one of its synonyms."""
    synonyms: str | None = None
    """A file of synonyms: a line `word<TAB>synonym<TAB>synonym...`."""
    back_translation: Fraction = 0.0
    """The probability that a text is replaced by its translation back and forth (a classifier's text), or a source by the translation of its target (seq2seq)."""
    translators: list[str] = []
    """The runs or model folders that translate, applied one after another: there and back for a classifier, target to source for seq2seq."""


class ValidationConfig(Section):
    """The held-out part: a pure function of the seed."""

    by: Literal["document", "position"] = "document"
    """document: whole documents chosen by the seed. position: the last part of the tokens."""
    fraction: Fraction = 0.05
    """The share held out of every source: of the documents, or of the tokens."""
    sources: list[SourceConfig] = []
    """Separate sources for validation; then nothing is held out of the training sources."""


class DataConfig(Section):
    """From text to samples."""

    sources: list[SourceConfig] = [SourceConfig()]
    """Where text comes from; several make a weighted mixture."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation: ValidationConfig = ValidationConfig()
    clean: CleanConfig = CleanConfig()
    dedup: DedupConfig = DedupConfig()
    augment: AugmentConfig = AugmentConfig()
    seq_len: Positive = 256
    """Tokens of one sample; of an example (a labelled text, a sentence pair) the most tokens of its input, or of its target."""
    truncate: Literal["refuse", "head", "tail", "middle", "window"] = "refuse"
    """What becomes of an example that is longer: it is refused before training; its head, its tail, or its head and tail (the middle falls out) are kept; or it is cut into overlapping windows, whose predictions are averaged."""
    stride: Positive = 64
    """For window: tokens that a window shares with the one before."""
    cross_documents: bool = True
    """Whether attention may look across document boundaries inside a packed sample."""
    shuffle: bool = True
    """Shuffle samples in every epoch; off reads them in order."""
    store: str = "data_store"
    """The folder for tokenised sources, shared between runs; each source gets a sub-folder named by its digest."""
    workers: NonNegative = 0
    """Processes that tokenise; 0 is one a core. The result does not depend on it."""
    prefetch: Positive = 16
    """Steps of data prepared ahead of the training step, fewer where they take more than 256 MiB."""

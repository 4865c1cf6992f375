"""Every option of distllm: typed, frozen, and documented under each field.

This file holds the shape of a config and the rules that concern one value. What two values cannot be together is in
`check.py`; where values come from is in `load.py`. It imports no torch, so that a wrong config is told at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Scalar = bool | int | float | str | None
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen part of the config that refuses keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelConfig(Section):
    """The model: exactly one of `type`, `path` and `spec`."""

    type: str | None = None
    """A causal language model of transformers by its `model_type` (llama, qwen3, gpt2, ...), with random weights."""
    sizes: dict[str, Scalar | list[Scalar]] = {}
    """Values for the model's own transformers config (hidden_size, num_hidden_layers, ...), strictly checked. With `path`, they change the loaded config."""
    path: str | None = None
    """A local folder or a hub name with weights in safetensors."""
    spec: str | None = None
    """The import path, `package.module:function`, of a function that returns a ModelSpec: a module of your own."""
    spec_args: dict[str, Scalar | list[Scalar]] = {}
    """Arguments given to the `spec` function by keyword."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a hub model. Off unless you ask for it."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention kernel of a transformers model; auto is sdpa where the family has it."""


class SourceConfig(Section):
    """One source of text or tokens."""

    kind: Literal["embedded", "text", "jsonl", "csv", "parquet", "hub", "tokens"] = "embedded"
    """embedded: the source code of the running Python's standard library. tokens: a Megatron .bin/.idx pair, already tokenised."""
    path: str | None = None
    """A path, a glob, or a hub name; for tokens the path without `.bin`. Relative to the working folder."""
    name: str | None = None
    """For hub: the name of the data set's configuration."""
    split: str = "train"
    """For hub: the split to read."""
    column: str = "text"
    """For jsonl, csv, parquet and hub: the column that holds the text."""
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
    seq_len: Positive = 256
    """Tokens of one sample."""
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


class LayoutConfig(Section):
    """How the model and the batch are spread over ranks: the sizes of the mesh axes, outermost first."""

    pp: Positive = 1
    """Pipeline-parallel stages."""
    dp_replicate: Positive | Literal["auto"] = 1
    """Data-parallel replicas with whole gradients all-reduced (DDP; with dp_shard > 1: HSDP)."""
    dp_shard: Positive | Literal["auto"] = "auto"
    """Data-parallel ranks over which parameters, gradients and optimizer state are sharded (FSDP2). auto: what the other axes leave."""
    cp: Positive = 1
    """Context-parallel ranks, over which a sequence is cut."""
    tp: Positive = 1
    """Tensor-parallel ranks, over which matrices are cut."""
    ep: Positive = 1
    """Expert-parallel ranks, over which experts are spread."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a block after its forward pass and gather them again for its backward pass."""


class PrecisionConfig(Section):
    """Number formats. Master weights, optimizer state and gradient reductions stay fp32 in every mode."""

    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The format of the matrix products. fp16 comes with a dynamic loss scale."""
    initial_loss_scale: Annotated[float, Field(gt=0.0)] = 65536.0
    """fp16: the loss scale to start with."""
    loss_scale_window: Positive = 2000
    """fp16: finite steps in a row after which the scale doubles."""
    tf32: bool = False
    """Let fp32 matrix products use TF32 on GPUs that have it: faster, with 10 bits of mantissa."""


class ActivationConfig(Section):
    """Activation checkpointing: recompute blocks in the backward pass instead of keeping their activations."""

    mode: Literal["none", "full", "every"] = "none"
    """full: every block. every: each k-th block."""
    every: Positive = 2
    """For mode `every`: k."""


class OptimConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "adam", "sgd", "rmsprop", "lion"] = "adamw"
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """The peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """For adamw, adam and lion."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """For adamw, adam and rmsprop."""
    momentum: Fraction = 0.9
    """For sgd and rmsprop."""
    alpha: Fraction = 0.99
    """For rmsprop: the decay of the squared-gradient average."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decay of the matrices of linear layers, never of biases, norms and embeddings: decoupled (p -= lr * weight_decay * p) in adamw and lion, an L2 gradient in adam, sgd and rmsprop."""
    decay_embeddings: bool = False
    """Decay embeddings too."""
    l1: Annotated[float, Field(ge=0.0)] = 0.0
    """Adds l1 * sign(p) to the gradient of decayed parameters, after clipping."""
    l2: Annotated[float, Field(ge=0.0)] = 0.0
    """Adds l2 * p to the gradient of decayed parameters, after clipping (classic L2, not decoupled)."""
    clip: Annotated[float, Field(ge=0.0)] = 1.0
    """The largest global gradient norm; 0 does not clip."""
    implementation: Literal["auto", "fused", "foreach", "loop"] = "auto"
    """How the update runs; auto is fused where torch has it for the device, else foreach."""


class ScheduleConfig(Section):
    """The learning rate as a pure function of the step."""

    name: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """wsd: warm-up, stable, decay."""
    warmup: NonNegative | Literal["auto"] = "auto"
    """Steps of linear warm-up. auto: 100, or a tenth of a run that is shorter than 1,000 steps."""
    final: Fraction = 0.1
    """For linear, cosine and wsd: the last learning rate as a share of the peak."""
    decay_fraction: Fraction = 0.2
    """For wsd: the share of the steps, at the end, in which the rate falls linearly."""


class TrainConfig(Section):
    """The step and the loop."""

    steps: Positive = 1000
    """Optimizer steps of the whole run."""
    micro_batch: Positive = 8
    """Samples that one rank takes through the model at once."""
    accumulation: Positive | Literal["auto"] = "auto"
    """Micro-batches a rank adds up before it updates the weights; auto follows from global_batch, else 1."""
    global_batch: Positive | None = None
    """Samples of one optimizer step over all ranks: micro_batch x accumulation x data-parallel size. Unset: it follows."""
    max_skips: Positive = 10
    """Steps in a row with a loss or gradient that is not finite after which the run stops."""
    log_every: Positive = 10
    eval_every: NonNegative = 100
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_batches: NonNegative = 0
    """Micro-batches a rank evaluates each time; 0 takes the whole validation set. The evaluation after the last step always takes it whole."""
    sample_every: NonNegative = 0
    """Steps between text samples; 0 samples only at the end."""
    sample_prompts: list[str] = [""]
    """What the samples continue; an empty prompt starts from the end-of-document token."""
    sample_tokens: NonNegative = 64
    """New tokens of a sample; 0 does not sample."""
    sample_temperature: Annotated[float, Field(ge=0.0)] = 0.8
    """0 is greedy."""
    threads: NonNegative = 0
    """CPU threads of one rank; 0 shares the cores among the local ranks."""
    compile: bool = False
    """Compile each block with torch.compile."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms: repeatable bits on GPUs too, slower."""
    timeout_s: Positive = 120
    """Seconds after which a collective that a rank does not join is an error."""


class CheckpointConfig(Section):
    """What is saved, when, and what is kept."""

    every: NonNegative = 500
    """Steps between checkpoints; 0 saves only at the end and on a signal."""
    every_minutes: Annotated[float, Field(ge=0.0)] = 0.0
    """Also save when this many minutes have passed since the last checkpoint; 0 does not."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the newest verified checkpoints stay."""
    keep_every: NonNegative = 0
    """Checkpoints at multiples of this many steps are never deleted; 0 keeps none."""
    asynchronous: bool = True
    """Write in the background; the step waits only for the copy of the state."""


class TrackConfig(Section):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    wandb: bool = False
    """Log to Weights & Biases; offline when there is no network or no key. The key comes from the environment or netrc, never from here."""
    project: str = "distllm"
    entity: str | None = None
    tags: list[str] = []


class Config(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    """The run's name: its folder is OUT/NAME."""
    out: str = "runs"
    """The folder that holds run folders."""
    seed: NonNegative = 1
    """Everything random is a pure function of it: initial weights, data order, validation split, dropout."""
    resume: str = "auto"
    """auto: continue the newest good checkpoint of this run's folder if there is one. never: refuse a folder that holds a run. Else the path of a checkpoint or run to start from."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU."""
    model: ModelConfig = ModelConfig(type="llama")
    data: DataConfig = DataConfig()
    layout: LayoutConfig = LayoutConfig()
    precision: PrecisionConfig = PrecisionConfig()
    activation: ActivationConfig = ActivationConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()

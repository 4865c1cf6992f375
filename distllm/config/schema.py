"""Every option of distllm: typed, frozen, and documented under each field.

This file, with `schema_data.py` for the section `data`, holds the shape of a config and the rules that concern one value.
What two values cannot be together is in `check.py`; where values come from is in `load.py`. It imports no torch, so that a
wrong config is told at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distllm.config.schema_data import AugmentConfig as AugmentConfig
from distllm.config.schema_data import CleanConfig as CleanConfig
from distllm.config.schema_data import DataConfig as DataConfig
from distllm.config.schema_data import DedupConfig as DedupConfig
from distllm.config.schema_data import SourceConfig as SourceConfig
from distllm.config.schema_data import TokenizerConfig as TokenizerConfig
from distllm.config.schema_data import ValidationConfig as ValidationConfig
from distllm.config.section import Fraction, NonNegative, Positive, Scalar, Section, Share


class ModelConfig(Section):
    """The model: exactly one of `type`, `path` and `spec`."""

    type: str | None = None
    """A model of transformers by its `model_type` (llama, gpt2, bert, t5, bart, ...), with random weights and the head that `task.kind` needs."""
    sizes: dict[str, Scalar | list[Scalar]] = {}
    """Values for the model's own transformers config (hidden_size, num_hidden_layers, ...), strictly checked. With `path`, they change the loaded config."""
    path: str | None = None
    """What to start from: a local folder or a hub name with weights in safetensors, or a run or checkpoint of distllm. A head that differs is made anew, and told."""
    weights: str | None = None
    """For `type` and `spec`: take the weights of this model folder, run or checkpoint wherever name and shape agree; what is new or left over is told."""
    spec: str | None = None
    """The import path, `package.module:function`, of a function that returns a ModelSpec: a module of your own."""
    spec_args: dict[str, Scalar | list[Scalar]] = {}
    """Arguments given to the `spec` function by keyword."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a hub model. Off unless you ask for it."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention kernel of a transformers model; auto is sdpa where the family has it."""
    dropout: Share | None = None
    """Sets every dropout probability of a transformers model, under whatever names the family has; null keeps the config's own."""


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), through peft."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    """The adapter's product is scaled by alpha / rank."""
    dropout: Share = 0.0
    targets: list[str] = []
    """Last parts of the names of the linear layers to adapt (q_proj, v_proj); empty: those of attention."""


class TuneConfig(Section):
    """Which weights of a model learn, and how fast."""

    train: Literal["all", "head", "top", "lora"] = "all"
    """all weights; only the head (what the task adds to the body); top: the head and the last `top_blocks` blocks; lora: adapters, and the head of a classifier."""
    top_blocks: Positive = 1
    """For top: how many of the last blocks learn."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Layer-wise decay of the learning rate: a block k below the head learns at lr * layer_decay ** k, the embeddings below the first block."""
    embedding_rate: Annotated[float, Field(gt=0.0)] = 1.0
    """What the learning rate of embedding tables is multiplied by. Tables that grew in pre-training need more of it: a norm follows them, so a step changes what they say the less the larger they are."""
    lora: LoraConfig = LoraConfig()


class HeadConfig(Section):
    """One task of several that share a body."""

    kind: Literal["classification", "regression", "masked_lm"] = "classification"
    labels: list[str] = []
    """For classification: the labels in their order; empty: those of the training data, sorted."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """The weight of a sample of this task in the loss. How often the task is drawn is its sources' `weight`."""


class TaskConfig(Section):
    """What the model learns to do."""

    kind: Literal[
        "causal_lm", "masked_lm", "translation_lm", "seq2seq", "classification", "regression", "sft", "multi_task"
    ] = "causal_lm"
    """causal_lm: the next token. masked_lm: hidden tokens of packed text. translation_lm: hidden tokens of joined pairs. seq2seq: a target text by an encoder-decoder. classification, regression: a label or number of a text or a pair. sft: the response to a prompt, or the assistant's turns of a chat. multi_task: a shared body with a head for each of `tasks`."""
    labels: list[str] = []
    """For classification: the labels in their order; empty: those of the training data, sorted."""
    label_smoothing: Share = 0.0
    """Spreads this share of the target's probability over all classes or tokens (Szegedy et al. 2015, arXiv 1512.00567). Validation losses are told without it."""
    mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """For masked_lm and translation_lm: the share of tokens to predict."""
    mask_token: Fraction = 0.8
    """Of those, the share that becomes the mask token."""
    random_token: Fraction = 0.1
    """Of those, the share that becomes a random token; the rest stays as it is (Devlin et al. 2018, arXiv 1810.04805)."""
    masking: Literal["dynamic", "static"] = "dynamic"
    """dynamic: another mask in each epoch (Liu et al. 2019, arXiv 1907.11692). static: one mask a sample for the whole run."""
    whole_words: bool = False
    """Mask all tokens of a word together."""
    tasks: dict[str, HeadConfig] = {}
    """For multi_task: the tasks by name; a source names its task in `task`."""
    metrics: list[str] = []
    """What to measure besides what fits the task at no cost: bleu, chrf (both write translations of the validation set, which takes time)."""


class DistillConfig(Section):
    """Learn from a teacher's output too (Hinton et al. 2015, arXiv 1503.02531)."""

    teacher: str | None = None
    """A run, a checkpoint or a model folder: frozen, laid out like the student. Unset: no distillation."""
    temperature: Annotated[float, Field(gt=0.0)] = 2.0
    alpha: Fraction = 0.5
    """The loss is (1 - alpha) * task + alpha * temperature ** 2 * KL(teacher, student)."""
    hidden: Annotated[float, Field(ge=0.0)] = 0.0
    """The weight of the squared distance between the hidden states of matched blocks; 0 does not match them."""


class DecodeConfig(Section):
    """How an encoder-decoder writes."""

    beams: Positive = 4
    """The width of the beam search; 1 is greedy."""
    length_penalty: Annotated[float, Field(ge=0.0)] = 1.0
    """A hypothesis' log probability is divided by its length ** length_penalty."""
    max_tokens: Positive = 128
    """Tokens of an output at most."""


class LayoutConfig(Section):
    """How the model and the batch are spread over ranks: the sizes of the mesh axes, outermost first, and how each works."""

    pp: Positive = 1
    """Pipeline-parallel ranks, over which blocks are spread."""
    dp_replicate: Positive | Literal["auto"] = 1
    """Data-parallel replicas with whole gradients all-reduced (DDP; with dp_shard > 1: HSDP)."""
    dp_shard: Positive | Literal["auto"] = "auto"
    """Data-parallel ranks over which parameters, gradients and optimizer state are sharded (FSDP2). auto: what the other axes leave."""
    ep: Positive = 1
    """Expert-parallel ranks, over which the experts of a mixture-of-experts model are spread. They read different samples, and share the other weights as dp_shard ranks do."""
    cp: Positive = 1
    """Context-parallel ranks, over which each sequence is cut. They share the weights as dp_shard ranks do."""
    tp: Positive = 1
    """Tensor-parallel ranks, over which matrices are cut."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a block after its forward pass and gather them again for its backward pass."""
    sequence_parallel: bool = True
    """With tp: keep what lies between the matrices (norms, residuals) cut along the sequence, where the model allows it and no `moe` loss wants whole samples (Korthikanti et al. 2022, arXiv 2205.05198)."""
    loss_parallel: bool = True
    """With tp: leave the logits cut along the vocabulary and compute the loss on the parts."""
    cp_method: Literal["ring", "all_gather", "ulysses"] = "ring"
    """With cp: ring (keys and values travel round; arXiv 2310.01889), all_gather (of keys and values), ulysses (all-to-all over heads; arXiv 2309.14509)."""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev", "csv"] = "1f1b"
    """With pp: the order of forward and backward passes. interleaved_zero_bubble, zbv and dualpipev compute the gradients of inputs and of weights apart, and keep FSDP's parameters gathered."""
    pp_virtual: Positive | Literal["auto"] = "auto"
    """With pp: stages of one rank. auto: 1 for gpipe and 1f1b, else 2."""
    pp_split: list[Positive] = []
    """With pp: how many blocks each stage has, in the order of the forward pass; empty: so that the dearest stage is as cheap as can be."""
    pp_csv: str | None = None
    """With pp_schedule csv: a file with a line for each rank, a cell for each slot: 0F3 is the forward pass of micro-batch 3 on stage 0; B backward, or I and W, its halves for inputs and for weights."""


class EngineConfig(Section):
    """What takes the training step."""

    name: Literal["native", "deepspeed"] = "native"
    """native: torch alone, every layout. deepspeed: DeepSpeed's ZeRO over data-parallel ranks (Rajbhandari et al. 2019, arXiv 1910.02054), with zero_stage 1 also its pipeline; needs `pip install 'distllm[deepspeed]'`."""
    zero_stage: NonNegative = 2
    """With deepspeed: what is sharded. 1: the optimizer state; 2: gradients too; 3: parameters too."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """With deepspeed: where optimizer state and fp32 weights lie, besides the GPU, whose update the CPU then computes. nvme, with zero_stage 3: in files under `nvme_path`."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """With deepspeed and zero_stage 3: where the shards of the parameters lie. nvme: in files under `nvme_path`, what has a megabyte; each is read when a module needs it."""
    nvme_path: str | None = None
    """With nvme: a folder on a fast local disk of each node. A run writes under its own name there, and leaves the files."""


class MoeConfig(Section):
    """Mixture-of-experts models: losses that keep experts evenly loaded. They are of each sample by itself, so no split of the batch changes them."""

    balance: Annotated[float, Field(ge=0.0)] = 0.0
    """The weight of the sequence-wise balance loss of each layer (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), which is 1 where all experts get the same; 0.0001 to 0.01 are usual. 0 adds none, as transformers does by default."""
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    """The weight of the router's z-loss (ST-MoE, arXiv 2202.08906), which keeps its logits small; 0.001 is usual."""


class PrecisionConfig(Section):
    """Number formats. Master weights, optimizer state and gradient reductions stay fp32 in every mode."""

    compute: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """The format of the matrix products. fp16 comes with a dynamic loss scale. fp64 keeps weights and state in fp64 too: for proofs, not for speed."""
    initial_loss_scale: Annotated[float, Field(gt=0.0)] = 65536.0
    """fp16: the loss scale to start with."""
    loss_scale_window: Positive = 2000
    """fp16: finite steps in a row after which the scale doubles."""
    tf32: bool = False
    """Let fp32 matrix products use TF32 on GPUs that have it: faster, with 10 bits of mantissa."""


class ActivationConfig(Section):
    """Activation checkpointing: recompute in the backward pass what a block computed, instead of keeping it; or keep it on the CPU."""

    mode: Literal["none", "full", "every", "selective"] = "none"
    """full: every block. every: each k-th block. selective: every block, but keep the results of the operators in `keep`."""
    every: Positive = 2
    """For mode `every`: k."""
    keep: list[str] = ["matmul", "attention", "collectives"]
    """For mode `selective`: the operators whose results are kept: matmul, attention, collectives (those of experts), or one by torch's name, such as aten.mm."""
    offload: bool = False
    """On a GPU: keep what blocks save for the backward pass in the memory of the CPU. Weights and small tensors stay. With full and every it is the inputs of blocks."""


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
    batch_tokens: Positive | None = None
    """For examples: instead of a fixed number of samples, a step takes samples of about equal length whose tokens, padding included, are at most this many over all ranks."""
    batch_ramp: NonNegative = 0
    """Samples over which the global batch grows, in whole micro-batches, from one micro-batch a rank to global_batch; 0 begins with the whole one."""
    seq_ramp: NonNegative = 0
    """For packed text: samples over which the length grows from `seq_ramp_from` to data.seq_len, by powers of two; a long sample is cut into several rows, so no token is lost. 0 begins with the whole length."""
    seq_ramp_from: Positive = 64
    """The length that the ramp begins with; data.seq_len must be a power of two times it."""
    ema: Share = 0.0
    """Keep an exponential moving average of the weights with this decay; evaluation, prediction and export use it. 0 keeps none."""
    patience: NonNegative = 0
    """Stop when `best_metric` has not improved for this many evaluations; 0 does not stop early."""
    best_metric: str = "val_loss"
    """The validation metric by which the best checkpoint is chosen, kept and named `checkpoints/best`."""
    keep_best: bool = False
    """Save a checkpoint whenever `best_metric` improves, and keep the best; `patience` turns it on."""
    max_skips: Positive = 10
    """Steps in a row with a loss or gradient that is not finite after which the run stops."""
    log_every: Positive = 10
    eval_every: NonNegative = 100
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_batches: NonNegative = 0
    """Micro-batches a rank evaluates each time; 0 takes the whole validation set. The evaluation after the last step always takes it whole, and is compared with those before by the same batches."""
    sample_every: NonNegative = 0
    """Steps between text samples; 0 samples only at the end."""
    sample_prompts: list[str] = [""]
    """What the samples continue; an empty prompt starts from the end-of-document token. With task.kind=sft each is what the user says."""
    sample_tokens: NonNegative = 64
    """New tokens of a sample; 0 does not sample."""
    sample_temperature: Annotated[float, Field(ge=0.0)] = 0.8
    """0 is greedy."""
    threads: NonNegative = 0
    """CPU threads of one rank; 0 shares the cores among the local ranks; a process alone has OMP_NUM_THREADS where that is set."""
    compile: bool = False
    """Compile each block with torch.compile."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms: repeatable bits on GPUs too, slower."""
    timeout_s: Positive = 120
    """Seconds after which a collective that a rank does not join is an error."""
    lost_s: Positive = 10
    """Seconds without a sign of life from a rank after which the others end the run, naming it. A rank of the same machine whose process has ended is noticed at once."""
    stall_s: Positive = 60
    """Seconds after which the others end the run, naming the rank that stands still outside of a collective while they wait for it in one. The start, compiling, saving, work that rank 0 does alone, and the first step and evaluation may take longer."""


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
    noise_scale: bool = False
    """Report the gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162), in samples: the batch size up to which more is nearly free. Needs an accumulation of at least 2."""


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
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig(type="llama")
    tune: TuneConfig = TuneConfig()
    distill: DistillConfig = DistillConfig()
    decode: DecodeConfig = DecodeConfig()
    data: DataConfig = DataConfig()
    layout: LayoutConfig = LayoutConfig()
    engine: EngineConfig = EngineConfig()
    moe: MoeConfig = MoeConfig()
    precision: PrecisionConfig = PrecisionConfig()
    activation: ActivationConfig = ActivationConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()

"""Every task's head on transformers' families: the parts are found, ids and positions fit, and any layout learns alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from distllm.comm import World
from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import Config, DataConfig, ModelConfig, TaskConfig
from distllm.data.batch import Batch
from distllm.data.tokenizer import Roles
from distllm.models.build import initial_tensors, meta_model, resolve_spec
from distllm.models.spec import in_head
from distllm.train.objectives import classification, masked_lm, seq2seq
from tests.engines import Layout, engine_of, mesh_of, train
from tests.models.families import FAMILIES, filled, random_ids
from tests.models.heads import CASES, LABELS, ROLES, SEQ2SEQ, VOCABULARY, batch_of, folder_spec, head_config, head_spec
from tests.ranks import on_ranks

CLASSES = {"masked_lm": "ForMaskedLM", "classification": "ForSequenceClassification"}
BLOCKS = {"t5": [2, 3], "bart": [2, 3], "marian": [2, 3], "mbart": [2, 3], "albert": [1]}


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_every_family_has_its_head_and_its_parts_are_found(kind: str, task: str) -> None:
    spec = head_spec(kind, task)
    model = meta_model(spec)
    assert type(model).__name__.endswith(CLASSES.get(task, ("ForConditionalGeneration", "MTModel")))
    assert (spec.name, spec.task, spec.pad_id) == (kind, task, ROLES.pad)
    assert [len(model.get_submodule(path)) for path in spec.blocks] == BLOCKS.get(kind, [2])
    assert model.get_submodule(str(spec.embedding)).num_embeddings == VOCABULARY
    head = model.get_submodule(str(spec.head))
    assert head.weight.shape[0] == (LABELS if task == "classification" else VOCABULARY)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert in_head(spec, f"{spec.head}.weight") and f"{spec.head}.weight" in parameters
    assert not in_head(spec, f"{spec.blocks[0]}.0.x") and not in_head(spec, f"{spec.embedding}.weight")
    # A block outside the lists would never be sharded, nor checkpointed.
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1]
    assert all(any(f"{name}.".startswith(f"{path}.") for path in spec.blocks) for name in layers)


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_padding_changes_nothing_and_every_parameter_learns(kind: str, task: str) -> None:
    """DDP waits for a gradient of every parameter that wants one."""
    model, batch = filled(head_spec(kind, task, model={"dropout": 0.0})), batch_of(task)
    logits = model(**batch.inputs).logits
    assert logits.shape[-1] == (LABELS if task == "classification" else VOCABULARY) and logits.isfinite().all()
    assert logits.dim() == (2 if task == "classification" else 3)
    logits.log_softmax(-1)[..., 0].sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    for row in range(3):
        length, count = int(batch.inputs["attention_mask"][row].sum()), None
        alone = {name: value[row : row + 1, :length] for name, value in batch.inputs.items() if "decoder" not in name}
        if task == "seq2seq":
            count = int(batch.inputs["decoder_attention_mask"][row].sum())
            alone |= {n: v[row : row + 1, :count] for n, v in batch.inputs.items() if "decoder" in n}
        with torch.no_grad():
            one = model(**alone).logits[0]
        many = logits[row] if task == "classification" else logits[row, : (count or length)]
        torch.testing.assert_close(one, many, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "task"), [("bert", "classification"), ("bart", "seq2seq"), ("llama", "classification")])
def test_a_row_of_padding_gives_numbers(kind: str, task: str) -> None:
    """The last batch is filled up with rows of one padding token that is attended to."""
    batch = batch_of(task)
    for name, value in batch.inputs.items():
        value[-1] = 0 if "mask" in name else ROLES.pad
        value[-1, 0] = 1
    assert filled(head_spec(kind, task))(**batch.inputs).logits.isfinite().all()


@pytest.mark.parametrize("pad", [1, 7])
@pytest.mark.parametrize("kind", ["bert", "roberta", "bart", "marian", "llama"])
def test_the_row_of_the_embedding_that_stays_zero_is_that_of_padding(kind: str, pad: int) -> None:
    task = "seq2seq" if kind in ("bart", "marian") else "classification"
    spec = head_spec(kind, task, roles=dataclasses.replace(ROLES, pad=pad))
    embedding = filled(spec).get_submodule(str(spec.embedding))
    assert embedding.padding_idx == pad == spec.pad_id == spec.hf_config.pad_token_id
    assert spec.hf_config.eos_token_id == ROLES.eos and spec.hf_config.bos_token_id == ROLES.begin


def test_what_a_decoder_begins_with() -> None:
    for kind in ("t5", "bart", "marian", "mbart"):
        spec = head_spec(kind, "seq2seq")
        assert spec.decoder_start == spec.hf_config.decoder_start_token_id == ROLES.begin
    spec = head_spec("marian", "seq2seq", roles=dataclasses.replace(ROLES, begin=None))
    assert spec.decoder_start == ROLES.pad
    assert head_spec("bert", "masked_lm").decoder_start is None
    assert getattr(head_spec("bart", "seq2seq").hf_config, "forced_eos_token_id", None) in (None, ROLES.eos)


@pytest.mark.parametrize("pad", [1, 40])
def test_a_family_that_counts_positions_from_its_padding(pad: int) -> None:
    spec = head_spec("roberta", "masked_lm", seq_len=24, roles=dataclasses.replace(ROLES, pad=pad))
    assert spec.hf_config.max_position_embeddings == 24 + pad + 1 and spec.max_seq_len == 24
    ids = random_ids(2, 24) % 30 + 41
    assert filled(spec)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()
    with pytest.raises(ConfigError, match=r"has 20 positions; use data\.seq_len=20 or model\.sizes\.max_position_emb.*=26"):
        head_spec("roberta", "masked_lm", seq_len=24, max_position_embeddings=22)


def test_positions() -> None:
    assert [head_spec(kind, "seq2seq", seq_len=24).max_seq_len for kind in ("t5", "bart", "marian")] == [None, 24, 24]
    with pytest.raises(ConfigError, match=r"data\.seq_len=24: the model has 16 positions"):
        head_spec("bart", "seq2seq", seq_len=24, max_position_embeddings=16)
    spec = head_spec("marian", "seq2seq", seq_len=24)
    tensors, model = dict(initial_tensors(spec, seed=1)), spec.build()
    name = "model.decoder.embed_positions.weight"  # sine waves, which do not learn
    assert torch.equal(tensors[name], model.get_parameter(name)) and not model.get_parameter(name).requires_grad


def test_which_models_take_token_types() -> None:
    assert head_spec("bert", "classification").token_types and not head_spec("distilbert", "classification").token_types
    assert not head_spec("roberta", "classification", type_vocab_size=1).token_types
    assert not head_spec("bart", "seq2seq").token_types


def test_a_packed_encoder_has_no_pooler_and_looks_both_ways() -> None:
    model, ids = filled(head_spec("bert", "masked_lm")), random_ids(1, 16) % VOCABULARY
    assert not any("pooler" in name for name, _ in model.named_parameters())
    other = ids.clone()
    other[:, 8:] = 7
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits[:, :8], model(input_ids=other).logits[:, :8])


def test_a_folder_looks_as_the_task_does(tmp_path: Path) -> None:
    """The config of an encoder that was trained as a causal model says so, and the other way round."""
    for source, task in (("causal_lm", "masked_lm"), ("masked_lm", "causal_lm")):
        filled(head_spec("bert", source)).save_pretrained(tmp_path / source)
        assert folder_spec(tmp_path / source, task).hf_config.is_decoder == (task == "causal_lm")
        assert folder_spec(tmp_path / source, source).hf_config.is_decoder == (source == "causal_lm")


def test_the_decoder_of_an_encoder_decoder_alone_is_causal() -> None:
    model, ids = filled(head_spec("bart", "causal_lm")), random_ids(1, 16) % VOCABULARY
    assert type(model).__name__ == "BartForCausalLM"
    other = ids.clone()
    other[:, 8:] = 7
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[:, :8], model(input_ids=other).logits[:, :8])


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("gpt2", "masked_lm", "gpt2: is not a masked language model; one is bert"),
        ("bert", "seq2seq", "bert: is not an encoder-decoder; one is marian"),
        ("t5", "causal_lm", "t5: is not a causal language model; one is llama"),
        ("bart", "classification", "bart: is an encoder-decoder, which is for task.kind=seq2seq; .* use an encoder such as bert"),
        ("bart", "masked_lm", "bart: is an encoder-decoder"),
        ("marian", "classification", "marian: is not a classifier of texts; one is bert"),
        ("robertta", "classification", "robertta: is not a model of transformers; the nearest is roberta"),
    ],
)
def test_a_type_without_the_head_that_the_task_needs(kind: str, task: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.type={message}") as caught:
        head_spec(kind, task)
    assert "\n" not in str(caught.value)


def test_a_folder_without_the_head_that_the_task_needs(tmp_path: Path) -> None:
    filled(head_spec("roberta", "masked_lm")).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="roberta is not an encoder-decoder; one is marian"):
        folder_spec(tmp_path, "seq2seq")
    with pytest.raises(DataError, match=r"padding token 1, the tokenizer's is 9; use the model's own tokenizer"):
        config = Config(task=TaskConfig(kind="masked_lm"), model=ModelConfig(path=str(tmp_path)), data=DataConfig(seq_len=8))
        resolve_spec(config, vocab_size=VOCABULARY, roles=dataclasses.replace(ROLES, pad=9))


def test_no_block_is_ever_skipped() -> None:
    """Ranks would skip different ones, and wait for one another."""
    assert head_spec("m2m_100", "seq2seq", **SEQ2SEQ).hf_config.encoder_layerdrop == 0.0  # its own default is 0.05
    with pytest.raises(ConfigError, match=r"model\.sizes\.encoder_layerdrop=0.1: ranks would skip different blocks; use 0"):
        head_spec("mbart", "seq2seq", encoder_layerdrop=0.1)


DROPOUTS = {
    "bert": ["attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout_prob"],
    "roberta": ["attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout_prob"],
    "distilbert": ["attention_dropout", "dropout", "qa_dropout", "seq_classif_dropout"],
    "electra": ["attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout_prob", "summary_last_dropout"],
    "albert": ["attention_probs_dropout_prob", "classifier_dropout_prob", "hidden_dropout_prob"],
    "deberta-v2": ["attention_probs_dropout_prob", "cls_dropout", "hidden_dropout_prob", "pooler_dropout"],
    "gpt2": ["attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"],
    "llama": ["attention_dropout"],
    "t5": ["classifier_dropout", "dropout_rate"],
    "bart": ["activation_dropout", "attention_dropout", "classifier_dropout", "dropout"],
    "marian": ["activation_dropout", "attention_dropout", "dropout"],
    "mbart": ["activation_dropout", "attention_dropout", "classifier_dropout", "dropout"],
}


@pytest.mark.parametrize("kind", DROPOUTS)
def test_one_number_sets_every_dropout(kind: str) -> None:
    task = "seq2seq" if kind in BLOCKS and kind != "albert" else "classification"
    config = head_spec(kind, task, model={"dropout": 0.375}).hf_config
    assert sorted(name for name, value in config.to_dict().items() if value == 0.375) == [
        name for name in DROPOUTS[kind] if name != "cls_dropout"
    ]
    with torch.device("meta"):
        model = head_spec(kind, task, model={"dropout": 0.375}).build()
    found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert found <= {0.375}, "a dropout module does not follow"


def test_a_size_comes_before_the_one_number_and_a_folder_has_it_too(tmp_path: Path) -> None:
    config = head_spec("bert", "classification", model={"dropout": 0.5}, classifier_dropout=0.25).hf_config
    assert (config.classifier_dropout, config.hidden_dropout_prob) == (0.25, 0.5)
    filled(head_spec("bert", "masked_lm")).save_pretrained(tmp_path)
    assert folder_spec(tmp_path, "classification", dropout=0.125).hf_config.attention_probs_dropout_prob == 0.125
    assert folder_spec(tmp_path, "classification").hf_config.attention_probs_dropout_prob == 0.1
    with pytest.raises(ConfigError, match=r"model\.dropout=0.1: mamba has no dropout; use model\.dropout=null"):
        resolve_spec(Config(model=ModelConfig(type="mamba", dropout=0.1)), vocab_size=9)
    assert not [f.name for f in dataclasses.fields(CONFIG_MAPPING["mamba"]) if "drop" in f.name]


def test_labels_and_their_names() -> None:
    config = head_config("bert", "classification")
    spec = resolve_spec(config, vocab_size=VOCABULARY, labels={"": 2}, roles=ROLES, label_names=("no", "yes"))
    assert (spec.hf_config.id2label, spec.hf_config.label2id) == ({0: "no", 1: "yes"}, {"no": 0, "yes": 1})
    assert spec.hf_config.problem_type == "single_label_classification"
    number = head_spec("bert", "regression", labels=1)
    assert number.hf_config.num_labels == 1 and number.hf_config.problem_type == "regression"


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_flops_equal_the_operator_count_or_are_not_told(kind: str, task: str) -> None:
    spec = head_spec(kind, task)
    told = spec.flops_per_token
    assert (told is None) == (task == "seq2seq" or kind in ("albert", "deberta-v2", "modernbert"))
    if told is None:
        return
    auto = {"masked_lm": transformers.AutoModelForMaskedLM}.get(task, transformers.AutoModelForSequenceClassification)
    model = auto.from_config(spec.hf_config, attn_implementation="eager").eval()
    body = model if task == "masked_lm" else model.base_model
    if task == "classification":
        body.pooler = None
    with FlopCounterMode(display=False) as counter:
        outputs = body(input_ids=random_ids(2, 16) % VOCABULARY)
        outputs[0].sum().backward()
    assert told(16) * 2 * 16 == pytest.approx(counter.get_total_flops(), rel=1e-12)


LAYOUT_CASES = [
    ("bert", "masked_lm"), ("bert", "classification"), ("roberta", "masked_lm"), ("distilbert", "classification"),
    ("albert", "classification"), ("t5", "seq2seq"), ("bart", "seq2seq"), ("marian", "seq2seq"),
]  # fmt: skip
OBJECTIVES: dict[str, Any] = {"masked_lm": masked_lm, "classification": classification, "seq2seq": seq2seq}


def dealt(task: str) -> Callable[[Sequence[int]], Batch]:
    """The rows of one fixed set by number."""
    every = batch_of(task, count=24)

    def make(ids: Sequence[int]) -> Batch:
        rows = torch.tensor(list(ids))
        return Batch(
            {name: value[rows] for name, value in every.inputs.items()},
            {name: value[rows] for name, value in every.targets.items()},
            tuple(ids),
        )

    return make


def three_steps(layout: Layout, world: World) -> dict[str, Any]:
    results = {}
    for kind, task in LAYOUT_CASES:
        spec = head_spec(kind, task, model={"dropout": 0.0})
        mesh = mesh_of(world, layout)
        engine = engine_of(world, mesh, spec, OBJECTIVES[task])
        accumulation = 2 // mesh.dp_size
        results[f"{kind} {task}"] = train(engine, dealt(task), size=8, step=8, accumulation=accumulation, steps=3)
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = on_ranks(partial(three_steps, "one"), 1, tmp_path_factory.mktemp("alone"))
    return found


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_any_layout_learns_the_same(layout: Layout, alone: dict[str, Any], tmp_path: Path) -> None:
    found = on_ranks(partial(three_steps, layout), 2, tmp_path)[0]
    for case, wanted in alone.items():
        assert found[case]["losses"] == pytest.approx(wanted["losses"], abs=2e-6, rel=2e-6), case
        assert found[case]["norms"] == pytest.approx(wanted["norms"], rel=2e-5), case
        assert wanted["losses"][2] != wanted["losses"][0]
        assert found[case]["weights"].keys() == wanted["weights"].keys()


def test_causal_families_are_as_before() -> None:
    """Special tokens of a causal model's tokenizer stay out of its config: a padding row would never learn."""
    config = Config(model=ModelConfig(type="llama", sizes=FAMILIES["llama"]), data=DataConfig(seq_len=16))
    spec = resolve_spec(config, vocab_size=VOCABULARY, roles=Roles(eos=0, pad=None, begin=None, separator=0, mask=None))
    assert (spec.hf_config.pad_token_id, spec.hf_config.bos_token_id, spec.hf_config.eos_token_id) == (None, None, None)
    assert meta_model(spec).get_submodule(str(spec.embedding)).padding_idx is None

"""What parameters in DeepSpeed's files need of memory, by arithmetic: before there are ranks, or weights."""

from __future__ import annotations

import math

from distllm.config.check import resolve_layout
from distllm.config.deepspeed_json import FileBuffers
from distllm.config.schema import Config
from distllm.data.prepare import open_prepared
from distllm.data.tokenizer import roles_of
from distllm.models.build import meta_model, resolve_spec
from distllm.parallel.mesh import AXES
from distllm.parallel.parallelize import find_blocks
from distllm.train.build_deepspeed import buffers_of
from distllm.train.folder import read_tokenizer
from distllm.train.tasks import outputs_of
from distllm.verify.ledger import Step
from distllm.verify.local_shapes import own_shape


def predicted_buffers(config: Config, *, ranks: int) -> FileBuffers:
    """The buffers that a run of `ranks` processes will ask DeepSpeed for.

    Args:
        config: without problems, with `engine.offload_parameters=nvme`.
        ranks: processes of the run.

    Raises:
        DataError: the data are not prepared, on whose vocabulary the embedding depends.
        ConfigError: a model that cannot be.
    """
    prepared = open_prepared(config)
    roles, labels = roles_of(read_tokenizer(prepared.tokenizer_folder)), prepared.labels
    spec = resolve_spec(
        config, vocab_size=prepared.vocab_size, labels=outputs_of(labels), roles=roles, label_names=labels.get("", ())
    )
    model, resolved = meta_model(spec), resolve_layout(config, ranks)
    sizes = {axis: resolved.tp if axis == "tp" else 1 for axis in AXES}
    step = Step(config, spec, model, sizes, dict.fromkeys(AXES, 0), ())
    numbers = {name: math.prod(own_shape(step, name, parameter)) for name, parameter in model.named_parameters()}
    return buffers_of(config, model, numbers=numbers, ranks=resolved.dp_size, blocks=find_blocks(model, spec=spec))

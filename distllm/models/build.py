"""From the config to a ModelSpec, a model on meta, and its first numbers.

Initialisation is a pure function of (seed, full parameter name): no layout, order or number of ranks changes it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.config.check import model_problems
from distllm.config.errors import ConfigError, DistllmError
from distllm.config.roles import Roles
from distllm.config.schema import Config, ModelConfig
from distllm.models.spec import ModelSpec


def resolve_spec(
    config: Config,
    *,
    vocab_size: int,
    labels: Mapping[str, int] | None = None,
    roles: Roles | None = None,
    label_names: Sequence[str] = (),
) -> ModelSpec:
    """The ModelSpec of the model that the config describes.

    Args:
        config: the run's config; `model`, `task`, `data.seq_len` and `data.cross_documents` are read.
        vocab_size: the tokenizer's number of ids.
        labels: task name ("" where there is but one) -> its number of outputs; 1 for regression.
        roles: the tokenizer's special tokens, which any task but plain packed text needs.
        label_names: the labels of a classifier in their order, for the config that is exported.

    Raises:
        ConfigError: a name, size or value of `model` that cannot be.
        DataError: a model folder that cannot be used.
    """
    model, seq_len, labels = config.model, config.data.seq_len, labels or {}
    if problems := list(model_problems(config)):  # a config that was saved, or made in Python, has passed no check
        raise ConfigError(problems)
    if model.spec is None:
        from distllm.models.hf import hf_spec  # transformers takes seconds to import
        from distllm.models.hf_config import Needs

        needs = Needs(config.task.kind, vocab_size, seq_len, labels.get(""), label_names, roles)
        spec = hf_spec(model, needs=needs, packed=not config.data.cross_documents)
        if config.task.kind == "multi_task":
            from distllm.models.multi_task import multi_task_spec

            spec = multi_task_spec(spec, tasks=config.task.tasks, outputs=labels)
        return _with_weights(spec, model)
    spec = _own_spec(config, vocab_size=vocab_size, labels=labels.get(""), roles=roles)
    if spec.max_seq_len is not None and spec.max_seq_len < seq_len:
        raise ConfigError([f"data.seq_len={seq_len}: {spec.name} takes at most {spec.max_seq_len}"])
    if spec.vocab_size is not None and spec.vocab_size < vocab_size:
        raise ConfigError([f"model.spec={model.spec}: vocab_size={spec.vocab_size}: the tokenizer has {vocab_size} ids"])
    start = _start_id(roles) if config.task.kind == "seq2seq" and spec.decoder_start is None else spec.decoder_start
    pad = roles.pad if roles is not None else spec.pad_id
    return _with_weights(replace(spec, task=config.task.kind, decoder_start=start, pad_id=pad), model)


def _with_weights(spec: ModelSpec, model: ModelConfig) -> ModelSpec:
    """The spec that starts from `model.weights`, wherever name and shape agree."""
    if model.weights is None:
        return spec
    from distllm.models.hf_folder import weights_folder

    folder: Path = weights_folder(model.weights, key="model.weights", config=False)
    return replace(spec, weights=folder, lenient=True)


def _start_id(roles: Roles | None) -> int | None:
    """What a decoder's input begins with: the beginning, else padding."""
    return None if roles is None else roles.pad if roles.begin is None else roles.begin


def _own_spec(config: Config, *, vocab_size: int, labels: int | None, roles: Roles | None) -> ModelSpec:
    """Call the user's spec function with what it takes of vocab_size, seq_len, labels, pad_id and start_id.

    What `model.spec_args` gives comes before them.
    """
    model = config.model
    path = str(model.spec)
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError([f"model.spec={path}: no module {error.name}; is it installed or on PYTHONPATH?"]) from error
    except Exception as error:
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ConfigError([f"model.spec={path}: {module_name} cannot be imported: {text}; --debug shows where"]) from error
    function = getattr(module, name, None)
    if function is None:
        raise ConfigError([f"model.spec={path}: {module_name} has no function {name}"])
    if not _promises_spec(function):
        rule = f"must be a function that is declared to return a ModelSpec: def {name}(...) -> ModelSpec"
        raise ConfigError([f"model.spec={path}: {rule}"])
    takes = inspect.signature(function).parameters
    given: dict[str, Any] = {"vocab_size": vocab_size, "seq_len": config.data.seq_len}
    if labels is not None:
        given["labels"] = labels
    if roles is not None:
        given |= {"pad_id": roles.pad, "start_id": _start_id(roles)}
    arguments = {k: v for k, v in given.items() if k in takes} | dict(model.spec_args)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ConfigError([f"model.spec_args: {path}: {error}"]) from error
    spec = function(**arguments)
    if not isinstance(spec, ModelSpec):
        raise ConfigError([f"model.spec={path}: returned a {type(spec).__name__}, not a ModelSpec"])
    return spec


def _promises_spec(function: object) -> bool:
    """Whether this is a plain function annotated to return a ModelSpec, so that a config cannot call just anything."""
    if not inspect.isfunction(function):
        return False
    promised = function.__annotations__.get("return")
    return promised is ModelSpec or (isinstance(promised, str) and promised.strip("'\"").rpartition(".")[2] == "ModelSpec")


def meta_model(spec: ModelSpec) -> nn.Module:
    """The model on the meta device, fp32, tied weights tied: shapes and names, no memory.

    Raises:
        ConfigError: the spec's build is not legal on meta, or its names are not in the module.
    """
    try:
        with torch.device("meta"):
            model = spec.build()
    except (RuntimeError, NotImplementedError) as error:
        text = str(error).splitlines()[0]
        raise ConfigError([f"model {spec.name}: cannot be built on the meta device: {text}"]) from error
    for name, tensor in model.named_parameters():
        if tensor.device.type != "meta":
            raise ConfigError([f"model {spec.name}: {name} is made on {tensor.device} in spite of torch.device('meta')"])
    missing = [p for p in (*spec.blocks, spec.embedding, spec.norm, spec.head) if p is not None and not _has(model, p)]
    if missing or not spec.blocks:
        raise ConfigError([f"model {spec.name}: the spec names {', '.join(missing) or 'no blocks'}; not in the module"])
    return model


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def initial_tensors(
    spec: ModelSpec, *, seed: int, names: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by full name, whole, on the CPU; one block is in memory at a time.

    Args:
        spec: the model; with `weights`, parameters and persistent buffers that are there come first, read from there.
        seed: decides the random numbers, together with each parameter's full name.
        names: only these, at the cost of the blocks that hold them; None: all.

    Returns:
        Pairs (name, tensor): parameters in fp32, buffers in their own dtype. Tied parameters come once, under the first name.

    Raises:
        DistllmError: a parameter that the spec's init leaves without numbers; weights that do not fit.
    """
    model = _model_with_buffers(spec)
    wanted = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    wanted &= wanted if names is None else set(names)
    if spec.weights is not None:
        from distllm.models.weights import read_tensors

        for name, tensor in read_tensors(spec, model):
            if name in wanted:
                wanted.remove(name)
                yield name, tensor
    yield from _made(spec, model, seed=seed, wanted=wanted)


def _made(
    spec: ModelSpec, model: nn.Module, *, seed: int, wanted: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The wanted tensors from the spec's init, a block at a time."""
    paths = {id(module): name for name, module in model.named_modules()}
    blocks = [block for path in spec.blocks for block in model.get_submodule(path).children()]
    inside = {id(module) for block in blocks for module in block.modules()}
    done: set[int] = set()
    for unit in [*blocks, model]:
        rest = [m for m in _post_order(unit) if id(m) not in done and (unit is not model or id(m) not in inside)]
        done.update(map(id, rest))
        if not any(_join(paths[id(m)], key) in wanted for m in rest for key in (*m._parameters, *m._buffers)):
            continue
        for name, tensor in _initialised(rest, paths, spec, seed):
            if name in wanted:
                yield name, tensor


def _post_order(module: nn.Module) -> Iterator[nn.Module]:
    """A module's tree with children before parents, as `Module.apply` walks it."""
    for child in module.children():
        yield from _post_order(child)
    yield module


def _initialised(
    modules: list[nn.Module], paths: dict[int, str], spec: ModelSpec, seed: int
) -> list[tuple[str, torch.Tensor]]:
    """Give the modules of one unit memory, run the spec's init on each, and take the tensors out again.

    Every place of a tied parameter has memory of its own here, as in a model that is initialised first and tied after.
    """
    slots: list[tuple[nn.Module, str, nn.Parameter]] = []
    named: dict[str, torch.Tensor] = {}
    owner: dict[int, str] = {}
    for module in modules:
        for key, meta in module._parameters.items():
            if meta is None:
                continue
            slots.append((module, key, meta))
            # Not a number: what the init forgets is seen.
            real = torch.full(meta.shape, torch.nan, dtype=torch.float32, device="cpu")
            module._parameters[key] = nn.Parameter(real, requires_grad=False)
            named[_join(paths[id(module)], key)] = real
            owner[real.untyped_storage().data_ptr()] = _join(paths[id(module)], key)
    with _SeededByName(seed, owner) as seeded:
        for module in modules:
            seeded.module = paths[id(module)]
            spec.init(module)
    for name, tensor in named.items():
        if tensor.isnan().any():
            raise DistllmError(
                f"model {spec.name}: {name} is not initialised; give its module a reset_parameters() or the spec an init for it"
            )
    for module, key, meta in slots:
        module._parameters[key] = meta
    buffers = {
        _join(paths[id(module)], key): value
        for module in modules
        for key, value in module._buffers.items()
        if value is not None
    }
    return [*named.items(), *buffers.items()]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


class _SeededByName(TorchDispatchMode):
    """Seeds torch's generator before every random operation, by the name of the parameter that it writes.

    The k-th operation on a parameter draws from hash(seed, name, k), so neither other parameters nor their order matter.
    One that does not write a parameter (`orthogonal_` draws a temporary) takes the name of the module being initialised.
    """

    def __init__(self, seed: int, owner: dict[int, str]) -> None:
        super().__init__()
        self.seed, self.owner, self.module = seed, owner, ""
        self.count: dict[str, int] = {}
        self.saved = torch.empty(0)

    def __enter__(self) -> _SeededByName:
        self.saved = torch.default_generator.get_state()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.default_generator.set_state(self.saved)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            first = args[0] if args and isinstance(args[0], torch.Tensor) else None
            assert first is None or first.device.type != "meta", f"the init of {self.module} writes outside its block"
            pointer = first.untyped_storage().data_ptr() if first is not None else 0
            name = self.owner.get(pointer, f"module {self.module}")
            number = self.count[name] = self.count.get(name, -1) + 1
            digest = hashlib.sha256(f"{self.seed}/{name}/{number}".encode()).digest()
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
        return func(*args, **(kwargs or {}))


def _model_with_buffers(spec: ModelSpec) -> nn.Module:
    """The model with parameters on meta and buffers real, as its constructor computes them."""
    saved = torch.default_generator.get_state()
    try:
        with _parameters_on_meta():
            return spec.build()
    finally:
        torch.default_generator.set_state(saved)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to meta as it is registered; its memory was never touched, so it costs none."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def reset_parameters(module: nn.Module) -> None:
    """The usual `ModelSpec.init` of a plain module: its own `reset_parameters()`, which torch's layers have."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset) and (module._parameters or not list(module.children())):
        with torch.no_grad():
            reset()

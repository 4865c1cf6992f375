"""The commands. Each imports what it needs inside itself, so that help and config errors come at once."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distllm.config.errors import EXIT_BUG, EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, ConfigError, DataError, DistllmError
from distllm.faults import describe, say, tell
from distllm.launch.devices import has_driver
from distllm.launch_options import launch as launch_command
from distllm.launched import later_rank, report_end, show_log, world_size
from distllm.options import (
    Average,
    Beams,
    Column,
    ConfigFile,
    Device,
    Harness,
    LengthPenalty,
    Others,
    Overrides,
    PairColumn,
    Processes,
    Source,
    TaskName,
    Truncate,
    Trust,
    Weights,
    Which,
    Words,
    device_name,
    must_exist,
    real_device,
)

if TYPE_CHECKING:
    from distllm.config.load import Loaded

_EPILOG = (
    "Exit codes: 0 done · 1 a fault of distllm's own · 2 command line or config · 3 data, tokenizer or model files · "
    "4 checkpoint · 5 diverged · 6 disk full or not writable · 7 other ranks lost or not found · 8 out of memory · "
    "9 verify: a layout differs · 10 no progress · 11 bench: slower than before · "
    "75 stopped by a signal after saving (the same command continues) · 130 interrupted. "
    "--debug, anywhere, shows the traceback of an error."
)

app = typer.Typer(
    name="distllm",
    help="Train language models: on a laptop, on one GPU, on many.",
    epilog=_EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line and end the process with its exit code."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command line, telling errors on stderr, and return its exit code (see `config/errors.py`)."""
    debug = "--debug" in argv
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]  # click's own, or the copy that newer typers carry
    try:
        result = app([a for a in argv if a != "--debug"] or ["--help"], prog_name="distllm", standalone_mode=False)
        code = result if isinstance(result, int) else EXIT_OK
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else EXIT_BUG
    except usage_error as error:
        path = getattr(getattr(error, "ctx", None), "command_path", "distllm")
        say(f"{getattr(error, 'format_message', error.__str__)().rstrip('.')}; see {path} --help")
        return EXIT_CONFIG
    except BaseException as error:  # DCP's CheckpointException is no Exception
        code = tell(error, debug=debug, silent=later_rank() and isinstance(error, DistllmError))
        report_end(code=code, lines=describe(error)[0])
        return code
    if code == EXIT_INTERRUPTED and "DISTLLM_INIT_METHOD" not in os.environ:  # of local ranks, the launcher tells it
        say("interrupted")
    return code


@app.callback(invoke_without_command=True)
def _common(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if version:
        from distllm import __version__

        print(f"distllm {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise typer.BadParameter("a command is missing", ctx=context)


@app.command(epilog=_EPILOG)
def prepare(config: ConfigFile, overrides: Overrides = None) -> int:
    """Turn text into tokens on disk (train does it too, when they are missing)."""
    loaded = _checked(config, overrides)
    show_log()
    from distllm.data.prepare import prepare as prepare_data

    prepared = prepare_data(loaded.config, progress=True)
    held = sum(store.n_tokens for store in prepared.validation_stores)
    print(f"tokens      {sum(store.n_tokens for store in prepared.stores):,}" + (f" and {held:,} for validation" if held else ""))
    print(f"vocabulary  {prepared.vocab_size:,}")
    print(f"tokenizer   {prepared.tokenizer_folder}")
    print(f"next        distllm train {config}")
    return EXIT_OK


@app.command(epilog=_EPILOG)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    processes: Processes = None,
    trust: Annotated[bool, typer.Option("--trust", help="Run the Python code that a run folder's config names.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the commands that would run, and run nothing.")] = False,
) -> int:
    """Train a model here: in one process, on all local devices, or as a rank under torchrun."""
    loaded = _checked(config, overrides)
    if config.is_dir() and not trust:
        _refuse_own_code(loaded, config)
    from distllm.train_command import start

    argv = ["train", str(config), *(overrides or [])] + ["--trust"] * trust + ["--debug"] * ("--debug" in sys.argv)
    return start(loaded, argv, processes=processes, show=show)


@app.command(epilog=_EPILOG)
def verify(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="Try every layout on these numbers of ranks.")] = "1,2,4,8",
    layouts: Annotated[str | None, typer.Option(help='Try these instead: "tp=2,pp=2;dp_shard=4".')] = None,
    engines: Annotated[str | None, typer.Option(help="native, deepspeed, or both with commas; else native and CONFIG's.")] = None,
    precision: Annotated[str, typer.Option(help="fp64, fp32, bf16, or several with commas.")] = "fp64",
    steps: Annotated[int, typer.Option(min=2, help="Steps of each layout.")] = 3,
    planted_faults: Annotated[bool, typer.Option("--planted-faults", help="Plant known bugs; each must be caught.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda: a rank a GPU of this machine.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="The folder for record and picture; else OUT/NAME-verify.")] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds for one layout.")] = 300.0,
    trust: Annotated[bool, typer.Option("--trust", help="Run the Python code that a run folder's config names.")] = False,
) -> int:
    """Prove on a small model of the same kind that every layout and engine computes what one process computes."""
    from distllm.verify.asked import options_of

    loaded = _checked(config, overrides)
    if config.is_dir() and not trust:
        _refuse_own_code(loaded, config)
    options = options_of(
        ranks=ranks, layouts=layouts, precision=precision, steps=steps, faults=planted_faults, device=device, timeout_s=timeout,
        engines=f"native,{loaded.config.engine.name}" if engines is None else engines,
    )  # fmt: skip
    from distllm.verify.command import verify as run_verify

    folder = out or Path(loaded.config.out) / f"{loaded.config.name}-verify"
    return run_verify(loaded.config, options, folder=folder, named=" ".join([str(config), *(overrides or [])]))


@app.command(epilog=_EPILOG)
def bench(
    config: ConfigFile,
    overrides: Overrides = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help='Every combination: "layout.tp=1,2 train.micro_batch=4,8"; ranks=2 are so many ranks. Again for more.'),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of a cell, and of a turn of --against.")] = 10,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 3,
    data: Annotated[str, typer.Option(help="config: your data; synthetic: random tokens.")] = "config",
    against: Annotated[str, typer.Option(help="Loops to take turns with: bare, hf-trainer, accelerate, with commas.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each loop.")] = 6,
    compare: Annotated[Path | None, typer.Option(help="An older bench.json; ends with 11 when something is slower.")] = None,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="The folder for record, table and pictures; else OUT/NAME-bench.")] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds for one cell.")] = 600.0,
    trust: Annotated[bool, typer.Option("--trust", help="Run the Python code that a run folder's config names.")] = False,
) -> int:
    """Measure layouts, micro-batches, precisions: speed, MFU, memory, traffic, scaling; here, or in a job."""
    from distllm.bench.asked import options_of
    from distllm.config.machine import cores
    from distllm.rank_facts import rank_facts

    loaded = _checked(config, overrides)
    if config.is_dir() and not trust:
        _refuse_own_code(loaded, config)
    options = options_of(
        grid=grid or [], steps=steps, warmup=warmup, data=data, against=against, rounds=rounds, compare=compare, timeout_s=timeout
    )
    wanted = loaded.config.device if device_name(device) == "auto" else device
    gpus = 0 if wanted == "cpu" else _unused_gpus()
    if wanted == "cuda" and not gpus:
        raise ConfigError([f"device={wanted}: no CUDA device is available here; nearest: cpu"])
    from distllm.bench.cells import Room
    from distllm.bench.command import bench as run_bench
    from distllm.config.errors import EXIT_SLOWER

    folder = out or Path(loaded.config.out) / f"{loaded.config.name}-bench"
    command = shlex.join(["distllm", *sys.argv[1:]]) if sys.argv[1:2] == ["bench"] else f"distllm bench {config}"
    room = Room(gpus, cores(), rank_facts() if world_size() is not None else None)
    code = run_bench(config, overrides or [], options, room=room, folder=folder, command=command)
    slower = [f"--compare={compare}: something became slower, see the lines that begin with SLOWER"]
    report_end(code=code, lines=slower if code == EXIT_SLOWER else [])
    return code


@app.command("eval", epilog=_EPILOG)
def evaluate(
    source: Source,
    text: Annotated[list[Path] | None, typer.Option(help="A UTF-8 text file to measure on; may be given again.")] = None,
    data: Annotated[Path | None, typer.Option(help="A file like the run's training source, such as a test set.")] = None,
    target: Annotated[Path | None, typer.Option(help="The file of the targets where --data is a plain text.")] = None,
    ensemble: Others = None,
    weight: Weights = None,
    which: Which = "auto",
    average: Average = 1,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    column: Column = None,
    pair_column: PairColumn = None,
    label_column: Annotated[str | None, typer.Option(help="The column of the label in --data.")] = None,
    target_column: Annotated[str | None, typer.Option(help="The column of the target text in --data.")] = None,
    task: TaskName = "",
    truncate: Truncate = None,
    harness: Harness = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --harness: documents of each task.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 8,
    device: Device = "auto",
    trust: Trust = False,
) -> int:
    """Measure a model: a run on its own validation data, or any on a file: loss and what fits its task."""
    for name in (source, *(ensemble or [])):
        must_exist(name)
    for file in text or []:
        if not file.is_file():
            raise DataError(f"{file}: no such text file")
    show_log()
    from distllm.train import tell
    from distllm.train.ensemble import open_ensemble
    from distllm.train.evaluate_source import Measured, On, measure
    from distllm.train.files import Columns, check_output
    from distllm.train.inference import Choice, exported
    from distllm.train.translate import decode_of

    if json is not None:
        check_output(json, inputs=[f for f in (data, target) if f is not None])
    choice = Choice(which, average)
    if harness is not None:
        from distllm.train.harness import run_harness

        with exported(source, choice=choice, trust=trust) as (folder, kind):
            figures = run_harness(folder, harness.split(","), kind=kind, batch=batch, device=real_device(device), limit=limit)
        found = Measured(source, figures)
    else:
        opened = open_ensemble(
            [source, *(ensemble or [])], weights=weight or [], choice=choice, device=device_name(device), trust=trust
        )
        on = On(
            tuple(text or []), data, target, Columns(column, pair_column, label_column, target_column), task, truncate
        )
        decode = decode_of(opened, beams=beams, length_penalty=length_penalty)
        found = measure(opened, on=on, batch=batch, decode=decode, terminal=True)
    print("\n".join(tell.lines(found)))
    if found.confusions:
        folder = opened.first.run / "report" if opened.first.run is not None else Path.cwd()
        for path in tell.draw(found, folder, name=data.stem if data is not None else "validation"):
            print(f"{'picture':<16}{path}")
    if json is not None:
        tell.write_json(found, json)
        print(f"{'figures':<16}{json}")
    writes = (kind if harness is not None else opened.first.kind) in ("causal_lm", "sft")
    use = "generate {} --prompt '...'" if writes else "predict {} --input FILE --output FILE"
    print(f"{'next':<16}distllm {use.format(source)}")
    return EXIT_OK


@app.command(epilog=_EPILOG)
def predict(
    source: Source,
    input: Annotated[Path, typer.Option(help="A table (.tsv, .csv, .jsonl, .parquet), or plain text, an example a line.")],
    output: Annotated[Path, typer.Option(help="The file to write: a table of classes or numbers, or a text a line.")],
    ensemble: Others = None,
    weight: Weights = None,
    which: Which = "auto",
    average: Average = 1,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a translation or continuation at most.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="For continuations; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="For continuations that are drawn.")] = 1,
    column: Column = None,
    pair_column: PairColumn = None,
    task: TaskName = "",
    truncate: Truncate = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples at once.")] = 32,
    device: Device = "auto",
    trust: Trust = False,
) -> int:
    """Answer every row of a file: its class, its number, its translation, its continuation, or its masks filled."""
    for name in (source, *(ensemble or [])):
        must_exist(name)
    if not input.is_file():
        raise DataError(f"--input={input}: no such file")
    show_log()
    from distllm.generate import Sampling
    from distllm.train.ensemble import open_ensemble
    from distllm.train.files import Columns, check_output
    from distllm.train.inference import Choice
    from distllm.train.predict import Asked
    from distllm.train.predict import predict as predict_file
    from distllm.train.translate import decode_of

    check_output(output, inputs=[input])
    opened = open_ensemble(
        [source, *(ensemble or [])], weights=weight or [], choice=Choice(which, average), device=device_name(device), trust=trust
    )
    decode = decode_of(opened, beams=beams, length_penalty=length_penalty, max_tokens=max_tokens)
    asked = Asked(
        Columns(column, pair_column), task, truncate, decode, Sampling(max_tokens or 64, temperature=temperature), seed, batch
    )
    count = predict_file(opened, file=input, output=output, asked=asked, terminal=True)
    print(f"rows     {count:,}")
    print(f"written  {output}")
    return EXIT_OK


@app.command(epilog=_EPILOG)
def generate(
    source: Source,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; - reads stdin. Several make a batch.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of each text.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest that hold this share.")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same text.")] = 1,
    ensemble: Others = None,
    weight: Weights = None,
    which: Which = "auto",
    average: Average = 1,
    device: Device = "auto",
    trust: Trust = False,
) -> int:
    """Let a model continue a text."""
    for name in (source, *(ensemble or [])):
        must_exist(name)
    prompts = [sys.stdin.read() if p == "-" else p for p in prompt or [""]]
    target = device_name(device)
    from distllm.generate import Sampling
    from distllm.train.ensemble import open_ensemble
    from distllm.train.generate_source import generate_source
    from distllm.train.inference import Choice

    sampling = Sampling(max_tokens, temperature=0.0 if greedy else temperature, top_k=top_k, top_p=top_p)
    opened = open_ensemble(
        [source, *(ensemble or [])], weights=weight or [], choice=Choice(which, average), device=target, trust=trust
    )
    pieces = generate_source(opened, prompts=prompts, sampling=sampling, seed=seed)
    if len(prompts) == 1:
        for number, piece in enumerate(pieces):
            _write(prompts[0] + piece if number == 0 else piece)  # nothing is shown before the model has loaded
        _write("\n")
        return EXIT_OK
    for number, (start, text) in enumerate(zip(prompts, pieces, strict=True), start=1):
        _write(f"--- {number}\n{start}{text}\n")
    return EXIT_OK


@app.command(epilog=_EPILOG)
def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A run (its newest good checkpoint), or a checkpoint.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT_FOLDER", help="The folder to write; new or empty.")],
    which: Which = "auto",
    average: Average = 1,
    trust: Trust = False,
) -> int:
    """Write a model folder that plain transformers loads."""
    must_exist(source)
    from distllm.train.inference import Choice, export_source, loader_of

    written = export_source(source, folder, choice=Choice(which, average), trust=trust)
    loader = loader_of(written)
    use = "generate {} --prompt '...'" if loader == "AutoModelForCausalLM" else "predict {} --input FILE --output FILE"
    answers = loader.startswith("AutoModelFor")  # a body whose heads lie beside it, or a module of one's own, answers as a run
    call = f"{loader}.from_pretrained({str(written)!r})"
    if not loader.startswith("Auto"):
        call = f"{loader}({str(min(written.glob('*.safetensors')))!r})"
    print(f"written  {written}")
    print(f"next     distllm {use.format(written if answers else source)}")
    print(f"         {call}")
    return EXIT_OK


@app.command(epilog=_EPILOG)
def explain(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A YAML file, or a run folder.")] = None,
    words: Words = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a config, for editors.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Work the batch out for this number of ranks.")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Draw the pipeline's step to this PNG file.")] = None,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="Print the JSON that DeepSpeed is given, and no more.")] = False,
) -> int:
    """Show every value of a config, where it came from, and what it means."""
    from distllm.config import explain as explaining

    if schema:
        print(explaining.json_schema(), end="")
        return EXIT_OK
    if config is None:
        raise ConfigError(["CONFIG: must be given; nearest: distllm explain configs/quickstart.yaml"])
    from distllm.config.check import check, ranks_for
    from distllm.config.load import load

    loaded = load(config, [word for word in words or [] if "=" in word])
    ranks = processes or world_size() or ranks_for(loaded.config, devices=0)
    if deepspeed:
        print(explaining.deepspeed(loaded.config, ranks=ranks))
        return EXIT_OK
    explaining.show(loaded, [word for word in words or [] if "=" not in word], ranks=ranks, terminal=sys.stdout.isatty())
    problems = check(loaded.config, world_size=ranks)
    if problems:
        raise ConfigError(problems)
    if timeline is not None:
        from distllm.timeline.of_config import draw_config

        print("\n".join(draw_config(loaded.config, timeline, ranks=ranks)))
    return EXIT_OK


app.command("launch", epilog=_EPILOG)(launch_command)


@app.command(epilog=_EPILOG)
def jobs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The folder that holds run folders.")] = Path("runs"),
) -> int:
    """List the runs of a folder: state, step, last loss."""
    from distllm.jobs import show

    return show(folder)


@app.command(epilog=_EPILOG)
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> int:
    """Draw the curves of a run as pictures."""
    if not run_folder.is_dir():
        must_exist(f"./{run_folder}" if not run_folder.is_absolute() else str(run_folder))
    from distllm.report import report as draw

    for path in draw(run_folder):
        print(path)
    return EXIT_OK


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _checked(config: Path, overrides: list[str] | None) -> Loaded:
    """Load and check before anything heavy is imported."""
    from distllm.config.check import check
    from distllm.config.load import load

    loaded = load(config, overrides or [])
    problems = check(loaded.config, world_size=None)
    if problems:
        raise ConfigError(problems)
    return loaded


def _refuse_own_code(loaded: Loaded, folder: Path) -> None:
    """Refuse a run folder whose own config, not the command line, names code to run."""
    from distllm.config.trust import refuse_own_code

    given = {key for key in ("spec", "trust_remote_code") if loaded.origins[f"model.{key}"] == "command line"}
    model = loaded.config.model.model_copy(update=dict.fromkeys(given))
    refuse_own_code(loaded.config.model_copy(update={"model": model}), where=folder)


def _unused_gpus() -> int:
    """The GPUs of this machine, counted without starting CUDA where there is a driver at all."""
    if not has_driver():
        return 0
    from distllm.verify.asked import gpus

    return gpus()

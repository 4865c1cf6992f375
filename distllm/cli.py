"""The commands. Each imports what it needs inside itself, so that help and config errors come at once.

Those of a config are here; those that ask a trained model are in model_commands.py, and launch is in launch_options.py.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distllm.config.errors import EXIT_BUG, EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, ConfigError, DistllmError
from distllm.faults import describe, say, tell
from distllm.launch.devices import has_driver
from distllm.launch_options import launch as launch_command
from distllm.launched import later_rank, report_end, show_log, world_size
from distllm.model_commands import evaluate, export, generate, predict
from distllm.options import ConfigFile, Device, Overrides, Processes, Words, device_name, must_exist

if TYPE_CHECKING:
    from distllm.config.deepspeed_json import FileBuffers
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
        say(_of_usage(error, argv))
        return EXIT_CONFIG
    except BaseException as error:  # DCP's CheckpointException is no Exception
        code = tell(error, debug=debug, silent=later_rank() and isinstance(error, DistllmError))
        report_end(code=code, lines=describe(error)[0])
        return code
    if code == EXIT_INTERRUPTED and "DISTLLM_INIT_METHOD" not in os.environ:  # of local ranks, the launcher tells it
        say("interrupted")
    return code


def _of_usage(error: Exception, argv: list[str]) -> str:
    """What is wrong with the words of a command line: of a number in our words, of the rest in typer's."""
    from distllm.usage import number_problem

    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    told = number_problem(app, getattr(context, "info_name", None), getattr(parameter, "name", None), argv)
    path = getattr(context, "command_path", "distllm")
    return told or f"{getattr(error, 'format_message', error.__str__)().rstrip('.')}; see {path} --help"


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
    from distllm.verify.asked import options_of, words_of

    loaded = _checked(config, overrides)
    if config.is_dir() and not trust:
        _refuse_own_code(loaded, config)
    words = words_of(engines=engines, precision=precision, steps=steps, device=device, timeout_s=timeout, trust=trust)
    options = options_of(
        ranks=ranks, layouts=layouts, precision=precision, steps=steps, faults=planted_faults, device=device, timeout_s=timeout,
        engines=f"native,{loaded.config.engine.name}" if engines is None else engines,
    )  # fmt: skip
    from distllm.verify.command import verify as run_verify

    folder = out or Path(loaded.config.out) / f"{loaded.config.name}-verify"
    return run_verify(loaded.config, options, folder=folder, named=shlex.join([str(config), *(overrides or [])]), words=words)


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
    against: Annotated[
        str, typer.Option(help="Loops to take turns with: bare, hf-trainer, accelerate, or bare+host and so on; with commas.")
    ] = "",
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
    show_log()
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


app.command("eval", epilog=_EPILOG)(evaluate)
app.command("predict", epilog=_EPILOG)(predict)
app.command("generate", epilog=_EPILOG)(generate)
app.command("export", epilog=_EPILOG)(export)


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

        def buffers() -> FileBuffers:
            from distllm.verify.file_buffers import predicted_buffers  # it takes the model, and so torch

            return predicted_buffers(loaded.config, ranks=ranks)

        print(explaining.deepspeed(loaded.config, ranks=ranks, buffers=buffers))
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

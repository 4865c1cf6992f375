"""The command lines of what asks a trained model: eval, predict, generate and export; see cli.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from distllm.config.errors import EXIT_OK
from distllm.faults import say
from distllm.launched import show_log
from distllm.options import (
    Average,
    Beams,
    Column,
    Device,
    Harness,
    LengthPenalty,
    Others,
    PairColumn,
    Source,
    TaskName,
    Truncate,
    Trust,
    Weights,
    Which,
    device_name,
    must_be_file,
    must_exist,
    real_device,
)


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
    for option, files in (("--text", text or []), ("--data", [data] if data else []), ("--target", [target] if target else [])):
        for file in files:
            must_be_file(file, option=option)
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
        from distllm.checkpoint.hf import read_texts
        from distllm.data.clean import cleans
        from distllm.train.harness import run_harness

        with exported(source, choice=choice, trust=trust) as (folder, kind):
            learned = read_texts(folder)
            if learned is not None and cleans(learned.clean):
                say("--harness: its texts are not cleaned as those of the training were (data.clean)")
            if learned is not None and learned.prefix:
                say(f"--harness: its texts do not begin with {learned.prefix!r} as those of the training did")
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
    must_be_file(input, option="--input")
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


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A run (its newest good checkpoint), or a checkpoint.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT_FOLDER", help="The folder to write; new or empty.")],
    which: Which = "auto",
    average: Average = 1,
    trust: Trust = False,
) -> int:
    """Write a model folder that plain transformers loads."""
    must_exist(source)
    from distllm.checkpoint.hf import read_texts
    from distllm.data.clean import cleans, told
    from distllm.train.inference import Choice, export_source, loader_of

    written = export_source(source, folder, choice=Choice(which, average), trust=trust)
    loader = loader_of(written)
    use = "generate {} --prompt '...'" if loader == "AutoModelForCausalLM" else "predict {} --input FILE --output FILE"
    answers = loader.startswith("AutoModelFor")  # a body whose heads lie beside it, or a module of one's own, answers as a run
    call = f"{loader}.from_pretrained({str(written)!r})"
    if not loader.startswith("Auto"):
        call = f"{loader}({str(min(written.glob('*.safetensors')))!r})"
    print(f"written  {written}")
    texts = read_texts(written)
    if texts is not None and cleans(texts.clean):
        what = "distllm cleans what it is asked alike, and for transformers it is yours to do"
        print(f"cleaned  data.clean: {told(texts.clean)}; {what}")
    if texts is not None and texts.prefix:
        print(f"prefix   {texts.prefix!r}; distllm puts it before what it is asked, and for transformers it is yours to do")
    print(f"next     distllm {use.format(written if answers else source)}")
    print(f"         {call}")
    return EXIT_OK


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

from dataclasses import replace
from pathlib import Path

from distllm.track.summary import Summary, duration, printable, render_summary, told

RUN = Path("runs/quick start")
FULL = Summary(
    run_folder=RUN, steps=300, total_steps=300, seconds=125.0, tokens=1_228_800, metrics=RUN / "metrics.jsonl",
    resume_command="distllm train a.yaml train.steps=600", val_loss=3.25,
    figures={"perplexity": 25.79, "accuracy": 0.41}, unigram_loss=6.5, best_metric="val_loss",
    best_value=3.2, best_step=250, tokens_per_s=9830.4, skipped=2,
    checkpoint=RUN / "checkpoints/step-300", prompt="def ", sample="f(x):\n\treturn x\x1b[31m",
)  # fmt: skip


def test_plain_text_says_everything() -> None:
    text = render_summary(FULL, terminal=False)
    for part in (
        "quick start: done, 300 steps", "1,228,800 tokens", "2 min 5 s, 9,830 tokens/s",
        "loss 3.2500, perplexity 25.79",
        "accuracy 41.0%", "6.5000", "3.2000 at step 250", "2 steps", "checkpoints/step-300", "metrics.jsonl",
        "distllm generate 'runs/quick start'", "distllm report 'runs/quick start'",
        "distllm export 'runs/quick start' 'runs/quick start/export'",
        "distllm train a.yaml train.steps=600", "def f(x):",
    ):  # fmt: skip
        assert part in text, part
    assert "\x1b" not in text and text.endswith("\n")


def test_the_best_says_by_what_part_of_the_validation_set_it_was_chosen() -> None:
    """The last evaluation is of all of it, so two figures of one step can differ."""
    text = render_summary(replace(FULL, best_of=(32, 1152)), terminal=False)
    assert "3.2000 at step 250, by 32 of 1,152 validation samples\n" in text
    assert "validation samples" not in render_summary(replace(FULL, best_of=(1152, 1152)), terminal=False)


def test_each_task_of_several_tells_its_first_figure() -> None:
    figures = {"mood.samples": 4.0, "mood.accuracy": 0.5, "mood.f1_macro": 0.25, "score.pearson": 0.125, "score.mse": 2.0}
    assert told(0.75, figures) == "loss 0.7500, mood.accuracy 50.0%, mood.f1 macro 25.0%, score.pearson 0.12"


def test_what_is_not_known_is_not_told() -> None:
    bare = Summary(
        run_folder=RUN, steps=7, total_steps=300, seconds=1.0, tokens=10, metrics=RUN / "metrics.jsonl",
        resume_command="distllm train a.yaml", stopped="SIGTERM",
    )  # fmt: skip
    text = render_summary(bare, terminal=False)
    assert "stopped at step 7 of 300 (SIGTERM)" in text and "continue" in text
    for part in ("None", "generate", "export", "validation", "unigram", "sample"):
        assert part not in text, part


def test_the_terminals_frame_holds_the_same_and_no_control_characters_of_the_model() -> None:
    text = render_summary(FULL, terminal=True, width=100)
    assert "╭" in text and "distllm export" in text and "[31m" in text and "x\x1b[31m" not in text
    assert render_summary(replace(FULL, sample="[b]bold[/b]"), terminal=True).count("[b]bold[/b]") == 1


def test_durations() -> None:
    told = [duration(seconds) for seconds in (0.51, 42.2, 59.9, 60, 185, 3600, 26_000, 90_000)]
    assert told == ["0.5 s", "42 s", "60 s", "1 min", "3 min 5 s", "1 h", "7 h 13 min", "1 d 1 h"]


def test_printable() -> None:
    assert printable("a\tb\nc\r\x07é") == "a   b\nc\ufffd\ufffdé"

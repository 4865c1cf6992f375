"""`distllm verify`, from the config to the exit code."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distllm.config.check_pipeline import virtual_stages
from distllm.config.errors import EXIT_OK, EXIT_UNEQUAL, ConfigError
from distllm.config.places import make_folder
from distllm.config.schema import Config, EngineConfig, LayoutConfig
from distllm.models.build import meta_model, resolve_spec
from distllm.train.build_deepspeed import require_deepspeed
from distllm.train.tasks import outputs_of
from distllm.train.tune import apply_tune
from distllm.verify import deepspeed_trial, fake, guards, planted
from distllm.verify.asked import Options
from distllm.verify.collectives import Traffic
from distllm.verify.data import Data, open_data
from distllm.verify.engines import NATIVE, EngineChoice, engines_of
from distllm.verify.formulas import expected_traffic, unpredictable
from distllm.verify.judge import DEEPSPEED_EPS, judge
from distllm.verify.layouts import Layout, layout_of, products, refusals
from distllm.verify.ledger import Step
from distllm.verify.planted_deepspeed import DEEPSPEED_FAULTS
from distllm.verify.ranks import Broken, on_ranks
from distllm.verify.record import draw, write_record
from distllm.verify.rows import Row
from distllm.verify.shrink import EXPERTS, check_own_module, degrees_of, folded, shrink, uneven
from distllm.verify.table import certificate, growing, say
from distllm.verify.trial import Case, Planted, RankReport, Trace, make_case, run_rank, trace


class Verification:
    """Small models by layout, and what one process computes with each of them, once."""

    def __init__(self, config: Config, data: Data, options: Options) -> None:
        """Args:
        config: the user's.
        data: its tokens.
        options: what was asked for.

        Raises:
            ConfigError: a model that cannot be shrunk.
        """
        self.config, self.data, self.options = config, data, options
        labels = data.prepared.labels
        spec = resolve_spec(
            config, vocab_size=data.prepared.vocab_size, labels=outputs_of(labels), roles=data.roles,
            label_names=labels.get("", ()),
        )  # fmt: skip
        self.known = spec.hf_config
        parameters = sum(p.numel() for p in meta_model(spec).parameters())
        if self.known is None:
            check_own_module(config, parameters=parameters)
        self.parameters = parameters
        self.base = self.case(self.small(layout_of({})))
        self._traces: dict[str, Trace | Broken] = {}
        self._sound: dict[tuple[Layout, EngineChoice], Row] = {}

    @property
    def has_experts(self) -> bool:
        return self.known is not None and any(getattr(self.known, name, None) for name in EXPERTS)

    def small(
        self, layout: Layout, *, precision: str = "fp64", engine: EngineChoice = NATIVE, seed: int | None = None
    ) -> Config:
        """The config of a layout: a small model that it divides, and two micro-batches or more of one sample."""
        laid = self._laid(layout, engine)
        if laid.model.attention == "flash_attention_2" and self.options.device == "cpu":
            laid = laid.model_copy(update={"model": laid.model.model_copy(update={"attention": "auto"})})
        virtual = virtual_stages(laid.layout.pp_schedule, laid.layout.pp_virtual)
        small = shrink(laid, self.known, degrees_of(layout.sizes, virtual=virtual))
        sizes = layout.sizes
        readers = sizes["dp_replicate"] * sizes["dp_shard"] * sizes["ep"]
        each = max(2, 2 * sizes["pp"], 4 // readers)  # micro-batches of a rank: enough for every schedule
        batch = small.train.model_copy(update={"global_batch": readers * each})
        numbers = small.precision.model_copy(update={"compute": precision})
        changed: dict[str, Any] = {
            "train": batch, "precision": numbers, "device": self.options.device, "name": "verify",
        }  # fmt: skip
        if engine != NATIVE:
            changed["optim"] = small.optim.model_copy(update={"eps": max(small.optim.eps, DEEPSPEED_EPS)})
        return small.model_copy(update=changed | ({} if seed is None else {"seed": seed}))

    def _laid(self, layout: Layout, engine: EngineChoice) -> Config:
        """The user's config with a layout and an engine."""
        return self.config.model_copy(update={"layout": layout.config(), "engine": engine.config(self.config.engine)})

    def case(self, config: Config) -> Case:
        """What the ranks of a small config train."""
        fold = folded(config, vocab_size=self.data.prepared.vocab_size)
        return make_case(config, self.data, steps=self.options.steps, uneven=uneven(config), fold=fold)

    def reference(self, case: Case) -> Trace | Broken:
        """What one process computes of the same model and samples; computed once for all layouts that share them."""
        alone = case.config.model_copy(update={"layout": LayoutConfig(dp_shard=1), "engine": EngineConfig()})
        key = json.dumps(alone.model_dump(mode="json"), sort_keys=True)
        if key not in self._traces:
            one = replace(case, config=alone)
            found = on_ranks(lambda world: trace(one, world), 1, timeout_s=self.options.timeout_s, device=self.options.device)
            self._traces[key] = found if isinstance(found, Broken) else found[0]
        return self._traces[key]

    def run(
        self, layout: Layout, *, engine: EngineChoice = NATIVE, precision: str = "fp64", bug: Planted | None = None
    ) -> Row:
        """Run one layout, on real ranks or some of them in a fake world, and judge it."""
        began = time.monotonic()
        precision = engine.precision(precision)
        config = self.small(layout, precision=precision, engine=engine)
        row = Row(layout, precision, engine, fake=layout.ranks > self.options.real)
        if problems := self.refusals(layout, engine, small=config):
            return replace(row, refused=tuple(problems))
        try:
            case = self.case(config)
        except ConfigError as error:
            return replace(row, refused=tuple(error.problems))
        row = self._fake(case, row) if row.fake else self._real(case, row, bug=bug)
        return replace(row, seconds=time.monotonic() - began)

    def refusals(self, layout: Layout, engine: EngineChoice, *, small: Config | None = None) -> list[str]:
        """Why a layout cannot run under an engine, in the user's own numbers where these say it; empty where it can."""
        if layout.ranks > self.options.real and engine != NATIVE:
            return [
                f"--engines={engine.name}: {layout.ranks:,} ranks would run in a fake world here, and only engine native does; "
                f"nearest: {self.options.real} ranks"
            ]
        problems = refusals(small or self.small(layout, precision=engine.precision("fp64"), engine=engine), layout.ranks)
        if not problems:
            return []
        told = refusals(self._laid(layout, engine), layout.ranks)
        return [line for line in told if line.startswith("layout.")] or problems

    def row(self, empty: Row) -> Row:
        """What becomes of the layout of a row, with its engine and its precision."""
        if empty.precision == empty.engine.precision("fp64"):
            return self.sound(empty.layout, empty.engine)
        return self.run(empty.layout, engine=empty.engine, precision=empty.precision)

    def sound(self, layout: Layout, engine: EngineChoice = NATIVE) -> Row:
        """A layout without a bug, in fp64 where the engine has it; run once."""
        key = layout, engine
        if key not in self._sound:
            self._sound[key] = self.run(layout, engine=engine)
        return self._sound[key]

    def _real(self, case: Case, row: Row, *, bug: Planted | None) -> Row:
        reference = self.reference(case)
        if isinstance(reference, Broken):
            return replace(row, broken=f"one process: {reference.reason}")
        ranks, timeout = row.layout.ranks, self.options.timeout_s
        native = row.engine == NATIVE
        run, hidden = (run_rank, {}) if native else (deepspeed_trial.run_rank, deepspeed_trial.NOT_EXPOSED)
        reports = on_ranks(
            lambda world: run(case, world, reference, planted=bug), ranks, timeout_s=timeout, device=self.options.device
        )
        if isinstance(reports, Broken):
            return replace(row, refused=reports.problems, broken=reports.reason)
        formula, why = _formula(case, row.layout, reports) if native else (None, hidden["collectives"])
        expected = [formula(report) for report in reports] if formula is not None else []
        verdict = judge(case, reports, reference, expected=formula)
        verdict = replace(verdict, problems=(*verdict.problems, *guards.too_little(verdict)))
        traffic = [report.traffic for report in reports if report.traffic is not None]
        return replace(row, verdict=verdict, traffic=traffic, expected=expected, unpredictable=why, not_exposed=hidden)

    def _fake(self, case: Case, row: Row) -> Row:
        formula, why = _formula(case, row.layout, ())
        return replace(fake.look(case, row, timeout_s=self.options.timeout_s, formula=formula), unpredictable=why)

    def guard(self, row: Row) -> list[str]:
        """What shows that the comparison of a layout that ran proves nothing; and that two seeds differ."""
        case = self.case(self.small(row.layout, precision=row.precision, engine=row.engine))
        seed = self.config.seed + 1
        other = self.case(self.small(row.layout, precision=row.precision, engine=row.engine, seed=seed))
        own, others = self.reference(case), self.reference(other)
        if isinstance(own, Broken) or isinstance(others, Broken):
            return ["one process could not be run with two seeds"]
        return list(guards.dead(own, others))


def _formula(
    case: Case, layout: Layout, everyone: Sequence[RankReport]
) -> tuple[Callable[[RankReport], Traffic] | None, str]:
    """What a rank of a layout should send at its last step; or None, and why no formula says it."""
    model = meta_model(case.spec)
    apply_tune(model, case.spec, case.config.tune)
    if why := unpredictable(case.config, case.spec, model, layout.sizes):
        return None, why

    def formula(report: RankReport) -> Traffic:
        return expected_traffic(Step(case.config, case.spec, model, layout.sizes, report.place, report.micro, everyone))

    return formula, ""


def verify(config: Config, options: Options, *, folder: Path, named: str, words: str) -> int:
    """Verify every layout, show the table, and write record and picture.

    Args:
        config: checked.
        options: what was asked for.
        folder: where files go.
        named: how the user named the config, for the last line.
        words: of `words_of`, for the last line.

    Returns:
        EXIT_OK if every layout that is not refused is equal, every guard holds, and every planted fault was caught;
        else EXIT_UNEQUAL.

    Raises:
        DistllmError: data, model or layouts that cannot be used.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if "deepspeed" in options.engines:
        require_deepspeed()
        if options.device == "cpu":  # elsewhere it may start CUDA, which does not survive a fork
            deepspeed_trial.load_compiler()
    make_folder(folder, key="--out", value=str(folder), near="runs/verify")
    verification = Verification(config, open_data(config, folder), options)
    tasks = list(_tasks(verification))
    planted_ones = (*planted.FAULTS, *DEEPSPEED_FAULTS) if options.faults else ()
    faults = [fault for fault in planted_ones if fault.engine.name in options.engines]
    rows: list[Row] = []
    with growing(len(tasks)) as watch:
        for empty in tasks:
            watch.starts(empty.name)
            rows.append(verification.row(empty))
            watch.add(rows[-1])
    judged = next((row for row in rows if row.verdict is not None and not row.fake), None)
    found = verification.guard(judged) if judged is not None else []
    if all(row.refused for row in rows):
        found.append("every layout is refused: nothing was compared")
    caught = [_plant(verification, fault) for fault in faults]
    holds = all(row.holds for row in rows) and not found and not any(fault["caught"] is False for fault in caught)
    files = [write_record(folder, config, rows, guards=found, faults=caught, holds=holds)]
    worst = max((row for row in rows if row.verdict is not None and not row.fake), key=lambda row: row.worst, default=None)
    if worst is not None:
        files.append(draw(folder, worst))
    what = f"{config.name}: {_what(verification)}, {options.steps} steps of your own data"
    say(certificate(rows, guards=found, faults=caught, files=files, config=named, what=what, holds=holds,
                    options=words))
    return EXIT_OK if holds else EXIT_UNEQUAL


def _tasks(verification: Verification) -> Iterator[Row]:
    """The rows to come, without what becomes of them.

    Of DeepSpeed, layouts that were not asked for are left out where a rule refuses them; where it refuses all, one tells why.
    """
    options = verification.options
    layouts = list(_layouts(verification))
    for engine in engines_of(options.engines):
        tried = layouts
        if engine != NATIVE and not options.layouts:
            tried = [layout for layout in layouts if not verification.refusals(layout, engine)] or layouts[:1]
        for precision in dict.fromkeys(engine.precision(asked) for asked in options.precisions):
            yield from (Row(layout, precision, engine) for layout in tried)


def _layouts(verification: Verification) -> Iterator[Layout]:
    """The layouts asked for, or every product; experts are spread only where there are any."""
    options = verification.options
    if options.layouts:
        yield from options.layouts
        return
    axes = [axis for axis in ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp") if axis != "ep" or verification.has_experts]
    seen: dict[Layout, None] = {}
    for ranks in options.ranks:
        seen |= dict.fromkeys(products(ranks, axes=axes))
    yield from seen


def _what(verification: Verification) -> str:
    """What the small model is, beside the user's."""
    case = verification.base
    small = sum(p.numel() for p in meta_model(case.spec).parameters())
    if small == verification.parameters:
        return f"{case.spec.name} of {small:,} parameters, as it is"
    return f"{case.spec.name} of {small:,} parameters in place of {verification.parameters:,}"


def _plant(verification: Verification, fault: planted.Fault) -> Mapping[str, Any]:
    """Run a layout with one bug in it; `caught` is None where the bug has no place in this model."""
    layout = layout_of(fault.layout)
    told: dict[str, Any] = {"name": fault.name, "what": fault.what, "engine": fault.engine.label, "layout": layout.name}
    sound = verification.sound(layout, fault.engine)
    if sound.refused:
        return told | {"caught": None, "by": sound.refused[0]}
    if not sound.equal:
        return told | {"caught": False, "by": "the layout differs without it too"}
    row = verification.run(layout, engine=fault.engine, bug=fault)
    if row.verdict is None:  # a bug that breaks the run was not found by what is compared
        return told | {"caught": None if planted.NO_PLACE in row.broken else False, "by": row.broken}
    by = row.verdict.problems[0] if row.verdict.problems else ""
    return told | {"caught": bool(row.verdict.problems), "by": by}

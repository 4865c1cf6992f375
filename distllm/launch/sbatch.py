"""The script that sbatch takes: one attempt of a job, which the next one continues; of a bench the only one."""

from __future__ import annotations

from distllm.launch.attempt import NO_STEP
from distllm.launch.commands import Place, command
from distllm.launch.job import Job
from distllm.launch.script import FOLDER, MEET, comment, exports, folded, meet_in_files, ranks
from distllm.launch.settings import settings
from distllm.launch.words import Shell, quoted

START_S = 300
"""Seconds that SLURM may take to start the ranks; a slow prolog needs minutes, and without a limit srun waits for ever."""


def sbatch_script(job: Job) -> str:
    """The text for sbatch.

    Args:
        job: checked by `problems`; every field in an #SBATCH line has been matched against a narrow form.
    """
    lines = [
        "#!/usr/bin/env bash",
        *comment(
            f"{job.name} under SLURM: {ranks(job)}, started by {job.by}. Copy it, edit it, and give it to sbatch."
        ),
        *[f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in directives(job)],
        "set -uo pipefail",
        f"python={quoted([job.python])}",
        *_names(job),
        "export DISTLLM_LAUNCH",
        *(meet_in_files() if job.nodes == 1 else []),
        *exports([s for s in settings(job, folder=FOLDER, meet=MEET, master=None) if s.name != "DISTLLM_LAUNCH"]),
        f"export OMP_NUM_THREADS={max(1, job.slurm.cpus)}  # the cores of a rank",
        f"export SLURM_EXIT_ERROR={NO_STEP}  # srun's exit code where SLURM cannot start the ranks; no rank has it",
        "",
        *_begin(job),
        'read -r MASTER_ADDR MASTER_PORT <<< "$meet"',
        "export MASTER_ADDR MASTER_PORT",
        "",
        *(_traps() if job.resumes else []),
        "# shellcheck disable=SC2016  # each node's own shell puts its number in",
        *_step(job),
        "code=$?",
        "",
        *_end(job),
    ]
    return "\n".join(lines) + "\n"


def _begin(job: Job) -> list[str]:
    """Before the ranks: where they meet, and whether to start at all."""
    start = f'meet=$("$python" -m distllm.launch.attempt begin {FOLDER} --run "$run" --nodes {job.nodes} --slots {job.ranks}'
    where = "Where the ranks meet: the first node and a free port of it."
    if not job.resumes:
        return [*comment(where), f"{start} --once) || exit"]
    return [
        *comment(f"{where} An attempt that follows too many without"),
        *comment("progress ends here, and so does one with other nodes than asked for: it is requeued."),
        f"{start} --attempts {job.slurm.attempts}) || exit",
    ]


def _traps() -> list[str]:
    """What the script does with the signals of a job that saves when it is asked to."""
    return [
        *comment(
            "SIGUSR1 comes before the time limit. It is for the ranks: this shell and the launchers must not die of it."
        ),
        *comment("SIGTERM comes with scancel and with pre-emption: then nothing is requeued from here."),
        "asked=none",
        "trap '' USR1",
        "trap 'asked=TERM' TERM",
    ]


def _end(job: Job) -> list[str]:
    """After the ranks."""
    end = f'"$python" -m distllm.launch.attempt end {FOLDER} --run "$run" --code "$code"'
    if not job.resumes:
        return [*comment("Tell the failure that came first."), f"{end} --once"]
    return [
        *comment(
            "Tell the failure that came first. After a stop on request, and where the ranks were not started: requeue,"
        ),
        *comment("by scontrol, else by sbatch, else by exit code 75 (RequeueExit=75 in slurm.conf)."),
        f'{end} --asked "$asked" --attempts {job.slurm.attempts} --script "$0"',
    ]


def directives(job: Job) -> list[tuple[str, str]]:
    """The options of sbatch, in order."""
    s = job.slurm
    per_node = job.ranks if job.by == "srun" else 1
    found = [("job-name", job.name), ("nodes", str(job.nodes)), ("ntasks-per-node", str(per_node))]
    if s.cpus:
        found.append(("cpus-per-task", str(s.cpus * (1 if job.by == "srun" else job.ranks))))
    if job.device == "cuda":
        found.append(("gpus-per-node", str(job.ranks)))
    found += [(key, value) for key in ("partition", "account", "qos", "time") if (value := getattr(s, key))]
    if s.sweep:
        found.append(("array", f"0-{len(s.sweep) - 1}" + (f"%{s.at_once}" if s.at_once else "")))
    log = "%x-%A_%a.log" if s.sweep else "%x-%j.log"  # here: SLURM makes no folder for it
    found += [("output", log), ("open-mode", "append")]
    found += [("requeue", ""), ("signal", f"USR1@{s.lead_s}")] if job.resumes else [("no-requeue", "")]
    found.append(("export", ",".join((*job.forward, "DISTLLM_LAUNCH"))))
    return [*found, *s.options]


def _names(job: Job) -> list[str]:
    """The run folder and the launch's folder; of an array, those of this element."""
    out = quoted([job.out])
    if not job.slurm.sweep:
        return [
            f"run={out}/{job.name}",
            f"DISTLLM_LAUNCH=${{DISTLLM_LAUNCH:-{out}/.launch/{job.name}/$SLURM_JOB_ID}}  # a requeued job finds its own again",
        ]
    cases = [f"  {index}) sweep=({quoted(words)}) ;;" for index, words in enumerate(job.slurm.sweep)]
    return [
        *comment("This element of the array: the last one carries the array's own id, so these two name it."),
        'case "$SLURM_ARRAY_TASK_ID" in',
        *cases,
        "  *) exit 2 ;;",
        "esac",
        f"name={job.name}-$SLURM_ARRAY_TASK_ID",
        f"run={out}/$name",
        f"DISTLLM_LAUNCH=${{DISTLLM_LAUNCH:-{out}/.launch/$name/$SLURM_ARRAY_JOB_ID}}",
    ]


def _step(job: Job) -> list[str]:
    """The srun line: a launcher on every node, or every rank itself."""
    place = Place(Shell('"$SLURM_NODEID"'), Shell('"$MASTER_ADDR"'), Shell('"$MASTER_PORT"'), FOLDER, MEET)
    inner = [Shell('"$0"'), *command(job, place, words=(Shell('"$@"'),))[1:]]
    options = ["srun", "--export=ALL", "--kill-on-bad-exit=1", f"--immediate={START_S}"]
    if job.slurm.cpus:
        options.append(Shell('--cpus-per-task="$SLURM_CPUS_PER_TASK"'))  # since 22.05 srun takes it from nowhere else
    words = [*job.words, *([Shell('"name=$name"'), Shell('"${sweep[@]}"')] if job.slurm.sweep else [])]
    trap = 'trap "" USR1' if job.resumes else ""
    script = f"'{trap}\nexec {folded(inner)}'"
    head = quoted([*options, "bash", "-c"])
    return [f"{head} {script} {folded([Shell(chr(34) + '$python' + chr(34)), *words])}"]

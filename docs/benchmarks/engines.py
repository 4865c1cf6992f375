"""Native against DeepSpeed at ZeRO 1, 2 and 3, on data-, tensor- and pipeline-parallel ranks: each against one process.

    python docs/benchmarks/engines.py --text data/tinyshakespeare/input.txt

Runs `distllm verify configs/quickstart.yaml --engines native,deepspeed` with planted faults on real text, and writes
engines.json beside this file: the command, versions, tolerances, what DeepSpeed does not show, and for every engine, stage and
layout the verdict and the largest errors; then the planted faults. A layout that a rule refuses is a row with the rule. Its exit
code is that of verify.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LAYOUTS = "dp_shard=2;dp_shard=4;tp=2;dp_shard=2,tp=2;pp=2;pp=2,dp_shard=2"


def told(row: dict[str, Any]) -> dict[str, Any]:
    """A row of verify.json, without its traffic."""
    kept = ("engine", "zero_stage", "name", "ranks", "precision", "verdict", "rules", "errors", "problems", "seconds")
    return {key: row[key] for key in kept if key in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file; else the config's own text, Python's standard library")
    parser.add_argument("--layouts", default=LAYOUTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = [f"data.sources=[{{kind: text, document: paragraph, path: {args.text.resolve()}}}]"] if args.text else []
        asked = ["--engines", "native,deepspeed", "--layouts", args.layouts, "--planted-faults", "--out", f"{folder}/verify"]
        words = ["verify", "configs/quickstart.yaml", *source, f"data.store={folder}/store", *asked]
        began = time.monotonic()
        command = [sys.executable, "-m", "distllm", *words]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        seconds = round(time.monotonic() - began)
        whole = json.loads((Path(folder) / "verify" / "verify.json").read_text())
        line = f"distllm {shlex.join(words)}".replace(folder, "WORK")
    line = line.replace(str(args.text.resolve()), "INPUT.TXT") if args.text else line
    rows = whole["layouts"]
    hidden = {row["engine"]: row["not_exposed"] for row in rows if row.get("not_exposed")}
    record = {
        "command": line, "exit code": code, "wall_s": seconds, "holds": whole["holds"], "date": whole["date"],
        "hardware": whole["hardware"],
        "versions": whole["versions"] | {"deepspeed": version("deepspeed")}, "tolerances": whole["bounds"], "not exposed": hidden,
        "reference": "one process of the native engine, in the same precision", "guards": whole["guards"],
        "rows": [told(row) for row in rows], "planted faults": whole["planted_faults"],
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()

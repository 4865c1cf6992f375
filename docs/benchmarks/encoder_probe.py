"""What a masked-LM encoder, and the plain counts of the same text, know of sentiment: linear probes on SST-2.

    python docs/benchmarks/encoder_probe.py --data data --runs WORK/runs/encoder_pretrain

A sentence is the mean of the states of its tokens, in each layer of a run that `distllm train` made (or of the same model
with random weights), or the mean of vectors of its words that were made by counting neighbours (positive PMI, the 128
largest singular vectors; Levy & Goldberg 2014), from the texts of pre-training, from the training sentences without their
labels, and from both. A logistic regression learns from the training sentences and is measured on the validation sentences;
of three strengths of L2 the best counts, so the figures are a little too high, all in the same way. Writes
encoder_probe.json beside this file. The test set is not read. `--data` holds sst2/, wikitext2/ and tinyshakespeare/.

Shapes: N sentences, L layers, D values of a vector, V words.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import distllm
from distllm.train.inference import open_source

STRENGTHS = (1e-3, 1e-2, 1e-1)
WORDS, WINDOW, SIZE = 12_000, 5, 128
FEW = 1000
Table = tuple[list[str], torch.Tensor]


def table(path: Path) -> Table:
    """Sentences, and their labels [N]."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [row[0] for row in rows], torch.tensor([float(row[1]) for row in rows])


def probe(train: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, answers: torch.Tensor) -> float:
    """Validation accuracy of a logistic regression.

    Args:
        train: vectors to learn from, [N, D].
        labels: [N].
        valid: vectors to be measured on, [M, D].
        answers: [M].
    """
    mean, spread = train.mean(0), train.std(0) + 1e-6
    train, valid = (train - mean) / spread, (valid - mean) / spread
    reached = []
    for strength in STRENGTHS:
        weights = torch.zeros(train.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

        def loss(weights: torch.Tensor = weights, strength: float = strength, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            value = binary_cross_entropy_with_logits(train @ weights[:-1] + weights[-1], labels)
            value = value + strength * weights[:-1].square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)
        reached.append((((valid @ weights[:-1] + weights[-1]) > 0) == (answers > 0)).float().mean().item())
    return max(reached)


def states(model: Any, tokenizer: Any, sentences: Sequence[str]) -> torch.Tensor:
    """The mean state of each sentence in each layer, [N, L, D]; layer 0 is the embedding."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in sentences]
    means: dict[int, torch.Tensor] = {}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for begin in range(0, len(order), 64):
        some = order[begin : begin + 64]
        longest = len(ids[some[-1]])
        padded = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in some])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in some])
        with torch.no_grad():
            out = model.base_model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
        layers = torch.stack([*out.hidden_states[:-1], out.last_hidden_state], dim=1)
        inside = mask[:, None, :, None].float()
        means |= dict(zip(some, (layers * inside).sum(2) / inside.sum(2), strict=True))
    return torch.stack([means[i] for i in range(len(ids))])


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+|[^\sa-z0-9]", text.lower())


def counted(texts: Sequence[Sequence[str]], index: dict[str, int]) -> torch.Tensor:
    """Vectors [V, D] of words from the positive PMI with their neighbours, a neighbour at distance d counting 1 / d."""
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for text in texts:
        ids = [index[word] for word in text if word in index]
        for distance in range(1, WINDOW + 1):
            left, right = ids[:-distance], ids[distance:]
            rows += left + right
            columns += right + left
            values += [1 / distance] * (2 * len(left))
    shape = (len(index), len(index))
    places, shares = torch.tensor([rows, columns]), torch.tensor(values)
    counts = torch.sparse_coo_tensor(places, shares, shape, check_invariants=False).coalesce()
    (row, column), value = counts.indices(), counts.values()
    totals = torch.zeros(len(index)).index_add_(0, row, value)
    pmi = torch.log(value * totals.sum() / (totals[row] * totals[column]))
    kept = pmi > 0
    torch.manual_seed(0)
    matrix = torch.sparse_coo_tensor(counts.indices()[:, kept], pmi[kept], shape, check_invariants=False)
    vectors, strengths, _ = torch.svd_lowrank(matrix, q=SIZE, niter=6)
    return vectors * strengths.sqrt()


def of_counts(data: Path, train: Table, valid: Table) -> dict[str, Any]:
    """Probes of vectors of whole words, by the text that was counted; on all labels and on the first few."""
    files = ("wikitext2/valid.txt", "wikitext2/test.txt", "tinyshakespeare/input.txt")
    plain = [words(line) for file in files for line in (data / file).read_text(encoding="utf-8").splitlines()]
    inside = [words(text) for text in train[0]]
    outside = [words(text) for text in valid[0]]
    frequent = Counter(word for text in [*plain, *inside] for word in text).most_common(WORDS)
    index = {word: i for i, (word, _) in enumerate(frequent)}

    def means(texts: Sequence[Sequence[str]], vectors: torch.Tensor) -> torch.Tensor:
        found = [[index[word] for word in text if word in index] or [0] for text in texts]
        return torch.stack([vectors[ids].mean(0) for ids in found])

    told: dict[str, Any] = {}
    sources = {"WikiText-2, tiny Shakespeare": plain, "SST-2": inside, "all, SST-2 three times": plain + 3 * inside}
    vectors = {name: counted(texts, index) for name, texts in sources.items()}
    vectors["random vectors"] = torch.randn(len(index), SIZE, generator=torch.Generator().manual_seed(0))
    for name, some in vectors.items():
        learnt, asked = means(inside, some), means(outside, some)
        told[name] = {
            "all": probe(learnt, train[1], asked, valid[1]), f"first {FEW}": probe(learnt[:FEW], train[1][:FEW], asked, valid[1])
        }  # fmt: skip
    return told


def of_run(folder: Path, train: Table, valid: Table) -> dict[str, Any]:
    """Probes of each layer of a run, with its weights and with random ones."""
    told: dict[str, Any] = {}
    opened = open_source(str(folder), device="cpu")
    model = opened.model
    for name in ("its weights", "random weights"):
        learnt, asked = states(model, opened.tokenizer, train[0]), states(model, opened.tokenizer, valid[0])
        told[name] = [probe(learnt[:, k], train[1], asked[:, k], valid[1]) for k in range(learnt.shape[1])]
        torch.manual_seed(0)
        model = type(model)(model.config).eval()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="folders of masked-LM runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    train, valid = table(args.data / "sst2" / "train.tsv"), table(args.data / "sst2" / "dev.tsv")
    record: dict[str, Any] = {
        "what": "encoder_probe", "date": date.today().isoformat(),
        "versions": {"distllm": distllm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "sentences": {"train": len(train[0]), "validation": len(valid[0])},
        "words": of_counts(args.data, train, valid),
        "runs": {folder.name: of_run(folder, train, valid) for folder in args.runs},
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

"""Time and memory from rows on disk to packed rows: `python -m benchmarks.data_scale`.

Each size, from 10^3 to 10^6 short synthetic rows, runs the pipeline's own data path (read strictly, tokenize,
mask, write to the cache, split, pack an epoch) in a process of its own. Peak memory must be flat from 10^4
rows on: exit status 1 when the largest run needs over `ALLOWED_GROWTH` of the 10^4 one. The rows come from a
counter, so they are the same on every machine. Writes `results/data_scale.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import run_measured, table, threads_environment, write_results

SIZES = (1_000, 10_000, 100_000, 1_000_000)
ALLOWED_GROWTH = 1.5
MAX_LENGTH = 512
VOCABULARY = 1024
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main() -> int:
    """Measure every size, print the table; 0 when memory is flat."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_scale")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        build_and_pack(arguments.child)
        return 0
    with tempfile.TemporaryDirectory(prefix="data_scale_") as temporary:
        folder = Path(temporary)
        save_tokenizer(folder / "tokenizer")
        records = [measure(folder, size, arguments.threads) for size in arguments.sizes]
    growth = growth_of(records)
    print(rendered(records))
    print(f"peak memory of the largest run is {growth:.2f} x that of 10^4 rows (allowed {ALLOWED_GROWTH})")
    result = {"threads": arguments.threads, "growth_from_10k_rows": growth, "sizes": records}
    print(f"written: {write_results('data_scale', result, to=arguments.results)}")
    return 0 if growth <= ALLOWED_GROWTH else 1


def growth_of(records: list[dict[str, Any]]) -> float:
    """Peak memory of the largest size over that of 10^4 rows (or of the smallest size above)."""
    reference = next((r for r in records if r["rows"] >= 10_000), records[0])
    return records[-1]["peak_rss_mb"] / reference["peak_rss_mb"]


def row(number: int) -> dict[str, str]:
    """The row with this number: a question of a few words and an answer of up to thirty."""
    digits = [int(digit) for digit in str(number)]
    spelled = " ".join(NUMBERS[digit] for digit in digits)
    counted = ", ".join(str(number + step) for step in range(1 + number * 7919 % 12))
    return {"question": f"How is {number} spelled, and what follows?", "answer": f"{spelled}; {counted}."}


def write_rows(path: Path, count: int) -> None:
    """The first `count` rows as JSONL."""
    with open(path, "w") as file:
        file.writelines(json.dumps(row(number)) + "\n" for number in range(count))


def save_tokenizer(folder: Path) -> None:
    """A small tokenizer, trained on a few of the rows."""
    from common.model.tokenizer import train_tokenizer

    texts = (text for number in range(2_000) for text in row(number * 499).values())
    train_tokenizer(texts, VOCABULARY).save_pretrained(folder)


def measure(folder: Path, size: int, threads: int) -> dict[str, Any]:
    """One size, in a process of its own."""
    write_rows(folder / "rows.jsonl", size)
    command = [sys.executable, "-m", "benchmarks.data_scale", "--child", str(folder)]
    usage, _ = run_measured(command, log=folder / "log", environment=threads_environment(threads))
    inside = json.loads((folder / "child.json").read_text())
    assert inside["rows"] == size, (inside, size)
    print(f"{size:,} rows: {usage.wall_seconds:.1f} s, {usage.peak_rss_mb:,.0f} MB", flush=True)
    return {**inside, "cpu_seconds": usage.cpu_seconds, "peak_rss_mb": usage.peak_rss_mb}


def build_and_pack(folder: Path) -> None:
    """The child: what it took goes to `child.json`."""
    from transformers import AutoTokenizer

    from common.config import DataConfig
    from common.data import dataset
    from common.data.dataset_types import DEMONSTRATIONS
    from common.data.packing import pack

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    data = DataConfig(path=str(folder / "rows.jsonl"), max_length=MAX_LENGTH, eval_fraction=0.01)
    began = time.perf_counter()
    train, held_out, ledger = dataset.build(
        data, tokenizer, DEMONSTRATIONS, seed=0, cache_dir=folder / "cache"
    )
    built = time.perf_counter()
    packing = pack(train.lengths, MAX_LENGTH, seed=0)
    packed = time.perf_counter()
    record = {
        "rows": len(train) + (0 if held_out is None else len(held_out)),
        "tokens": sum(entry.tokens for entry in ledger.sources),
        "tokenize_seconds": built - began,
        "pack_seconds": packed - built,
        "packed_rows": len(packing),
        "fill": float(train.lengths.sum()) / (len(packing) * MAX_LENGTH),
    }
    (folder / "child.json").write_text(json.dumps(record))


def rendered(records: list[dict[str, Any]]) -> str:
    """One line per size."""
    head = ("rows", "tokens", "tokenize s", "pack s", "rows/s", "packed rows", "fill", "CPU s", "peak RSS MB")
    return table(
        head,
        [
            (
                f"{r['rows']:,}", r["tokens"], r["tokenize_seconds"], r["pack_seconds"],
                r["rows"] / r["tokenize_seconds"], r["packed_rows"], f"{r['fill']:.2%}",
                r["cpu_seconds"], r["peak_rss_mb"],
            )
            for r in records
        ],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

"""Time and memory from rows on disk to packed rows: `python -m benchmarks.data_scale`.

Each size, from 10^3 to 10^6 short synthetic rows, runs the pipeline's own data path (read strictly, tokenize,
mask, write to the cache, split, pack an epoch) in a process of its own. Peak memory must be flat from 10^4
rows on: exit status 1 when the largest run needs over `ALLOWED_GROWTH` of the 10^4 one. The rows come from a
counter, so they are the same on every machine. Writes `results/data_scale.json`.

`--processes 1 2` tokenizes each size in one process and in two, which must write the same bytes, and prints
how many times as fast two are: wall time, so other work on the machine spoils it. `--streaming` measures the
time to the first batch of a stream instead.
"""

from __future__ import annotations

import argparse
import json
import shutil
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
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1], help="that tokenize, one after another"
    )
    parser.add_argument("--streaming", action="store_true", help="the time to the first batch of a stream")
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        (stream_first if arguments.streaming else build_and_pack)(arguments.child, arguments.processes[0])
        return 0
    with tempfile.TemporaryDirectory(prefix="data_scale_") as temporary:
        folder = Path(temporary)
        save_tokenizer(folder / "tokenizer")
        records = [
            measure(folder, size, arguments.threads, processes, streaming=arguments.streaming)
            for size in arguments.sizes
            for processes in arguments.processes
        ]
    if arguments.streaming:
        result = {"threads": arguments.threads, "streams": records}
        print(f"written: {write_results('data_streaming', result, to=arguments.results)}")
        return 0
    growth = growth_of(records)
    print(rendered(records))
    for size in arguments.sizes if len(arguments.processes) > 1 else ():
        print(compared([record for record in records if record["rows"] == size]))
    print(f"peak memory of the largest run is {growth:.2f} x that of 10^4 rows (allowed {ALLOWED_GROWTH})")
    result = {"threads": arguments.threads, "growth_from_10k_rows": growth, "sizes": records}
    print(f"written: {write_results('data_scale', result, to=arguments.results)}")
    return 0 if growth <= ALLOWED_GROWTH else 1


def growth_of(records: list[dict[str, Any]]) -> float:
    """Peak memory of the largest size over that of 10^4 rows (or of the smallest size above)."""
    reference = next((r for r in records if r["rows"] >= 10_000), records[0])
    return records[-1]["peak_rss_mb"] / reference["peak_rss_mb"]


def compared(records: list[dict[str, Any]]) -> str:
    """How much faster more processes are, on the same rows; AssertionError where they wrote other bytes."""
    first = records[0]
    assert {record["sha256"] for record in records} == {first["sha256"]}, records
    times = [
        f"{first['tokenize_seconds'] / record['tokenize_seconds']:.2f} x with {record['processes']}"
        for record in records[1:]
    ]
    return (
        f"{first['rows']:,} rows, processes beside {first['processes']}: {', '.join(times)}; the same bytes"
    )


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


def measure(
    folder: Path, size: int, threads: int, processes: int = 1, *, streaming: bool = False
) -> dict[str, Any]:
    """One size, in a process of its own. processes: that tokenize."""
    write_rows(folder / "rows.jsonl", size)
    command = [sys.executable, "-m", "benchmarks.data_scale", "--child", str(folder)]
    command += ["--processes", str(processes), *(["--streaming"] if streaming else [])]
    usage, _ = run_measured(command, log=folder / "log", environment=threads_environment(threads))
    inside = json.loads((folder / "child.json").read_text())
    assert streaming or inside["rows"] == size, (inside, size)
    took = (
        f"first batch after {inside['first_batch_seconds']:.1f} s"
        if streaming
        else f"{usage.wall_seconds:.1f} s"
    )
    print(f"{size:,} rows, {processes} processes: {took}, {usage.peak_rss_mb:,.0f} MB", flush=True)
    return {
        "rows": size,
        "processes": processes,
        **inside,
        "cpu_seconds": usage.cpu_seconds,
        "peak_rss_mb": usage.peak_rss_mb,
    }


def stream_first(folder: Path, processes: int) -> None:
    """The child: time until the first batch of a stream is there, and then to the tenth step's."""
    from transformers import AutoTokenizer

    from common.config import DataConfig
    from common.data.batches import BatchPlan
    from common.data.stream import stream
    from common.data.stream_batches import StreamedBatches

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    data = DataConfig(
        path=str(folder / "rows.jsonl"), max_length=MAX_LENGTH, eval_fraction=0.0, streaming=True,
        processes=processes,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began = time.perf_counter()
        rows = stream(data, tokenizer, stage="sft", seed=0, cache_dir=Path(cache), report=print)
        batches = StreamedBatches(rows, BatchPlan(MAX_LENGTH, True, 8, 8, seed=0))
        tokens = sum(int(batch.input_ids.numel()) for batch in batches.micro_batches(0))
        record = {"first_batch_seconds": time.perf_counter() - began, "tokens_of_first_step": tokens}
        (folder / "child.json").write_text(json.dumps(record))
        rows.end()


def build_and_pack(folder: Path, processes: int) -> None:
    """The child: what it took goes to `child.json`."""
    from transformers import AutoTokenizer

    from common.artifacts import file_sha256
    from common.config import DataConfig
    from common.data import dataset
    from common.data.dataset_types import DEMONSTRATIONS
    from common.data.packing import pack

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    data = DataConfig(
        path=str(folder / "rows.jsonl"), max_length=MAX_LENGTH, eval_fraction=0.01, processes=processes
    )
    began = time.perf_counter()
    shutil.rmtree(folder / "cache", ignore_errors=True)
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
        "sha256": file_sha256(train.folder / "rows.arrow"),
        "packed_rows": len(packing),
        "fill": float(train.lengths.sum()) / (len(packing) * MAX_LENGTH),
    }
    (folder / "child.json").write_text(json.dumps(record))


def rendered(records: list[dict[str, Any]]) -> str:
    """One line per size."""
    head = (
        "rows",
        "processes",
        "tokens",
        "tokenize s",
        "pack s",
        "rows/s",
        "packed rows",
        "fill",
        "CPU s",
        "peak RSS MB",
    )
    return table(
        head,
        [
            (
                f"{r['rows']:,}", r["processes"], r["tokens"], r["tokenize_seconds"], r["pack_seconds"],
                r["rows"] / r["tokenize_seconds"], r["packed_rows"], f"{r['fill']:.2%}",
                r["cpu_seconds"], r["peak_rss_mb"],
            )
            for r in records
        ],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

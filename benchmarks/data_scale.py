"""Time and memory from rows on disk to packed rows: `python -m benchmarks.data_scale`.

Each size, from 10^3 to 10^6 short synthetic rows, runs the pipeline's own data path (read strictly, tokenize,
mask, write to the cache, split, pack an epoch) in a process of its own; with `--sizes 10000000` that is an
hour on one core. Exit status 1 when the largest needs more memory than `ALLOWED_MB`, or more than
`ALLOWED_BYTES` for each row. Then two ranks open what was made, one after the other, and go through steps of
two epochs: the first makes the packings, and of the second the memory is measured that it shares with nobody.
The rows come from a counter, so they are the same on every machine. Writes `results/data_scale.json`.

`--processes 1 2` tokenizes each size in one process and in two, which must write the same bytes. `--speed N`
does so N times in turn with TRL's `num_proc=2` on the same rows, each process with one thread, and gives the
medians of their wall times and CPU-seconds (`results/data_speed.json`): other work on the machine spoils the
former. `--streaming` measures the time to the first batch of a stream instead
(`results/data_streaming.json`); with `--served MB` of one whose rows a server sends, so many megabytes in a
second (`results/data_streaming_served.json`).
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.measure import Usage, run_measured, table, threads_environment, write_results

SIZES = (1_000, 10_000, 100_000, 1_000_000)
ALLOWED_MB, ALLOWED_BYTES = 2_000, 100.0
"""At the peak of the largest run; and for each row more than 10^4."""
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
    parser.add_argument("--speed", type=int, default=0, metavar="N", help="rounds beside TRL, of one size")
    parser.add_argument("--streaming", action="store_true", help="the time to the first batch of a stream")
    parser.add_argument("--served", type=float, default=0, metavar="MB", help="per second, by a server")
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        CHILDREN[arguments.child](arguments.folder, arguments.processes[0])
        return 0
    if arguments.speed:
        result = compare_speed(arguments.sizes[-1], arguments.speed)
        print(f"written: {write_results('data_speed', result, to=arguments.results)}")
        return 0
    with tempfile.TemporaryDirectory(prefix="data_scale_") as temporary:
        folder = Path(temporary)
        save_tokenizer(folder / "tokenizer")
        records = [
            measure(folder, size, arguments.threads, processes, arguments.streaming, arguments.served)
            for size in arguments.sizes
            for processes in arguments.processes
        ]
    if arguments.streaming:
        result = {"threads": arguments.threads, "streams": records}
        name = "data_streaming_served" if arguments.served else "data_streaming"
        print(f"written: {write_results(name, result, to=arguments.results)}")
        return 0
    growth, peak = growth_of(records), records[-1]["peak_rss_mb"]
    print(rendered(records))
    for size in arguments.sizes if len(arguments.processes) > 1 else ():
        print(compared([record for record in records if record["rows"] == size]))
    print(
        f"peak memory {peak:,.0f} MB (allowed {ALLOWED_MB:,}), from 10^4 rows on {growth:.0f} bytes a row "
        f"(allowed {ALLOWED_BYTES:.0f})"
    )
    of_rank = bytes_per_row(records)
    print(f"a rank's own memory grows by {of_rank:.2f} bytes a row")
    result = {
        "threads": arguments.threads, "bytes_per_row": growth, "rank_bytes_per_row": of_rank,
        "sizes": records,
    }  # fmt: skip
    print(f"written: {write_results('data_scale', result, to=arguments.results)}")
    return 0 if peak <= ALLOWED_MB and growth <= ALLOWED_BYTES else 1


def growth_of(records: list[dict[str, Any]]) -> float:
    """Bytes of peak memory for each row by which the largest size exceeds 10^4 (or the smallest above)."""
    last, first = records[-1], next((r for r in records if r["rows"] >= 10_000), records[0])
    grown = (last["peak_rss_mb"] - first["peak_rss_mb"]) * 1e6
    return float(grown / max(1, last["rows"] - first["rows"]))


def bytes_per_row(records: list[dict[str, Any]]) -> float:
    """How much a rank's own memory grows from the size before the largest to that. Packings of few documents
    are held in memory: with less than a million rows it is those that are measured."""
    last = records[-1]
    first = next((each for each in reversed(records) if each["rows"] < last["rows"]), last)
    grown = (last["rank_own_mb"] - first["rank_own_mb"]) * 1e6
    return float(grown / max(1, last["rows"] - first["rows"]))


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
    folder: Path, size: int, threads: int, processes: int = 1, streaming: bool = False, served: float = 0
) -> dict[str, Any]:
    """One size, in a process of its own. processes: that tokenize. served: MB in a second; 0: rows here."""
    write_rows(folder / "rows.jsonl", size)
    with serving(folder, served) if served else nullcontext():
        usage, inside = child("stream" if streaming else "build", folder, threads, processes)
    if served:
        inside |= {"served_mb_per_second": served, "file_mb": (folder / "rows.jsonl").stat().st_size / 1e6}
    if streaming:
        took = f"first batch after {inside['first_batch_seconds']:.1f} s"
    else:
        assert inside["rows"] == size, (inside, size)
        took = f"{usage.wall_seconds:.1f} s"
        for _ in ("makes the packings", "reads them"):
            of_rank, rank = child("rank", folder, threads)
        inside |= {"rank_own_mb": rank["own_mb"], "rank_peak_rss_mb": of_rank.peak_rss_mb}
    print(f"{size:,} rows, {processes} processes: {took}, {usage.peak_rss_mb:,.0f} MB", flush=True)
    return {
        "rows": size,
        "processes": processes,
        **inside,
        "cpu_seconds": usage.cpu_seconds,
        "peak_rss_mb": usage.peak_rss_mb,
    }


@contextmanager
def serving(folder: Path, megabytes: float) -> Iterator[None]:
    """A server of the folder's files on this machine, which sends so much in a second; `address` is there."""

    class Slow(SimpleHTTPRequestHandler):
        def copyfile(self, source: Any, out: Any) -> None:
            while block := source.read(round(megabytes * 1e4)):
                out.write(block)
                time.sleep(0.01)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(folder))) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who has enough hangs up
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (folder / "address").write_text(f"http://127.0.0.1:{server.server_port}/rows.jsonl")
        yield
        server.shutdown()


def child(name: str, folder: Path, threads: int, processes: int = 1) -> tuple[Usage, dict[str, Any]]:
    """What one of `CHILDREN` took, and what it wrote down."""
    command = [sys.executable, "-m", "benchmarks.data_scale", "--child", name, "--folder", str(folder)]
    command += ["--processes", str(processes)]
    usage, _ = run_measured(command, log=folder / "log", environment=threads_environment(threads))
    return usage, json.loads((folder / "child.json").read_text())


def compare_speed(size: int, rounds: int) -> dict[str, Any]:
    """One process, two, and TRL with two, in turn on the same rows: medians of their times, and ratios."""
    took: dict[str, list[dict[str, float]]] = {"one process": [], "two": [], "TRL, two": []}
    with tempfile.TemporaryDirectory(prefix="data_scale_") as temporary:
        folder = Path(temporary)
        save_tokenizer(folder / "tokenizer")
        write_rows(folder / "rows.jsonl", size)
        for number in range(rounds):
            for processes, name in ((1, "one process"), (2, "two")):
                usage, inside = child("build", folder, threads=1, processes=processes)
                took[name].append({"wall": inside["tokenize_seconds"], "cpu": usage.cpu_seconds})
            took["TRL, two"].append(tokenize_with_trl(folder, size))
            last = ", ".join(f"{name} {every[-1]['wall']:.1f} s" for name, every in took.items())
            print(f"round {number + 1}: {last}", flush=True)
    medians = {
        name: {kind: statistics.median(each[kind] for each in every) for kind in ("wall", "cpu")}
        for name, every in took.items()
    }
    one, two, trl = medians.values()
    ratios = {"two_to_one": one["wall"] / two["wall"], "two_to_trl": trl["wall"] / two["wall"]}
    ratios["two_to_trl_cpu"] = trl["cpu"] / two["cpu"]
    print(table(("", "wall s", "CPU s"), [(name, *each.values()) for name, each in medians.items()]))
    print(
        f"two processes are {ratios['two_to_one']:.2f} x as fast as one (wanted 1.8) and "
        f"{ratios['two_to_trl']:.2f} x as fast as TRL's two (wanted 1.5)"
    )
    return {"rows": size, "rounds": took, "medians": medians, **ratios}


def tokenize_with_trl(folder: Path, size: int) -> dict[str, float]:
    """Seconds that TRL takes for the same rows, from JSONL to tokens and masks."""
    shutil.rmtree(folder / "trl_cache", ignore_errors=True)
    settings = {
        "rows": str(folder / "rows.jsonl"), "tokenizer": str(folder / "tokenizer"), "num_proc": 2,
        "max_length": MAX_LENGTH, "out": str(folder / "trl.json"),
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "benchmarks.trl_tokenize", str(folder / "settings.json")]
    environment = {**threads_environment(1), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    usage, _ = run_measured(command, log=folder / "log", environment=environment)
    inside = json.loads((folder / "trl.json").read_text())
    assert inside["rows"] == size, (inside, size)
    return {"wall": inside["load_seconds"] + inside["prepare_seconds"], "cpu": usage.cpu_seconds}


def stream_first(folder: Path, processes: int) -> None:
    """The child: time until the first batch of a stream is there, and then to the tenth step's."""
    from transformers import AutoTokenizer

    from common.config import DataConfig
    from common.data.batches import BatchPlan
    from common.data.stream import folder_of, stream
    from common.data.stream_batches import StreamedBatches
    from common.listing import list_files

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    address = folder / "address"
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began, path = time.perf_counter(), folder / "rows.jsonl"
        if address.exists():
            listing = list_files(address.read_text(), "data.path", Path(cache) / "rows", print)
            assert listing is not None
            path = listing
        data = DataConfig(
            path=str(path), max_length=MAX_LENGTH, eval_fraction=0.0, streaming=True, processes=processes
        )
        windows = folder_of(data, tokenizer, stage="sft", seed=0, cache_dir=Path(cache))
        rows = stream(data, tokenizer, windows, stage="sft", seed=0, report=print)
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


def steps_of_a_rank(folder: Path, processes: int) -> None:
    """The child: a rank that opens the cache and takes steps of two epochs; the memory that is its own."""
    import pyarrow  # noqa: F401  # and all else that is imported when rows are read

    from common.data import cache, dataset
    from common.data.batches import Batches, BatchPlan
    from common.data.dataset_types import DEMONSTRATIONS

    (made,) = (path.parent for path in (folder / "cache").glob(f"*/{cache.KEY_FILE}"))
    plan = BatchPlan(MAX_LENGTH, True, 64, 8, seed=0, rank=1, world_size=2)
    before = own_memory()
    train, _, _ = dataset.load(made, DEMONSTRATIONS)
    batches = Batches(train, plan)
    of_epoch = batches.steps_in_epochs(1)
    taken = 0
    for first in (0, of_epoch // 2, of_epoch):
        for step in range(first, first + min(20, of_epoch)):
            taken += sum(int(batch.input_ids.numel()) for batch in batches.micro_batches(step))
    gc.collect()
    record = {"own_mb": (own_memory() - before) / 1e6, "tokens_of_rank": taken}
    (folder / "child.json").write_text(json.dumps(record))


def own_memory() -> int:
    """Bytes of this process that no file backs: what it shares with nobody."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


CHILDREN = {"build": build_and_pack, "rank": steps_of_a_rank, "stream": stream_first}
"""What is measured in a process of its own."""


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
        "rank's own MB",
    )
    return table(
        head,
        [
            (
                f"{r['rows']:,}", r["processes"], r["tokens"], r["tokenize_seconds"], r["pack_seconds"],
                r["rows"] / r["tokenize_seconds"], r["packed_rows"], f"{r['fill']:.2%}",
                r["cpu_seconds"], r["peak_rss_mb"], r["rank_own_mb"],
            )
            for r in records
        ],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

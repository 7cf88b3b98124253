"""Memory and time of loading under ZeRO-3, in parts and whole: `python -m benchmarks.partitioned_loading`.

Writes a network with the shape of a 1B model (1.24e9 weights in bf16, tied) to the disk, then loads and
partitions it on several ranks, processes of their own, as a model that is not trained: the memory is then
that of its weights alone. Measured on each rank: the peak of its own memory (RssAnon), apart from it pages of
the mapped files (RssFile), which the system takes back when it needs them, and CPU-seconds. The bar of a
rank: model / ranks + two largest tensors + 0.5 GB. Writes `results/partitioned_loading.json`; exit status 1
when a rank is above its bar. The whole network on n ranks takes n times its memory: `--whole 1`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, table, threads_environment, write_results

SHAPE = {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip
SLACK = 0.5e9
SAMPLE_SECONDS = 0.005


def main() -> int:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.partitioned_loading")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--whole", type=int, nargs="*", default=[1], help="ranks that load it whole")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # a rank, started by this program
    parser.add_argument("--in-parts", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        print(json.dumps(load(arguments.rank_of, in_parts=arguments.in_parts)))
        return 0
    with tempfile.TemporaryDirectory(prefix="loading_", dir=PROJECT / "benchmarks") as temporary:
        sizes = write_model(Path(temporary))
        runs = []
        for number in range(arguments.repeats):
            sides = [(ranks, True) for ranks in arguments.ranks]
            sides += [(ranks, False) for ranks in arguments.whole]
            for ranks, in_parts in sides if number % 2 == 0 else reversed(sides):
                runs.append(measured(Path(temporary), ranks, in_parts, sizes))
                print(runs[-1], flush=True)
    print(text(runs))
    print(f"written: {write_results('partitioned_loading', {'model': sizes, 'runs': runs})}")
    return int(any(run["in_parts"] and run["peak_gb"] > run["bar_gb"] for run in runs))


def write_model(folder: Path) -> dict[str, float]:
    """The network with random weights, and a tokenizer; its bytes and those of its largest tensor."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import tiny_tokenizer

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **SHAPE), dtype=torch.bfloat16
    )
    model.save_pretrained(folder, max_shard_size="1GB")
    tiny_tokenizer().save_pretrained(folder)
    sizes = [2 * parameter.numel() for parameter in model.parameters()]
    return {"model_gb": sum(sizes) / 1e9, "largest_tensor_gb": max(sizes) / 1e9}


def measured(folder: Path, ranks: int, in_parts: bool, sizes: dict[str, float]) -> dict[str, Any]:
    """One start of all ranks; the largest number of each kind over them."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(29_600 + ranks), **threads_environment(1)}
    command = [sys.executable, "-m", "benchmarks.partitioned_loading", "--rank-of", str(folder)]
    command += ["--in-parts"] if in_parts else []
    started = [
        subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    bar = (sizes["model_gb"] / ranks + 2 * sizes["largest_tensor_gb"]) + SLACK / 1e9
    largest = {name: max(rank[name] for rank in found) for name in found[0]}
    return {"ranks": ranks, "in_parts": in_parts, **largest, "bar_gb": bar}


def load(folder: str, *, in_parts: bool) -> dict[str, float]:
    """On one rank: load and partition, and what it took."""
    from common.config import DeepSpeedConfig, Dtype, ModelConfig
    from common.model.loading import load_model
    from common.model.packed import PackedCausalLM
    from common.model.partition import share_of
    from common.model.probes import find_shortcuts
    from common.model.tokenizer import load_tokenizer
    from common.runtime.distributed import close_world, init_world
    from common.training import engine  # noqa: F401  # imports before anything is measured
    from common.training.frozen import Frozen

    world = init_world()
    model = ModelConfig(path=folder, dtype=Dtype.bf16)
    tokenizer = load_tokenizer(model)
    share = share_of(3) if in_parts else None
    before, cpu, wall = memory("RssAnon"), time.process_time(), time.monotonic()
    with watched() as peaks:
        network = load_model(model, tokenizer, seed=0, device=world.device, share=share)
        module = PackedCausalLM(network, find_shortcuts(network))
        Frozen(module, DeepSpeedConfig(stage=3), dtype=Dtype.bf16, world=world)
    took = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.monotonic() - wall}
    close_world()
    files = {"mapped_files_gb": peaks["RssFile"] / 1e9}
    return {"before_gb": before / 1e9, "peak_gb": peaks["RssAnon"] / 1e9, **files, **took}


def memory(kind: str) -> int:
    """Bytes of this process: RssAnon or RssFile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """The largest memory seen while the block runs, by kind; complete when it ends."""
    peaks, ended = {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            for kind in peaks:
                peaks[kind] = max(peaks[kind], memory(kind))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def text(runs: list[dict[str, Any]]) -> str:
    """The table for the terminal."""
    columns = ("ranks", "before_gb", "peak_gb", "bar_gb", "mapped_files_gb", "cpu_seconds", "wall_seconds")
    rows = [["in parts" if run["in_parts"] else "whole", *(run[name] for name in columns)] for run in runs]
    return table(("side", *columns), rows)


if __name__ == "__main__":
    sys.exit(main())

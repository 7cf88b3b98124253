"""Memory and time of loading under ZeRO-3, in parts and whole: `python -m benchmarks.partitioned_loading`.

Writes a network with the shape of a 1B model (1.24e9 weights in bf16, tied) to the disk, then loads and
partitions it on several ranks, processes of their own, as a model that is not trained: the memory is then
that of its weights alone. Measured on each rank: the peak of its own memory (RssAnon), apart from it pages of
the mapped files (RssFile), which the system takes back when it needs them, and CPU-seconds. The bar of a
rank: model / ranks + two largest tensors + 0.5 GB. The whole network on n ranks takes n times its memory, by
default it is loaded by one. With `--export 2` the network is also exported from an engine on two ranks,
tensor by tensor and whole; there the memory counts that comes on top of the engine's, on rank 0. With
`--merge 2` it is exported under adapters on all linear layers and without them, tensor by tensor and, where
`--whole` has 2, whole. Exports run with the allocator that the launcher gives to ranks, from an engine that
trains one norm or the adapters alone, and are compared in fp32 module by module. Writes
`results/partitioned_loading.json`, `partitioned_export.json` or `partitioned_merge.json`; exit status 1 when
a rank that loads its part is above its bar.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, table, threads_environment, write_results
from launch.local import allocator

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
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--whole", type=int, nargs="*", default=[1], help="ranks that load it whole")
    parser.add_argument("--export", type=int, nargs="*", default=[], help="ranks that export it")
    parser.add_argument("--merge", type=int, nargs="*", default=[], help="ranks that export it with adapters")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # on a rank, started by this program
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments.folder)))
        return 0
    sides = [("parts", ranks) for ranks in arguments.ranks] + [("whole", ranks) for ranks in arguments.whole]
    sides += [(side, ranks) for ranks in arguments.export for side in ("export", "export whole")]
    for ranks in arguments.merge:
        kinds = ("export", "merge", *(["merge whole"] if ranks in arguments.whole else []))
        sides += [(side, ranks) for side in kinds]
    with tempfile.TemporaryDirectory(prefix="loading_", dir=PROJECT / "benchmarks") as temporary:
        sizes = write_model(Path(temporary))
        runs = []
        for number in range(arguments.repeats):
            for side, ranks in sides if number % 2 == 0 else reversed(sides):
                runs.append(measured(Path(temporary), ranks, side, sizes))
                print(runs[-1], flush=True)
    print(text(runs))
    kind = "merge" if arguments.merge else "export" if arguments.export else "loading"
    name = f"partitioned_{kind}"
    print(f"written: {write_results(name, {'model': sizes, 'runs': runs})}")
    return int(any(run["side"] == "parts" and run["peak_gb"] > run["bar_gb"] for run in runs))


def write_model(folder: Path) -> dict[str, float]:
    """The network with random weights, and a tokenizer; its bytes and those of its largest tensor."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import CHATML, tiny_tokenizer

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **SHAPE), dtype=torch.bfloat16
    )
    model.save_pretrained(folder, max_shard_size="1GB")
    tiny_tokenizer(CHATML).save_pretrained(folder)
    sizes = [2 * parameter.numel() for parameter in model.parameters()]
    return {"model_gb": sum(sizes) / 1e9, "largest_tensor_gb": max(sizes) / 1e9}


def measured(folder: Path, ranks: int, side: str, sizes: dict[str, float]) -> dict[str, Any]:
    """One start of all ranks; the largest number of each kind over them."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(29_600 + ranks), **threads_environment(1)}
    if side not in ("parts", "whole"):
        common |= allocator()
    command = [
        sys.executable,
        "-m",
        "benchmarks.partitioned_loading",
        "--side",
        side,
        "--folder",
        str(folder),
    ]
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
    shutil.rmtree(folder / "out", ignore_errors=True)
    return {"side": side, "ranks": ranks, **largest, "bar_gb": bar}


def load(folder: str, *, in_parts: bool) -> dict[str, float]:
    """On one rank: load and partition, and what it took."""
    from transformers import LlamaForCausalLM  # noqa: F401  # imports before anything is measured

    from common.config import DeepSpeedConfig, Dtype
    from common.runtime.distributed import close_world, init_world
    from common.training.frozen import Frozen

    world = init_world()
    with taken() as found:
        Frozen(_module(folder, in_parts), DeepSpeedConfig(stage=3), dtype=Dtype.bf16, world=world)
    close_world()
    return found


def _module(folder: str, in_parts: bool, adapted: bool = False) -> Any:
    import torch

    from common.config import Dtype, LoraConfig, ModelConfig
    from common.model.loading import load_model
    from common.model.packed import PackedCausalLM
    from common.model.partition import share_of
    from common.model.probes import find_shortcuts
    from common.model.tokenizer import load_tokenizer

    lora, share = LoraConfig(enabled=adapted), share_of(3) if in_parts else None
    model = ModelConfig(path=folder, dtype=Dtype.bf16, lora=lora)
    network = load_model(model, load_tokenizer(model), seed=0, device=torch.device("cpu"), share=share)
    return PackedCausalLM(network, find_shortcuts(network))


def export(folder: str, *, streamed: bool, adapted: bool = False) -> dict[str, float]:
    """On one rank: export from an engine that took no step, with adapters that changed."""
    import torch

    from common.config import DeepSpeedConfig, Dtype, ModelConfig
    from common.model.tokenizer import load_tokenizer
    from common.runtime.distributed import close_world, init_world, wait_for_rank0
    from common.training import export_check
    from common.training.ds_config import build_ds_config
    from common.training.engine import Engine, return_free_memory
    from common.training.export import ask_live, export_model
    from common.training.export_stream import stream_weights

    export_check._free_memory = lambda: 0  # else the comparison takes what happens to be free
    world, module = init_world(), _module(folder, True, adapted)
    if not adapted:  # else the machine would need twelve bytes more for each weight; no export touches them
        module.requires_grad_(False)
        module.model.model.norm.requires_grad_(True)
    config = build_ds_config(
        DeepSpeedConfig(stage=3), dtype=Dtype.bf16, max_grad_norm=1.0, micro_batch_size=1,
        world_size=world.size, num_parameters=1_000_000,
    )  # fmt: skip
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine = Engine(module, torch.optim.SGD(trained, lr=1.0), config)
    if adapted:  # half of them begin as zero
        for master in engine.master_weights():
            master.add_(1e-3)
        engine.publish_master_weights()
    engine.forget_optimizer()
    engine.eval()
    tokenizer, out = load_tokenizer(ModelConfig(path=folder)), Path(folder) / "out" / "export"
    probe = ask_live(module, [torch.arange(3, 35)])
    return_free_memory()  # what loading left in the allocator would be taken for the engine's
    with taken() as found:
        written = stream_weights(engine, module.model, out, writes=world.is_rank0) if streamed else None
        weights = None if streamed else engine.full_state_dict()
        if world.is_rank0:
            export_model(module.model, weights, tokenizer, out, probe, details={}, streamed=written)
    wait_for_rank0(world, "export")
    close_world()
    if not world.is_rank0:
        return dict.fromkeys(found, 0.0)
    return {**found, "peak_gb": found["peak_gb"] - found["before_gb"]}


SIDES: dict[str, Callable[[str], dict[str, float]]] = {
    "parts": partial(load, in_parts=True),
    "whole": partial(load, in_parts=False),
    "export": partial(export, streamed=True),
    "export whole": partial(export, streamed=False),
    "merge": partial(export, streamed=True, adapted=True),
    "merge whole": partial(export, streamed=False, adapted=True),
}


@contextmanager
def taken() -> Iterator[dict[str, float]]:
    """What the block takes: filled when it ends."""
    found: dict[str, float] = {}
    before, cpu, wall = memory("RssAnon"), time.process_time(), time.monotonic()
    with watched() as peaks:
        yield found
    found |= {"before_gb": before / 1e9, "peak_gb": peaks["RssAnon"] / 1e9}
    found |= {"mapped_files_gb": peaks["RssFile"] / 1e9}
    found |= {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.monotonic() - wall}


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
    rows = [[run["side"], *(run[name] for name in columns)] for run in runs]
    return table(("side", *columns), rows)


if __name__ == "__main__":
    sys.exit(main())

"""The time that an optimizer step takes at least, by what its kernels move and multiply: no GPU is needed.

    python -m benchmarks.roofline            two minutes; writes results/roofline.json
    python -m benchmarks.roofline --layers   a decoder layer as it is, compiled, and with Liger's kernels
                                             where they are found; writes results/roofline_layers.json

Runs the learner's own code on the fake device of `tests/gpu_fake` and counts, for each kernel, bytes and
floating-point operations. A kernel takes as long as the slower of the two; nothing is added for launches or
for the host. Two times are given: at the H200's peaks, and at the shares of them that good kernels reach. MFU
is by 6 operations per weight and token. Nothing here is a measured time.

A layer is what a pass of three layers has more than one of two, without recomputation. Liger is nothing that
the project needs: pip install --no-deps --target FOLDER liger-kernel 'triton>=3,<4', and PYTHONPATH=FOLDER.
How its kernels are counted is said in `tests/gpu_fake/liger.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from benchmarks.measure import PROJECT, machine, table, write_results
from pipeline.planning.network import from_fields
from tests.gpu_fake.large import OF_DEPTH, SIZES

PEAK, PEAK_FP32, BANDWIDTH = 989e12, 67e12, 4.8e12
"""Of an H200: operations per second in bf16 and fp32, bytes per second."""
REACHED_OPERATIONS, REACHED_BANDWIDTH = 0.75, 0.85
"""The share of them that good kernels reach."""
TOKENS, MICRO_BATCHES = 16_384, 2
"""Of a pass; passes of a step."""
SHOWN = 24
"""Kernels of a table."""
PLAIN: dict[str, Any] = {
    "frozen": [], "tokens": TOKENS, "micro_batches": MICRO_BATCHES, "stage": 1, "size": 1, "hpz": 1,
    "lora": 0, "offload_optimizer": False, "offload_param": False, "checkpointing": False, "kernels": True,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "1B": {"names": ["1B"]},
    "7B": {"names": ["7B"], "checkpointing": True},
    "1B, compiled": {"names": ["1B"], "compile": True},
    "7B, compiled": {"names": ["7B"], "checkpointing": True, "compile": True},
}
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {}, "compiled": {"compile": True}, "Liger's kernels": {"liger": True},
}  # fmt: skip
LIGER = ("liger_kernel", "triton")
LAYERS = (2, 3)
"""Of the two passes whose difference is a layer: the last layer of each may be another than those before."""
LEFT_ALONE = ("mm", "addmm", "_varlen_attn", "_varlen_attn_backward")
"""Kernels that nothing here replaces."""


@dataclass
class Row:
    """All calls of one kernel in a step. seconds: at the peaks; reached: at the shares that are reached."""

    kernel: str
    calls: int = 0
    bytes: float = 0.0
    operations: float = 0.0
    seconds: float = 0.0
    reached: float = 0.0

    def add(self, calls: int, size: float, operations: float, single: float) -> None:
        multiplied = (operations - single) / PEAK + single / PEAK_FP32
        moved = size / BANDWIDTH
        self.calls += calls
        self.bytes += size
        self.operations += operations
        self.seconds += max(multiplied, moved)
        self.reached += max(multiplied / REACHED_OPERATIONS, moved / REACHED_BANDWIDTH)


def run(cases: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What came of each case of `tests/gpu_fake/large.py`. RuntimeError with what a case that failed said."""
    command = [sys.executable, "-m", "tests.gpu_fake.rank"]
    lines = "\n".join(json.dumps({**PLAIN, **case}) for case in cases)
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, "PYTHONPATH": path},
        input=lines, text=True, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    outcomes: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()[1:]]
    for outcome in outcomes:
        if outcome["status"] != 0:
            raise RuntimeError(outcome["printed"])
    return outcomes


def rows_of(kernels: Sequence[Sequence[Any]], step: int = 2) -> list[Row]:
    """The kernels of a step, the longest first. kernels: as in `Kernels.plain`."""
    rows: dict[str, Row] = {}
    for _, at, name, *counts in kernels:
        if at == step:
            rows.setdefault(name, Row(name)).add(*counts)
    return sorted(rows.values(), key=lambda row: -row.reached)


def account(case: dict[str, Any], outcome: dict[str, Any]) -> dict[str, Any]:
    """MFU, time, memory and kernels of a case."""
    network = from_fields(SIZES[case["names"][0]])
    assert network is not None
    looked_up = 0 if network.is_tied else network.vocabulary * network.hidden
    ideal = 6 * (network.parameters - looked_up) * TOKENS * MICRO_BATCHES / PEAK
    rows = rows_of(outcome["kernels"])
    by_phase: defaultdict[str, list[Any]] = defaultdict(list)
    for kernel in outcome["kernels"]:
        by_phase["update" if kernel[0] == "update" else "passes"].append(kernel)
    seconds, reached = sum(row.seconds for row in rows), sum(row.reached for row in rows)
    return {
        "parameters": network.parameters, "case": case, "peak_memory": outcome["peak"],
        "model_operations_seconds": ideal,
        "seconds_at_peaks": seconds, "mfu_at_peaks": ideal / seconds,
        "seconds": reached, "mfu": ideal / reached,
        "seconds_by_phase": {
            name: sum(row.reached for row in rows_of(kernels)) for name, kernels in by_phase.items()
        },
        "kernels": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip


def rendered(name: str, found: dict[str, Any]) -> str:
    """A case in words, and its longest kernels."""
    kernels = found["kernels"]
    head = ("kernel", "calls", "GB", "Tflop", "ms at the peaks", "ms")
    rows = [
        (
            row["kernel"], row["calls"], row["bytes"] / 1e9, row["operations"] / 1e12, row["seconds"] * 1e3,
            row["reached"] * 1e3,
        )
        for row in kernels[:SHOWN]
    ]  # fmt: skip
    calls, size = sum(row["calls"] for row in kernels), sum(row["bytes"] for row in kernels)
    return (
        f"{name}: MFU at most {found['mfu']:.1%} ({found['mfu_at_peaks']:.1%} at the peaks)\n"
        f"a step of {MICRO_BATCHES} x {TOKENS:,} tokens takes {found['seconds'] * 1e3:,.0f} ms at least, its "
        f"model operations {found['model_operations_seconds'] * 1e3:,.0f} at the peak; {calls:,} kernels, "
        f"{size / 1e9:,.0f} GB; peak memory {found['peak_memory'] / 1e9:.1f} GB\n" + table(head, rows)
    )


def layer_of(size: str, way: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Kernels and bytes of a layer, forward and backward: small operations', and products and attention's."""
    cases = [
        {"names": [f"{layers}{OF_DEPTH}{size}"], "micro_batches": 1, "checkpointing": False, **way}
        for layers in LAYERS
    ]
    few, more = ([kernel for kernel in found["kernels"] if kernel[0] != "update"] for found in run(cases))
    return more_of(rows_of(few), rows_of(more))


def more_of(few: Sequence[Row], more: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """What the second has more than the first: kernels and bytes, by kind and by kernel."""
    before = {row.kernel: row for row in few}
    assert before.keys() <= {row.kernel for row in more}
    found: dict[str, dict[str, Any]] = {
        kind: {"kernels": 0, "bytes": 0.0, "by_kernel": {}} for kind in ("small", "products")
    }
    for row in more:
        was = before.get(row.kernel, Row(row.kernel))
        kind = found["products" if row.kernel in LEFT_ALONE else "small"]
        calls, size = row.calls - was.calls, row.bytes - was.bytes
        kind["kernels"] += calls
        kind["bytes"] += size
        if calls:
            kind["by_kernel"][row.kernel] = {"calls": calls, "bytes": size}
    return found


def compare_layers(name: str, *, writes: bool) -> None:
    """A layer of each size in each way: count, print, write."""
    ways = dict(WAYS)
    if not all(map(find_spec, LIGER)):
        print(f"{' and '.join(LIGER)} are not both found: a layer with Liger's kernels is left out")
        del ways["Liger's kernels"]
    found = {size: {way: layer_of(size, case) for way, case in ways.items()} for size in ("1B", "7B")}
    head = ("a layer", "kernels", "of them small", "GB", "GB by small kernels")
    rows = [
        (
            f"{size}, {way}", sum(kind["kernels"] for kind in kinds.values()), kinds["small"]["kernels"],
            f"{sum(kind['bytes'] for kind in kinds.values()) / 1e9:.2f}",
            f"{kinds['small']['bytes'] / 1e9:.2f}",
        )
        for size, by_way in found.items()
        for way, kinds in by_way.items()
    ]  # fmt: skip
    print(table(head, rows))
    if writes:
        versions = {"liger-kernel": metadata.version("liger-kernel")} if len(ways) == len(WAYS) else {}
        write_results(name, {"machine": machine(), "tokens": TOKENS, "packages": versions, "layers": found})


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--layers", action="store_true", help="a layer, in each way to compute it")
    parser.add_argument("--name", help="of the file under results/")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    if args.layers:
        compare_layers(args.name or "roofline_layers", writes=not args.no_write)
        return 0
    cases = {name: CASES[name] for name in args.cases}
    found = {
        name: account(case, outcome)
        for (name, case), outcome in zip(cases.items(), run(cases.values()), strict=True)
    }
    for name, result in found.items():
        print(rendered(name, result), end="\n\n")
    if not args.no_write:
        peaks = {"operations": PEAK, "operations_fp32": PEAK_FP32, "bandwidth": BANDWIDTH}
        shares = {"operations": REACHED_OPERATIONS, "bandwidth": REACHED_BANDWIDTH}
        write_results(
            args.name or "roofline", {"machine": machine(), "peaks": peaks, "reached": shares, "runs": found}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

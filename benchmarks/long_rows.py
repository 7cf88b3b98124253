"""Memory of one rank with rows of up to a million tokens, 8B: no GPU and no network is needed.

    python -m benchmarks.long_rows           minutes; writes results/long_rows.json
    python -m benchmarks.long_rows --whole   at all 32 layers as well

Rank 0's own code runs on the fake device of `tests/gpu_fake` for networks of two, three and four layers, with
--whole for all. Beside each peak stands `plan`'s, whose error is shown; what the whole depth needs is its
estimate. Pinned are the inputs of layers; what DeepSpeed offloads lies in host memory beside them and is in
`plan`'s. Nothing is computed, and no time is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import roofline
from benchmarks.measure import machine, table, write_results
from pipeline.planning import memory
from pipeline.planning.network import from_fields
from pipeline.planning.work import Head, MicroBatchShape, Sharding, Trained, Workload

DEPTHS, WHOLE = (2, 3, 4), 32
PLAIN: dict[str, Any] = {
    "micro_batches": 1, "stage": 3, "checkpointing": True, "activation_offload": True, "kernels": False,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "1M tokens shared by 8 ranks": {"tokens": 1 << 20, "size": 8, "shared": 8},
    "128k tokens on one GPU, states in host memory": {
        "tokens": 1 << 17, "size": 1, "offload_optimizer": True, "offload_param": True,
    },
}  # fmt: skip


def planned(case: dict[str, Any], layers: int) -> memory.MemoryEstimate:
    """Of 8B with so many layers."""
    from tests.gpu_fake.large import fields_of

    network = from_fields(fields_of(f"{layers} layers of 8B"))
    assert network is not None
    tokens, offloads = case["tokens"] // case.get("shared", 1), case.get("offload_param", False)
    return memory.estimate(
        Workload(
            networks=(Trained(network, network.parameters, Head.tokens),),
            batch=MicroBatchShape(tokens, tokens, short=False),
            sharding=Sharding(3, case["size"], offloads, offloads),
            half=True,
            gpu=True,
            checkpointing=True,
            tiled=True,
            offload_activations=True,
        )
    )


def account(case: dict[str, Any], depths: Sequence[int]) -> dict[str, Any]:
    """Peaks at these depths, on the fake device and by plan; bytes, without what CUDA takes for itself."""
    cases = [{**PLAIN, **case, "names": [f"{layers} layers of 8B"]} for layers in depths]
    outcomes = roofline.run(cases)
    plans = {layers: planned(case, layers) for layers in (*depths, WHOLE)}
    sizes = {layers: plan.device - plan.of("libraries") for layers, plan in plans.items()}
    return {
        "case": case,
        "depths": list(depths),
        "peaks": [outcome["peak"] for outcome in outcomes],
        "pinned": [outcome["pinned_peak"] for outcome in outcomes],
        "planned": [sizes[layers] for layers in depths],
        "planned_whole_depth": sizes[WHOLE],
        "planned_whole_depth_on_the_host": plans[WHOLE].host,
    }


def rendered(name: str, found: dict[str, Any]) -> str:
    """A case in words and a table."""
    columns = zip(found["depths"], found["peaks"], found["planned"], found["pinned"], strict=True)
    rows = [
        (layers, peak / 1e9, plan / 1e9, f"{plan / peak - 1:+.1%}", pinned / 1e9)
        for layers, peak, plan, pinned in columns
    ]
    return (
        f"8B, {name}: {found['planned_whole_depth'] / 1e9:.1f} GB by plan at {WHOLE} layers, and "
        f"{found['planned_whole_depth_on_the_host'] / 1e9:.1f} GB of host memory\n"
        + table(("layers", "peak GB", "plan GB", "off", "pinned GB"), rows)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_rows", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--whole", action="store_true", help="at all layers as well")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    depths = (*DEPTHS, WHOLE) if args.whole else DEPTHS
    result = {}
    for name in args.cases:
        result[name] = account(CASES[name], depths)
        print(rendered(name, result[name]), end="\n\n", flush=True)
    if not args.no_write:
        write_results("long_rows", {"machine": machine(), "runs": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Collectives and memory of one rank among hundreds, ZeRO-3: no GPU and no network is needed.

    python -m benchmarks.large_groups        minutes; writes results/large_groups.json

Rank 0's own code runs on the fake device of `tests/gpu_fake`, whose other ranks are names, for networks of
three depths: DeepSpeed loops over ranks in Python for each weight, so that the whole depth would take half an
hour. Bytes and counts that grow by the same amount from layer to layer are extended to the whole depth along
that line; what does not is left out there, and said. The line begins where a network is deep enough:
DeepSpeed does not release a weight that comes again within 1e9 numbers (stage3_max_reuse_distance), and so
gathers those of the last layers once, and not again for their backward pass. The peak at the whole depth is
`plan`'s estimate, beside its error at the deepest of the three. Bytes are those of the buffers, sent from and
received into, that this rank hands to collectives; nothing is sent, and no time is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import roofline
from benchmarks.measure import machine, table, write_results
from pipeline.planning import memory
from pipeline.planning.network import Network, from_fields
from pipeline.planning.work import Head, MicroBatchShape, Sharding, Trained, Workload

TOKENS = 8192
"""Of the one pass of a step, recomputing activations."""
CASES: dict[str, dict[str, Any]] = {
    "8B on 512 ranks, hpZ over 8": {"names": ["8B"], "size": 512, "hpz": 8},
    "70B on 64 ranks": {"names": ["70B"], "size": 64, "hpz": 1},
}
DEPTHS = {"8B on 512 ranks, hpZ over 8": (2, 3, 4), "70B on 64 ranks": (1, 2, 3)}
"""Layers, one more each time."""


def of_depth(case: dict[str, Any], layers: int) -> dict[str, Any]:
    """The case with a network of so many layers."""
    return {
        **case, "names": [f"{layers} layers of {case['names'][0]}"], "tokens": TOKENS, "micro_batches": 1,
        "stage": 3, "checkpointing": True, "kernels": False,
    }  # fmt: skip


def sent(outcome: dict[str, Any], step: int = 2) -> Counter[str]:
    """Of a step, by kind of collective: calls, and bytes of this rank's buffers."""
    found: Counter[str] = Counter()
    for _, at, kind, calls, size in outcome["collectives"]:
        if at == step:
            found[f"{kind.strip('_')} calls"] += calls
            found[f"{kind.strip('_')} bytes"] += size
    return found


def extended(values: Sequence[int], first_depth: int, layers: int) -> int | None:
    """What the whole depth has, along the line through three depths from the first on; None: they are on
    none."""
    first, second, third = values
    by_layer = second - first
    return first + (layers - first_depth) * by_layer if third - second == by_layer else None


def planned(network: Network, case: dict[str, Any]) -> float:
    """`plan`'s peak, without what CUDA takes for itself."""
    found = memory.estimate(
        Workload(
            networks=(Trained(network, network.parameters, Head.tokens),),
            batch=MicroBatchShape(TOKENS, TOKENS, short=False),
            sharding=Sharding(3, case["size"], hpz=case["hpz"]),
            half=True,
            gpu=True,
            checkpointing=True,
        )
    )
    return found.device - found.of("libraries")


def account(
    case: dict[str, Any], depths: Sequence[int], outcomes: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """outcomes: of each depth."""
    from tests.gpu_fake.large import SIZES, fields_of

    fields = SIZES[case["names"][0]]
    layers, whole = fields["num_hidden_layers"], from_fields(fields)
    deepest = from_fields(fields_of(of_depth(case, depths[-1])["names"][0]))
    assert whole is not None and deepest is not None
    by_depth = [sent(outcome) for outcome in outcomes]
    kinds = sorted(set().union(*by_depth))
    return {
        "layers": layers, "measured_depths": depths,
        "measured": {kind: [found[kind] for found in by_depth] for kind in kinds},
        "whole_depth": {
            kind: extended([found[kind] for found in by_depth], depths[0], layers) for kind in kinds
        },
        "measured_peaks": [outcome["peak"] for outcome in outcomes],
        "planned_peak": planned(whole, case),
        "planned_off_at_the_deepest": planned(deepest, case) / outcomes[-1]["peak"] - 1,
    }  # fmt: skip


def lines(name: str, found: dict[str, Any]) -> Iterator[str]:
    """A case in words and a table."""
    yield (
        f"{name}: peak by plan {found['planned_peak'] / 1e9:.1f} GB at {found['layers']} layers (at "
        f"{found['measured_depths'][-1]}, {found['planned_off_at_the_deepest']:+.1%} off the fake device's)"
    )
    whole = found["whole_depth"]
    rows = [
        (kind, *values, "on no line" if whole[kind] is None else whole[kind])
        for kind, values in found["measured"].items()
    ]
    yield table(
        (
            "of a step",
            *(f"{depth} layers" for depth in found["measured_depths"]),
            f"{found['layers']} layers",
        ),
        rows,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_groups", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    result = {}
    for name in args.cases:
        case, depths = CASES[name], DEPTHS[name]
        result[name] = account(case, depths, roofline.run(of_depth(case, depth) for depth in depths))
        print(*lines(name, result[name]), sep="\n", end="\n\n", flush=True)
    if not args.no_write:
        write_results("large_groups", {"machine": machine(), "tokens": TOKENS, "runs": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())

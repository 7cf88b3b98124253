"""`plan`'s memory against the fake device's peak at real sizes: within 5 %, CUDA's own memory left out."""

from __future__ import annotations

from typing import Any

import pytest

from common.config import LoraConfig
from pipeline.planning import memory
from pipeline.planning.network import Network, from_fields
from pipeline.planning.work import Head, MicroBatchShape, Sharding, Trained, Workload
from tests.gpu_fake.jobs import Fake
from tests.gpu_fake.large import documents_of, fields_of

pytestmark = pytest.mark.gpu_fake

PLAIN: dict[str, Any] = {
    "names": ["1B"], "frozen": [], "tokens": 4096, "micro_batches": 2, "stage": 1, "size": 1, "hpz": 1,
    "lora": 0, "checkpointing": False, "offload_optimizer": False, "offload_param": False,
}  # fmt: skip
LONG: dict[str, Any] = {
    "names": ["4 layers of 8B"], "tokens": 1 << 20, "micro_batches": 1, "stage": 3, "size": 8, "shared": 8,
    "checkpointing": True, "activation_offload": True,
}  # fmt: skip
ALONE: dict[str, Any] = {
    **LONG, "tokens": 131_072, "size": 1, "shared": 1, "offload_optimizer": True, "offload_param": True,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "1B": {},
    "1B, compiled": {"compile": True},
    "1B, fp32": {"dtype": "fp32"},
    "2 layers of 1B, fp32, a long document among short ones": {
        "names": ["2 layers of 1B"], "dtype": "fp32", "documents": [3072] + 64 * [16],
    },
    "7B, checkpointing": {"names": ["7B"], "checkpointing": True},
    "1B, selective": {"checkpointing": True, "policy": "selective"},
    "1B, selective, compiled": {"checkpointing": True, "policy": "selective", "compile": True},
    "8 layers of 1B, selective, lora": {
        "names": ["8 layers of 1B"], "checkpointing": True, "policy": "selective", "lora": 16,
    },
    "1B, zero2, 8 ranks": {"stage": 2, "size": 8},
    "1B, zero3, 8 ranks": {"stage": 3, "size": 8},
    "8 layers of 1B, zero3, 8 ranks that share rows": {
        "names": ["8 layers of 1B"], "tokens": 8 * 4096, "stage": 3, "size": 8, "shared": 8,
    },
    "8 layers of 1B, zero2 offload, 8 ranks": {
        "names": ["8 layers of 1B"], "stage": 2, "size": 8, "offload_optimizer": True,
    },
    "8 layers of 1B, zero3 offload, 8 ranks": {
        "names": ["8 layers of 1B"], "stage": 3, "size": 8, "offload_optimizer": True, "offload_param": True,
    },
    "8 layers of 1B, zero3 offload, one rank, short rows": {
        "names": ["8 layers of 1B"], "tokens": 512, "stage": 3,
        "offload_optimizer": True, "offload_param": True,
    },
    "8 layers of 1B, zero3, 16 ranks, hpZ over 2": {
        "names": ["8 layers of 1B"], "stage": 3, "size": 16, "hpz": 2,
    },
    "4 layers of 70B, zero3, 64 ranks": {
        "names": ["4 layers of 70B"], "stage": 3, "size": 64, "checkpointing": True,
    },
    "8B, 4 of 32 layers, 128k untiled, 8 ranks that share rows": {
        **LONG, "tokens": 131_072, "tiled": False, "activation_offload": False,
    },
    "1B, lora": {"lora": 16},
    "2 of 48 layers of 30B-A3B": {"names": ["2 layers of 30B-A3B"]},
    "2 of 48 layers of 30B-A3B, zero2, 8 ranks, checkpointing": {
        "names": ["2 layers of 30B-A3B"], "stage": 2, "size": 8, "checkpointing": True,
    },
    "4 layers of 1B, 16k, zero2, 8 ranks, checkpointing": {
        "names": ["4 layers of 1B"], "tokens": 16_384, "stage": 2, "size": 8, "checkpointing": True,
    },
    "3 of 48 layers of 30B-A3B, 32k, checkpointing": {
        "names": ["3 layers of 30B-A3B"], "tokens": 32_768, "checkpointing": True,
    },
    "PPO's four 1B, zero2, 8 ranks": {
        "names": ["1B", "1B"], "frozen": ["1B", "1B"], "stage": 2, "size": 8,
    },
    "PPO's four 1B, zero2, 8 ranks that share rows": {
        "names": ["1B", "1B"], "frozen": ["1B", "1B"], "tokens": 8 * 4096, "stage": 2, "size": 8, "shared": 8,
    },
}  # fmt: skip


def network(name: str, *, scalar: bool = False) -> Network:
    found = from_fields(fields_of(name))
    assert found is not None
    return found.without_head() if scalar else found


def planned(case: dict[str, Any]) -> memory.MemoryEstimate:
    lora = LoraConfig(enabled=True, r=case["lora"]) if case["lora"] else None
    learning, tokens = [], case["tokens"] // case.get("shared", 1)
    documents = documents_of(case)
    for number, name in enumerate(case["names"]):
        net = network(name, scalar=number > 0)
        trained = net.adapter_parameters(lora) if lora else net.parameters
        learning.append(Trained(net, trained, Head.scalar if number else Head.tokens))
    return memory.estimate(
        Workload(
            networks=tuple(learning),
            batch=MicroBatchShape(tokens, tokens, False, len(documents), max(documents)),
            sharding=Sharding(
                case["stage"], case["size"], case["offload_optimizer"], case["offload_param"], hpz=case["hpz"]
            ),
            half=case.get("dtype") != "fp32",
            gpu=True,
            checkpointing=case["checkpointing"],
            selective=case.get("policy") == "selective",
            tiled=case["checkpointing"] and case.get("tiled") is not False and case.get("policy") is None,
            offload_activations=case.get("activation_offload", False),
            compiled=case.get("compile", False),
            frozen=tuple(network(name) for name in case["frozen"]),
            sharing=case.get("shared", 1),
        )
    )


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_peak(fake: Fake, name: str) -> None:
    case = {**PLAIN, **CASES[name]}
    outcome = fake.run_large(case)
    assert outcome.status == 0, outcome.printed[-3000:]
    estimate = planned(case)
    base = estimate.of("libraries")  # CUDA's context and workspaces, which are not on the fake device
    assert estimate.device - base == pytest.approx(outcome.peak, rel=0.05), outcome.peak_site


@pytest.mark.parametrize(
    ("case", "device", "host"),
    [
        pytest.param(LONG, 56e9, 40e9, id="8B, 1M tokens shared by 8 ranks"),
        pytest.param(ALONE, 56e9, 200e9, id="8B, 128k tokens on one GPU, states in host memory"),
    ],
)
def test_a_long_row_of_8b_fits(fake: Fake, case: dict[str, Any], device: float, host: float) -> None:
    """At 4 of 32 layers `plan` is the peak; what it says of 32 is within 80 GB, with room. Pinned are the
    inputs of layers alone, to the byte. Whole depths are in benchmarks/results/long_rows.json."""
    outcome = fake.run_large({**PLAIN, **case})
    assert outcome.status == 0, outcome.printed[-3000:]
    estimate, whole = planned({**PLAIN, **case}), planned({**PLAIN, **case, "names": ["8B"]})
    assert estimate.device - estimate.of("libraries") == pytest.approx(outcome.peak, rel=0.05), (
        outcome.peak_site
    )
    assert estimate.of("inputs of layers") == outcome.pinned_peak
    assert whole.device < device < 80e9 and whole.host < host

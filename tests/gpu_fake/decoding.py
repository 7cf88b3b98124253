"""Passes of the decoder on the fake device, at real sizes: what each asks of the GPU."""

from __future__ import annotations

from typing import Any


def decode(case: dict[str, Any]) -> int:
    """One pass that takes in prompts, then a pass for each of case["lengths"]; returns 0.

    case: decoded (a size), slots, capacity, graphs, prompts: how many, of 512 tokens together; lengths: of
    each pass, for each slot, how many tokens its response has with its prompt (0: the slot is free). Pass n
    is step n of the phase `rollout`, the prompts' is step 0.
    """
    import numpy as np

    from common.decoding import passes
    from common.phases import enter
    from common.runtime.distributed import init_world
    from tests.gpu_fake.large import _module

    init_world()
    network = _module({"stage": 1, "checkpointing": False, "lora": 0}, case["decoded"], False).base()
    network.requires_grad_(False)
    with passes.sampling_from(network, True) as base:
        cached = passes.CachedPasses(base, case["slots"], case["capacity"], graphs=case["graphs"])
        nothing = np.zeros(0, np.int64)
        enter("rollout", 0)
        prompts = [(slot, np.full(512 // case["prompts"], 7)) for slot in range(case["prompts"])]
        cached.forward(nothing, nothing, [], nothing, prompts)
        for number, given in enumerate(case["lengths"], 1):
            enter("rollout", number)
            lengths = np.array(given, np.int64)
            rows = len(lengths)
            longest = -(-int(lengths.max() + 1) // 64) * 64
            wanted = np.flatnonzero(lengths)
            logits = cached.forward(np.full(rows, 7), lengths, [(0, rows, longest)], wanted, [])
            assert logits.shape == (len(wanted), network.config.vocab_size)
            del logits
    assert cached.graphs is None or cached.graphs.fault is None, cached.graphs
    return 0

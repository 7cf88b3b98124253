"""Ranks of two machines that open rows from the cache; each writes what it read for that, and what it has."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import DataConfig
from common.data import cache, sources
from common.data.dataset_types import DEMONSTRATIONS
from common.runtime.distributed import World, barrier, close_world, init_world
from common.runtime.heartbeat import _collectives_begun
from common.stage import Step
from common.training.step_data import build_data
from step1_sft.config import SFTJob
from tests.tiny import CHATML, tiny_tokenizer

DOCUMENTS = 8
"""Of which each rank looks at the tokens."""


def opened(folder: str, ranks_of_machine: int) -> int:
    """Rows from the cache, and those of a stream; every machine has a cache of its own."""
    world = init_world()
    world = replace(world, local_rank=world.rank % ranks_of_machine)
    machine = world.rank // ranks_of_machine
    read: Counter[str] = Counter()
    cache.file_sha256 = _counted(cache.file_sha256, read, "hashed")
    sources.content_hash = _counted(sources.content_hash, read, "sources")
    data = DataConfig(
        path=f"{folder}/rows.jsonl", cache_dir=f"{folder}/cache {machine}", eval_fraction=0.0, processes=1
    )
    found = {}
    for name, asked in (("stored", data), ("streamed", replace(data, streaming=True))):
        read.clear()
        begun = _collectives_begun()
        rows = _rows(asked, world)
        collectives = _collectives_begun() - begun
        tokens = [rows[at].input_ids.tolist() for at in range(DOCUMENTS)]
        found[name] = {"read": dict(read), "collectives": collectives, "tokens": tokens}
    Path(folder, f"found_{world.rank}.json").write_text(json.dumps(found))
    barrier()  # rank 0 holds the store
    close_world()
    return 0


def _rows(data: DataConfig, world: World) -> Any:
    job = SFTJob(output_dir=data.cache_dir or "")
    return build_data(job, Step.sft, data, DEMONSTRATIONS, tiny_tokenizer(CHATML), print, world=world).train


def _counted(function: Callable[..., Any], counts: Counter[str], name: str) -> Callable[..., Any]:
    def counting(*arguments: Any) -> Any:
        counts[name] += 1
        return function(*arguments)

    return counting

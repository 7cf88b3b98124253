from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from common.config import DataConfig, SourceConfig
from common.data import dataset
from common.data.batches import Batches, BatchPlan
from common.data.dataset_types import DEMONSTRATIONS
from common.data.stored import TokenizedDataset
from common.data.types import IGNORE, TokenizedExample
from common.decoding.sampling import held_out_prompts
from common.runtime.distributed import World
from common.stage import Step
from common.training.step_data import batch_plan, cache_dir, load_data
from step1_sft.config import SFTJob
from step1_sft.data import count_tokens
from tests.tiny import CHATML, tiny_tokenizer


class Documents:
    """Three documents: a prompt of two tokens and an answer, plain text, a prompt of six tokens."""

    sources = ["only"]
    examples = [
        TokenizedExample(
            np.array([1, 2, 3, 4], np.int32), np.array([IGNORE, 3, 4, IGNORE], np.int32), "only"
        ),
        TokenizedExample(np.array([5, 6, 7], np.int32), np.array([6, 7, IGNORE], np.int32), "only"),
        TokenizedExample(
            np.arange(10, 18, dtype=np.int32), np.array([IGNORE] * 5 + [16, 17, IGNORE], np.int32), "only"
        ),
    ]
    lengths = np.array([4, 3, 8], np.int32)
    source_ids = np.zeros(3, np.int32)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.examples[index]


def prompts(count: int = 9, longest: float = math.inf, seed: int = 0) -> set[tuple[int, ...]]:
    found = held_out_prompts(Documents(), count, longest, seed)  # type: ignore[arg-type]
    return {tuple(prompt.tolist()) for prompt in found}


def test_a_prompt_ends_where_the_first_trained_token_would_come() -> None:
    assert prompts() == {(1, 2), (10, 11, 12, 13, 14, 15)}


def test_plain_text_has_no_prompt_and_a_long_one_leaves_no_room() -> None:
    assert prompts(longest=5) == {(1, 2)}
    assert len(prompts(count=1)) == 1 and prompts(count=0) == set()
    assert len({frozenset(prompts(count=1, seed=seed)) for seed in range(8)}) == 2


def test_filler_batches_are_padding_and_nothing_else_is() -> None:
    counted = []
    for rank in (0, 1):
        plan = BatchPlan(8, False, 3, 1, 0, rank, 2)
        micro_batches = Batches(Documents(), plan).micro_batches(0)
        assert len(micro_batches) == 2
        counted.append(count_tokens(micro_batches))
    tokens, trained, padding = (sum(numbers) for numbers in zip(*counted, strict=True))
    assert (tokens, trained) == (15, 6)
    assert padding == 1  # three rows for two ranks with two passes each: the fourth holds one token


def test_ranks_differ_in_nothing_but_their_place() -> None:
    job = SFTJob(seed=7)
    job.sft.data.sources = [SourceConfig(path="x")]
    worlds = [World(rank, 2, rank, None) for rank in (0, 1)]  # type: ignore[arg-type]
    plans = [batch_plan(job, job.sft.data, job.sft.train, world) for world in worlds]
    assert [plan.rank for plan in plans] == [0, 1]
    assert {(plan.seed, plan.world_size, plan.max_length, plan.global_batch_size) for plan in plans} == {
        (7, 2, job.sft.data.max_length, job.sft.train.global_batch_size)
    }


def test_the_cache_is_shared_by_the_runs_of_an_output_folder_unless_it_is_named() -> None:
    job = SFTJob(output_dir="somewhere")
    assert cache_dir(job, job.sft.data).parts == ("somewhere", ".cache", "data")
    job.sft.data.cache_dir = "elsewhere"
    assert cache_dir(job, job.sft.data).parts == ("elsewhere",)


def test_rows_that_are_shared_out_are_trained_on_by_the_step_they_belong_to(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = SFTJob(output_dir=str(tmp_path))
    split = {"sft": 1.0, "reward": 1.0}
    job.sft.data = DataConfig(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.0, stage_split=split)
    tokenizer = tiny_tokenizer(CHATML)

    def texts(train: TokenizedDataset) -> set[str]:
        return {str(tokenizer.decode(train[index].input_ids)) for index in range(len(train))}

    world = World(0, 1, 0, None)  # type: ignore[arg-type]
    loaded = load_data(job, Step.sft, job.sft.data, DEMONSTRATIONS, tokenizer, tmp_path, world, print)
    ours = texts(loaded.train)
    other, _, _ = dataset.build(
        job.sft.data, tokenizer, DEMONSTRATIONS, stage="reward", seed=job.seed, cache_dir=tmp_path
    )
    assert 10 <= len(ours) <= 30  # half of them, by chance
    assert not ours & texts(other) and len(ours) + len(texts(other)) == 40

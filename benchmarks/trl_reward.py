"""One run of TRL's RewardTrainer, as a process of its own: `python -m benchmarks.trl_reward SETTINGS.json`.

SETTINGS has `base` (folder of a sequence classifier with one label), `dtype` (fp32, or bf16: autocast over
fp32 weights), `out` (a folder), `arguments` (of RewardConfig), and either `rows` (JSONL of preferences as
messages, prepared by TRL itself) or `tokenized` (JSON lists `chosen_ids` and `rejected_ids`). What it writes
to `out` is said in trl_run.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import trl_run
from benchmarks.pairs_workload import load_for_trl

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import RewardTrainer


def build_trainer(settings: dict[str, Any], out: Path) -> RewardTrainer:
    """The trainer, on the rows that the settings name."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(settings["base"], dtype=torch.float32),
        args=RewardConfig(**trl_run.common_arguments(settings, out)),
        train_dataset=_dataset(settings),
        processing_class=AutoTokenizer.from_pretrained(settings["base"]),
    )


def _dataset(settings: dict[str, Any]) -> Dataset:
    from datasets import Dataset

    if "tokenized" in settings:
        return Dataset.from_dict(json.loads(Path(settings["tokenized"]).read_text()))
    by_length = settings["arguments"].get("train_sampling_strategy") == "group_by_length"
    return load_for_trl(settings["rows"], with_lengths=by_length)


if __name__ == "__main__":
    trl_run.run(build_trainer)

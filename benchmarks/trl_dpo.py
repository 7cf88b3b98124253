"""One run of TRL's DPOTrainer, as a process of its own: `python -m benchmarks.trl_dpo SETTINGS.json`.

SETTINGS has `base` (a policy's folder, which is its own reference), `dtype` (fp32, or bf16: autocast over
fp32 weights), `out` (a folder), `arguments` (of DPOConfig), and either `rows` (JSONL of preferences as
messages, prepared by TRL itself) or `tokenized` (JSON lists `prompt_ids`, `chosen_ids` and `rejected_ids`).
What it writes to `out` is said in trl_run.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import trl_run
from benchmarks.pairs_workload import load_for_trl

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DPOTrainer


def build_trainer(settings: dict[str, Any], out: Path) -> DPOTrainer:
    """The trainer, on the rows that the settings name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig

    kind = _tokenized_trainer() if "tokenized" in settings else _plain_trainer()
    return kind(
        model=AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.float32),
        args=DPOConfig(**trl_run.common_arguments(settings, out)),
        train_dataset=_dataset(settings),
        processing_class=AutoTokenizer.from_pretrained(settings["base"]),
    )


def _plain_trainer() -> type[DPOTrainer]:
    from trl import DPOTrainer

    return DPOTrainer


def _tokenized_trainer() -> type[DPOTrainer]:
    """The trainer without its preparation: unlike RewardTrainer it has no way in for tokens."""
    from trl import DPOTrainer

    class OnTokens(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return OnTokens


def _dataset(settings: dict[str, Any]) -> Dataset:
    from datasets import Dataset

    if "tokenized" in settings:
        return Dataset.from_dict(json.loads(Path(settings["tokenized"]).read_text()))
    by_length = settings["arguments"].get("train_sampling_strategy") == "group_by_length"
    return load_for_trl(settings["rows"], with_lengths=by_length)


if __name__ == "__main__":
    trl_run.run(build_trainer)

"""One run of TRL's SFTTrainer, as a process of its own: `python -m benchmarks.trl_sft SETTINGS.json`.

SETTINGS has `base` (a model's folder), `dtype` (fp32: everything; bf16: autocast over fp32 weights, which is
what TRL calls bf16), `out` (a folder), `arguments` (of SFTConfig), and either `rows` (JSONL with question
and answer, prepared by TRL itself) or `tokenized` (JSON lists `input_ids` and `labels`). What it writes to
`out` is said in trl_run.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import trl_run

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTTrainer


def build_trainer(settings: dict[str, Any], out: Path) -> SFTTrainer:
    """The trainer, on the rows that the settings name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.float32),
        args=SFTConfig(**trl_run.common_arguments(settings, out)),
        train_dataset=_dataset(settings),
        processing_class=AutoTokenizer.from_pretrained(settings["base"]),
    )


def _dataset(settings: dict[str, Any]) -> Dataset:
    from datasets import Dataset, load_dataset

    if "tokenized" in settings:
        return Dataset.from_dict(json.loads(Path(settings["tokenized"]).read_text()))
    rows = load_dataset("json", data_files=settings["rows"], split="train")
    return rows.map(_as_prompt_and_completion, remove_columns=rows.column_names)


def _as_prompt_and_completion(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


if __name__ == "__main__":
    trl_run.run(build_trainer)

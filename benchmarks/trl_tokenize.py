"""Rows made ready by TRL's SFTTrainer, as a process of its own.

`python -m benchmarks.trl_tokenize SETTINGS.json`, where SETTINGS has `rows` (JSONL with question and answer),
`tokenizer` (a folder), `num_proc`, `max_length` and `out` (a file). The rows are first written as the
conversational prompts and completions that TRL takes without another pass; that is not counted. What is
written to `out`: the seconds that loading and preparing them took, and tokens.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure once."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    out = Path(settings["out"])
    rows = out.with_suffix(".rows.jsonl")
    with open(settings["rows"]) as source, open(rows, "w") as target:
        target.writelines(_as_prompt_and_completion(json.loads(line)) for line in source)
    dataset, loaded, prepared = prepare(settings, rows, out.parent / "trl_cache")
    tokens = sum(map(len, dataset["input_ids"]))
    record = {"rows": len(dataset), "tokens": tokens, "load_seconds": loaded, "prepare_seconds": prepared}
    out.write_text(json.dumps(record))


def prepare(settings: dict[str, Any], rows: Path, cache: Path) -> tuple[Any, float, float]:
    """The trainer's data set, and the seconds that loading the rows and preparing them took."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    took = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            prepared = super()._prepare_dataset(*arguments, **options)
            took.append(time.perf_counter() - began)
            return prepared

    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    small = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    began = time.perf_counter()
    dataset = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(cache))
    loaded = time.perf_counter() - began
    options = SFTConfig(
        output_dir=str(cache / "trainer"), report_to="none", use_cpu=True, bf16=False,
        max_length=settings["max_length"], dataset_num_proc=settings["num_proc"],
    )  # fmt: skip
    trainer = Timed(LlamaForCausalLM(small), options, train_dataset=dataset, processing_class=tokenizer)
    return trainer.train_dataset, loaded, sum(took)


def _as_prompt_and_completion(row: dict[str, str]) -> str:
    turns = {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }
    return json.dumps(turns) + "\n"


if __name__ == "__main__":
    main()

"""One run of TRL's SFTTrainer, as a process of its own: `python -m benchmarks.trl_sft SETTINGS.json`.

SETTINGS has `base` (a model's folder), `dtype` (fp32: everything; bf16: autocast over fp32 weights, which is
what TRL calls bf16), `out` (a folder), `arguments` (of SFTConfig), and either `rows` (JSONL with question
and answer, prepared by TRL itself) or `tokenized` (JSON lists `input_ids` and `labels`). Writes to `out`:
`steps.jsonl`, a line per optimizer step with the running total of tokens; `logs.json`, what the trainer
logged; `model/`, unless `save` is false; and with `exact_grad_norm` also `grad_norms.json`, the norms before
clipping, summed in float64.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTTrainer


def main() -> None:
    """Train as the settings say."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(settings, out)
    norms = _measure_norms(trainer) if settings.get("exact_grad_norm") else []
    trainer.train()
    (out / "grad_norms.json").write_text(json.dumps(norms))
    (out / "logs.json").write_text(json.dumps(trainer.state.log_history))
    if settings.get("save", True):
        trainer.save_model(str(out / "model"))


def build_trainer(settings: dict[str, Any], out: Path) -> SFTTrainer:
    """The trainer, with a line per step in `out/steps.jsonl`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(out / "trainer"),
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=settings["dtype"] == "bf16",
        **settings["arguments"],
    )
    model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.float32)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(settings),
        processing_class=AutoTokenizer.from_pretrained(settings["base"]),
    )
    _write_steps(trainer, out / "steps.jsonl")
    return trainer


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


def _write_steps(trainer: SFTTrainer, path: Path) -> None:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with open(path, "a") as file:
                file.write(
                    json.dumps({"step": state.global_step, "tokens": trainer._total_train_tokens}) + "\n"
                )

    trainer.add_callback(Steps())


def _measure_norms(trainer: SFTTrainer) -> list[float]:
    """Have the norm of every step's gradient put into the list that is returned, before it is clipped.

    torch sums the squares of an fp32 tensor in fp32, which on the CPU costs the fourth digit for an embedding
    of a million weights.
    """
    norms: list[float] = []
    clip = trainer._clip_grad_norm

    def measure_and_clip(model: Any) -> Any:
        squares = (parameter.grad.double().square().sum() for parameter in model.parameters())
        norms.append(float(sum(squares)) ** 0.5)
        return clip(model)

    trainer._clip_grad_norm = measure_and_clip  # type: ignore[method-assign]
    return norms


if __name__ == "__main__":
    main()

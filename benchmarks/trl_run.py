"""What every run of a TRL trainer writes down, as a process of its own.

Takes a SETTINGS.json and a function that builds a trainer from it; leaves in the settings' `out`:
`steps.jsonl`, a line per optimizer step with the running total of tokens; `logs.json`, what the trainer
logged; `model/`, unless `save` is false; and with `exact_grad_norm` also `grad_norms.json`, the norms before
clipping, summed in float64. With `only_prepare` there is no training, but `prepared.json`, the rows' tokens
as the trainer made them. Which trainer it is, and on what rows, is said in `trl_<step>.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


def run(build_trainer: Callable[[dict[str, Any], Path], Trainer]) -> None:
    """Train as the settings named on the command line say."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(settings, out)
    if settings.get("only_prepare"):
        (out / "prepared.json").write_text(json.dumps(_tokens_of(trainer.train_dataset)))
        return
    _write_steps(trainer, out / "steps.jsonl")
    norms = _measure_norms(trainer) if settings.get("exact_grad_norm") else []
    trainer.train()
    (out / "grad_norms.json").write_text(json.dumps(norms))
    (out / "logs.json").write_text(json.dumps(trainer.state.log_history))
    if settings.get("save", True):
        trainer.save_model(str(out / "model"))


def common_arguments(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Arguments that every trainer gets: the settings' own, their precision, no reports, no network."""
    import torch

    return {
        "output_dir": str(out / "trainer"),
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": settings["dtype"] == "bf16",
        **settings["arguments"],
    }


def _tokens_of(dataset: Any) -> dict[str, list[list[int]]]:
    return {name: list(dataset[name]) for name in dataset.column_names if name.endswith("_ids")}


def _write_steps(trainer: Any, path: Path) -> None:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            line = {"step": state.global_step, "tokens": trainer._total_train_tokens}
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")

    trainer.add_callback(Steps())


def _measure_norms(trainer: Any) -> list[float]:
    """Have the norm of every step's gradient put into the list that is returned, before it is clipped.

    torch sums the squares of an fp32 tensor in fp32, which on the CPU costs the fourth digit for an embedding
    of a million weights.
    """
    norms: list[float] = []
    clip = trainer._clip_grad_norm

    def measure_and_clip(model: Any) -> Any:
        gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
        norms.append(float(sum(gradient.double().square().sum() for gradient in gradients)) ** 0.5)
        return clip(model)

    trainer._clip_grad_norm = measure_and_clip
    return norms

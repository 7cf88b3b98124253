"""Loss with AdamW's moments in bf16 beside fp32: `python -m benchmarks.optimizer_states`.

Trains copies of a pretrained model in one process, each under its own engine (ZeRO-1, one rank), on the same
documents in the same order: AdamW with moments in fp32, in bf16 rounded stochastically (`adamw_bf16`), and in
bf16 rounded to nearest, which no run offers. Writes `results/optimizer_states.json` after every step, so that
a run that is cut off leaves what it has measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import write_results
from common.config import DeepSpeedConfig, Dtype, ModelConfig
from common.model.loading import load_model
from common.model.packed import PackedCausalLM
from common.model.probes import find_shortcuts
from common.model.tokenizer import load_tokenizer
from common.runtime.distributed import World, close_world, init_world
from common.training import adamw_bf16
from common.training.ds_config import build_ds_config
from common.training.engine import Engine
from common.training.optim import build_optimizer
from common.training_config import OptimConfig, OptimizerName

SIDES = {"fp32": OptimizerName.adamw, "bf16": OptimizerName.adamw_bf16, "nearest": OptimizerName.adamw_bf16}


@dataclass
class Side:
    """An engine, its losses per token before each step, and the CPU-seconds of its updates."""

    engine: Engine
    losses: list[float] = field(default_factory=list)
    update_seconds: list[float] = field(default_factory=list)


def main() -> int:
    """Train, print each step, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer_states")
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained model")
    parser.add_argument("--data", type=Path, required=True, help="rows with question and answer, as GSM8K's")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=8, help="documents of a step")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    arguments = parser.parse_args()
    world, model = init_world(), ModelConfig(path=str(arguments.model.resolve()), dtype=Dtype.fp32)
    tokenizer = load_tokenizer(model)
    optim = OptimConfig(betas=[0.9, arguments.beta2])
    sides = {
        name: Side(_engine(name, model, tokenizer, optim, arguments.lr, world)) for name in arguments.sides
    }
    documents = _documents(arguments.data, tokenizer)
    for step in range(arguments.steps):
        chosen = [next(documents) for _ in range(arguments.rows)]
        for name, side in sides.items():
            _learn(name, side, chosen)
        print(step + 1, {name: round(side.losses[-1], 6) for name, side in sides.items()}, flush=True)
        _write(arguments, sides, step + 1)
    close_world()
    return 0


def _engine(
    name: str, model: ModelConfig, tokenizer: Any, optim: OptimConfig, lr: float, world: World
) -> Engine:
    network = load_model(model, tokenizer, seed=0, device=world.device)
    module = PackedCausalLM(network, find_shortcuts(network))
    config = build_ds_config(
        DeepSpeedConfig(stage=1), dtype=Dtype.fp32, max_grad_norm=1.0, micro_batch_size=1, world_size=1,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
    )  # fmt: skip
    named = OptimConfig(**{**vars(optim), "name": SIDES[name]})
    return Engine(module, build_optimizer(module, named, lr), config)


def _documents(path: Path, tokenizer: Any) -> Iterator[torch.Tensor]:
    """int64 [T] each, in the file's order, again and again."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    while True:
        for row in rows:
            turns = [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            yield torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def _learn(name: str, side: Side, documents: list[torch.Tensor]) -> None:
    """One step; the loss is the mean over its tokens, each predicted from those before."""
    tokens, total = sum(len(document) - 1 for document in documents), 0.0
    for ids in documents:
        length = len(ids)
        scored = side.engine(
            input_ids=ids[None], position_ids=torch.arange(length)[None], max_seqlen=length,
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            trained_positions=torch.arange(length - 1), targets=ids[1:],
        )  # fmt: skip
        side.engine.backward(scored.loss_sum, tokens)
        total += float(scored.loss_sum.detach())
    rounded, begun = adamw_bf16.rounded, time.process_time()
    if name == "nearest":
        adamw_bf16.rounded = lambda values, noise: values.bfloat16()
    assert side.engine.step().applied
    adamw_bf16.rounded = rounded
    side.update_seconds.append(time.process_time() - begun)
    side.losses.append(total / tokens)


def _write(arguments: argparse.Namespace, sides: dict[str, Side], steps: int) -> None:
    settings = {"lr": arguments.lr, "beta2": arguments.beta2, "rows": arguments.rows, "steps": steps}
    found = {
        name: {"losses": side.losses, "cpu_seconds_of_an_update": sorted(side.update_seconds)[steps // 2]}
        for name, side in sides.items()
    }
    write_results("optimizer_states", {"settings": settings, "sides": found}, to=arguments.results)


if __name__ == "__main__":
    sys.exit(main())

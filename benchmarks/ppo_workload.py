"""The policy, the reward model and the prompts that both sides of a PPO comparison start from.

Takes questions (GSM8K where it is there, else spelled numbers) and a folder; leaves there `policy/` and
`reward_model/`, artifacts that plain transformers loads too, and `prompts.jsonl`. All weights are random, so
that nothing is downloaded, with one change: a model that knows nothing would never stop by itself, and
here both sides must stop alike. One dimension of the residual stream is therefore held constant, and the
terminator's row of the tied embedding reads it: every position then ends the response with about the same
probability, on whatever engine the weights run. Lengths have a long tail (`tail`: most are short, a few reach
the limit) or are all at the limit (`uniform`). A folder that has them is used as it is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import data_scale, workload
from benchmarks.measure import PROJECT
from benchmarks.pairs_workload import export_as_policy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.config import ModelConfig

ENDS = {"tail": 1 / 24, "uniform": 1e-9}
"""How likely a response is to end at a position, in the mean; it differs between responses, so that a few are
much longer than 24 tokens."""
OWN = "own"
MAX_LENGTH = workload.MAX_LENGTH
TOY: Mapping[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}  # fmt: skip
CONSTANT = 0.1  # of the residual dimension, five times the spread of a fresh embedding


@dataclass(frozen=True)
class PPOWorkload:
    """Where both sides read."""

    policy: Path
    reward_model: Path
    prompts: Path  # JSONL with question and answer
    source: str  # what the prompts are, in words


def prepare(
    folder: Path,
    prompts: int,
    lengths: str,
    *,
    model: Mapping[str, Any] | None = None,
    pretrained: Path | None = None,
    data: Path = workload.GSM8K,
    seed: int = 0,
    max_length: int = MAX_LENGTH,
) -> PPOWorkload:
    """Make what is missing.

    lengths: one of `ENDS`, or `OWN` with a pretrained model. model: fields of its config; by default those of
    conf/model/llama_4m.yaml. pretrained: a model's folder. max_length: of a prompt with its response, for the
    model's context.
    """
    rows, source = questions(data, prompts, seed)
    if len(rows) < prompts:
        raise ValueError(f"there are {len(rows)} questions, not {prompts}")
    made = PPOWorkload(folder / "policy", folder / "reward_model", folder / "prompts.jsonl", source)
    folder.mkdir(parents=True, exist_ok=True)
    made.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows[:prompts]))
    if not (made.reward_model / "manifest.json").is_file():
        if pretrained is None:
            save_base(folder / "base", rows, ENDS[lengths], model, seed)
        export_artifacts(pretrained or folder / "base", made, max_length)
    return made


def questions(data: Path, count: int, seed: int) -> tuple[list[dict[str, str]], str]:
    """The file's questions with their answers in seeded order; made-up ones, `count`, where there is none."""
    if data.is_file():
        every = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
        source = "GSM8K questions"
    else:
        every = [data_scale.row(number * 37) for number in range(count)]
        source = "made-up questions about numbers"
    random.Random(seed).shuffle(every)
    return [{"question": row["question"], "answer": row["answer"]} for row in every], source


def save_base(
    base: Path, rows: Sequence[dict[str, str]], ends: float, model: Mapping[str, Any] | None, seed: int
) -> None:
    """A model that ends a response at any position with the probability `ends`, and its tokenizer."""
    import torch
    from omegaconf import OmegaConf

    from common.config import Dtype, ModelConfig, TokenizerConfig
    from common.model.loading import load_model
    from common.model.tokenizer import load_tokenizer, terminators_of

    fields = OmegaConf.to_container(OmegaConf.load(PROJECT / "conf" / "model" / "llama_4m.yaml"))
    assert isinstance(fields, dict)
    config = ModelConfig(
        config=dict(model or fields["config"]),
        tokenizer=TokenizerConfig(**fields["tokenizer"]),
        dtype=Dtype.fp32,
    )
    tokenizer = load_tokenizer(
        config, lambda: (text for row in rows for text in (row["question"], row["answer"]))
    )
    network = load_model(config, tokenizer, seed=seed, device=torch.device("cpu"))
    let_end(network, terminators_of(tokenizer), ends)
    tokenizer.save_pretrained(base)
    network.save_pretrained(base)


def let_end(network: PreTrainedModel, terminators: Sequence[int], probability: float) -> None:
    """Change the tied embedding so that one of the terminators follows with this mean probability.

    The first terminator gets all of it. ValueError for a model whose head is not its embedding.
    """
    import torch

    weight: Any = network.get_input_embeddings().weight
    if network.get_output_embeddings().weight is not weight:
        raise ValueError("the terminator's probability is set through an embedding that is tied to the head")
    with torch.no_grad():
        weight[:, 0] = CONSTANT
        weight[list(terminators), 0] = -50.0
        hidden, logits = some_outputs(network, terminators)
        weight[terminators[0], 0] = entry_for(probability, hidden[:, 0], logits, terminators[0])


def some_outputs(network: PreTrainedModel, terminators: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [N, h] and logits [N, V] after random tokens without terminators."""
    import torch

    from common.model.attention import plain_attention

    generator = torch.Generator().manual_seed(0)
    size = network.config.vocab_size
    usual = torch.tensor([token for token in range(size) if token not in terminators])
    ids = usual[torch.randint(len(usual), (8, 64), generator=generator)]
    with torch.no_grad(), plain_attention(network):
        network.eval()
        seen = network.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        hidden = seen.flatten(0, 1)
        return hidden, network.get_output_embeddings()(hidden)


def entry_for(probability: float, reads: torch.Tensor, logits: torch.Tensor, token: int) -> float:
    """The entry of the token's embedding, in the constant dimension, that gives it this mean probability.

    reads: fp32 [N], that dimension; logits: fp32 [N, V] while the entry is -50.
    """
    import torch

    others = logits.clone()
    others[:, token] = -torch.inf
    rest, low, high = others.logsumexp(-1), -50.0, 50.0
    for _ in range(60):  # the probability rises with the entry
        middle = (low + high) / 2
        mean = torch.sigmoid(logits[:, token] + (middle + 50.0) * reads - rest).mean()
        low, high = (middle, high) if mean < probability else (low, middle)
    return (low + high) / 2


def export_artifacts(base: Path, made: PPOWorkload, max_length: int) -> None:
    """The policy, and a reward model of the same backbone with a random head."""
    from common.config import Dtype, ModelConfig
    from common.model.tokenizer import load_tokenizer

    config = ModelConfig(path=str(base), dtype=Dtype.fp32)
    tokenizer = load_tokenizer(config)
    export_as_policy(config, tokenizer, made.policy, max_length)
    export_as_reward_model(config, tokenizer, made.reward_model, max_length)


def export_as_reward_model(
    model: ModelConfig, tokenizer: PreTrainedTokenizerFast, folder: Path, max_length: int
) -> None:
    """The model as a reward model artifact: a random head, and a calibration on random documents."""
    import torch

    from common.model.loading import load_model
    from common.model.probes import Shortcuts
    from common.model.scalar_head import NEW_REWARD_MODEL, PackedScalarModel
    from common.training.export import ask_live, export_model

    cpu = torch.device("cpu")
    live = load_model(model, tokenizer, NEW_REWARD_MODEL, seed=0, device=cpu, max_length=max_length)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, len(tokenizer), (32,), generator=generator) for _ in range(64)]
    packed = PackedScalarModel(live.eval(), Shortcuts())
    with torch.no_grad():
        scores = packed.answers(documents)
    calibration = {
        "mean": float(scores.mean()), "std": float(scores.std()), "accuracy": 0.5,
        "expected_calibration_error": 0.0, "pairs": len(documents),
    }  # fmt: skip
    details: dict[str, Any] = {"parents": [], "calibration": calibration}
    export_model(live, None, tokenizer, folder, ask_live(packed, documents[:4]), details=details)

"""One rank of PPO's gradient grid: rank 0 writes both gradients and metrics.

The gradient is read off a plain SGD step so large that the old weight is lost in rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from common.data.batches import Batches, BatchPlan
from common.data.types import IGNORE, TokenizedExample
from common.model import attention
from common.model.probes import find_shortcuts
from common.rates import Rates
from common.runtime.distributed import World, close_world, init_world
from common.training.learner import Learner
from common.training_config import OptimConfig
from step3_ppo.config import KLConfig, KLPlacement, PPOConfig
from step3_ppo.loss import UpdateSums
from step3_ppo.minibatches import minibatches_of
from step3_ppo.networks import Critic, Networks
from step3_ppo.rollout import Experience, Response
from step3_ppo.state import PPOCounters
from step3_ppo.update import update
from tests.packed import packed_lm
from tests.spread import sharing
from tests.step2_dpo.gradients import LEARNING_RATE, engine_of
from tests.step2_dpo.pairs import VOCABULARY, tiny_llama

MAX_LENGTH, TEMPERATURE, KL_COEF, SHIFT = 32, 0.7, 0.3, 0.5
PROMPTS, RESPONSES = (3, 9, 3, 5, 9, 1, 3), (5, 1, 9, 12, 4, 7, 2)
GROUPS = (0, 1, 0, 2, 1, 3, 0)
ALIKE = (0, 0, 2, 0, 0, 0, 4)  # tokens that a response begins with like the first one to its prompt


def everything() -> PPOConfig:
    """All terms of the loss at once."""
    kl = KLConfig(placement=KLPlacement.loss, coef=KL_COEF)
    return PPOConfig(entropy_coef=1.0, ptx_weight=0.5, ptx_batch_size=5, kl=kl)


class Point(NamedTuple):
    """One way to compute the same update."""

    micro_batch_size: int
    packing: bool
    stage: int


GRID = [
    Point(1, True, 1),
    Point(1, False, 2),
    Point(1, True, 3),
    Point(2, False, 1),
    Point(2, True, 2),
    Point(4, False, 3),
    Point(4, True, 2),
]


def some_experience() -> Experience:
    """Seven responses of different lengths to four prompts, with made-up numbers, also as importance weights;
    some tokens are clipped."""
    draw = np.random.default_rng(6)

    def ids(count: int) -> np.ndarray:
        return draw.integers(1, VOCABULARY, count).astype(np.int32)

    def numbers(mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
        return (mean + scale * draw.standard_normal(sum(RESPONSES))).astype(np.float32)

    responses: list[Response] = []
    for length, of_prompt, group, alike in zip(RESPONSES, PROMPTS, GROUPS, ALIKE, strict=True):
        prompt, tokens = ids(of_prompt), ids(length)
        first = next((response for response in responses if response.group == group), None)
        if first is not None:
            prompt, tokens[:alike] = first.prompt, first.tokens[: min(alike, length)]
        responses.append(Response(group, group, prompt, tokens, np.zeros(length, np.float32), True))
    chance = -np.log(VOCABULARY)
    return Experience(
        responses,
        old_logprobs=numbers(chance, 0.3),
        ref_logprobs=numbers(chance, 0.3),
        values=numbers(SHIFT, 0.2),
        advantages=numbers(),
        returns=numbers(),
        importance=np.exp(numbers()),
    )


class SomeDemonstrations:
    """Five documents, all of them in an update, packed or not."""

    sources = ["only"]
    lengths = np.array([7, 4, 12, 9, 5])
    source_ids = np.zeros(5, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedExample:
        ids = np.random.default_rng(100 + index).integers(1, VOCABULARY, self.lengths[index]).astype(np.int32)
        labels = np.append(ids[1:], IGNORE).astype(np.int32)
        labels[:2] = IGNORE
        return TokenizedExample(ids, labels, "only")


def tiny_scorer(attn_implementation: str = attention.NAME) -> Any:
    """A backbone with a scalar head."""
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    attention.register()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attn_implementation)
    torch.nn.init.normal_(model.score.weight, std=0.2)
    return model


def plan_of(point: Point, world: World, size: int) -> BatchPlan:
    return BatchPlan(MAX_LENGTH, point.packing, size, point.micro_batch_size, 0, **sharing(world))


def one_update(world: World, point: Point) -> tuple[dict[str, Any], dict[str, float]]:
    """Gradients of both networks by name (on rank 0), and the update's metrics."""
    ppo, experience = everything(), some_experience()
    scorer = tiny_scorer()
    modules = {"actor": packed_lm(tiny_llama()), "critic": Critic(scorer, find_shortcuts(scorer), SHIFT)}
    before = {
        part: {name: value.clone() for name, value in module.state_dict().items()}
        for part, module in modules.items()
    }
    trained = {}
    for part, module in modules.items():
        engine = engine_of(module, point.stage, world, LEARNING_RATE)  # type: ignore[arg-type]
        rates = Rates.of(OptimConfig(), LEARNING_RATE, 1)
        trained[part] = Learner(engine, engine._engine.optimizer, lambda applied: LEARNING_RATE, rates)
    networks = Networks(
        trained["actor"],
        trained["critic"],
        None,
        None,
        modules["actor"].model,
        TEMPERATURE,
        world.device,
        True,
    )
    (minibatch,) = minibatches_of(experience, plan_of(point, world, 7), iteration=0, epoch=0)
    sums, demonstrated = UpdateSums(), Batches(SomeDemonstrations(), plan_of(point, world, 5))
    outcome = update(networks, minibatch, experience, ppo, PPOCounters(kl_coef=KL_COEF), sums, demonstrated)
    assert outcome.actor is not None and outcome.actor.applied
    assert outcome.critic is not None and outcome.critic.applied
    metrics = {**sums.all_reduced().means(), **outcome.metrics()}
    gradients: dict[str, Any] = {}
    for part, one in trained.items():
        after = one.engine.full_state_dict()
        if after is not None:
            old = before[part]
            gradients[part] = {name: (old[name] - after[name]) / LEARNING_RATE for name in old}
    return gradients, metrics


def main(out: str, sequence_parallel: int = 1, points: Sequence[Point] = tuple(GRID)) -> int:
    world = init_world(sequence_parallel)
    found = {point: one_update(world, point) for point in points}
    if world.is_rank0:
        torch.save(found, out)
    close_world()
    return 0

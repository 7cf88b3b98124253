"""Straightforward PPO with plain transformers and torch, to stand beside ours.

The algorithm is step3_ppo's with its defaults: sampled roll-outs, calibrated rewards with a penalty for
responses that did not stop, KL to the reference in the per-token reward, GAE, whitened advantages, clipped
losses averaged over tokens, two optimizers. It is written the way a careful practitioner writes it the first
time: `generate` on fixed batches of prompts in the data's order, padded on the left; forward passes on
batches padded to their own longest prompt and response; logits of the whole vocabulary; SDPA, no gradients
where none are needed, fused AdamW. Not in it: what is ours to show (refilled slots, packed rows, trained
positions only), and data checks, checkpoints, exports and distribution.

`python -m benchmarks.ppo_reference settings.json` takes `Settings`; it appends a line per iteration to
`<out>/metrics.jsonl`, with seconds and CPU-seconds of roll-out, scoring and learning. With bf16 the trained
weights are fp32 under autocast, as in TRL.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """What the process is told."""

    policy: str
    reward_model: str
    prompts: str  # JSONL with question
    out: str
    iterations: int
    prompts_per_iteration: int
    responses_per_update: int
    max_new_tokens: int
    rollout_batch: int  # prompts side by side in generate
    score_batch: int  # sequences per forward pass without gradients
    train_batch: int  # sequences per forward pass with gradients
    dtype: str = "fp32"
    seed: int = 0
    actor_lr: float = 1e-6
    critic_lr: float = 9e-6
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    ppo_epochs: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    kl_coef: float = 0.05
    missing_eos_penalty: float = 1.0
    reward_clip: float = 10.0


@dataclass(frozen=True)
class Sequences:
    """B prompts, padded on the left to P, with their responses, padded on the right to R."""

    ids: Tensor  # int64 [B, P + R]
    mask: Tensor  # bool [B, P + R], without padding
    prompt_length: int  # P
    stopped: Tensor  # bool [B]

    @property
    def response_mask(self) -> Tensor:
        """bool [B, R]."""
        return self.mask[:, self.prompt_length :]

    def rows(self, rows: Tensor) -> Sequences:
        """Some of them, cut to the longest prompt and the longest response among them."""
        mask = self.mask[rows]
        used = mask.any(0).nonzero()
        begin, end = int(used[0]), int(used[-1]) + 1
        return Sequences(
            self.ids[rows, begin:end], mask[:, begin:end], self.prompt_length - begin, self.stopped[rows]
        )

    def inputs(self) -> dict[str, Tensor]:
        """What a transformers model is called with."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": self.ids, "attention_mask": self.mask.long(), "position_ids": positions}


@dataclass(frozen=True)
class Experience:
    """What is known of the responses before the updates; all fp32 [B, R], 0 where padded."""

    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class Trainer:
    """The four models, two optimizers and the prompts."""

    def __init__(self, settings: Settings) -> None:
        from transformers import AutoTokenizer

        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(settings.seed)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(settings.policy)
        self.tokenizer.padding_side = "left"
        trained, frozen = torch.float32, torch.float32 if settings.dtype == "fp32" else torch.bfloat16
        self.actor = self.load("AutoModelForCausalLM", settings.policy, trained)
        self.critic = self.load("AutoModelForSequenceClassification", settings.reward_model, trained)
        self.reference = self.load("AutoModelForCausalLM", settings.policy, frozen)
        self.reward_model = self.load("AutoModelForSequenceClassification", settings.reward_model, frozen)
        for model in (self.reference, self.reward_model):
            model.requires_grad_(False)
        ends = self.actor.generation_config.eos_token_id
        self.terminators = torch.tensor(ends if isinstance(ends, list) else [ends], device=self.device)
        calibration = json.loads(Path(settings.reward_model, "manifest.json").read_text())["details"][
            "calibration"
        ]
        self.reward_mean, self.reward_std = calibration["mean"], calibration["std"]
        self.actor_optimizer = self.optimizer(self.actor, settings.actor_lr)
        self.critic_optimizer = self.optimizer(self.critic, settings.critic_lr)
        self.prompts = self.read_prompts()

    def load(self, auto_class: str, path: str, dtype: torch.dtype) -> Any:
        import transformers

        made = getattr(transformers, auto_class).from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa"
        )
        return made.to(self.device).eval()  # no dropout

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        betas = self.settings.betas
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=0.0, fused=True)

    def read_prompts(self) -> list[list[int]]:
        """Token ids of each prompt, through the chat template."""
        rows = [json.loads(line) for line in Path(self.settings.prompts).read_text().splitlines()]
        return [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": row["question"]}],
                add_generation_prompt=True, tokenize=True, return_dict=True,
            )["input_ids"]
            for row in rows
        ]  # fmt: skip

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bf16")

    # roll-out

    @torch.no_grad()
    def roll_out(self, prompts: Sequence[list[int]]) -> Sequences:
        """Sample a response to each prompt."""
        size = self.settings.rollout_batch
        return joined(
            [self.generate(prompts[first : first + size]) for first in range(0, len(prompts), size)],
            self.tokenizer.pad_token_id,
        )

    def generate(self, prompts: Sequence[list[int]]) -> Sequences:
        padded = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.device)
        prompt_mask = padded["attention_mask"].bool()
        with self.precision():
            ids = self.actor.generate(
                **padded, do_sample=True, temperature=self.settings.temperature, top_k=0, top_p=1.0,
                max_new_tokens=self.settings.max_new_tokens, use_cache=True,
            )  # fmt: skip
        width = prompt_mask.shape[1]
        ended = torch.isin(ids[:, width:], self.terminators)
        before_the_end = ended.cumsum(1) - ended.long() == 0  # through the first terminator
        return Sequences(ids, torch.cat([prompt_mask, before_the_end], 1), width, ended.any(1))

    # score

    @torch.no_grad()
    def score(self, sequences: Sequences) -> tuple[Experience, dict[str, float]]:
        """Rewards, log-probabilities and values of the responses; then their advantages."""
        settings, mask = self.settings, sequences.response_mask
        shape = mask.shape
        logprobs, reference, values = (torch.zeros(shape, device=self.device) for _ in range(3))
        scores = torch.zeros(shape[0], device=self.device)
        for rows in batches(torch.arange(shape[0], device=self.device), settings.score_batch):
            some = sequences.rows(rows)
            width = some.response_mask.shape[1]
            with self.precision():
                scores[rows] = self.reward_model(**some.inputs()).logits[:, 0].float()
                logprobs[rows, :width] = self.logprobs(self.actor, some)
                reference[rows, :width] = self.logprobs(self.reference, some)
                values[rows, :width] = self.values(some)
        rewards = ((scores - self.reward_mean) / self.reward_std).clamp(
            -settings.reward_clip, settings.reward_clip
        )
        rewards = rewards - settings.missing_eos_penalty * ~sequences.stopped
        kl = (logprobs - reference) * mask
        per_token = -settings.kl_coef * kl
        per_token[torch.arange(shape[0]), mask.sum(1) - 1] += rewards
        advantages = generalized_advantages(per_token, values * mask, mask, settings.gamma, settings.lam)
        known = Experience(
            logprobs * mask, values * mask, whitened(advantages, mask), (advantages + values) * mask
        )
        return known, {"objective/scores": float(rewards.mean()), "objective/kl": float(kl.sum(1).mean())}

    def logprobs(self, model: Any, sequences: Sequences) -> Tensor:
        """fp32 [B, R], of the response's tokens at the sampling temperature."""
        logits = model(**sequences.inputs(), use_cache=False).logits
        before = logits[:, sequences.prompt_length - 1 : -1].float() / self.settings.temperature
        said = sequences.ids[:, sequences.prompt_length :]
        return before.log_softmax(-1).gather(-1, said[..., None])[..., 0]

    def values(self, sequences: Sequences) -> Tensor:
        """fp32 [B, R], read at the positions that predict the response's tokens."""
        hidden = self.critic.model(**sequences.inputs(), use_cache=False).last_hidden_state
        value = self.critic.score(hidden[:, sequences.prompt_length - 1 : -1])[..., 0].float()
        return (value - self.reward_mean) / self.reward_std

    # learn

    def learn(self, sequences: Sequences, known: Experience) -> dict[str, float]:
        """Update actor and critic on shuffled minibatches; returns the mean losses."""
        losses: list[tuple[float, float]] = []
        for _ in range(self.settings.ppo_epochs):
            order = torch.randperm(len(sequences.ids)).to(self.device)
            for minibatch in batches(order, self.settings.responses_per_update):
                losses.append(self.update(sequences, known, minibatch))
        policy, value = (sum(column) / len(losses) for column in zip(*losses, strict=True))
        return {"loss/policy_avg": policy, "loss/value_avg": value}

    def update(self, sequences: Sequences, known: Experience, minibatch: Tensor) -> tuple[float, float]:
        """One step of both optimizers; returns both losses."""
        tokens = sequences.response_mask[minibatch].sum()
        sums = torch.zeros(2, device=self.device)
        for rows in batches(minibatch, self.settings.train_batch):
            some = sequences.rows(rows)
            mask = some.response_mask
            old = [field[rows, : mask.shape[1]] for field in vars(known).values()]
            old_logprobs, old_values, advantages, returns = old
            with self.precision():
                logprobs, values = self.logprobs(self.actor, some), self.values(some)
            policy = self.policy_loss(logprobs, old_logprobs, advantages)[mask].sum() / tokens
            value = self.value_loss(values, old_values, returns)[mask].sum() / tokens
            (policy + value).backward()  # they share no weights
            sums += torch.stack([policy.detach(), value.detach()])
        for model, optimizer in (
            (self.actor, self.actor_optimizer),
            (self.critic, self.critic_optimizer),
        ):
            nn.utils.clip_grad_norm_(model.parameters(), self.settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return float(sums[0]), float(sums[1])

    def policy_loss(self, logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        """[B, R]."""
        ratio = (logprobs - old).clamp(-20, 20).exp()
        clipped = ratio.clamp(1 - self.settings.clip, 1 + self.settings.clip)
        return -torch.minimum(ratio * advantages, clipped * advantages)

    def value_loss(self, values: Tensor, old: Tensor, returns: Tensor) -> Tensor:
        """[B, R]."""
        clipped = old + (values - old).clamp(-self.settings.value_clip, self.settings.value_clip)
        return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def batches(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Row numbers, `size` at a time."""
    yield from rows.split(size)


def joined(parts: Sequence[Sequences], pad: int) -> Sequences:
    """Batches of different widths as one."""
    left = max(part.prompt_length for part in parts)
    right = max(part.response_mask.shape[1] for part in parts)
    margins = [(left - part.prompt_length, right - part.response_mask.shape[1]) for part in parts]
    pairs = list(zip(parts, margins, strict=True))
    ids = torch.cat([nn.functional.pad(part.ids, margin, value=pad) for part, margin in pairs])
    mask = torch.cat([nn.functional.pad(part.mask, margin, value=False) for part, margin in pairs])
    return Sequences(ids, mask, left, torch.cat([part.stopped for part in parts]))


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE (arXiv 1506.02438), [B, R]; the value after the last token is 0, padding stays 0."""
    advantages = torch.zeros_like(rewards)
    following = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = following
    return advantages


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the unpadded."""
    flat = values[mask]
    return (values - flat.mean()) / (flat.std(correction=0) + 1e-8) * mask


class Clock:
    """Wall and CPU seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wall, cpu = _now(), time.process_time()
        yield
        self.seconds[f"time/{name}"] = _now() - wall
        self.seconds[f"cpu/{name}"] = time.process_time() - cpu


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(settings: Settings) -> None:
    """All iterations; a line of metrics after each."""
    trainer = Trainer(settings)
    count, num_tokens = settings.prompts_per_iteration, 0
    with Path(settings.out, "metrics.jsonl").open("w") as file:
        for iteration in range(settings.iterations):
            chosen = [trainer.prompts[(iteration * count + i) % len(trainer.prompts)] for i in range(count)]
            clock = Clock()
            with clock.phase("rollout"):
                sequences = trainer.roll_out(chosen)
            with clock.phase("score"):
                known, metrics = trainer.score(sequences)
            with clock.phase("learn"):
                metrics |= trainer.learn(sequences, known)
            num_tokens += int(sequences.mask.sum())
            line = {
                "step": iteration + 1, "num_tokens": num_tokens,
                "response/length_mean": int(sequences.response_mask.sum()) / count,
                **metrics, **clock.seconds,
            }  # fmt: skip
            if torch.cuda.is_available():
                line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            file.write(json.dumps(line) + "\n")
            file.flush()


if __name__ == "__main__":
    run(Settings(**json.loads(Path(sys.argv[1]).read_text())))

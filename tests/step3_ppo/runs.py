"""Tiny PPO runs for tests: a policy that may stop at any token, a reward model, prompts, and a job's start.

All weights are random. What is learned is seen in weights and numbers, not in text.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.config import Dtype, ModelConfig, SourceConfig, TokenizerConfig
from common.runtime.tracking import read_metrics
from common.tracking_config import WandbMode
from step3_ppo.config import Estimator, KLPlacement, PPOJob, RewardSourceConfig
from tests.programs import killed
from tests.programs.live_logits import keep_live
from tests.runs import LLAMA, finish, write_job
from tests.step2_dpo.runs import write_rows

ENDS = 0.1
"""How likely a response is to end at a token: some stop within eight tokens, and some do not."""
MAX_LENGTH = 64
BATCH = 4
"""Responses in an update."""


@dataclass(frozen=True)
class Artifacts:
    """What PPO starts from."""

    policy: Path
    reward_model: Path


def make_artifacts(folder: Path, tokenizer: Path, *, seed: int = 0, **config: Any) -> Artifacts:
    """A random policy and a random reward model, calibrated. config: fields of the model's, beside LLAMA."""
    from benchmarks.pairs_workload import export_as_policy
    from benchmarks.ppo_workload import export_as_reward_model
    from common.model.tokenizer import load_tokenizer

    made = Artifacts(folder / "policy", folder / "reward_model")
    for number, export in enumerate((export_as_policy, export_as_reward_model)):
        base = _random_model(folder / f"base {number}", tokenizer, {**LLAMA, **config}, seed + number)
        settings = ModelConfig(path=str(base), dtype=Dtype.fp32)
        export(settings, load_tokenizer(settings), (made.policy, made.reward_model)[number], MAX_LENGTH)
    return made


def _random_model(folder: Path, tokenizer: Path, config: dict[str, Any], seed: int) -> Path:
    """A plain model that ends a response at any token with the probability ENDS."""
    import torch

    from benchmarks.ppo_workload import let_end
    from common.model.loading import load_model
    from common.model.tokenizer import load_tokenizer, terminators_of

    settings = ModelConfig(config=config, tokenizer=TokenizerConfig(path=str(tokenizer)), dtype=Dtype.fp32)
    loaded = load_tokenizer(settings)
    network = load_model(settings, loaded, seed=seed, device=torch.device("cpu"))
    let_end(network, terminators_of(loaded), ENDS)
    loaded.save_pretrained(folder)
    network.save_pretrained(folder)
    return folder


def questions(count: int = 30) -> list[dict[str, Any]]:
    """Sums as prompts of different lengths, with another column for reward functions."""
    generator, rows = random.Random(7), []
    for _ in range(count):
        a, b = generator.randrange(100), generator.randrange(100)
        rows.append({"prompt": f"What is {'now ' * generator.randrange(4)}{a} + {b}?", "wanted": str(a + b)})
    return rows


def make_job(folder: Path, artifacts: Artifacts, **train: Any) -> PPOJob:
    """The smallest job that does everything: 8 responses an iteration in two updates. `train`: fields of
    `ppo.train`."""
    job = PPOJob(run_name="tiny", output_dir=str(folder / "runs"), seed=3)
    job.model.dtype = Dtype.fp32
    job.ppo.policy, job.ppo.reward_model = str(artifacts.policy), str(artifacts.reward_model)
    rows = folder / "questions.jsonl"
    job.ppo.data.sources = [SourceConfig(path=str(rows if rows.exists() else write_rows(rows, questions())))]
    job.ppo.data.max_length, job.ppo.data.eval_fraction = MAX_LENGTH, 0.2
    job.ppo.data.cache_dir = str(folder / "cache")
    rollout = job.ppo.rollout
    rollout.prompts, rollout.samples_per_prompt, rollout.max_new_tokens, rollout.slots = 4, 2, 8, 3
    job.ppo.evaluation.num_prompts = 3
    for optim in (job.ppo.optim, job.ppo.critic.optim):
        optim.lr, optim.warmup_ratio = 5e-4, 0.0
    job.tracking.wandb = WandbMode.off
    defaults = {"global_batch_size": BATCH, "micro_batch_size": 1, "max_steps": 3}
    for name, value in {**defaults, **train}.items():
        setattr(job.ppo.train, name, value)
    return job


def without_reward_model(job: PPOJob, estimator: Estimator, function: str = "shared") -> PPOJob:
    """The job with a function of this module as its only reward, and an estimator."""
    job.ppo.reward_model = None
    kl = replace(job.ppo.kl, placement=KLPlacement.auto)  # anew: it goes with the estimator
    rewards = [RewardSourceConfig(function=f"{__name__}:{function}")]
    job.ppo = replace(job.ppo, estimator=estimator, rewards=rewards, kl=kl)
    return job


def shared(completions: list[str], wanted: list[str]) -> list[float]:
    """A reward function: how many characters of the row's `wanted` are in the completion, and a little for
    every other character, so that no two are alike."""
    pairs = zip(completions, wanted, strict=True)
    return [sum(c in completion for c in right) + len(set(completion)) / 7 for completion, right in pairs]


_asked = [0]


def solved_after_one(completions: list[str], wanted: list[str]) -> list[float]:
    """`shared` for the first iteration of a process; from then on every response earns 1."""
    _asked[0] += 1
    return shared(completions, wanted) if _asked[0] == 1 else [1.0] * len(completions)


def run_job(job: PPOJob, run_dir: Path, ranks: int = 1, *, code: int = 0) -> str:
    """Run the job to its end, watched; returns what was printed."""
    return finish(write_job(job, run_dir), ranks, ppo_watched, code=code)


def lines_of(run_dir: Path, name: str = "objective/scores") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have this metric."""
    return [line for line in read_metrics(run_dir / "ppo" / "metrics.jsonl") if name in line]


def series(run_dir: Path, name: str) -> list[float]:
    return [line[name] for line in lines_of(run_dir, name)]


def weights_of(run_dir: Path, update: int, part: str = "actor") -> dict[str, Any]:
    """The whole weights in the checkpoint with this number, on ZeRO 1 and 2."""
    import torch

    (file,) = (run_dir / "ppo" / "checkpoints" / f"step_{update:08d}" / part).rglob(
        "mp_rank_00_model_states.pt"
    )
    return torch.load(file, weights_only=False)["module"]


# programs of a rank


def ppo(config: str, *extra: str) -> int:
    """`python -m step3_ppo --config CONFIG ...` in this process."""
    from step3_ppo.__main__ import main

    sys.argv = ["step3_ppo", "--config", config, *extra]
    return main()


def ppo_watched(config: str) -> int:
    """The same; rank 0 saves live_logits.pt: {experiences, updates, scored, learned, probe, logits}.

    experiences: of each iteration, filled in. updates: (iteration, update, actor, critic) of each, with
    this rank's fp32 master weights after it. scored, learned: the responses of each micro-batch that this
    rank computed, for the log-probabilities of an iteration and for an update. probe, logits: what the live
    model gave when it was exported. states: how many tensors of the networks had an optimizer's state then.
    """
    import os

    from common.training import session
    from step3_ppo import networks as networks_of_ppo
    from step3_ppo import train

    fill, update = train.with_advantages, train.update
    tell = networks_of_ppo.Networks.with_token_numbers
    ask = session.ask_live
    seen: dict[str, Any] = {"experiences": [], "updates": [], "scored": [], "learned": [], "states": []}
    learners: list[Any] = []

    def telling(networks: Any, experience: Any, batches: Any, **kwargs: Any) -> Any:
        if not kwargs:  # in an iteration
            seen["scored"].append([batch.row_ids for batch in batches])
        return tell(networks, experience, batches, **kwargs)

    def filling(*args: Any) -> Any:
        seen["experiences"].append(fill(*args))
        return seen["experiences"][-1]

    def updating(networks: Any, *args: Any) -> Any:
        outcome, counters = update(networks, *args), args[3]
        seen["learned"].append([batch.row_ids for batch in args[0].micro_batches])
        both = (networks.actor, networks.critic)
        learners[:] = filter(None, both)
        weights = [None if it is None else [w.clone() for w in it.engine.master_weights()] for it in both]
        seen["updates"].append((counters.step, counters.update, *weights))
        return outcome

    def asking(*args: Any) -> Any:
        seen["states"] += [len(it.engine._engine.optimizer.optimizer.state) for it in learners]
        return ask(*args)

    session.ask_live = asking
    train.with_advantages, train.update = filling, updating
    networks_of_ppo.Networks.with_token_numbers = telling
    if int(os.environ["RANK"]) == 0:
        keep_live(config, "logits", **seen)
    return ppo(config)


def ppo_interrupted(config: str, moment: str, number: int, rank: int, signal_number: int) -> int:
    """The same, of which this rank gets a signal in the middle of `moment` number `number`.

    update: at the end of that update of the run, counted from 1 over all iterations. roll-out, scoring,
    evaluation: in that iteration (from 0; of evaluations, after it). Others: see tests/programs/killed.py.
    """
    import os

    if int(os.environ["RANK"]) == rank:
        if moment in ("update", "roll-out", "scoring", "evaluation"):
            _interrupt(moment, number, signal_number)
        else:
            killed._prepare(moment)
    return ppo(config)


def _interrupt(moment: str, number: int, signal_number: int) -> None:
    """Have the process signalled there."""
    import os

    from step3_ppo import train

    update, score, sample = train.update, train.Scoring.score, train.Sampler.__call__
    place = ("evaluation", 0)  # where the run is

    def reached(here: tuple[str, int]) -> None:
        if here == (moment, number):
            os.kill(os.getpid(), signal_number)

    def updating(networks: Any, minibatch: Any, experience: Any, ppo: Any, counters: Any, *more: Any) -> Any:
        outcome = update(networks, minibatch, experience, ppo, counters, *more)
        per_iteration = ppo.ppo_epochs * len(experience.responses) // BATCH
        reached(("update", counters.step * per_iteration + counters.update + 1))
        return outcome

    def scoring(*args: Any) -> Any:
        if place[0] == "roll-out":
            reached(("scoring", place[1]))
        return score(*args)

    def sampling(*args: Any, key: tuple[int, ...], **kwargs: Any) -> Any:
        nonlocal place
        is_roll_out = len(key) == 2
        after = place[1] + (place[0] == "roll-out")
        place = ("roll-out", key[1]) if is_roll_out else ("evaluation", after)
        reached(place)
        return sample(*args, key=key, **kwargs)

    train.update = updating
    train.Scoring.score, train.Sampler.__call__ = scoring, sampling  # type: ignore[method-assign]


def watched(run_dir: Path) -> dict[str, Any]:
    """What `ppo_watched` saved."""
    import torch

    found: dict[str, Any] = torch.load(run_dir / "live_logits.pt", weights_only=False)
    return found

"""The straightforward PPO is right, its responses are as long as ours, and its account is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import ppo_cpu, ppo_reference, ppo_sides, ppo_workload
from benchmarks.measure import Tick
from tests.packed import packed_lm, packed_scorer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ppo_workload.PPOWorkload:
    folder = tmp_path_factory.mktemp("ppo")
    nowhere = folder / "no questions here"
    return ppo_workload.prepare(folder, 16, "tail", model=ppo_workload.TOY, data=nowhere)


def trainer_of(made: ppo_workload.PPOWorkload, **settings: object) -> ppo_reference.Trainer:
    usual: dict[str, object] = {
        "policy": str(made.policy), "reward_model": str(made.reward_model), "prompts": str(made.prompts),
        "out": "", "iterations": 1, "prompts_per_iteration": 16, "responses_per_update": 8,
        "max_new_tokens": 24, "rollout_batch": 5, "score_batch": 3, "train_batch": 3,
    }  # fmt: skip
    return ppo_reference.Trainer(ppo_reference.Settings(**{**usual, **settings}))  # type: ignore[arg-type]


def documents_of(sequences: ppo_reference.Sequences) -> list[torch.Tensor]:
    return [ids[mask] for ids, mask in zip(sequences.ids, sequences.mask, strict=True)]


def test_responses_end_with_the_terminator_or_at_the_limit(made: ppo_workload.PPOWorkload) -> None:
    trainer = trainer_of(made)
    sequences = trainer.roll_out(trainer.prompts)
    lengths = sequences.response_mask.sum(1)
    assert sequences.stopped.any() and not sequences.stopped.all() and len(set(lengths.tolist())) > 4
    for document, prompt, stopped, length in zip(
        documents_of(sequences), trainer.prompts, sequences.stopped, lengths, strict=True
    ):
        response = document[len(prompt) :]
        assert document[: len(prompt)].tolist() == prompt and len(response) == length
        ends = torch.isin(response, trainer.terminators)
        assert not ends[:-1].any() and bool(ends[-1]) == bool(stopped)
        assert stopped or length == trainer.settings.max_new_tokens


def test_lengths_are_a_property_of_the_weights(tmp_path: Path) -> None:
    endless = ppo_workload.prepare(
        tmp_path, 8, "uniform", model=ppo_workload.TOY, data=tmp_path / "no questions here"
    )
    trainer = trainer_of(endless)
    assert trainer.roll_out(trainer.prompts).response_mask.all()


def test_padding_changes_nothing(made: ppo_workload.PPOWorkload) -> None:
    """Log-probabilities, values and scores are those of each document alone, in our packed passes."""
    from common.config import Dtype, ModelConfig
    from common.model.loading import load_model
    from common.model.scalar_head import REWARD_MODEL
    from common.model.tokenizer import load_tokenizer

    trainer = trainer_of(made)
    sequences = trainer.roll_out(trainer.prompts)
    known, _ = trainer.score(sequences)
    policy = ModelConfig(path=str(made.policy), dtype=Dtype.fp32)
    tokenizer, cpu = load_tokenizer(policy), torch.device("cpu")
    actor = packed_lm(load_model(policy, tokenizer, seed=0, device=cpu).eval())
    judged = ModelConfig(path=str(made.reward_model), dtype=Dtype.fp32)
    judge = packed_scorer(load_model(judged, tokenizer, REWARD_MODEL, seed=0, device=cpu).eval())
    for row, (document, prompt) in enumerate(zip(documents_of(sequences), trainer.prompts, strict=True)):
        said = document[len(prompt) :]
        with torch.no_grad():
            logits = actor.logits(document[None])[len(prompt) - 1 : -1]
            prefixes = [document[: len(prompt) + t] for t in range(len(said))]
            values = (judge.answers(prefixes) - trainer.reward_mean) / trainer.reward_std
        expected = logits.log_softmax(-1).gather(-1, said[:, None])[:, 0]
        count = len(said)
        torch.testing.assert_close(known.logprobs[row, :count], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(known.values[row, :count], values, atol=1e-4, rtol=0)
        assert not known.logprobs[row, count:].any() and not known.advantages[row, count:].any()
    with torch.no_grad():
        scores = judge.answers(documents_of(sequences))
    rewards = (scores - trainer.reward_mean) / trainer.reward_std - (~sequences.stopped).float()
    # without KL the returns of the last token are its reward, whatever the values
    last = sequences.response_mask.sum(1) - 1
    returns = known.returns[torch.arange(len(last)), last]
    torch.testing.assert_close(returns, rewards, atol=1e-4, rtol=0)


def test_advantages_are_those_worked_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 0.25, 0.0], [1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = ppo_reference.generalized_advantages(rewards, values, mask, 1.0, 0.5)
    # the last: 1 - 0.25 = 0.75; before it: 0.25 - 0.5 + 0.5 * 0.75 = 0.125
    torch.testing.assert_close(found, torch.tensor([[0.125, 0.75, 0.0], [1.0, 0.0, 0.0]]))


def test_advantages_are_ours() -> None:
    from step3_ppo.advantages import gae

    generator = np.random.default_rng(0)
    lengths = [1, 5, 3]
    rewards, values = (generator.normal(size=sum(lengths)).astype(np.float32) for _ in range(2))
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    padded = [torch.zeros(3, 5).masked_scatter(mask, torch.tensor(flat)) for flat in (rewards, values)]
    found = ppo_reference.generalized_advantages(*padded, mask, 0.9, 0.95)[mask]
    expected, _ = gae(rewards, values, np.cumsum([0, *lengths]), gamma=0.9, lam=0.95)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("train_batch", [1, 8])
def test_an_update_does_not_depend_on_the_batch_size(
    made: ppo_workload.PPOWorkload, train_batch: int
) -> None:
    reference, other = trainer_of(made), trainer_of(made, train_batch=train_batch)
    sequences = reference.roll_out(reference.prompts)
    known, _ = reference.score(sequences)
    rows = torch.arange(8)
    for trainer in (reference, other):
        trainer.update(sequences, known, rows)
    for one, two in zip(
        [*reference.actor.parameters(), *reference.critic.parameters()],
        [*other.actor.parameters(), *other.critic.parameters()],
        strict=True,
    ):
        # Adam's first step is the sign of the gradient where that is not tiny
        assert (one - two).abs().max() < 2.1e-5 and (one - two).abs().mean() < 1e-7


def test_the_first_ratio_is_one(made: ppo_workload.PPOWorkload) -> None:
    trainer = trainer_of(made)
    sequences = trainer.roll_out(trainer.prompts)
    known, _ = trainer.score(sequences)
    policy, _ = trainer.update(sequences, known, torch.arange(16))
    advantages = known.advantages[sequences.response_mask]
    assert policy == pytest.approx(-float(advantages.mean()), abs=1e-6)


def write_metrics(path: Path, lengths: list[float]) -> Path:
    lines = [
        {
            "step": n + 1, "response/length_mean": length, "num_tokens": 100 * (n + 1) ** 2,
            "time/rollout": 3.0 - n, "time/score": 0.5, "time/learn": 1.0,
        }
        for n, length in enumerate(lengths)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"step": 0, "eval/reward": 1.0}, *lines]))
    return path


def test_the_first_iteration_and_the_end_do_not_count(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "metrics.jsonl", [10.0, 20.0, 30.0])
    ticks = [Tick(1, 5.0, 4.0), Tick(2, 7.0, 6.0), Tick(3, 10.0, 10.0), Tick(4, 99.0, 99.0)]
    found = ppo_sides.account(metrics, ticks, iterations=3, skip=1)
    assert found["tokens_per_cpu_second"] == pytest.approx(800 / 6)
    assert found["tokens_per_iteration"] == 400
    assert (found["cpu_seconds_per_iteration"], found["seconds_per_iteration"]) == (3.0, 2.5)
    assert (found["rollout_seconds"], found["score_seconds"], found["learn_seconds"]) == (1.5, 0.5, 1.0)
    assert found["response_length"] == 25.0


def test_a_run_that_broke_off_is_refused(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "metrics.jsonl", [10.0, 20.0])
    with pytest.raises(ValueError, match="2 iterations were logged"):
        ppo_sides.account(metrics, [Tick(2, 1.0, 1.0)], iterations=3, skip=1)


def test_a_side_with_longer_responses_is_not_slower_for_it() -> None:
    ours = dict.fromkeys(
        ("cpu_seconds_per_iteration", "seconds_per_iteration", "rollout_seconds", "score_seconds"), 2.0
    )
    ours |= {"learn_seconds": 1.0, "tokens_per_iteration": 40.0, ppo_cpu.RATE: 100.0}
    other = {name: 2 * value for name, value in ours.items()} | {
        "tokens_per_iteration": 20.0,
        ppo_cpu.RATE: 25.0,
    }
    ratios = ppo_cpu.ratios_of(ours, other)
    assert (ratios[ppo_cpu.RATE], ratios["rollout_seconds_per_token"]) == (4.0, 4.0)
    assert ratios["cpu_seconds_per_iteration"] == 2.0


def test_the_command_is_one_that_the_configuration_knows(
    tmp_path: Path, made: ppo_workload.PPOWorkload
) -> None:
    from pipeline.compose import compose

    load = ppo_sides.Load(made, 2, 8, 4, 12, 512, "fp32")
    command, metrics = ppo_sides.our_command(load, ppo_sides.OurSettings(4, 1), tmp_path)
    job = compose(command[4:])
    assert job.ppo.responses_per_iteration == 8 and job.ppo.train.max_steps == 2
    assert metrics == tmp_path / "ours" / "ppo" / "metrics.jsonl"


@pytest.mark.slow
def test_both_sides_run_and_are_counted(tmp_path: Path, made: ppo_workload.PPOWorkload) -> None:
    load = ppo_sides.Load(made, 2, 8, 4, 12, 512, "fp32")
    settings = ppo_sides.OurSettings(slots=4, micro_batch=1)
    ours = ppo_cpu.measured(load, tmp_path, 1, "ours", lambda at: ppo_sides.our_command(load, settings, at))
    reference = ppo_sides.ReferenceSettings(4, 2, 2)
    theirs = ppo_cpu.measured(
        load, tmp_path, 1, "reference", lambda at: ppo_sides.reference_command(load, reference, at)
    )
    assert ours.keys() == theirs.keys()
    assert 0 < ours["response_length"] <= 12 and 0 < theirs["response_length"] <= 12
    assert ppo_cpu.rendered({"ours": ours, "theirs": theirs})


def test_what_the_comparison_is_told_reaches_both_sides() -> None:
    arguments = ppo_cpu._parser().parse_args(["--toy", "--prompts", "8"])
    assert isinstance(arguments, argparse.Namespace) and arguments.lengths == ["tail", "uniform"]

"""What only the engine knows of DeepSpeed; its numerics are in tests/numerics and tests/recipes."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.training.snapshot import Snapshot
from tests import forked
from tests.packed import packed_lm


def one_step(folder: str) -> int:
    """An engine of its own in a fresh process: what it imports, its outcomes, its state on disk."""
    import torch

    from common.config import DeepSpeedConfig, Dtype
    from common.runtime.distributed import init_world
    from common.training.ds_config import build_ds_config
    from common.training.engine import Engine

    init_world()
    module = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    config = build_ds_config(
        DeepSpeedConfig(stage=2), dtype=Dtype.fp32, max_grad_norm=1.0, micro_batch_size=1, world_size=1,
        num_parameters=3,
    )  # fmt: skip
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=0.5), config)
    assert engine.zero_stage == 2 and engine.module is module and engine.loss_scale == 1.0
    assert "torch._inductor.compile_fx" not in sys.modules

    engine.backward(engine(torch.tensor([[3.0, 0.0, 4.0]])).sum(), 2.0)
    engine.backward(engine(torch.tensor([[3.0, 0.0, 4.0]])).sum(), 2.0)
    outcome = engine.step()
    # the gradient is (3, 0, 4): of norm 5, clipped to 1
    assert outcome.applied and math.isclose(outcome.grad_norm, 5.0, rel_tol=1e-6)
    state = engine.full_state_dict()
    assert state is not None
    torch.testing.assert_close(state["weight"], torch.tensor([[0.7, 1.0, 0.6]]))

    open_file = Snapshot(Path(folder), None).open
    engine.save(Path(folder), open_file)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["layout.json", "zero"]
    engine.backward(engine(torch.tensor([[math.nan, 0.0, 0.0]])).sum(), 1.0)
    outcome = engine.step()
    assert not outcome.applied and math.isnan(outcome.grad_norm)
    torch.testing.assert_close(module.weight, torch.tensor([[0.7, 1.0, 0.6]]))
    engine.backward(engine(torch.tensor([[3.0, 0.0, 4.0]])).sum(), 1.0)
    assert engine.step().applied and module.weight[0, 0].item() < 0.5
    engine.load(Path(folder))
    torch.testing.assert_close(module.weight, torch.tensor([[0.7, 1.0, 0.6]]))
    with pytest.raises(FileNotFoundError):
        engine.save(Path(folder) / "of a run that was removed" / "step", open_file)
    assert not (Path(folder) / "of a run that was removed").exists()
    return 0


def test_an_engine_steps_clips_skips_saves_and_loads(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    ranks = forked.start(one_step, (str(tmp_path / "state"),), 1, tmp_path / "output.txt")
    codes, printed = ranks.finish(), (tmp_path / "output.txt").read_text()
    assert codes == [0], printed
    assert printed == "", "DeepSpeed talks on the terminal"


def summed_at_once_and_later(folder: str) -> int:
    """bf16 gradients of three micro-batches a step, added to their sums as they come, and after each pass."""
    import torch

    from common.config import DeepSpeedConfig, Dtype
    from common.runtime.distributed import init_world
    from common.training.ds_config import build_ds_config
    from common.training.engine import Engine

    init_world()
    found = []
    for at_once in (True, False):
        torch.manual_seed(0)
        first, last = (
            torch.nn.Linear(8, 16, dtype=torch.bfloat16),
            torch.nn.Linear(16, 8, dtype=torch.bfloat16),
        )
        module = torch.nn.Sequential(first, torch.nn.SiLU(), last, torch.nn.SiLU(), first)
        config: Any = build_ds_config(
            DeepSpeedConfig(stage=1), dtype=Dtype.bf16, max_grad_norm=1.0, micro_batch_size=1, world_size=1,
            num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        )  # fmt: skip
        assert config["bf16"]["immediate_grad_update"] is True
        config["bf16"]["immediate_grad_update"] = at_once
        engine = Engine(module, torch.optim.AdamW(module.parameters(), lr=0.01), config)
        for _ in range(4):
            for _ in range(3):
                engine.backward(engine(torch.randn(5, 8, dtype=torch.bfloat16)).float().square().sum(), 15.0)
            assert engine.step().applied
        found.append(torch.cat(engine.master_weights()))
    assert torch.equal(*found)
    return 0


def test_gradients_that_are_summed_as_they_come_give_the_same_bits(tmp_path: Path) -> None:
    ranks = forked.start(summed_at_once_and_later, (str(tmp_path),), 1, tmp_path / "output.txt")
    assert ranks.finish() == [0], (tmp_path / "output.txt").read_text()


class Hostile:
    """What a stranger may put into a pickle: loading it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def hostile_states(stage: int, folder: str) -> int:
    """Every file of a state in turn holds an object that runs a function when it is loaded."""
    import torch

    from common.runtime.distributed import init_world
    from tests.programs import engines

    world = init_world()
    engine = engines.engine_of(engines.tiny_actor(), stage, world)
    state, made = Path(folder) / "state", Path(folder) / "made"
    engine.save(state, Snapshot(state, None).open)
    assert engine.load(state) is None
    files = sorted((state / "zero").glob("*.pt"))
    assert len(files) >= 2
    for file in files:
        content = file.read_bytes()
        torch.distributed.barrier()
        if world.is_rank0:
            stored = torch.load(file, weights_only=False)
            torch.save({**stored, "beside": Hostile(made)}, file)
        torch.distributed.barrier()
        with pytest.raises(UserError, match=rf"{file.name} holds more than .*mkdir.*nothing of it was run"):
            engine.load(state)
        assert not made.exists()
        torch.distributed.barrier()
        if world.is_rank0:
            file.write_bytes(content)
        torch.distributed.barrier()
        assert engine.load(state) is None
    return 0


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 2), (3, 2)])
def test_a_state_that_would_run_code_is_refused_by_every_rank_and_runs_nothing(
    tmp_path: Path, stage: int, ranks: int
) -> None:
    (tmp_path / "state").mkdir()
    runs(hostile_states, ranks, tmp_path, stage, str(tmp_path))


def several_engines() -> int:
    """An actor and a critic of each ZeRO stage and dtype."""
    from common.config import Dtype
    from common.runtime.distributed import init_world
    from tests.programs import engines

    world = init_world()
    for dtype, stage in itertools.product((Dtype.fp32, Dtype.bf16), (1, 2, 3)):
        actor = engines.engine_of(engines.tiny_actor(dtype), stage, world, dtype)
        critic = engines.engine_of(engines.tiny_critic(dtype), stage, world, dtype)
        begin = engines.weights_of(actor, world)
        engines.alone(actor, engines.actor_losses, world)
        engines.alone(critic, engines.critic_losses, world)
        expected = [engines.weights_of(engine, world) for engine in (actor, critic)]
        assert len(engines.differing(begin, expected[0])) == len(begin), "nothing was learned"

        actor = engines.engine_of(engines.tiny_actor(dtype), stage, world, dtype)
        critic = engines.engine_of(engines.tiny_critic(dtype), stage, world, dtype)
        engines.beside(actor, critic, world)
        for engine, weights in zip((actor, critic), expected, strict=True):
            assert engines.differing(engines.weights_of(engine, world), weights) == [], (dtype, stage)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_engines_beside_each_other_learn_the_bits_that_each_learns_alone(tmp_path: Path, ranks: int) -> None:
    """Although the one's passes lie between the other's forward and backward, and all weights are made whole
    and partitioned again between the steps."""
    runs(several_engines, ranks, tmp_path)


def several_losses_per_step() -> int:
    """Policy loss and SFT loss of several micro-batches, then one step; beside plain torch."""
    import torch

    from common.runtime.distributed import init_world
    from tests.programs import engines

    world = init_world()
    for make, losses in (
        (engines.tiny_actor, engines.actor_losses),
        (engines.tiny_critic, engines.critic_losses),
    ):
        plain = make()
        begin = {name: value.clone() for name, value in plain.state_dict().items()}
        engines.plainly(plain, losses, world.size)
        expected = plain.state_dict()
        for stage in (1, 2, 3):
            engine = engines.engine_of(make(), stage, world, optimizer=engines.sgd)
            engines.alone(engine, losses, world)
            found = engines.weights_of(engine, world)
            error = sum(float(((found[name] - expected[name]) ** 2).sum()) for name in found)
            moved = sum(float(((begin[name] - expected[name]) ** 2).sum()) for name in found)
            assert error**0.5 < 1e-5 * moved**0.5, (losses, stage, error, moved)
            assert not torch.equal(found["model.model.norm.weight"], begin["model.model.norm.weight"])
    return 0


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_losses_of_several_backward_passes_add_up_as_in_plain_torch(tmp_path: Path, ranks: int) -> None:
    runs(several_losses_per_step, ranks, tmp_path)


def whole_weights() -> int:
    """What a phase with whole weights is like on ZeRO-3, in its variants."""
    import torch
    import torch.distributed as dist

    from common.config import Offload
    from common.runtime.distributed import init_world
    from tests.programs import engines

    world = init_world()
    inputs = engines.document(5)
    for variant in ({}, {"offload_param": Offload.cpu}, {"hpz_partition_size": world.size}):
        engine = engines.engine_of(engines.tiny_actor(), 3, world, **variant)
        engines.alone(engine, engines.actor_losses, world, steps=2)
        # from the second pass on DeepSpeed fetches ahead; what a backward pass would need then stays
        engine.backward(next(engines.actor_losses(engine, world.rank, 2)), 10.0)
        with torch.no_grad():
            expected = engines.of_actor(engine, inputs).token_losses
        calls = engines.count_collectives(dist)
        with torch.no_grad(), engine.gathered():
            made = calls()
            assert all(p.numel() == p.ds_numel for p in engine.module.parameters())
            for run in (engine.module, engine):
                assert torch.equal(engines.of_actor(run, inputs).token_losses, expected), variant
            engine.module.model.model.layers[1].mlp(torch.ones(1, 1, 32))  # a part alone
            assert calls() == made
        partitioned = [p for p in engine.module.parameters() if p.numel() != p.ds_numel]
        assert len(partitioned) == len(list(engine.module.parameters())), "they stay whole"
        with torch.no_grad():
            assert torch.equal(engines.of_actor(engine, inputs).token_losses, expected), variant
        assert world.size == 1 or calls() > made, "collectives are not counted"
    return 0


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_with_whole_weights_passes_cost_no_collective_and_give_the_same_numbers(
    tmp_path: Path, ranks: int
) -> None:
    runs(whole_weights, ranks, tmp_path)


def an_error_inside() -> int:
    import torch

    from common.runtime.distributed import init_world
    from tests.programs import engines

    world = init_world()
    engine = engines.engine_of(engines.tiny_actor(), 3, world)
    with contextlib.suppress(KeyError), engine.gathered():
        raise KeyError
    other = engines.engine_of(engines.tiny_actor(), 3, world)
    for each in (engine, other):
        engines.alone(each, engines.actor_losses, world, steps=2)
    assert engines.differing(engines.weights_of(engine, world), engines.weights_of(other, world)) == []
    assert torch.is_grad_enabled()
    return 0


def test_an_error_within_a_phase_of_whole_weights_leaves_the_engine_usable(tmp_path: Path) -> None:
    runs(an_error_inside, 1, tmp_path)


def reference_in_between() -> int:
    """LoRA: between its steps the actor answers without its adapter."""
    import peft
    import torch

    from common.config import Dtype
    from common.model.adapters import adapters_off
    from common.model.packed import PackedCausalLM
    from common.runtime.distributed import init_world
    from tests.programs import engines

    def with_adapter() -> PackedCausalLM:
        torch.manual_seed(3)
        base = engines.tiny_actor(Dtype.bf16).model
        settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return packed_lm(peft.get_peft_model(base, settings, autocast_adapter_dtype=False))

    world = init_world()
    inputs = engines.document(1, 2)
    with torch.no_grad():
        base_says = engines.of_actor(engines.tiny_actor(Dtype.bf16), inputs).token_losses
    for stage in (1, 2, 3):
        plain, asked = (engines.engine_of(with_adapter(), stage, world, Dtype.bf16) for _ in range(2))
        engines.alone(plain, engines.actor_losses, world)
        for step in range(engines.STEPS):
            asked.train()
            for loss in engines.actor_losses(asked, world.rank, step):
                with torch.no_grad(), adapters_off(asked.module):
                    assert torch.equal(engines.of_actor(asked, inputs).token_losses, base_says), stage
                del loss
            for loss in engines.actor_losses(asked, world.rank, step):
                asked.backward(loss, 10.0)
            assert asked.step().applied
            with torch.no_grad():
                assert not torch.equal(engines.of_actor(asked, inputs).token_losses, base_says), stage
        weights = [engines.weights_of(engine, world) for engine in (plain, asked)]
        assert engines.differing(*weights) == [], stage
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_actor_that_is_asked_without_its_adapter_learns_the_same_bits(tmp_path: Path, ranks: int) -> None:
    runs(reference_in_between, ranks, tmp_path)


def a_forgotten_optimizer() -> int:
    """One step, then without the optimizer: nothing holds its state, and the weights are the same."""
    import gc
    import itertools
    import weakref

    import torch

    from common.config import Dtype
    from common.runtime.distributed import init_world
    from tests.programs import engines

    world = init_world()
    for stage, dtype in itertools.product((1, 2, 3), (Dtype.fp32, Dtype.bf16)):
        engine = engines.engine_of(engines.tiny_actor(dtype), stage, world, dtype)
        engines.alone(engine, engines.actor_losses, world, steps=1)
        states = engine._engine.optimizer.optimizer.state.values()
        held = [
            weakref.ref(tensor.untyped_storage())
            for state in states
            for tensor in state.values()
            if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
        ]
        assert held and all(storage() is not None for storage in held)
        before = engines.weights_of(engine, world)
        del states
        engine.forget_optimizer()
        gc.collect()
        assert [storage() for storage in held if storage() is not None] == [], (stage, dtype)
        assert engines.differing(before, engines.weights_of(engine, world)) == []
    return 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_forgotten_optimizer_leaves_nothing_of_its_state_and_all_weights(
    tmp_path: Path, ranks: int
) -> None:
    runs(a_forgotten_optimizer, ranks, tmp_path)


def runs(program: Callable[..., int], ranks: int, folder: Path, *arguments: Any) -> None:
    """The program ends well on every rank."""
    codes = forked.start(program, arguments, ranks, folder / "output.txt").finish()
    assert codes == [0] * ranks, (folder / "output.txt").read_text()[-4000:]

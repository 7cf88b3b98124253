"""The running average of an engine's weights, beside a plain loop over whole weights."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.common.training.test_engine import runs

DECAY = 0.8


def beside_a_plain_loop(folder: str) -> int:
    """All ZeRO stages, in fp32 and bf16: values, swapping, going on, resuming."""
    import torch

    from common.config import Dtype
    from common.runtime.distributed import init_world
    from common.training.ema import ExponentialMovingAverage
    from common.training.snapshot import Snapshot
    from tests.programs import engines

    world = init_world()
    inputs = engines.document(5)
    for dtype, stage in itertools.product((Dtype.fp32, Dtype.bf16), (1, 2, 3)):
        where = (dtype, stage)
        engine = engines.engine_of(engines.tiny_actor(dtype), stage, world, dtype)
        average = ExponentialMovingAverage(engine, DECAY)
        expected = {name: value.float() for name, value in engines.weights_of(engine, world).items()}
        for step in range(4):
            engine.train()
            for loss in engines.actor_losses(engine, world.rank, step):
                engine.backward(loss, 10.0)
            engine.step()
            average.update()
            now = engines.weights_of(engine, world)
            for name, value in expected.items():
                expected[name] = DECAY * value + (1 - DECAY) * now[name].float()
            if step == 1:
                at = Path(folder) / f"{dtype.value}-{stage}"
                at.mkdir(exist_ok=True)
                average.save(at, Snapshot(at, None).open)
                saved = [value.clone() for value in average._averages]
        live = engines.weights_of(engine, world)
        with torch.no_grad():
            before = engines.of_actor(engine, inputs).token_losses
            with average.swapped_in():
                shown = engines.weights_of(engine, world)
                averaged = engines.of_actor(engine, inputs).token_losses
                with engine.gathered():
                    assert torch.equal(engines.of_actor(engine.module, inputs).token_losses, averaged), where
            assert not torch.equal(before, averaged), where
            assert torch.equal(engines.of_actor(engine, inputs).token_losses, before), where
        for name, value in expected.items():
            # in bf16 the plain loop averages weights that are rounded, and the shown average is rounded, too
            tolerance = 1e-6 if dtype is Dtype.fp32 else 2**-7 * float(value.abs().max())
            torch.testing.assert_close(shown[name].float(), value, atol=tolerance, rtol=0, msg=name)
        assert len(engines.differing(shown, live)) == len(live), where
        assert engines.differing(engines.weights_of(engine, world), live) == [], where
        masters = [weights.clone() for weights in engine.master_weights()]
        with average.swapped_in():
            assert not torch.equal(engine.master_weights()[0], masters[0])
        assert all(map(torch.equal, masters, engine.master_weights())), where

        assert not any(map(torch.equal, saved, average._averages))
        average.load(at)
        assert all(map(torch.equal, saved, average._averages)), where
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_average_is_that_of_a_plain_loop_and_leaves_the_weights_as_they_were(
    tmp_path: Path, ranks: int
) -> None:
    (tmp_path / "saved").mkdir()
    runs(beside_a_plain_loop, ranks, tmp_path, str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved" / "fp32-1").iterdir()}
    assert names == {"layout.json", *(f"rank_{rank}.safetensors" for rank in range(ranks))}


def training_goes_on() -> int:
    """Steps after an average was shown, beside an engine that never had one."""
    from common.config import Dtype
    from common.runtime.distributed import init_world
    from common.training.ema import ExponentialMovingAverage
    from tests.programs import engines

    world = init_world()
    for dtype, stage in itertools.product((Dtype.fp32, Dtype.bf16), (1, 2, 3)):
        plain, averaged = (
            engines.engine_of(engines.tiny_actor(dtype), stage, world, dtype) for _ in range(2)
        )
        average = ExponentialMovingAverage(averaged, DECAY)
        for _ in range(2):
            engines.alone(plain, engines.actor_losses, world, steps=2)
            engines.alone(averaged, engines.actor_losses, world, steps=2)
            average.update()
            with average.swapped_in():
                engines.weights_of(averaged, world)
        left, right = (engines.weights_of(engine, world) for engine in (plain, averaged))
        assert engines.differing(left, right) == [], (dtype, stage)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_training_goes_on_as_if_the_average_had_never_been_shown(tmp_path: Path, ranks: int) -> None:
    runs(training_goes_on, ranks, tmp_path)


def small_updates() -> int:
    """bf16, with updates far below its rounding."""
    from functools import partial

    import torch

    from common.config import Dtype
    from common.runtime.distributed import init_world
    from common.training.ema import ExponentialMovingAverage
    from tests.programs import engines

    world = init_world()
    adamw = partial(torch.optim.AdamW, lr=1e-6, fused=True)
    engine = engines.engine_of(engines.tiny_actor(Dtype.bf16), 2, world, Dtype.bf16, adamw)
    begin = engine.master_weights()[0].clone()
    average = ExponentialMovingAverage(engine, 0.5)
    engines.alone(engine, engines.actor_losses, world, steps=1)
    average.update()
    moved = average._averages[0] != begin
    assert moved.float().mean() > 0.9, float(moved.float().mean())
    # weights of about 0.02 do not move by 1e-6 in bf16
    weights = torch.cat([p.detach().float().flatten() for p in engine.module.parameters()])
    fresh = torch.cat([p.detach().float().flatten() for p in engines.tiny_actor(Dtype.bf16).parameters()])
    assert (weights != fresh).float().mean() < 0.5
    return 0


def test_updates_below_the_rounding_of_bf16_are_averaged(tmp_path: Path) -> None:
    runs(small_updates, 1, tmp_path)

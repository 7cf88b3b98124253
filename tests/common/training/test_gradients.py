"""Gradients of a lone rank that lie end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import forked


def no_copy_is_made() -> int:
    """Engines with and without flat gradients, three steps of some passes: the same bits, no copy."""
    import torch

    from common.config import Dtype, Offload
    from common.runtime.distributed import init_world
    from common.training import engine as engine_module
    from tests.programs import engines

    world = init_world()
    holds = engine_module.lie_end_to_end

    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("gradients were copied into a flat tensor")

    sides = ((engines.tiny_actor, engines.actor_losses), (engines.tiny_critic, engines.critic_losses))
    for module, losses in sides:
        learned = []
        for flat in (True, False):
            engine_module.lie_end_to_end = holds if flat else lambda zero: False
            network: torch.nn.Module = module()
            # one that DeepSpeed reduces through a buffer, as a small one, and one that no pass reaches
            network.register_parameter("small", torch.nn.Parameter(torch.ones(2)))
            network.register_parameter("unused", torch.nn.Parameter(torch.ones(5)))
            engine = engines.engine_of(network, 1, world)
            assert (engine._flat_gradients is not None) is (flat and world.size == 1)
            if engine._flat_gradients is not None:
                engine._engine.optimizer.flatten_dense_tensors_aligned = refuse
            begin, norms = engines.weights_of(engine, world), []
            for step in range(3):
                for loss in losses(engine, world.rank, step):
                    engine.backward(loss + (network.small * loss.detach()).sum(), 10.0)
                outcome = engine.step()
                norms.append(outcome.grad_norm)
            learned.append((engines.weights_of(engine, world), norms))
            assert len(engines.differing(begin, learned[-1][0])) == len(begin), "nothing was learned"
        assert engines.differing(learned[0][0], learned[1][0]) == [] and learned[0][1] == learned[1][1]
    engine_module.lie_end_to_end = holds
    for stage, dtype, offload in (
        (2, Dtype.fp32, Offload.none),
        (2, Dtype.fp32, Offload.cpu),
        (1, Dtype.bf16, Offload.none),
    ):
        actor = engines.tiny_actor(dtype)
        engine = engines.engine_of(actor, stage, world, dtype, offload_optimizer=offload)
        assert engine._flat_gradients is None, (stage, dtype, offload)
    return 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_of_a_lone_rank_are_never_copied_and_teach_the_same_bits(
    tmp_path: Path, ranks: int
) -> None:
    started = forked.start(no_copy_is_made, (), ranks, tmp_path / "output.txt")
    codes, printed = started.finish(), (tmp_path / "output.txt").read_text()
    assert codes == [0] * ranks, printed

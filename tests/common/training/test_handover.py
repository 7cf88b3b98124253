"""Live weights, one after the other, as they are handed to an engine that samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import forked


def handed_over(stage: int) -> int:
    """The weights of a network that has learned, twice, with an update between."""
    import torch

    from common.runtime.distributed import init_world
    from common.training.handover import whole_weights
    from tests.programs import engines

    world = init_world()
    engine = engines.engine_of(engines.tiny_actor(), stage, world)
    seen = []
    for _ in range(2):
        engines.alone(engine, engines.actor_losses, world, steps=2)
        found = {f"model.{name}": weight for name, weight in whole_weights(engine, engine.module.model)}
        expected = {
            name: weight for name, weight in engines.weights_of(engine, world).items() if name in found
        }
        assert engines.differing(found, expected) == []
        assert len(found) == len(list(engine.module.parameters())) and all(w.numel() for w in found.values())
        seen.append(next(iter(found.values())).clone())
    assert not torch.equal(*seen)
    return 0


def of_adapters() -> int:
    from common.config import LoraConfig
    from common.model.adapters import add_adapters
    from common.training.handover import whole_weights
    from tests.common.model.test_attention import CONFIGS, tiny

    class Whole:
        zero_stage = 1

        def gathered(self, only: object) -> object:
            from contextlib import nullcontext

            return nullcontext()

    model = add_adapters(tiny(CONFIGS["llama"]), LoraConfig(enabled=True, r=2), "CAUSAL_LM")
    names = [name for name, _ in whole_weights(Whole(), model)]  # type: ignore[arg-type]
    assert names and all(".lora_" in name for name in names)
    return 0


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 2), (3, 2)])
def test_every_weight_is_handed_over_whole_and_as_it_is_now(stage: int, ranks: int, tmp_path: Path) -> None:
    forked.run(handed_over, (stage,), ranks, tmp_path / "output.txt")


def test_of_an_adapted_model_the_adapters_alone_are() -> None:
    assert of_adapters() == 0

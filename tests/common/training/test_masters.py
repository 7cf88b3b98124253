"""fp32 weights that are their own master weights."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests import forked


def one_memory_for_both() -> int:
    """Engines of stages 1 and 2 with and without shared masters, AdamW and clipping, three steps."""
    import torch

    from common.config import Dtype, Offload
    from common.runtime.distributed import init_world
    from common.training import engine as engine_module
    from tests.programs import engines

    world = init_world()
    share = engine_module.share_masters

    def storages(engine: engine_module.Engine) -> tuple[set[int], set[int]]:
        weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
        return weights, {master.untyped_storage().data_ptr() for master in engine.master_weights()}

    for stage, offload in itertools.product((1, 2), (Offload.none, Offload.cpu)):
        learned = []
        for shared in (True, False):
            engine_module.share_masters = share if shared else lambda zero: None
            engine = engines.engine_of(engines.tiny_actor(), stage, world, offload_optimizer=offload)
            weights, masters = storages(engine)
            assert (masters <= weights) is (shared and offload is Offload.none), (stage, offload, shared)
            for parameter in engine.module.parameters():
                mapping = parameter._hp_mapping
                assert mapping is None or mapping.hp_fragment.untyped_storage().data_ptr() in masters
            begin = engines.weights_of(engine, world)
            engines.alone(engine, engines.actor_losses, world, steps=3)
            learned.append(engines.weights_of(engine, world))
            assert len(engines.differing(begin, learned[-1])) == len(begin), "nothing was learned"
            assert not shared or storages(engine) == (weights, masters), "a step moved them apart"
        assert engines.differing(*learned) == [], (stage, offload)
    half = engines.engine_of(engines.tiny_actor(Dtype.bf16), 2, world, Dtype.bf16)
    weights, masters = storages(half)
    assert not masters & weights and half.master_weights()[0].dtype is torch.float32
    return 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp32_weights_are_their_own_masters_and_learn_the_same_bits(tmp_path: Path, ranks: int) -> None:
    started = forked.start(one_memory_for_both, (), ranks, tmp_path / "output.txt")
    codes, printed = started.finish(), (tmp_path / "output.txt").read_text()
    assert codes == [0] * ranks, printed

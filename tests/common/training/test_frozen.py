"""Models that are only asked, beside the plain module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import DeepSpeedConfig, Dtype
from common.runtime.distributed import World
from common.training.frozen import Frozen
from tests.common.training.test_engine import runs

WORLD = World(0, 1, 0, torch.device("cpu"))


def frozen(module: torch.nn.Module, *, offload: bool) -> Frozen:
    return Frozen(module, DeepSpeedConfig(stage=2), dtype=Dtype.fp32, world=WORLD, offload=offload)


def every_stage() -> int:
    from common.runtime.distributed import init_world
    from tests.programs import engines

    world = init_world()
    for dtype in (Dtype.fp32, Dtype.bf16):
        plain: Any = engines.tiny_actor(dtype).eval(), engines.tiny_critic(dtype).eval()
        inputs = [engines.document(world.rank, number) for number in range(3)]
        with torch.no_grad():
            expected = [engines.of_actor(plain[0], each).token_losses for each in inputs]
            values = [engines.of_critic(plain[1], each) for each in inputs]
        trained = engines.engine_of(engines.tiny_actor(dtype), 3, world, dtype)
        for stage, offload in ((1, False), (2, False), (2, True), (3, False), (3, True)):
            settings = DeepSpeedConfig(stage=stage)
            both = [
                Frozen(module, settings, dtype=dtype, world=world, offload=offload)
                for module in (engines.tiny_actor(dtype), engines.tiny_critic(dtype))
            ]
            for each, losses, value in zip(inputs, expected, values, strict=True):
                with both[0].present():
                    found = engines.of_actor(both[0], each, per_token=True).token_losses
                    assert torch.equal(found, losses), (dtype, stage)
                    assert not found.requires_grad
                with both[1].present(), both[0].present():
                    assert torch.equal(engines.of_critic(both[1], each), value), (dtype, stage)
                engines.of_actor(trained, each)  # passes of an engine in between
            if stage == 3:
                parameters = list(both[0].module.parameters())
                shared = [p for p in parameters if p.ds_tensor.numel() < p.ds_numel]  # type: ignore[attr-defined]
                assert world.size == 1 or len(shared) == len(parameters), "they are not partitioned"
    return 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_frozen_model_says_what_the_plain_module_says_on_every_zero_stage(
    tmp_path: Path, ranks: int
) -> None:
    runs(every_stage, ranks, tmp_path)


def test_nothing_in_it_is_random_or_trained() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    model = frozen(module.train(), offload=False)
    inputs = torch.ones(2, 4, requires_grad=True)
    assert torch.equal(model(inputs), model(inputs)) and not model(inputs).requires_grad
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_an_offloaded_model_is_asked_only_while_it_is_present() -> None:
    module = torch.nn.Linear(3, 3)
    expected = module(torch.ones(3)).detach()
    model = frozen(module, offload=True)
    with pytest.raises(ValueError, match="present"):
        model(torch.ones(3))
    with model.present():
        assert torch.equal(model(torch.ones(3)), expected)
    with pytest.raises(ValueError, match="present"):
        model(torch.ones(3))


def test_an_offloaded_models_weights_travel_to_the_device_and_their_copy_is_dropped() -> None:
    module = torch.nn.Linear(3, 3)
    model = frozen(module, offload=True)
    host = module.weight.data_ptr()
    with model.present():
        copy = module.weight.data_ptr()
        assert copy != host
        with model.present():  # one that is there does not travel again
            assert module.weight.data_ptr() == copy
        assert module.weight.data_ptr() == copy, "the inner block took it away"
    assert module.weight.data_ptr() == host


def test_weights_that_are_tied_are_still_tied_on_the_device() -> None:
    module = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)}
    )
    module["head"].weight = module["embed"].weight
    model = frozen(module, offload=True)
    with model.present():
        assert module["head"].weight is module["embed"].weight
        assert module["head"].weight.data_ptr() == module["embed"].weight.data_ptr()


def test_an_error_while_it_is_present_puts_it_away() -> None:
    module = torch.nn.Linear(3, 3)
    model = frozen(module, offload=True)
    host = module.weight.data_ptr()
    with pytest.raises(KeyError), model.present():
        raise KeyError
    assert module.weight.data_ptr() == host


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_an_offloaded_model_takes_no_memory_outside_of_its_phases() -> None:
    device = torch.device("cuda", 0)
    module = torch.nn.Linear(1024, 1024).to(device)
    expected = module(torch.ones(1024, device=device)).detach()
    world = World(0, 1, 0, device)
    model = Frozen(module, DeepSpeedConfig(stage=2), dtype=Dtype.fp32, world=world, offload=True)
    assert module.weight.is_pinned()
    without = torch.cuda.memory_allocated()
    with model.present():
        assert module.weight.is_cuda and torch.cuda.memory_allocated() >= without + 4 * 1024**2
        assert torch.equal(model(torch.ones(1024, device=device)), expected)
    assert torch.cuda.memory_allocated() == without

"""8-bit moments as plain numbers, worked by hand, and back by bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from common.training.eight_bit import BLOCK, WRAPPED, decoded, encoded


def test_a_moment_is_its_place_in_the_map_times_the_largest_of_its_block() -> None:
    codes = torch.zeros(BLOCK + 2, dtype=torch.uint8)
    codes[0], codes[-1] = 2, 1
    quantized = {"state1": codes, "qmap1": torch.tensor([0.0, 0.5, 1.0]), "absmax1": torch.tensor([3.0, 8.0])}
    found = decoded({"step": 5, WRAPPED: quantized})
    assert set(found) == {"step", "state1"} and found["step"] == 5
    assert found["state1"].dtype is torch.float32 and found["state1"].shape == codes.shape
    assert found["state1"].nonzero().flatten().tolist() == [0, BLOCK + 1]
    assert (found["state1"][0], found["state1"][-1]) == (3.0, 4.0)


def test_moments_in_fp32_and_those_of_other_optimizers_stay_as_they_are() -> None:
    moment = torch.arange(3.0)
    assert decoded({"step": 1, WRAPPED: {"state1": moment}}) == {"step": 1, "state1": moment}
    assert decoded({"exp_avg": moment}) == {"exp_avg": moment}
    assert encoded({"exp_avg": moment}, torch.optim.SGD([torch.zeros(1)])) == {"exp_avg": moment}


def test_what_is_decoded_and_encoded_steps_as_if_nothing_had_happened() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    start, gradients = torch.randn(4096 + 300), torch.randn(4, 4096 + 300)

    def made(weights: torch.Tensor) -> tuple[torch.Tensor, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(weights.clone())
        return parameter, bitsandbytes.optim.AdamW8bit([parameter], lr=0.1)

    def learn(parameter: torch.Tensor, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            parameter.grad = gradients[step].clone()
            optimizer.step()

    whole, optimizer = made(start)
    learn(whole, optimizer, range(3))
    stored = optimizer.state_dict()
    other, again = made(whole.detach())
    state = encoded(decoded(stored["state"][0]), again)
    assert state["state1"].dtype is torch.uint8 and state["step"] == 3
    again.load_state_dict({**stored, "state": {0: state}})
    for key in ("state1", "absmax1", "state2", "absmax2"):
        torch.testing.assert_close(again.state[other][key], optimizer.state[whole][key], rtol=1e-6, atol=0)
    learn(whole, optimizer, range(3, 4))
    learn(other, again, range(3, 4))
    torch.testing.assert_close(other, whole, rtol=0, atol=1e-6)


def test_a_small_tensor_is_not_quantized() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    optimizer = bitsandbytes.optim.AdamW8bit([torch.nn.Parameter(torch.zeros(300))])
    moments = {"step": 2, "state1": torch.ones(300), "state2": torch.ones(300)}
    assert encoded(moments, optimizer) == moments

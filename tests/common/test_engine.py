"""What only the engine knows of DeepSpeed; its numerics are in tests/numerics and tests/recipes."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from tests import forked


def one_step(folder: str) -> int:
    """An engine of its own in a fresh process: what it imports, its outcomes, its state on disk."""
    import torch

    from common.config import DeepSpeedConfig, Dtype
    from common.distributed import init_world
    from common.ds_config import build_ds_config
    from common.engine import Engine

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

    engine.save(Path(folder))
    assert sorted(path.name for path in Path(folder).iterdir()) == ["zero"]
    engine.backward(engine(torch.tensor([[math.nan, 0.0, 0.0]])).sum(), 1.0)
    outcome = engine.step()
    assert not outcome.applied and math.isnan(outcome.grad_norm)
    torch.testing.assert_close(module.weight, torch.tensor([[0.7, 1.0, 0.6]]))
    engine.backward(engine(torch.tensor([[3.0, 0.0, 4.0]])).sum(), 1.0)
    assert engine.step().applied and module.weight[0, 0].item() < 0.5
    engine.load(Path(folder))
    torch.testing.assert_close(module.weight, torch.tensor([[0.7, 1.0, 0.6]]))
    return 0


def test_an_engine_steps_clips_skips_saves_and_loads(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    ranks = forked.start(one_step, (str(tmp_path / "state"),), 1, tmp_path / "output.txt")
    codes, printed = ranks.finish(), (tmp_path / "output.txt").read_text()
    assert codes == [0], printed
    assert printed == "", "DeepSpeed talks on the terminal"

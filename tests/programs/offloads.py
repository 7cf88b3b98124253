"""Ranks that try what DeepSpeed has to keep optimizer states elsewhere, or in bf16, beside AdamW as it is
offered; rank 0 writes what came of it.

Two operators that DeepSpeed compiles have stand-ins: libaio's, which reads and writes at once here, and the
Adam of SuperOffload's second process, which is torch's in this one. All else is DeepSpeed's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from common.config import DeepSpeedConfig, Dtype, Offload
from common.model import attention
from common.model.loading import torch_dtype
from common.runtime.distributed import World, barrier, init_world
from common.training.ds_config import build_ds_config
from common.training.engine import Engine
from common.training.optim import parameter_groups
from common.training.snapshot import Snapshot
from tests.packed import packed_lm
from tests.programs import engines

BEFORE, AFTER, SHARES = 2, 2, 4
SMALL_STEP = 1e-5
"""A usual learning rate."""
UNCLIPPED = {"gradient_clipping": 0.0}
ONE_PASS = {"managed_gradient_accumulation": True}
"""DeepSpeed decides when a step ends: here after each pass."""


def nvme_writes(folder: str) -> int:
    """Trains beside host memory, saves, and goes on."""
    world, where = init_world(), Path(folder)
    _without_libaio()
    in_memory = _engine(world, 3, offload=Offload.cpu)
    _learn(in_memory, world, range(BEFORE + AFTER))
    engine = _engine(world, 3, _on_disk(where / "swapped"))
    _learn(engine, world, range(BEFORE))
    then, snapshot = engines.weights_of(engine, world), _save(engine, where / "state")
    _learn(engine, world, range(BEFORE, BEFORE + AFTER))
    later = engines.weights_of(engine, world)
    present = {p.relative_to(where / "state").as_posix() for p in (where / "state").rglob("*") if p.is_file()}
    barrier()
    if world.is_rank0:
        torch.save((then, later), where / "then.pt")
    differing = engines.differing(later, engines.weights_of(in_memory, world))
    swapped = engine._engine.optimizer.fp16_partitioned_groups_flat_numel
    return _tell(world, where, {
        "differing from host memory": differing, "numbers of each group": swapped,
        "not hashed": sorted(name for name in present if "offloaded" in name and name not in snapshot),
    })  # fmt: skip


def nvme_reads(folder: str) -> int:
    """Other processes go on from what was saved; their new model has other weights."""
    world, where = init_world(), Path(folder)
    _without_libaio()
    _engine(world, 3, offload=Offload.cpu)  # DeepSpeed names the files by how many parameters came before
    engine = _engine(world, 3, _on_disk(where / "swapped again"), noise=0.5)
    engine.load(where / "state")
    then, later = torch.load(where / "then.pt")
    states = [len(state) for state in engine._engine.optimizer.optimizer.state.values()]
    wrong = engines.differing(engines.weights_of(engine, world), then)
    _learn(engine, world, range(BEFORE, BEFORE + AFTER))
    apart = _apart(engines.weights_of(engine, world), later)
    return _tell(world, where, {"optimizer states": states, "weights not loaded": wrong, "apart": apart})


def zenflow(folder: str) -> int:
    """Every second step updates what is not among the largest tenth."""
    world, where = init_world(), Path(folder)
    settings = {"topk_ratio": 0.1, "update_interval": 2, "select_strategy": "step", "select_interval": 4}
    zero = {"zenflow": {**settings, "overlap_step": False}}
    more = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}}
    found: dict[str, Any] = {}
    for name, optimizer in (("torch's AdamW", torch.optim.AdamW), ("with the step's number", _Numbered)):
        engine = _engine(world, 2, zero, offload=Offload.cpu, more=more, optimizer=optimizer)
        found[name] = _outcome(engine, world)
    plain = _engine(world, 2, offload=Offload.cpu, more=ONE_PASS)
    engine = _engine(world, 2, zero, offload=Offload.cpu, more={**more, **ONE_PASS}, optimizer=_Numbered)
    given, got = [engines.weights_of(one, world) for one in (plain, engine)]
    turned = {name: v.t().reshape(v.shape) if v.dim() == 2 else v for name, v in given.items()}
    found["before any step"] = {
        "others": _moved(got, given),
        "wrongly turned": not engines.differing(got, turned),
    }
    _learn_by_pass(engine, world, range(4))
    _save(engine, where / "state")
    again = _engine(world, 2, zero, offload=Offload.cpu, more={**more, **ONE_PASS}, optimizer=_Numbered)
    again.load(where / "state")
    states = [one._engine.optimizer.selective_optimizer.state for one in (engine, again)]
    return _tell(world, where, {**found, "states of the tenth": [len(state) for state in states]})


def superoffload(folder: str) -> int:
    """As it is, then without its question after CUDA; steps are ended by us, then by DeepSpeed."""
    import deepspeed.runtime.superoffload.superoffload_stage3 as stage3
    from deepspeed.accelerator import get_accelerator

    world, where = init_world(), Path(folder)
    zero = {"offload_optimizer": {"device": "cpu", "super_offload": True}}
    found: dict[str, Any] = {}
    try:
        _engine(world, 3, zero)
    except AssertionError as error:
        found["on the CPU"] = str(error)
    stage3._validate_superoffload_accelerator = lambda: None
    stage3.SuperOffloadCPUOptimizer = _Second
    type(get_accelerator()).current_stream = lambda *_: SimpleNamespace(synchronize=lambda: None)
    engine = _engine(world, 3, zero, more=UNCLIPPED)
    start = engines.weights_of(engine, world)
    norms = _learn(engine, world, range(BEFORE))
    found |= {"norms": norms, "moved": len(engines.differing(engines.weights_of(engine, world), start))}
    plain = _engine(world, 3, offload=Offload.cpu, more={**UNCLIPPED, **ONE_PASS})
    engine = _engine(world, 3, zero, more={**UNCLIPPED, **ONE_PASS})
    for one in (plain, engine):
        _learn_by_pass(one, world, range(3))
    found["apart by pass"] = _apart(*[engines.weights_of(one, world) for one in (plain, engine)])
    _save(engine, where / "state")
    path = where / "state" / "zero" / f"zero_pp_rank_{world.rank}_mp_rank_00_optim_states.pt"
    saved = torch.load(path, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]["state"]
    held = engine._engine.optimizer.superoffload_cpu_optimizer.optimizers
    return _tell(world, where, {**found, "states held": len(held), "states saved": len(saved)})


def bf16_states(folder: str) -> int:
    """The share of master weights that eight small steps move, with fp32 masters and with bf16 states."""
    world, where = init_world(), Path(folder)
    states = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    found: dict[str, Any] = {}
    for name in ("fp32", "bf16"):
        more = states if name == "bf16" else None
        engine = _engine(world, 2, dtype=Dtype.bf16, more=more, lr=SMALL_STEP)
        start = torch.cat([master.flatten().clone() for master in engine.master_weights()])
        _learn(engine, world, range(8))
        end = torch.cat([master.flatten() for master in engine.master_weights()])
        found[name] = float((start != end).float().mean())
    return _tell(world, where, found)


def _on_disk(folder: Path) -> dict[str, Any]:
    return {"offload_optimizer": {"device": "nvme", "nvme_path": str(folder), "buffer_count": 5}}


def _engine(
    world: World,
    stage: int,
    zero: dict[str, Any] | None = None,
    *,
    offload: Offload | None = None,
    dtype: Dtype = Dtype.fp32,
    more: dict[str, Any] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    lr: float = 1e-2,
    noise: float = 0.0,
) -> Engine:
    """zero, more: settings of DeepSpeed's over those of a run. DeepSpeed swaps what has a MiB: matrices have
    it on each of two ranks, norms do not. noise: added to the weights, so that only what is loaded can be
    right."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    network: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    module = packed_lm(network.to(torch_dtype(dtype)))
    for parameter in module.parameters():
        parameter.data.add_(noise)
    kept = offload or (Offload.cpu if zero and "super_offload" in str(zero) else Offload.none)
    settings: dict[str, Any] = build_ds_config(
        DeepSpeedConfig(stage=stage, offload_optimizer=kept), dtype=dtype, max_grad_norm=1.0,
        micro_batch_size=1, world_size=world.size, num_parameters=sum(p.numel() for p in module.parameters()),
    )  # fmt: skip
    settings["zero_optimization"] |= zero or {}
    return Engine(module, optimizer(parameter_groups(module, 0.1), lr=lr), {**settings, **(more or {})})


def _learn(engine: Engine, world: World, steps: range) -> list[float]:
    """Steps of several passes each, as a recipe takes them; their norms."""
    engine.train()
    norms = []
    for step in steps:
        for share in range(world.rank, SHARES, world.size):
            for loss in engines.actor_losses(engine, share, step):
                engine.backward(loss, 10.0)
        norms.append(engine.step().grad_norm)
    return norms


def _learn_by_pass(engine: Engine, world: World, steps: range) -> None:
    engine.train()
    for step in steps:
        engine.backward(next(iter(engines.actor_losses(engine, world.rank, step))), 10.0)
        engine.step()


def _outcome(engine: Engine, world: World) -> str:
    try:
        return f"norms {_learn(engine, world, range(BEFORE))}"
    except TypeError as error:
        return f"TypeError: {error}"


def _save(engine: Engine, folder: Path) -> list[str]:
    """The names of the files that were opened by us: those that are hashed and committed."""
    folder.mkdir(exist_ok=True)
    snapshot = Snapshot(folder, None)
    engine.save(folder, snapshot.open)
    barrier()
    return snapshot._names


def _apart(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


def _moved(now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> float:
    """The share of all weights that are others now."""
    return sum(int((now[name] != before[name]).sum()) for name in now) / sum(v.numel() for v in now.values())


def _tell(world: World, folder: Path, found: dict[str, Any]) -> int:
    if world.is_rank0:
        (folder / "found.json").write_text(json.dumps(found))
    barrier()
    return 0


def _without_libaio() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder.load = lambda *_, **__: SimpleNamespace(aio_handle=_Files)


class _Files:
    """libaio's handle, as DeepSpeed's swapper calls it."""

    def __init__(self, **_: Any) -> None:
        self._done = 0
        self._locked: dict[int, torch.Tensor] = {}

    def new_cpu_locked_tensor(self, count: int, like: torch.Tensor) -> torch.Tensor:
        made = torch.empty(count, dtype=like.dtype)
        self._locked[made.untyped_storage().data_ptr()] = made
        return made

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        return self._locked.pop(tensor.untyped_storage().data_ptr(), None) is not None

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._locked

    def async_pwrite(self, tensor: torch.Tensor, path: str, _: int) -> int:
        Path(path).write_bytes(tensor.detach().numpy().tobytes())
        self._done += 1
        return 0

    def async_pread(self, tensor: torch.Tensor, path: str, _: int) -> int:
        tensor.detach().copy_(torch.from_numpy(np.fromfile(path, np.float32, tensor.numel())))
        self._done += 1
        return 0

    def wait(self) -> int:
        done, self._done = self._done, 0
        return done


class _Numbered(torch.optim.AdamW):
    """AdamW that is told the number of the step, as ZenFlow's own is."""

    def step(self, closure: Any = None, step_id: int = 0) -> Any:  # type: ignore[override]
        return super().step(closure)


class _Second:
    """SuperOffload's second process, in this one."""

    def __init__(self, optimizer_config: list[dict[str, Any]], **_: Any) -> None:
        self._config, self._done = optimizer_config, []  # type: ignore[var-annotated]
        self.optimizers: dict[int, torch.optim.Optimizer] = {}

    def async_step(
        self, group: int, number: int, param: torch.Tensor, grad: torch.Tensor, **more: Any
    ) -> None:
        if number not in self.optimizers:
            self.optimizers[number] = torch.optim.AdamW([torch.nn.Parameter(param)], **self._config[group])
        (weights,) = self.optimizers[number].param_groups[0]["params"]
        weights.data, weights.grad = param, grad.clone()
        self.optimizers[number].step()
        self._done.append(
            {
                "param_group_id": group,
                "sub_group_id": number,
                "updated_param": param,
                "event_type": "adam_step",
            }
        )

    def get_result(self, expected_event_type: str | None = None) -> Any:
        return self._done.pop(0) if self._done else None

    def close(self) -> None:
        """There is no process to end."""

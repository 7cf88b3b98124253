"""DeepSpeed's engine behind the calls a recipe makes; with `stored_state.py` all that imports deepspeed.

Takes a module whose forward returns sums over trained tokens, an optimizer and a config dict; owns
the exact scaling of gradients, the outcome of a step, the engine's state on disk and the gathering
of full weights. Does not decide when anything happens.

Several engines live in one process, and one may run passes without gradients, also of a part of its module,
between the passes of another. On ZeRO-3 each is a collective: all ranks run the same ones in the same order.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.errors import UserError
from common.model.tiled_mlp import is_tiled
from common.phases import enter
from common.runtime.distributed import all_gather_objects, make_or_raise
from common.training.eight_bit import encoded
from common.training.gradients import FlatGradients, lie_end_to_end
from common.training.masters import share_masters
from common.training.partitions import fill_partitions, one_by_one
from common.training.reshard import WEIGHTS, Layout, Piece, Shard, reshard
from common.training.snapshot import Open
from common.training.stored_state import held_by, loss_scaler_for, read_state

STATE_TAG = "zero"
"""Name of the folder DeepSpeed writes below a checkpoint."""


@dataclass(frozen=True)
class StepOutcome:
    applied: bool  # False: a gradient was not finite, weights and optimizer state are untouched
    grad_norm: float  # global, before clipping; nan when the step was not applied


class Engine:
    """A module under ZeRO."""

    def __init__(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
    ) -> None:
        self._engine = _initialized(module, optimizer, config)
        self._engine._copy_recovery_script = lambda folder: None  # a checkpoint holds state, not programs
        self._engine.checkpoint_engine.load = read_state
        zero = self._engine.optimizer
        share_masters(zero)
        self._flat_gradients = FlatGradients(zero) if lie_end_to_end(zero) else None
        self._in_step = False
        self._world_size = dist.get_world_size()
        self.zero_stage: int = self._engine.zero_optimization_stage()
        self.layout = Layout(self.zero_stage, tuple(all_gather_objects(self._shards())))
        """How the trained weights and the optimizer's state are divided over the ranks."""
        if (place := getattr(optimizer, "place", None)) is not None:
            own = self.layout.ranks[dist.get_rank()]
            place({master: shard.pieces for master, shard in zip(self._masters(), own, strict=True)})

    @property
    def module(self) -> torch.nn.Module:
        """The module given to `__init__`; its weights may be partitioned."""
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def train(self) -> None:
        """Dropout on, as the model's config says."""
        self._engine.train()

    def eval(self) -> None:
        """Dropout off."""
        self._engine.eval()

    def backward(self, loss_sum: torch.Tensor, denominator: float) -> None:
        """Accumulate the gradient of `loss_sum / denominator`, both taken over all ranks.

        `denominator` is the step's global count of trained tokens, known before the first
        micro-batch. DeepSpeed averages gradients over ranks; the factor world size undoes it.
        """
        if enter("backward"):
            loss_sum = loss_sum * math.nan
        if self._flat_gradients is not None and not self._in_step:
            self._flat_gradients.begin()
        self._in_step = True
        self._engine.backward(loss_sum * (self._world_size / denominator), scale_wrt_gas=False)

    def step(self) -> StepOutcome:
        """Reduce, clip, update. A gradient that is not finite on any rank skips it on all."""
        enter("update")
        self._engine.step()
        self._in_step = False
        applied = bool(self._engine.was_step_applied())
        norm = self._engine.get_global_grad_norm()
        return StepOutcome(applied, float(norm) if applied and norm is not None else math.nan)

    @property
    def loss_scale(self) -> float:
        """fp16's current loss scale; 1 otherwise."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0) or 1.0)

    def save(self, folder: Path, open_file: Open) -> None:
        """Write weights and optimizer state of this rank below `folder`, into files that `open_file` opens;
        all ranks call it.

        Raises this rank's disk error once all ranks are done: DeepSpeed has collectives between its writes,
        and a rank that leaves them early takes the others down with it. A removed run's folder stays removed.
        """
        refused: list[OSError] = []
        writer = self._engine.checkpoint_engine
        write, make_folders = writer.save, writer.makedirs

        def tried(do: Callable[..., object], *args: Any, **kwargs: Any) -> None:
            try:
                do(*args, **kwargs)
            except OSError as error:
                refused.append(error)

        def write_file(state_dict: object, path: str) -> None:
            with open_file(Path(path)) as file:
                torch.save(state_dict, file)

        writer.save = partial(tried, write_file)
        writer.makedirs = partial(tried, lambda path, exist_ok: Path(path).mkdir(exist_ok=exist_ok))
        try:
            self._engine.save_checkpoint(
                str(folder), tag=STATE_TAG, save_latest=False, exclude_frozen_parameters=self._has_frozen()
            )
            if dist.get_rank() == 0:
                self.layout.write(folder, open_file)
        except OSError as error:
            refused.append(error)
        finally:
            writer.save, writer.makedirs = write, make_folders
        if refused:
            raise refused[0]

    def load(self, folder: Path) -> str | None:
        """Restore what `save` wrote, bit for bit.

        With another number of ranks or another ZeRO stage it is resharded; returns from what and to what.
        UserError when the optimizer's state cannot be resharded, or when a file holds more than state.
        """
        files = sorted(folder.glob(f"{STATE_TAG}/*.pt"))
        own = files[dist.get_rank() :: self._world_size]
        make_or_raise(lambda: [bool(read_state(path, mmap=True)) for path in own])  # before any collective
        stored = Layout.read(folder)
        written_by = len(list((folder / STATE_TAG).glob("*_optim_states.pt")))
        if stored is None and written_by != self._world_size:
            raise UserError(
                f"{folder} was written by {written_by} ranks and an earlier version; this run has "
                f"{self._world_size}",
                hint=f"resume with launch.nproc_per_node={written_by}, or start a new run_name",
            )
        now = _dtype_of(self._engine._config._param_dict)
        before = _dtype_of(read_state(files[0], mmap=True).get("ds_config"), now)
        if stored is not None and (stored != self.layout or before != now):
            self._load_resharded(folder / STATE_TAG, stored, same_dtype=before == now)
            of_before, of_now = ("", "") if before == now else (f" in {before}", f" in {now}")
            return f"{stored}{of_before} -> {self.layout}{of_now}"
        path, _ = self._engine.load_checkpoint(
            str(folder), tag=STATE_TAG, load_module_strict=not self._has_frozen()
        )
        if path is None:
            raise RuntimeError(f"DeepSpeed found no state in {folder}")
        return None

    def forget_optimizer(self) -> None:
        """Free this rank's optimizer state, once training is over and saved: nothing trains after it."""
        zero = self._engine.optimizer
        for parameter in self.module.parameters():
            if (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
                mapping.optim_fragment = {}  # views of that state
        zero.optimizer.state.clear()
        return_free_memory()

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """The module's whole state dict on rank 0, None elsewhere; all ranks call it."""
        if self.zero_stage == 3:
            state = self._engine._zero3_consolidated_16bit_state_dict()
        else:
            state = self._engine.module_state_dict()
        return state if dist.get_rank() == 0 else None

    def whole_weights(self, named: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """On stage 3: weights and buffers of the module, each whole until the next; all ranks iterate."""
        return one_by_one(self._engine.optimizer, named)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights whole on every rank while the block runs; on stages 1 and 2 they always are.

        Forward passes then cost no collective, so that ranks may run different ones, also over parts of the
        module. There is no backward pass in the block, and it must not change weights.
        """
        if self.zero_stage < 3:
            yield
            return
        with _gathered(self.module, self._engine.optimizer.parameter_offload):
            yield

    def master_weights(self) -> list[torch.Tensor]:
        """This rank's share of the trained weights, flat, fp32: what the optimizer updates in place.

        The module's weights are these, rounded; a change here shows in them after `publish_master_weights`.
        """
        return [master.data for master in self._masters()]

    @torch.no_grad()
    def publish_master_weights(self) -> None:
        """Make the module's weights the rounded master weights, as a step does; all ranks call it."""
        zero = self._engine.optimizer
        if self.zero_stage < 3:
            zero.update_lp_params()
            return
        zero.parameter_offload.partition_all_parameters()  # a whole one would hide its new part
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()

    def _masters(self) -> list[torch.Tensor]:
        """The flat tensors that DeepSpeed gave to the optimizer, which keys its state by them."""
        zero = self._engine.optimizer
        if self.zero_stage == 3:
            return zero.fp32_partitioned_groups_flat
        if hasattr(zero, "fp32_groups_flat_partition"):  # bf16 at stage 1 has an optimizer of its own
            return zero.fp32_groups_flat_partition
        return zero.single_partition_of_fp32_groups

    def _shards(self) -> tuple[Shard, ...]:
        """This rank's part of `layout`, as DeepSpeed recorded it."""
        zero = self._engine.optimizer
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        if self.zero_stage == 3:
            pieces = [_pieces_of_partitions(group, names) for group in zero.fp16_groups]
            groups = zero.fp16_groups
        else:
            groups = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
            pieces = [_pieces_of_fragments(group, names) for group in groups]
        shards = zip(self._masters(), groups, pieces, strict=True)
        return tuple(
            Shard(master.numel(), names[id(group[0])], tuple(found), _wholes(zero, number, names))
            for number, (master, group, found) in enumerate(shards)
        )

    def _load_resharded(self, folder: Path, stored: Layout, *, same_dtype: bool) -> None:
        """Restore a state of other ranks, of another stage or of another dtype: its fp32 weights, rounded."""
        own = self.layout.ranks[dist.get_rank()]
        # the ranks that succeeded would wait for the others
        held = make_or_raise(lambda: reshard(stored, own, lambda rank: held_by(folder, rank)))
        weights = [values.pop(WEIGHTS) for values in held]
        self._load_buffers(folder)
        scaler = loss_scaler_for(self._world_size, folder, len(stored.ranks)) if same_dtype else None
        self._load_optimizer(held, scaler)
        for master, values in zip(self.master_weights(), weights, strict=True):
            master.copy_(values)
        self.publish_master_weights()

    def _load_optimizer(self, states: list[dict[str, Any]], loss_scaler: Any) -> None:
        """Give the optimizer its state for each of the flat tensors, and fp16 its loss scale."""
        zero = self._engine.optimizer
        if self.zero_stage == 3:
            zero._set_fp32_optimizer_param_groups()  # in between it hides them
        state = {number: encoded(values, zero.optimizer) for number, values in enumerate(states) if values}
        zero.optimizer.load_state_dict(
            {"state": state, "param_groups": zero.optimizer.state_dict()["param_groups"]}
        )
        if self.zero_stage == 3:
            zero._clear_fp32_optimizer_param_groups()
        if loss_scaler is not None and hasattr(zero, "loss_scaler"):
            zero.loss_scaler = loss_scaler

    def _load_buffers(self, folder: Path) -> None:
        """Restore the module's buffers; rank 0 wrote all of them, at stage 3 every rank."""
        path = sorted(folder.glob("*mp_rank_00_model_states.pt"))[0]
        stored = read_state(path, mmap=True)["module"] or {}
        for name, buffer in self.module.named_buffers():
            if name in stored:
                buffer.copy_(stored[name])

    def _has_frozen(self) -> bool:
        return any(not p.requires_grad for p in self.module.parameters())


class Partitioned:
    """A module that is not trained, its weights partitioned over the ranks (ZeRO-3)."""

    def __init__(self, module: torch.nn.Module, config: dict[str, Any]) -> None:
        """config: see `ds_config.build_frozen_config`. No weight of the module may want a gradient."""
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError("a partitioned module is not trained: requires_grad_(False) first")
        self._engine = _initialized(module, None, config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self._engine(*args, **kwargs)


def _pieces_of_fragments(group: list[torch.nn.Parameter], names: dict[int, str]) -> Iterator[Piece]:
    """Stages 1 and 2: a rank's flat tensor is a stretch of all parameters of the group in a row."""
    for parameter in group:
        if (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            begin, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
            yield Piece(names[id(parameter)], begin, place.start, place.numel)


def _pieces_of_partitions(group: list[Any], names: dict[int, str]) -> Iterator[Piece]:
    """Stage 3: every rank has an equal stretch of each parameter; the last ranks pad theirs."""
    offset = 0
    for parameter in group:
        size = parameter.partition_numel()
        begin = dist.get_rank(parameter.ds_process_group) * size
        if (count := min(size, parameter.ds_numel - begin)) > 0:
            yield Piece(names[id(parameter)], begin, offset, count)
        offset += size


def _wholes(zero: Any, number: int, names: dict[int, str]) -> tuple[Piece, ...] | None:
    """Places in Muon's momentum that hold whole parameters, for each parameter of which the rank has a part;
    None where the momentum is divided like the weights."""
    in_partition = getattr(zero, "params_in_partition", None)  # of stages 1 and 2
    if in_partition is None or zero.cpu_offload or not in_partition[number]:
        return None
    if not zero._is_muon_group(in_partition[number]):
        return None
    pieces, offset = [], 0
    for parameter in in_partition[number]:
        pieces.append(Piece(names[id(parameter)], 0, offset, parameter.numel()))
        offset += parameter.numel()
    return tuple(pieces)


def _dtype_of(config: Any, unknown: str = "fp32") -> str:
    """Of the weights in the forward pass, by DeepSpeed's configuration."""
    enabled = [name for name in ("bf16", "fp16") if config and config.get(name, {}).get("enabled")]
    return (enabled or ["fp32" if config else unknown])[0]


def _initialized(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any]
) -> Any:
    """DeepSpeed's engine, without its side effects."""
    if not torch.cuda.is_available():
        # else ZeRO-3 starts a program that counts the machine's sockets, for every bucket of gradients
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also for a lone process
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    _import_muon(compiled=False)
    # on the CPU it would compile a collective with g++ at the first start, and hang if that was killed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # its older names
    with contextlib.redirect_stdout(io.StringIO()):  # at stage 1 with bf16 it prints its memory use
        for part in filter(is_tiled, module.modules()):
            deepspeed.utils.set_z3_leaf_module(part, True)  # gathered once, not for every tile
        fill_partitions(module, config, deepspeed)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
    return engine


def return_free_memory() -> None:
    """Give the system what freed tensors held on the CPU; allocators keep it, tcmalloc and glibc's here."""
    process = ctypes.CDLL(None)
    if hasattr(process, "MallocExtension_ReleaseFreeMemory"):
        process.MallocExtension_ReleaseFreeMemory()
    elif hasattr(process, "malloc_trim"):
        process.malloc_trim(0)


@contextmanager
def _gathered(module: torch.nn.Module, offload: Any) -> Iterator[None]:
    """Whole weights under ZeRO-3. offload: DeepSpeed's, whose hooks release weights of a called module."""
    import deepspeed

    # what was fetched ahead for a backward pass that did not come is still on its way
    offload.partition_all_parameters()
    with deepspeed.zero.GatheredParameters(list(module.parameters())), _hooks_off(module, offload):
        yield


@contextmanager
def _hooks_off(module: torch.nn.Module, offload: Any) -> Iterator[None]:
    """Without DeepSpeed's hooks. They were the last to be registered, and are the last again afterwards."""
    handles = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
    removed = []
    for handle in handles:
        hooks = handle.hooks_dict_ref()
        removed.append((hooks, handle.id, hooks.pop(handle.id)))
    try:
        yield
    finally:
        for hooks, number, hook in sorted(removed, key=lambda entry: entry[1]):
            hooks[number] = hook


def muon_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """DeepSpeed's Muon with plain AdamW for the groups whose `use_muon` is false.

    It must be DeepSpeed's own class: its ZeRO optimizers orthogonalise only for that one. Without
    `adam_optimizer` it updates the others inline, which spares compiling FusedAdam.
    """
    _import_muon(compiled=torch.cuda.is_available())
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(groups)


def _import_muon(*, compiled: bool) -> None:
    """Import DeepSpeed's Muon, whose functions are wrapped for torch.compile unless `compiled` is false.

    ZeRO imports it whichever optimizer is used, and the wrapping imports torch's compiler: two seconds of
    every start. On the CPU the first step would also need a C++ compiler, for a minute.
    """
    name = "deepspeed.runtime.zero.muon.original_muon"
    if compiled or name in sys.modules:
        return
    from deepspeed.runtime import compiler

    wrap, compiler.compile = compiler.compile, lambda *args, **kwargs: lambda function: function
    try:
        importlib.import_module(name)
    finally:
        compiler.compile = wrap

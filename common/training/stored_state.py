"""What DeepSpeed's engine has written into a checkpoint, read without running anything of it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.training.eight_bit import decoded
from common.training.reshard import WEIGHTS


def held_by(folder: Path, rank: int) -> list[dict[str, Any]]:
    """Of a rank's file: weights and optimizer state of each flat tensor, 8-bit moments in fp32."""
    stored = stored_optimizer(folder, rank)
    if "fp32_flat_groups" in stored:  # stage 3
        weights, optimizer = stored["fp32_flat_groups"], stored["optimizer_state_dict"]
    else:
        weights, optimizer = stored["single_partition_of_fp32_groups"], stored["base_optimizer_state"]
    return [
        {WEIGHTS: master.detach(), **decoded(optimizer["state"].get(number, {}))}
        for number, master in enumerate(weights)
    ]


def stored_optimizer(folder: Path, rank: int) -> dict[str, Any]:
    path = next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    return dict(read_state(path, mmap=True)["optimizer_state_dict"])


def loss_scaler_for(world_size: int, folder: Path, written_by: int) -> Any:
    """fp16's loss scaler for that many ranks; in other dtypes it is a constant, or None.

    A rank's gradients carry its loss scale times the world size: their product stays, so that the same passes
    overflow as before.
    """
    scaler: Any = stored_optimizer(folder, 0).get("loss_scaler")
    if scaler is not None and scaler.dynamic:
        scaler.cur_scale = max(scaler.min_scale, scaler.cur_scale * written_by / world_size)
    return scaler


def read_state(path: str | Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """What DeepSpeed wrote into a file: tensors, plain values and a few of its own classes.

    A pickle may name any function and call it. Only the classes of DeepSpeed's state are allowed; UserError
    names anything else in the file. With mmap tensors stay on the disk until they are used.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f"{named[1]}, which is not part of it" if named else f"what cannot be read ({error})"
            raise UserError(
                f"{path} holds more than a checkpoint's state: {what}; nothing of it was run",
                hint="delete the checkpoint: the run goes on from an earlier one, or from its start",
            ) from None

"""Checks of what the ranks share: the global batch, rows, a node's weights. `checks.py` calls them."""

from __future__ import annotations

from common.errors import UserError
from pipeline.config import PipelineConfig


def check_batch(global_batch_size: int, ranks: int, key: str) -> None:
    """Every rank has a row in every optimizer step, save the last of an epoch, which may be short of rows."""
    if global_batch_size < ranks:
        raise UserError(
            f"{key}={global_batch_size} is less than the {ranks} ranks it is shared by",
            hint=f"{key}={ranks} or more, or fewer ranks with launch.nproc_per_node",
        )


def check_sharding(config: PipelineConfig, ranks: int) -> None:
    """A secondary partition divides the ranks of a node."""
    size = config.deepspeed.hpz_partition_size
    if size > 1 and ranks % size != 0:
        raise UserError(
            f"deepspeed.hpz_partition_size={size} does not divide the {ranks} rank(s) of this machine",
            hint=f"deepspeed.hpz_partition_size={ranks}" if ranks > 1 else "deepspeed=zero3",
        )

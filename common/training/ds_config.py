"""What a run asks of DeepSpeed in, its configuration dict out. Pure: imports nothing heavy."""

from __future__ import annotations

from common.config import DeepSpeedConfig, Dtype, Offload
from common.training_config import OptimizerName


def build_ds_config(
    deepspeed: DeepSpeedConfig,
    *,
    dtype: Dtype,
    max_grad_norm: float,
    micro_batch_size: int,
    world_size: int,
    num_parameters: int,
    optimizer: OptimizerName = OptimizerName.adamw,
    gpu: bool = False,
) -> dict[str, object]:
    """The dict given to `deepspeed.initialize`.

    Every value that changes numerics is set here, because DeepSpeed's own defaults are not neutral
    (it clips at 1.0 and accumulates bf16 gradients in bf16). Accumulation is owned by the recipe:
    `managed_gradient_accumulation` is off, so each `engine.step()` ends a step of as many
    micro-batches as were run, and the batch sizes below only satisfy DeepSpeed's own arithmetic.
    `num_parameters` bounds the reduce bucket, which DeepSpeed allocates whole.
    """
    is_bf16 = dtype is Dtype.bf16
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch_size * world_size,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,  # client optimizers are ours, and tested
        "zero_force_ds_cpu_optimizer": False,  # CPUAdam would be compiled on first use
        # each gradient is added to its fp32 sum as it comes: the same sums, and never all of them in bf16
        "bf16": {"enabled": is_bf16, "immediate_grad_update": is_bf16},
        "fp16": {"enabled": dtype is Dtype.fp16, "hysteresis": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {**_zero(deepspeed, num_parameters, optimizer), **_alone(deepspeed, world_size)},
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every pass
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if is_bf16 and gpu and world_size == 1:
        config["communication_data_type"] = "fp32"  # nothing is sent, and no bf16 copy of the sums is made
    return config


def build_frozen_config(
    deepspeed: DeepSpeedConfig, *, dtype: Dtype, world_size: int, num_parameters: int
) -> dict[str, object]:
    """The dict given to `deepspeed.initialize` for a module that is partitioned (stage 3) and not trained."""
    zero = _zero(deepspeed, num_parameters, OptimizerName.adamw)
    zero.pop("offload_optimizer", None)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "bf16": {"enabled": dtype is Dtype.bf16},
        "fp16": {"enabled": dtype is Dtype.fp16},
        "zero_optimization": zero,
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _zero(deepspeed: DeepSpeedConfig, num_parameters: int, optimizer: OptimizerName) -> dict[str, object]:
    bucket = min(deepspeed.reduce_bucket_size, num_parameters)
    bucket += bucket % 2  # DeepSpeed refuses an odd one
    zero: dict[str, object] = {
        "stage": deepspeed.stage,
        "contiguous_gradients": True,
        # DeepSpeed allows overlap with recipe-owned accumulation from stage 2 on
        "overlap_comm": deepspeed.overlap_comm and deepspeed.stage >= 2,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if deepspeed.offload_optimizer is not Offload.none:
        zero["offload_optimizer"] = {"device": deepspeed.offload_optimizer.value, "pin_memory": True}
    if deepspeed.offload_param is not Offload.none:
        zero["offload_param"] = {"device": deepspeed.offload_param.value, "pin_memory": True}
    if deepspeed.stage == 3 and optimizer is OptimizerName.muon:
        zero["reduce_scatter"] = False  # DeepSpeed's Muon wants whole gradients there
    if deepspeed.stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero["zero_hpz_partition_size"] = deepspeed.hpz_partition_size
    return zero


def _alone(deepspeed: DeepSpeedConfig, world_size: int) -> dict[str, object]:
    """One rank of stage 1 reduces nothing: with a bucket that holds no gradient each stays where it is."""
    without = world_size == 1 and deepspeed.stage == 1 and deepspeed.offload_optimizer is Offload.none
    return {"reduce_bucket_size": 2} if without else {}

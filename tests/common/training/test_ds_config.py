import pytest

from common.config import DeepSpeedConfig, Dtype, Offload
from common.errors import UserError
from common.fields import as_schema
from common.training.ds_config import build_ds_config
from common.training_config import OptimizerName


def build(deepspeed: DeepSpeedConfig, dtype: Dtype = Dtype.bf16, **overrides: object) -> dict:
    values = {"max_grad_norm": 0.5, "micro_batch_size": 4, "world_size": 2, "num_parameters": 1000}
    return build_ds_config(deepspeed, dtype=dtype, **{**values, **overrides})


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", list(Dtype))
def test_every_value_that_changes_numerics_is_set(stage: int, dtype: Dtype) -> None:
    config = build(DeepSpeedConfig(stage=stage), dtype)
    assert config["gradient_clipping"] == 0.5
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["managed_gradient_accumulation"] is False
    assert config["bf16"]["enabled"] is (dtype is Dtype.bf16)
    assert config["fp16"]["enabled"] is (dtype is Dtype.fp16)
    assert config["zero_optimization"]["stage"] == stage


def test_bf16_gradients_are_summed_as_they_come_and_one_gpu_sends_none_in_bf16() -> None:
    for dtype in Dtype:
        assert build(DeepSpeedConfig(), dtype)["bf16"]["immediate_grad_update"] is (dtype is Dtype.bf16)
    sent = "communication_data_type"
    assert build(DeepSpeedConfig(), gpu=True, world_size=1)[sent] == "fp32"
    for kept in ({"gpu": False, "world_size": 1}, {"gpu": True, "world_size": 2}):
        assert sent not in build(DeepSpeedConfig(), **kept)
    assert sent not in build(DeepSpeedConfig(), Dtype.fp16, gpu=True, world_size=1)


def test_no_clipping_is_said_and_not_left_to_the_default_of_one() -> None:
    assert build(DeepSpeedConfig(), max_grad_norm=0.0)["gradient_clipping"] == 0.0


def test_reduce_bucket_is_never_larger_than_the_model() -> None:
    assert build(DeepSpeedConfig(), num_parameters=10)["zero_optimization"]["reduce_bucket_size"] == 10
    small = DeepSpeedConfig(reduce_bucket_size=8)
    assert build(small, num_parameters=10)["zero_optimization"]["reduce_bucket_size"] == 8


def test_one_rank_of_stage_1_has_no_bucket_and_everything_else_has_one() -> None:
    alone = build(DeepSpeedConfig(stage=1), world_size=1)["zero_optimization"]
    assert (alone["reduce_bucket_size"], alone["allgather_bucket_size"]) == (2, 1000)
    for config, ranks in (
        (DeepSpeedConfig(stage=1), 2),
        (DeepSpeedConfig(stage=2), 1),
        (DeepSpeedConfig(stage=3), 1),
        (DeepSpeedConfig(stage=1, offload_optimizer=Offload.cpu), 1),
    ):
        assert build(config, world_size=ranks)["zero_optimization"]["reduce_bucket_size"] == 1000


def test_buckets_are_even_because_deepspeed_refuses_odd_ones() -> None:
    for config in (build(DeepSpeedConfig(reduce_bucket_size=7)), build(DeepSpeedConfig(), num_parameters=7)):
        zero = config["zero_optimization"]
        assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 8


def test_overlap_is_off_at_stage_one_where_deepspeed_refuses_it() -> None:
    assert build(DeepSpeedConfig(stage=1))["zero_optimization"]["overlap_comm"] is False
    assert build(DeepSpeedConfig(stage=2))["zero_optimization"]["overlap_comm"] is True


def test_offload_names_its_device_and_is_absent_otherwise() -> None:
    offloaded = build(DeepSpeedConfig(stage=3, offload_optimizer=Offload.cpu, offload_param=Offload.cpu))
    assert offloaded["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert offloaded["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert not {"offload_optimizer", "offload_param"} & set(
        build(DeepSpeedConfig(stage=3))["zero_optimization"]
    )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"stage": 0}, "deepspeed.stage=0"),
        ({"stage": 4}, "deepspeed.stage=4"),
        ({"stage": 1, "offload_optimizer": Offload.cpu}, "deepspeed.offload_optimizer"),
        ({"stage": 2, "offload_param": Offload.cpu}, "deepspeed.offload_param"),
        ({"stage": 2, "hpz_partition_size": 2}, "deepspeed.hpz_partition_size"),
    ],
)
def test_stages_that_cannot_work_are_refused_with_a_way_out(values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        as_schema(DeepSpeedConfig, values, "deepspeed.")
    assert caught.value.hint


def test_muon_reduces_whole_gradients_at_stage_three() -> None:
    muon = build(DeepSpeedConfig(stage=3), optimizer=OptimizerName.muon)
    assert muon["zero_optimization"]["reduce_scatter"] is False
    for other in (build(DeepSpeedConfig(stage=3)), build(DeepSpeedConfig(), optimizer=OptimizerName.muon)):
        assert "reduce_scatter" not in other["zero_optimization"]

"""The memory estimate against what autograd keeps, what a process takes, and what is worked by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import memory_plan
from common.config import LoraConfig, ModelConfig, TokenizerConfig
from common.model.fused_loss import chunk_rows_for
from common.stage import Step
from pipeline.compose import compose, prepare
from pipeline.planning import memory
from pipeline.planning.activations import activations, chunk_rows
from pipeline.planning.fitting import Room, largest_rows, rows_that_fit, ways_out, ways_out_of, with_rows
from pipeline.planning.network import from_fields, network_of
from pipeline.planning.work import Decoding, Head, MicroBatchShape, Sharding, Trained, Workload
from pipeline.planning.workload import compiles, workload_of
from tests.packed import packed_lm

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "tie_word_embeddings": True,
}  # fmt: skip


def work_of(fields: dict[str, Any] = LLAMA, **changes: Any) -> Workload:
    network = from_fields(fields)
    assert network is not None
    plain = Workload(
        (Trained(network, network.parameters, Head.tokens),),
        MicroBatchShape(600, 400),
        Sharding(1, 1),
        half=False,
        gpu=False,
    )
    return replace(plain, **changes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_parameters_are_counted_as_transformers_makes_them(kind: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**LLAMA, "model_type": kind, "head_dim": 12, "tie_word_embeddings": tied}
    with torch.device("meta"):
        config = AutoConfig.for_model(kind, **{k: v for k, v in fields.items() if k != "model_type"})
        model = AutoModelForCausalLM.from_config(config)
    network = from_fields(fields)
    assert network is not None
    assert network.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_folder_with_weights_is_counted_in_its_files_and_a_config_without_sizes_is_not_guessed(
    tmp_path: Path,
) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    found = network_of(ModelConfig(path=str(tmp_path)))
    assert found is not None and found.is_exact and found.parameters == 22
    assert from_fields({"model_type": "llama", "hidden_size": 8}) is None
    assert network_of(ModelConfig(path="org/name")) is None


def test_the_vocabulary_of_a_new_model_is_its_tokenizers() -> None:
    fields = {name: value for name, value in LLAMA.items() if name != "vocab_size"}
    model = ModelConfig(config=fields, tokenizer=TokenizerConfig(train_vocab_size=512))
    found = network_of(model)
    assert found is not None and found.vocabulary == 512


@pytest.mark.parametrize("length", [100, 300])
@pytest.mark.parametrize("half", [False, True])
def test_activations_are_what_autograd_keeps(half: bool, length: int) -> None:
    """Within 6 %: rotary tables, token ids and logsumexp are left out of the formula."""
    kept, batch = bytes_kept(half, length)
    work = work_of(batch=batch, half=half)
    assert activations(work, work.networks[0]) == pytest.approx(kept, rel=0.06)


def test_recomputation_leaves_the_input_of_each_layer_and_one_whole_layer() -> None:
    """600 tokens in fp32 by hand: three layers' inputs, a layer without the shortcut, norm and selection."""
    work = work_of(checkpointing=True)
    inputs, layer = 3 * 48 * 4, 4 * (6 * 48 + 3 * 48 + 2 * 24 + 4 * 112)
    assert activations(work, work.networks[0]) == 600 * (inputs + layer + 12 * 48) + 2 * 400 * 48 * 4


def bytes_kept(half: bool, length: int) -> tuple[int, MicroBatchShape]:
    """What a forward pass over documents of this length saves, weights left out."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from common.data.batches import collate
    from common.data.types import IGNORE, TokenizedExample
    from common.model import attention
    from common.model.packed import batch_arguments

    attention.register()
    dtype = torch.bfloat16 if half else torch.float32
    config = AutoConfig.for_model(**LLAMA)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    packed = packed_lm(model.train())
    ids = np.arange(length, dtype=np.int32) % LLAMA["vocab_size"]
    labels = np.roll(ids, -1)
    labels[: length // 3] = labels[-1] = IGNORE
    documents = [TokenizedExample(ids, labels, "")] * (600 // length)
    batch = collate(documents, range(len(documents)), [0] * len(documents))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed(**batch_arguments(batch))
    size = sum(size for address, (size, _) in kept.items() if address not in weights)
    size += 2 * len(batch.targets) * LLAMA["hidden_size"] * dtype.itemsize  # selected, and its gradient
    return size, MicroBatchShape(batch.input_ids.shape[1], len(batch.targets), short=length <= 256)


def test_states_are_those_of_zero_and_are_shared_by_the_ranks_as_its_stages_say() -> None:
    """Hand-worked for 1,000 weights in half precision on 4 ranks: weights 2, master 4, AdamW 8 bytes."""
    network = from_fields(LLAMA)
    assert network is not None
    part = Trained(replace(network, parameters=1000), 1000, Head.tokens)
    found = {}
    for stage in (1, 2, 3):
        work = work_of(networks=(part,), sharding=Sharding(stage, 4), half=True, gpu=True)
        terms = memory.estimate(work)
        found[stage] = [terms.of(name) for name in ("weights", "optimizer", "gradients", "gathered weights")]
    assert found[1] == [2000, 3000, 4000, 0]
    assert found[2] == [2000, 3000, 1000, 0]
    assert found[3] == [500, 3000, 1000, 2000]


def test_hpz_holds_every_weight_once_more_among_the_ranks_of_a_group() -> None:
    """1,000 weights that learn and 1,000 frozen ones in half precision, 16 ranks in groups of 4."""
    network = from_fields(LLAMA)
    assert network is not None
    network = replace(network, parameters=1000)
    work = work_of(networks=(Trained(network, 1000, Head.tokens),), half=True, gpu=True, frozen=(network,))
    plain, shared = (memory.estimate(replace(work, sharding=Sharding(3, 16, hpz=hpz))) for hpz in (1, 4))
    assert (plain.of("second shares"), shared.of("second shares")) == (0, 2 * 2000 / 4)
    assert shared.device - plain.device == 1000


def test_a_network_is_loaded_in_parts_on_stage_3_unless_it_has_to_be_whole() -> None:
    """1,000 weights in half precision on 4 ranks: 2,000 bytes whole, 500 of a rank; 100 in one tensor."""
    network = from_fields(LLAMA)
    assert network is not None
    network = replace(network, parameters=1000, vocabulary=10, hidden=10, intermediate=5)
    part = Trained(network, 1000, Head.tokens)
    found = {}
    for stage, whole, gpu in ((2, False, True), (3, False, True), (3, True, True), (3, True, False)):
        sharding = Sharding(stage, 4)
        work = work_of(networks=(part,), sharding=sharding, half=True, gpu=gpu, loaded_whole=whole)
        term = memory.loading(work)
        found[stage, whole, gpu] = (term.device, term.host)
        assert memory.estimate(work).host_to_load == term.host
    assert network.largest == 100
    assert found == {
        (2, False, True): (0, 2000),
        (3, False, True): (500, 50),
        (3, True, True): (2000, 2000),
        (3, True, False): (0, 0),
    }


def test_what_is_offloaded_is_host_memory_on_a_gpu_and_the_same_memory_on_the_cpu() -> None:
    offloaded = Sharding(3, 2, offload_optimizer=True, offload_param=True)
    on_gpu = memory.estimate(work_of(sharding=offloaded, gpu=True))
    plain = memory.estimate(work_of(sharding=Sharding(3, 2), gpu=True))
    assert on_gpu.host > 0 and on_gpu.device + on_gpu.host == pytest.approx(plain.device)
    on_cpu = memory.estimate(work_of(sharding=offloaded))
    assert on_cpu.host == 0 and on_cpu.device == memory.estimate(work_of(sharding=Sharding(3, 2))).device


def test_adapters_have_optimizer_states_only_for_themselves() -> None:
    network = from_fields(LLAMA)
    assert network is not None
    # r (in + out) of q, k, v, o, gate, up, down in three layers, with r = 2
    linears = [(48, 48), (48, 24), (48, 24), (48, 48), (48, 112), (48, 112), (112, 48)]
    adapters = 3 * sum(2 * (a + b) for a, b in linears)
    assert network.adapter_parameters(LoraConfig(r=2)) == adapters
    work = work_of(networks=(Trained(network, adapters, Head.tokens),))
    assert memory.estimate(work).of("optimizer") == 8 * adapters  # fp32: each weight is its own master


def test_the_kv_cache_is_two_vectors_per_layer_token_and_slot() -> None:
    work = work_of(decoding=Decoding(slots=8, capacity=64), half=True)
    cache = 2 * 3 * 24 * 2 * 8 * 64
    logits = 3 * 4 * 8 * 320
    assert memory.kv_cache(work) == cache + logits


def test_vllm_has_weights_of_its_own_and_on_a_gpu_only_while_it_samples() -> None:
    plain, by_vllm = Decoding(slots=8, capacity=128), Decoding(slots=8, capacity=128, by_vllm=True)
    network = work_of().networks[0].network
    copy, packed = 2 * network.parameters, 2 * 320 * 48  # the output layer, which shares its weights
    assert memory.weights_of_vllm(work_of(decoding=plain, half=True)) == 0
    assert memory.weights_of_vllm(work_of(decoding=by_vllm, half=True)) == copy + packed
    assert memory.weights_of_vllm(work_of(decoding=by_vllm, half=True, gpu=True)) == copy
    more, less = (memory.estimate(work_of(decoding=each, half=True)).device for each in (by_vllm, plain))
    assert more - less == copy + packed + memory.VLLM_BASE
    given = Decoding(slots=8, capacity=128, by_vllm=True, cache_bytes=5e6)
    assert memory.kv_cache(work_of(decoding=given)) == 5e6 + 3 * 4 * 8 * 320


def test_vllms_cache_has_room_for_all_slots_in_whole_pages_or_what_it_is_given() -> None:
    config = compose(prepare(["experiment=demo", "ppo.rollout.engine=vllm"]).overrides)
    work = workload_of(config, Step.ppo, 1, gpu=False)
    assert work is not None
    length = -(-config.ppo.data.max_length // 128) * 128
    assert work.decoding == Decoding(config.ppo.rollout.slots, length, by_vllm=True)
    config.ppo.rollout.vllm.cache_gb = 0.5
    work = workload_of(config, Step.ppo, 1, gpu=False)
    assert work is not None and work.decoding is not None and work.decoding.cache_bytes == 0.5e9


def test_ppo_holds_four_networks_and_its_gradients_in_turn() -> None:
    config = compose(prepare(["experiment=demo"]).overrides)
    work = workload_of(config, Step.ppo, 1, gpu=False)
    assert work is not None
    actor, critic = work.networks
    assert critic.network.parameters == actor.network.parameters + 128 and critic.head is Head.scalar
    assert len(work.frozen) == 2
    without_reference = compose(prepare(["experiment=demo", "ppo.kl.coef=0"]).overrides)
    fewer = workload_of(without_reference, Step.ppo, 1, gpu=False)
    assert fewer is not None and len(fewer.frozen) == 1
    grpo = compose(prepare(["experiment=gsm8k_rlvr"]).overrides)
    one = workload_of(grpo, Step.ppo, 2, gpu=False)
    assert one is not None and len(one.networks) == 1 and len(one.frozen) == 1
    assert one.decoding == Decoding(
        64, 512, gathers=True
    )  # 32 prompts with 8 samples each on a rank, in 64 slots


def test_a_reference_of_its_own_is_one_more_network_to_dpo(tmp_path: Path) -> None:
    config = compose(prepare(["experiment=demo", "steps=[sft,dpo]"]).overrides)
    without = workload_of(config, Step.dpo, 1, gpu=False)
    assert without is not None and without.frozen == ()
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 1}))
    config.dpo.reference = str(tmp_path)
    work = workload_of(config, Step.dpo, 1, gpu=False)
    assert work is not None and [network.layers for network in work.frozen] == [1]


def test_a_way_out_names_overrides_that_fit_and_leaves_out_what_does_not_help() -> None:
    config = compose(prepare(["experiment=demo", "steps=[sft]"]).overrides)
    work = workload_of(config, Step.sft, 1, gpu=False)
    assert work is not None
    work = replace(work, batch=MicroBatchShape(8 * 100_000, 8 * 50_000))
    needed = memory.estimate(work).device
    ways = ways_out_of(work, Step.sft, config, Room(needed / 3))
    assert any(way.startswith("sft.train.micro_batch_size=1: about ") for way in ways)
    assert not any(way.startswith("sft.train.micro_batch_size=4: ") for way in ways)  # still half of it
    assert not any(way.startswith("deepspeed=zero2:") for way in ways)  # one rank shards nothing
    for way in ways:
        overrides = way.partition(":")[0].split()
        compose(prepare(["experiment=demo", "steps=[sft]", *overrides]).overrides)


def test_ways_out_begin_with_what_is_needed_and_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.devices.host_memory", lambda: 300_000_000)
    monkeypatch.setattr("pipeline.planning.fitting.count_gpus", lambda: 0)
    config = compose(prepare(["experiment=demo", "steps=[sft]"]).overrides)
    first = ways_out(config, Step.sft, 1)[0]
    assert "and has 0.30 GB" in first and first.endswith("GB short")
    assert ways_out(compose(prepare(["steps=[sft]", "model.path=org/name"]).overrides), Step.sft, 1) == []


def test_planning_imports_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'pyarrow'}"
    program = f"import pipeline.planning.show, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(memory_plan.PROJECT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0


def test_a_device_out_of_memory_ends_with_a_line_and_a_status_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from common.runtime.logs import run_and_report
    from common.shortage import OUT_OF_MEMORY, shortage

    def work() -> int:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
            "which 512.00 MiB is free. Process 1 has 78.6 GiB memory in use."
        )

    assert run_and_report(work, tmp_path) == OUT_OF_MEMORY
    assert "2.00 GiB more were needed, 512.00 MiB of 79.10 GiB were free" in capsys.readouterr().err
    assert shortage(RuntimeError("CUDA out of memory")) is None


def test_a_way_out_is_named_once() -> None:
    """With one row in a pass all together is recomputation alone."""
    config = compose(prepare(["experiment=demo", "steps=[sft]", "sft.train.micro_batch_size=1"]).overrides)
    work = workload_of(config, Step.sft, 1, gpu=False)
    assert work is not None
    work = replace(work, batch=MicroBatchShape(100_000, 50_000))
    ways = ways_out_of(work, Step.sft, config, Room(0))
    assert ways and len(ways) == len(set(ways))


def test_on_a_gpu_the_worst_moment_counts_not_all_of_them() -> None:
    """By hand, bf16 at stage 1: of many tokens the loss, of few the update, in which two ranks
    send 2 bytes a weight."""
    work = work_of(half=True, gpu=True)
    (part,), vocabulary, hidden = work.networks, 320, 48
    chunk = 400 * vocabulary
    logits = 6 * chunk + 4 * vocabulary * hidden  # more than 6 * vocabulary * hidden, after it
    of_loss = memory.estimate(work)
    assert of_loss.of("logits") == logits and of_loss.of("buffers") == 0
    assert of_loss.of("activations") == activations(work, part)
    few = memory.estimate(replace(work, batch=MicroBatchShape(4, 4), sharding=Sharding(1, 2)))
    assert few.of("buffers") == 2 * part.trained and few.of("activations") == few.of("logits") == 0


def test_on_a_gpu_the_backward_pass_has_the_buckets_and_no_logits() -> None:
    work = work_of(half=True, gpu=True, batch=MicroBatchShape(600, 1), sharding=Sharding(2, 1))
    found, size = memory.estimate(work), work.networks[0].trained
    assert found.of("buffers") == 2 * 2 * size  # two buckets of rounded gradients
    assert found.of("logits") == 2 * 320 * 48  # the projection's gradient, rounded


def test_a_chunk_of_logits_has_as_many_rows_as_the_loss_makes_at_once() -> None:
    for vocabulary in (300, 32_000, 49_152, 128_256, 248_320, 2_000_000):
        for device, gpu in (("cuda", True), ("cpu", False)):
            rows = chunk_rows_for(torch.device(device), vocabulary)
            assert chunk_rows(vocabulary, gpu=gpu) == rows
            assert not gpu or (rows % 256 == 0 and (rows == 256 or 4 * rows * vocabulary <= 2**30))


def test_frozen_norms_keep_no_normalised_input() -> None:
    full = work_of(half=True, gpu=True)
    (part,) = full.networks
    adapted = replace(full, networks=(replace(part, trained=100),))
    norms = 2 * 3 + 1  # two in each layer, and the last one
    saved = activations(full, part) - activations(adapted, adapted.networks[0])
    assert saved == norms * 600 * 2 * 48


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    work = work_of(half=True, gpu=True)  # of two rows
    sizes = [memory.estimate(with_rows(work, number / 2)).device for number in range(1, 6)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5
    assert [largest_rows(work, 2, Room(size), 9) for size in sizes] == [1, 2, 3, 4, 5]
    assert largest_rows(work, 2, Room(sizes[0] - 1), 9) == 0 and largest_rows(work, 2, Room(sizes[4]), 3) == 3


def test_plan_names_it_for_the_gpus_here_and_for_others() -> None:
    config = compose(prepare(["steps=[sft]", "sft.data.path=x", "sft.train.global_batch_size=64"]).overrides)
    work = replace(work_of(half=True, gpu=True))
    line = rows_that_fit(work, Step.sft, config, 2, Room(1e6))
    assert line.startswith(
        "largest sft.train.micro_batch_size that fits, up to 32: none here, 32 on an H100 "
    )
    assert line.endswith("32 on an H200 (151 GB)")


SEVEN_BILLION: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip


def test_plan_says_how_a_gpu_that_is_too_small_takes_one_row() -> None:
    config = compose(prepare(["steps=[sft]", "sft.data.path=x", "sft.train.micro_batch_size=1"]).overrides)
    row = MicroBatchShape(2048, 2048, short=False)
    work = work_of(SEVEN_BILLION, half=True, gpu=True, checkpointing=True, batch=row)
    line = rows_that_fit(work, Step.sft, config, 1, None)
    # 2 T of weights, 4 T of masters, 4 T of sums and 2 T of states are more than 85.5 GB at 7.6e9
    assert line.endswith("; H100 (85.5 GB) takes one row with deepspeed=zero2_offload")
    assert "none on an H100" in line and "none on an H200" not in line
    smaller = work_of(
        {**SEVEN_BILLION, "num_hidden_layers": 22}, half=True, gpu=True, checkpointing=True, batch=row
    )
    line = rows_that_fit(smaller, Step.sft, config, 1, None)
    assert line.endswith("; H100 (85.5 GB) takes one row with optim@sft.optim=adamw_8bit")


def test_gradients_in_bf16_are_summed_as_they_come_and_those_in_fp16_are_kept_until_then() -> None:
    for fp16, each in ((False, 4), (True, 6)):
        work = work_of(half=True, gpu=True, fp16=fp16)
        assert memory.gradients(work, work.networks[0]).device == each * work.networks[0].trained


def test_one_gpu_sends_no_gradients_and_two_send_all_of_them_rounded() -> None:
    for ranks, each in ((1, 0), (2, 2)):
        work = work_of(half=True, gpu=True, sharding=Sharding(1, ranks))
        assert memory.update_buffers(work, work.networks[0]).device == each * work.networks[0].trained


@pytest.mark.parametrize(
    ("overrides", "step", "expected"),
    [
        ([], Step.sft, True),
        (["deepspeed=zero3"], Step.sft, False),
        (["model.dtype=fp32"], Step.sft, True),
        ([], Step.dpo, False),
        (["model.compile=true"], Step.dpo, True),
        (["model.compile=false"], Step.sft, False),
    ],
)
def test_plan_knows_which_layers_a_gpu_compiles(overrides: list[str], step: Step, expected: bool) -> None:
    config = compose(prepare(["steps=[sft,dpo]", "sft.data.path=x", "dpo.data.path=x", *overrides]).overrides)
    assert compiles(config, step) is expected


def test_on_zero3_the_whole_actor_is_there_while_it_samples() -> None:
    network = from_fields(LLAMA)
    assert network is not None
    large = replace(network, parameters=8_000_000_000)
    decoding = Decoding(slots=8, capacity=64)
    work = work_of(
        networks=(Trained(large, large.parameters, Head.tokens),), decoding=decoding, gpu=True, half=True,
        sharding=Sharding(3, 512),
    )  # fmt: skip
    whole = replace(work, decoding=replace(decoding, gathers=True))
    assert memory.estimate(work).of("whole weights") == 0
    # one billion of them are counted among those that ZeRO-3 keeps gathered anyway
    assert memory.estimate(whole).of("whole weights") == 2 * 7_000_000_000
    assert memory.estimate(whole).device > memory.estimate(work).device
    assert memory.whole_weights(replace(whole, sharding=Sharding(2, 512))) == 0

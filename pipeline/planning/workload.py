"""A step's settings -> the `Workload` that its memory is estimated from.

Takes a PipelineConfig, a step, its ranks and what is known of its rows; returns numbers only. Reads the
config of the model it starts from (`network.py`), nothing else.
"""

from __future__ import annotations

import math
from pathlib import Path

from common.compiling import ALONE, why_not_compiled
from common.config import CheckpointingPolicy, Dtype, Offload, Quantize
from common.handoff import model_of
from common.parts import why_whole
from common.stage import Input, Step
from common.training_config import OptimizerName, TrainConfig
from pipeline.config import PipelineConfig
from pipeline.plan import start_of, wire_run
from pipeline.planning.network import Network, network_of
from pipeline.planning.work import Decoding, Head, MicroBatchShape, Sharding, Trained, Workload

PAIR = 2
"""A row of packed pairs has room for two documents of the greatest length."""

STATE_BYTES = {
    OptimizerName.adamw: 8.0,  # two fp32 moments
    OptimizerName.adamw_bf16: 4.0,
    OptimizerName.adamw_8bit: 2.0,
    OptimizerName.paged_adamw_8bit: 2.0,
    OptimizerName.adafactor: 4.0,  # not factored on ZeRO's flat shards: one fp32 number
    OptimizerName.muon: 4.0,  # one momentum; embeddings, which have two moments, are counted as matrices
}
SHORT_DOCUMENT = 256
"""As in `common.model.attention`: on the CPU, documents up to this length are attended to in fp32."""
SAMPLING_SLOTS = 32
"""As in `common.decoding.sampling`: completions decoded side by side."""
VLLM_BLOCK = 128
"""As in `common.decoding.vllm_decoder`: tokens of a page of its cache."""
SLOT_STEP, LENGTH_STEP = 8, 64
"""As in `common.decoding.scheduler`: slots and their capacity are rounded up to these."""


def compiles(config: PipelineConfig, step: Step) -> bool:
    """Whether a GPU's layers are compiled, as in `common.model.compiled`, on a machine that can."""
    if config.model.compile is not None:
        return config.model.compile
    return step in ALONE and why_not_compiled(config.model, config.deepspeed.stage) is None


def workload_of(
    config: PipelineConfig,
    step: Step,
    ranks: int,
    *,
    gpu: bool,
    vocabulary: int | None = None,
    longest: int | None = None,
    mean_length: float | None = None,
    trained_share: float = 1.0,
) -> Workload | None:
    """None where the network's sizes are not known. longest, mean_length: of documents (None: a row's);
    trained_share: of the tokens.

    Rows are taken to be full, which packed ones nearly are.
    """
    network = network_at(config, step, Input.policy, vocabulary)
    if network is None:
        return None
    part, deepspeed = getattr(config, step.value), config.deepspeed
    pair = PAIR if step in (Step.reward, Step.dpo) else 1
    rows = rows_per_pass(part.train, config.launch.data_ranks(ranks))
    sharing, longest = config.launch.sequence_parallel, longest or part.data.max_length
    of_rows = rows * part.data.max_length * pair
    tokens = math.ceil(of_rows / sharing)
    return Workload(
        networks=trained_networks(config, step, network, vocabulary),
        batch=MicroBatchShape(
            tokens,
            max(1, math.ceil(tokens * trained_share)),
            short=longest <= SHORT_DOCUMENT,
            documents=math.ceil(of_rows / (mean_length or longest)),
            longest=longest,
        ),
        sharding=Sharding(
            stage=deepspeed.stage,
            ranks=ranks,
            offload_optimizer=deepspeed.offload_optimizer is not Offload.none,
            offload_param=deepspeed.offload_param is not Offload.none,
            reduce_bucket_size=deepspeed.reduce_bucket_size,
            overlap_comm=deepspeed.overlap_comm,
            hpz=deepspeed.hpz_partition_size,
        ),
        half=config.model.dtype is not Dtype.fp32,
        gpu=gpu,
        checkpointing=config.model.gradient_checkpointing,
        selective=config.model.checkpointing_policy is CheckpointingPolicy.selective,
        tiled=config.model.tiles_feed_forward and not (gpu and compiles(config, step)),
        offload_activations=config.model.activation_offload and gpu,
        decoding=decoding_of(config, step, ranks),
        frozen=frozen_networks(config, step, network, vocabulary),
        offload_frozen=step is Step.ppo and config.ppo.offload_frozen,
        averaged=step is Step.ppo and config.ppo.ema_decay is not None,
        fp16=config.model.dtype is Dtype.fp16,
        compiled=gpu and compiles(config, step),
        loaded_whole=why_whole(config.model) is not None,
        saves_beside=part.train.saves_beside(gpu=gpu),
        sharing=sharing,
    )


def rows_per_pass(train: TrainConfig, ranks: int) -> int:
    """Rows of one forward pass of a rank: the micro batch, or less where the global batch gives less.

    ranks: with rows of their own.
    """
    return min(train.micro_batch_size, math.ceil(train.global_batch_size / ranks))


def accumulation(train: TrainConfig, ranks: int) -> int:
    """Forward passes of a rank in an optimizer step, at most."""
    return math.ceil(train.global_batch_size / (ranks * train.micro_batch_size))


def network_at(config: PipelineConfig, step: Step, taken: Input, vocabulary: int | None) -> Network | None:
    """The network that a step takes; that of the base model where an earlier step will make it."""
    start = start_of(step, wire_run(config), taken)
    return network_of(config.model if start is None else model_of(config.model, Path(start)), vocabulary)


def trained_networks(
    config: PipelineConfig, step: Step, network: Network, vocabulary: int | None
) -> tuple[Trained, ...]:
    """What learns: the policy or reward model; of PPO the actor and, with a critic, the critic."""
    part = getattr(config, step.value)
    head = Head.scalar if step is Step.reward else Head.tokens
    first = network.without_head() if head is Head.scalar else network
    learning = [_trained(config, first, head, part.optim.name)]
    if step is Step.ppo and part.has_critic:
        base = network_at(config, step, part.critic_starts_from, vocabulary) or network
        critic = base.without_head() if not base.is_exact else base
        learning.append(_trained(config, critic, Head.scalar, part.critic.optim.name))
    return tuple(learning)


def frozen_networks(
    config: PipelineConfig, step: Step, network: Network, vocabulary: int | None
) -> tuple[Network, ...]:
    """PPO's reference (unless the actor without its adapter serves) and its reward model; DPO's reference
    where it is another model than the policy, which is there until its log-probabilities are known."""
    if step is Step.dpo and config.dpo.reference is not None:
        return (network_at(config, step, Input.reference, vocabulary) or network,)
    if step is not Step.ppo:
        return ()
    found = []
    if config.ppo.kl.coef > 0 and not config.model.lora.enabled:
        found.append(network)
    if any(source.model for source in config.ppo.rewards):
        found.append(network_at(config, step, Input.reward_model, vocabulary) or network.without_head())
    return tuple(found)


def decoding_of(config: PipelineConfig, step: Step, ranks: int) -> Decoding | None:
    """Roll-outs of PPO; completions of held-out prompts in SFT and DPO; None where nothing is sampled
    here."""
    if step is Step.reward:
        return None
    data = getattr(config, step.value).data
    if step is Step.ppo:
        rollout = config.ppo.rollout
        if rollout.vllm.servers is not None:
            return None
        if rollout.uses_vllm:
            gigabytes = rollout.vllm.cache_gb
            return Decoding(
                rollout.slots,
                _up(data.max_length, VLLM_BLOCK),
                by_vllm=True,
                cache_bytes=None if gigabytes is None else gigabytes * 1e9,
            )
        per_rank = math.ceil(rollout.prompts / ranks) * rollout.samples_per_prompt
        slots, capacity = _up(min(rollout.slots, per_rank), SLOT_STEP), _up(data.max_length, LENGTH_STEP)
        return Decoding(slots, capacity, gathers=rollout.gather_parameters)
    sampling = getattr(config, step.value).sampling
    if sampling.num_prompts == 0:
        return None
    slots = min(SAMPLING_SLOTS, math.ceil(sampling.num_prompts / ranks))
    return Decoding(_up(slots, SLOT_STEP), _up(data.max_length + sampling.max_new_tokens, LENGTH_STEP))


def _trained(config: PipelineConfig, network: Network, head: Head, optimizer: OptimizerName) -> Trained:
    lora = config.model.lora
    return Trained(
        network=network,
        trained=network.adapter_parameters(lora) if lora.enabled else network.parameters,
        head=head,
        state_bytes=STATE_BYTES[optimizer],
        quantized=config.model.quantize is Quantize.nf4,
    )


def _up(number: int, step: int) -> int:
    return -(-number // step) * step

"""Names of settings in other programs (TRL and transformers, axolotl, LLaMA-Factory, ...), and the keys here.

Pure: takes an unknown key as it was typed, returns the hint. Pages of `docs/coming-from` say what differs; a
test holds them against this table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.config import NO_NVME
from common.stage import Step

STEP = "{step}"
MEANT: Mapping[str, str] = {
    # the model
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "base_model": "model.path",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "dtype": "model.dtype",
    "bf16": "model.dtype=bf16",
    "fp16": "model.dtype=fp16",
    "pure_bf16": "model.dtype=bf16",
    "trust_remote_code": "model.trust_remote_code",
    "chat_template_path": "model.chat_template",
    "chat_template_jinja": "model.chat_template",
    "chat_template": "model.chat_template",
    "template": "model.chat_template",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "torch_compile": "model.compile",
    "load_in_4bit": "model.quantize=nf4",
    "quantization_bit": "model.quantize=nf4",
    "use_peft": "model.lora.enabled=true",
    "use_lora": "model.lora.enabled=true",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.targets",
    "lora_target": "model.lora.targets",
    "target_modules": "model.lora.targets",
    "use_dora": "model.lora.dora=true",
    # rows
    "dataset_name": "{step}.data.path",
    "dataset": "{step}.data.path",
    "datasets": "{step}.data.sources",
    "dataset_test_split": "{step}.data.eval_split",
    "test_split_size": "{step}.data.eval_fraction",
    "val_set_size": "{step}.data.eval_fraction",
    "val_size": "{step}.data.eval_fraction",
    "eval_dataset": "{step}.data.eval_path",
    "test_datasets": "{step}.data.eval_path",
    "max_length": "{step}.data.max_length",
    "max_seq_length": "{step}.data.max_length",
    "max_seq_len": "{step}.data.max_length",
    "sequence_len": "{step}.data.max_length",
    "cutoff_len": "{step}.data.max_length",
    "truncation_mode": "{step}.data.truncation",
    "packing": "{step}.data.packing",
    "sample_packing": "{step}.data.packing",
    "neat_packing": "{step}.data.packing",
    "assistant_only_loss": "{step}.data.train_on",
    "completion_only_loss": "{step}.data.train_on",
    "train_on_inputs": "{step}.data.train_on",
    "chat_template_kwargs": "{step}.data.chat_template_kwargs",
    # the loop
    "per_device_train_batch_size": "{step}.train.micro_batch_size",
    "gradient_accumulation_steps": "{step}.train.global_batch_size",
    "num_train_epochs": "{step}.train.epochs",
    "num_epochs": "{step}.train.epochs",
    "max_steps": "{step}.train.max_steps",
    "max_train_steps": "{step}.train.max_steps",
    "eval_steps": "{step}.train.eval_every",
    "save_steps": "{step}.train.save_every",
    "checkpointing_steps": "{step}.train.save_every",
    "save_total_limit": "{step}.train.keep_checkpoints",
    "load_best_model_at_end": "{step}.train.export=best",
    "early_stopping_patience": "{step}.train.stop_when.patience",
    "early_stopping_steps": "{step}.train.stop_when.patience",
    "metric_for_best_model": "{step}.train.stop_when.metric",
    # the optimizer
    "learning_rate": "{step}.optim.lr",
    "weight_decay": "{step}.optim.weight_decay",
    "max_grad_norm": "{step}.optim.max_grad_norm",
    "adam_beta1": "{step}.optim.betas",
    "adam_beta2": "{step}.optim.betas",
    "adam_epsilon": "{step}.optim.eps",
    "optim": "{step}.optim.name",
    "optimizer": "{step}.optim.name",
    "lr_scheduler_type": "{step}.optim.scheduler",
    "lr_scheduler": "{step}.optim.scheduler",
    "warmup_steps": "{step}.optim.warmup_steps",
    "num_warmup_steps": "{step}.optim.warmup_steps",
    "warmup_ratio": "{step}.optim.warmup_ratio",
    "cosine_min_lr_ratio": "{step}.optim.min_lr_ratio",
    # DPO, the reward model, PPO
    "beta": "dpo.beta",
    "pref_beta": "dpo.beta",
    "rl_beta": "dpo.beta",
    "label_smoothing": "dpo.label_smoothing",
    "dpo_label_smoothing": "dpo.label_smoothing",
    "loss_type": "dpo.loss_type",
    "pref_loss": "dpo.loss_type",
    "center_rewards_coefficient": "reward.center_rewards_coefficient",
    "num_generations": "ppo.rollout.samples_per_prompt",
    "max_completion_length": "ppo.rollout.max_new_tokens",
    "response_length": "ppo.rollout.max_new_tokens",
    "num_iterations": "ppo.ppo_epochs",
    "epsilon": "ppo.clip",
    "reward_funcs": "ppo.rewards",
    "reward_weights": "ppo.rewards",
    # what is seen of it
    "report_to": "tracking.to",
    "with_tracking": "tracking.to",
    "use_tensorboard": "tracking.to=[tensorboard]",
    "wandb_project": "tracking.project",
    "wandb_project_name": "tracking.project",
    "wandb_entity": "tracking.entity",
}
"""Their name, and the key here, with a value where only one is meant; `{step}` stands for the step."""
REMARKS = {
    "per_device_train_batch_size": "{step}.train.global_batch_size is the whole batch",
    "gradient_accumulation_steps": "it is the whole batch; accumulation follows from it",
    "early_stopping_patience": "with {step}.train.stop_when.metric",
    "early_stopping_steps": "with {step}.train.stop_when.metric",
}
"""What differs so much that the key alone misleads."""

NOT_OFFERED = {
    "nvme": NO_NVME,
    "zenflow": "ZenFlow begins with other weights than the model's, and applies most gradients late: "
    "deepspeed=zero2_offload runs AdamW itself",
    "superoffload": "SuperOffload learns nothing from steps of several passes and saves no moments of AdamW: "
    "deepspeed=zero3_offload does both",
    "bf16optimizerstates": "with them weights are bf16 alone, rounded to nearest, and small steps move few: "
    "optim.name=adamw_bf16 rounds stochastically and keeps fp32 weights",
}
"""What DeepSpeed has and no run takes, by its name without signs, and why (docs/performance.md)."""


def not_offered(text: str) -> str | None:
    """Why what is named somewhere in a key, an option or a message is not offered; None for any other."""
    letters = "".join(filter(str.isalnum, text.lower()))
    return next((reason for name, reason in NOT_OFFERED.items() if name in letters), None)


NO_EXPERTS = (
    "expert parallelism is not offered, docs/scale.md says why; deepspeed=zero3 divides experts over ranks"
)
NO_TENSORS = (
    "tensor parallelism is not offered, docs/scale.md says why; deepspeed=zero3 divides weights over ranks, "
    "launch.sequence_parallel rows"
)
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("expert_parallel", "autoep_size", "expert_parallel_size", "expert_model_parallel_size", "ep_size"),
        NO_EXPERTS,
    ),
    **dict.fromkeys(
        ("tensor_parallel", "autotp_size", "tensor_parallel_size", "tensor_model_parallel_size", "tp_size"),
        NO_TENSORS,
    ),
}
"""What other programs and DeepSpeed divide a network by, and what does that here."""


def meant(key: str, steps: Sequence[str] = ()) -> str | None:
    """The hint for an unknown key that other programs or DeepSpeed have; None for any other.

    key: dotted, as it was typed; its last part is looked up. steps: of the run, one for each key that every
    step has; a step at the key's beginning comes before them.
    """
    typed, _, name = key.strip("+~-").rpartition(".")
    name = name.replace("-", "_")
    if refused := [REFUSED[part] for part in (name, *typed.split(".")) if part in REFUSED]:
        return refused[0]
    if name not in MEANT:
        return not_offered(key)
    own = [step for step in typed.split(".")[:1] if step in Step.__members__]
    of_steps = own or list(steps) or [Step.sft.value]
    *others, last = dict.fromkeys(MEANT[name].replace(STEP, step) for step in of_steps)
    listed = f"{', '.join(others)} or {last}" if others else last
    remark = REMARKS.get(name, "").replace(STEP, of_steps[0] if len(of_steps) == 1 else "STEP")
    return f"did you mean {listed}?" + (f" ({remark})" if remark else "")

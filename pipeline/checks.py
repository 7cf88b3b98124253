"""Checks between keys, and of the files they name, before anything is launched.

Takes a PipelineConfig and the number of ranks, returns nothing, raises the first UserError. Looks at
folders, files and disks; never at rows or weights (the step does), and never at the network: what
could be a hub name passes.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.artifacts import read_json
from common.config import DataConfig, Dtype, ModelConfig, Quantize
from common.errors import UserError
from common.handoff import model_of, similar
from common.launch_config import LaunchConfig
from common.paths import check_pattern, is_glob, name_of
from common.stage import Input, Step
from common.streaming import check_streaming
from common.text import did_you_mean
from common.tracking_config import MirrorName, TrackingConfig
from common.training_config import Exported, OptimConfig, OptimizerName, TrainConfig
from common.webhook import address_of
from launch.local import gpus_of
from launch.nodes import endpoint_of
from pipeline.config import CONF, PipelineConfig
from pipeline.disk import check_disk
from pipeline.experts import check_balanced, check_not_balanced
from pipeline.plan import STAGES, start_of, wire_run
from pipeline.sharing import check_batch, check_sharding
from step3_ppo.config import PPOConfig

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz", ".zst")
EIGHT_BIT = (OptimizerName.adamw_8bit, OptimizerName.paged_adamw_8bit)
BITSANDBYTES_ON_CPU = "0.50"
"""From here on 4-bit weights and 8-bit optimizers were seen to run and to resume without a GPU."""
SOURCE = "{source}"
"""In the name of a metric: of a source, where rows of several are held out."""
EVAL = "eval/"
"""Begins the name of every metric of an evaluation."""


def check(
    config: PipelineConfig, ranks: int, on_each: Sequence[int] = (), *, can_lack: Collection[Input] = ()
) -> None:
    """Every check, also that each step has a start.

    ranks: how many ranks a step will have. on_each: how many of them each machine has; without, there is one.
    can_lack: what a step need not have yet; what is asked of it is then asked of the policy.
    """
    wired = wire_run(config, can_lack=can_lack)
    check_tracking(config.tracking, elsewhere=config.launch.is_elsewhere)
    if Step.sft in config.steps:
        check_model(config.model)
    if (quantize := config.model.quantize) is not Quantize.none:
        way_out = "model=lora, or model.quantize=none: adapters alone work anywhere"
        check_bitsandbytes(config.launch, f"model.quantize={quantize.value}", way_out)
        config.launch.check_read_once(quantized=True)
    for step in wired:
        starts = {taken: start_of(step.stage.name, wired, taken) for taken in step.sources}
        models = {
            taken: config.model if start is None else model_of(config.model, Path(start))
            for taken, start in starts.items()
        }
        models = models or {Input.policy: config.model}
        for model in models.values():
            check_balanced(model)
        if on_each or config.launch.nnodes == 1:  # else the others' ranks are not known yet
            check_heads(config.launch, models.values(), ranks)
        stand_ins = {taken: models[Input.policy] for taken in can_lack if taken not in models}
        check_step(config, step.stage.name, {**models, **stand_ins}, ranks)
    if Step.ppo in config.steps:
        check_ppo(config.ppo)
        check_vllm_policy(config)
        check_not_balanced(config.model)
        config.ppo.check_patience(ranks)
    check_stage_split(config)
    for count in set(on_each or [ranks]):
        check_sharding(config, count)


def check_launch(launch: LaunchConfig) -> None:
    """A machine of several knows its number, and where machine 0 is."""
    if launch.nnodes == 1:
        return
    if launch.node_rank is None:
        raise UserError(
            f"launch.nnodes={launch.nnodes}, and launch.node_rank is missing",
            hint="give every machine the same command with its own launch.node_rank, from 0 to "
            f"{launch.nnodes - 1}, or let launch=ssh, slurm or k8s do it",
        )
    endpoint_of(launch)


def check_tracking(tracking: TrackingConfig, *, elsewhere: bool = False) -> None:
    """What shows the numbers is installed, and the webhook's address is known.

    elsewhere: the run goes to machines with the same packages and an environment of their own.
    """
    if MirrorName.tensorboard in tracking.to and find_spec("tensorboard") is None:
        raise UserError(
            "tracking.to names tensorboard, which is not installed",
            hint="pip install tensorboard (the extra rlhf-pipeline[tensorboard]); or 'tracking.to=[wandb]'",
        )
    if tracking.webhook is not None and not elsewhere:
        address_of(tracking.webhook)


def check_step(config: PipelineConfig, step: Step, models: Mapping[Input, ModelConfig], ranks: int) -> None:
    """What one step is told about data, loop and optimizer; `models` are what it takes."""
    name, part = step.value, getattr(config, step.value)
    # an experiment names data for at least one step, perhaps one that does not run
    named = any(getattr(config, other.value).data.all_sources() for other in STAGES)
    check_data(part.data, f"{name}.data", or_demo=not named)
    for taken, model in models.items():
        whose = "model" if taken is Input.policy else taken.value.replace("_", " ")
        check_length(model, part.data.max_length, f"{name}.data.max_length", whose)
    check_batch(
        part.train.global_batch_size, config.launch.data_ranks(ranks), f"{name}.train.global_batch_size"
    )
    check_streaming(part.data, part.train, step)
    check_exported(part.train, part.data, name)
    check_watched(part.train.stop_when.metric, part.measured(), part.data, name)
    trained = {f"{name}.optim": (models[Input.policy], part.optim)}
    if step is Step.ppo:
        check_ptx(part, models[Input.policy], config.launch.data_ranks(ranks))
        if part.has_critic:
            trained["ppo.critic.optim"] = (models[part.critic_starts_from], part.critic.optim)
    for key, (_, optim) in trained.items():
        setting, way_out = f"{key}.name={optim.name.value}", f"{key}.name=adamw or adafactor"
        if optim.name is OptimizerName.paged_adamw_8bit:
            check_gpu(config.launch, setting, f"{key}.name=adamw_8bit, adamw or adafactor")
        if optim.name in EIGHT_BIT:
            check_bitsandbytes(config.launch, setting, way_out)
        check_muon(config, optim, key)
    check_disk(config, [model for model, _ in trained.values()])


def check_exported(train: TrainConfig, data: DataConfig, name: str) -> None:
    """What is best, and whether it gets better, is judged by several evaluations of held-out rows."""
    judged = [f"{name}.train.export=best"] if train.export is Exported.best else []
    judged += [f"{name}.train.stop_when.metric={train.stop_when.metric}"] if train.stop_when.metric else []
    if judged and not train.eval_every:
        raise UserError(
            f"{judged[0]} compares evaluations, and with {name}.train.eval_every=0 there is one, at the end",
            hint=f"set {name}.train.eval_every, e.g. to a tenth of the steps",
        )
    if judged and data.eval_path is None and not data.held_out_fraction():
        raise UserError(
            f"{judged[0]} needs held-out rows, and {name}.data.eval_fraction=0 leaves none",
            hint=f"{name}.data.eval_fraction=0.05, or {name}.data.eval_path=FILE",
        )


def check_watched(metric: str | None, measured: Sequence[str], data: DataConfig, name: str) -> None:
    """What early stopping watches is a number of the step's evaluations."""
    of_several = data.eval_path is None and len(data.all_sources()) > 1
    sources = {each.name or name_of(each.path) for each in data.all_sources()} if of_several else set()
    known = [each for each in measured if SOURCE not in each]
    known += [each.replace(SOURCE, name) for each in measured if SOURCE in each for name in sorted(sources)]
    numbered = re.sub(r"-\d+(?=/)", "", metric or "")  # of sources that have one name
    if metric is not None and not {metric, numbered} & set(known):
        key = f"{name}.train.stop_when.metric"
        listed, names = f"measured are {', '.join(known)}", [each.removeprefix(EVAL) for each in known]
        raise UserError(
            f"{key}={metric} is not measured on held-out rows",
            hint=did_you_mean(metric.removeprefix(EVAL), names, listed, prefix=f"{key}={EVAL}"),
        )


def check_ppo(ppo: PPOConfig) -> None:
    """Every update of PPO has its responses."""
    batch, rollout, sampled = ppo.train.global_batch_size, ppo.rollout, ppo.responses_per_iteration
    if batch > sampled:
        raise UserError(
            f"ppo.train.global_batch_size={batch}, but an iteration samples {sampled} responses "
            f"(ppo.rollout.prompts={rollout.prompts} × ppo.rollout.samples_per_prompt="
            f"{rollout.samples_per_prompt})",
            hint=f"ppo.train.global_batch_size={sampled} or less, or more prompts or samples",
        )


def check_vllm_policy(config: PipelineConfig) -> None:
    """vLLM computes the policy as the trainer does."""
    model, lora = config.model, config.model.lora
    if not config.ppo.rollout.uses_vllm:
        return
    if model.quantize is not Quantize.none:
        raise UserError(
            f"ppo.rollout.engine=vllm samples from the base as it was before model.quantize="
            f"{model.quantize.value}, which is another policy than the one that is trained",
            hint="model.quantize=none, or ppo.rollout.engine=builtin",
        )
    if lora.enabled and not config.ppo.rollout.vllm_here:
        raise UserError(
            "ppo.rollout.vllm.servers are handed whole weights, and model.lora trains adapters alone",
            hint="ppo.rollout.vllm.servers=null: vLLM in each rank takes adapters; or no adapters",
        )
    if lora.enabled and lora.dora:
        raise UserError(
            "ppo.rollout.engine=vllm has no DoRA, which model.lora.dora=true trains",
            hint="model.lora.dora=false, or ppo.rollout.engine=builtin",
        )


def check_ptx(ppo: PPOConfig, model: ModelConfig, ranks: int) -> None:
    """Demonstrations are mixed in when there are some, and there are some when they are mixed in.

    ranks: with rows of their own.
    """
    data, weight = ppo.ptx_data, ppo.ptx_weight
    if weight > 0:
        check_data(data, "ppo.ptx_data")
        check_streaming(data, ppo.train, Step.ppo, "ptx_data")
        check_length(model, data.max_length, "ppo.ptx_data.max_length")
        check_batch(ppo.ptx_batch_size, ranks, "ppo.ptx_batch_size")
    elif data.all_sources():
        raise UserError(
            f"ppo.ptx_data names {data.all_sources()[0].path}, which ppo.ptx_weight={weight} leaves out",
            hint="give it a weight, e.g. ppo.ptx_weight=0.1, or leave ppo.ptx_data out",
        )


def check_stage_split(config: PipelineConfig) -> None:
    """Steps that share out the rows of one data set all have the same shares, each of them its own one."""
    splits = {
        step: getattr(config, step.value).data.stage_split
        for step in config.steps
        if getattr(config, step.value).data.stage_split
    }
    for step, shares in splits.items():
        key = f"{step.value}.data.stage_split"
        for name in shares:
            if name not in Step.__members__:
                way_out = did_you_mean(
                    name, Step.__members__, f"steps: {', '.join(Step.__members__)}", cutoff=0.3
                )
                raise UserError(f"{key}: {name} is not a step", hint=way_out)
        if step.value not in shares:
            raise UserError(
                f"{key}={shares} leaves no rows to {step.value} itself",
                hint=f"add a share for {step.value}, or leave stage_split out: the step then sees all rows",
            )
        for other in config.steps:
            if other.value in shares and other not in splits:
                raise UserError(
                    f"{key} has a share for {other.value}, but {other.value}.data.stage_split is empty: "
                    f"{other.value} would see all rows, those of {step.value} too",
                    hint=f"give {other.value} the same shares, or take it out of {key} if it has other data",
                )
    for (first, ours), (second, theirs) in itertools.pairwise(splits.items()):
        if ours != theirs:
            raise UserError(
                f"{first.value}.data.stage_split={ours}, but {second.value}.data.stage_split={theirs}: "
                "their parts could overlap",
                hint="give every step of the run the same shares",
            )


def check_model(model: ModelConfig) -> None:
    """A model is named, its folder is one, and a model made from scratch has a tokenizer."""
    if model.path is None and not model.config:
        raise UserError(
            "no model is named: model.path is missing",
            hint="model.path=FOLDER_OR_HUB_NAME, model=llama_4m, or experiment=demo",
        )
    if model.config and "model_type" not in model.config:
        raise UserError("model.config has no model_type", hint="e.g. model.config.model_type=llama")
    tokenizer = model.tokenizer
    if model.config and tokenizer.path is None and tokenizer.train_vocab_size is None:
        raise UserError(
            "model.config makes a model from scratch, and no tokenizer is named",
            hint="model.tokenizer.path=FOLDER_OR_HUB_NAME, or model.tokenizer.train_vocab_size=4096",
        )
    _check_model_folder(model.path, "model.path", "config.json")
    _check_model_folder(tokenizer.path, "model.tokenizer.path", "tokenizer.json", "tokenizer_config.json")
    template = model.chat_template
    if template is not None and template.endswith(".jinja") and not Path(template).is_file():
        raise UserError(f"model.chat_template={template}: no such file", hint=similar(Path(template)))


def check_data(data: DataConfig, key: str, *, or_demo: bool = False) -> None:
    """Every source is named and, when it is a local file or folder, can be read.

    or_demo: whether the demo may be offered where nothing is named. It is an experiment of its own: beside
    another one, or data for another step, it would take their place.
    """
    sources = data.all_sources()
    if not sources:
        raise UserError(
            f"no data is named: {key}.path is missing",
            hint=f"{key}.path=FILE_OR_HUB_NAME, or {'experiment=demo' if or_demo else _data_options(key)}",
        )
    for index, source in enumerate(sources):
        name = f"{key}.path" if data.path is not None else f"{key}.sources[{index}].path"
        if not source.path:
            raise UserError(f"{name} is empty", hint="name a file, a folder or a hub data set")
        _check_readable(source.path, name)
    if data.eval_path is not None:
        _check_readable(data.eval_path, f"{key}.eval_path")


def check_length(model: ModelConfig, max_length: int, key: str, whose: str = "model") -> None:
    """Rows fit into the model's context, where that is known without loading anything."""
    context = context_length(model)
    if context is not None and max_length > context:
        raise UserError(
            f"{key}={max_length}, but the {whose}'s context is {context} tokens (max_position_embeddings)",
            hint=f"{key}={context} or less",
        )


def check_heads(launch: LaunchConfig, models: Iterable[ModelConfig], ranks: int) -> None:
    """Ranks that share rows are a part of all ranks, and share the heads of attention, where their number is
    known without loading."""
    for model in models:
        launch.check_sequence_parallel(ranks, _number_in_config(model, "num_attention_heads"))


def context_length(model: ModelConfig) -> int | None:
    """max_position_embeddings of model.config or of a local folder's config.json; None when unknown."""
    return _number_in_config(model, "max_position_embeddings")


def _number_in_config(model: ModelConfig, field: str) -> int | None:
    config: Any = model.config
    if model.path is not None:
        try:
            config = read_json(Path(model.path) / "config.json")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{model.path}/config.json cannot be read: {error}", hint="restore the model's folder"
            ) from None
    value = config.get(field) if isinstance(config, dict) else None
    return value if isinstance(value, int) else None


def check_gpu(launch: LaunchConfig, setting: str, way_out: str) -> None:
    """What exists on GPUs only, paged optimizers, is not asked for where there are none.

    Other machines are asked when they begin, unless it is known here what they have.
    """
    if gpus_of(launch) == 0:
        there = f"launch.{launch.kind.value}.gpus_per_node=0"
        why = there if launch.is_elsewhere else "this machine offers none"
        raise UserError(f"{setting} needs a GPU, and {why}", hint=way_out)


def check_bitsandbytes(launch: LaunchConfig, setting: str, way_out: str) -> None:
    """What bitsandbytes computes is asked for where it is installed, in a version that has it for the device.

    Other machines are asked when they begin.
    """
    if launch.is_elsewhere:
        return
    from packaging.version import Version

    found = version("bitsandbytes") if find_spec("bitsandbytes") else None
    if found is None:
        lacks = "needs bitsandbytes, which is not installed"
    elif gpus_of(launch) == 0 and Version(found) < Version(BITSANDBYTES_ON_CPU):
        lacks = f"without a GPU needs bitsandbytes {BITSANDBYTES_ON_CPU}, and {found} is installed"
    else:
        return
    raise UserError(f"{setting} {lacks}", hint=f"pip install 'rlhf-pipeline[gpu]', or {way_out}")


def check_muon(config: PipelineConfig, optim: OptimConfig, key: str) -> None:
    """Muon runs where DeepSpeed computes it, and nothing clips its update."""
    if optim.name is not OptimizerName.muon:
        return
    stage, dtype = config.deepspeed.stage, config.model.dtype
    if dtype is not Dtype.fp32 and stage != 3:
        # Measured with 0.19.8: in half precision stage 1 does not orthogonalise, and at stage 2 the gradients
        # of most norms do not reach the optimizer; neither says so.
        raise UserError(
            f"{key}.name=muon with model.dtype={dtype.value} does not work at deepspeed.stage={stage}",
            hint="deepspeed=zero3, or model.dtype=fp32",
        )
    if optim.max_grad_norm > 0:
        raise UserError(
            f"{key}.max_grad_norm={optim.max_grad_norm} would clip Muon's update, whose norm says nothing "
            "of the gradient's",
            hint=f"{key}.max_grad_norm=0, which optim=muon sets",
        )


def _data_options(key: str) -> str:
    """The choices in conf/data, as overrides of one step's data."""
    names = sorted(file.stem for file in (CONF / "data").glob("*.yaml") if file.stem != "default")
    return f"data@{key}=NAME with one of {', '.join(names)}"


def _check_model_folder(path: str | None, key: str, *expected: str) -> None:
    if path is None:
        return
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in expected):
            raise UserError(
                f"{key}={path} has no {expected[0]}", hint="name a folder that transformers can load"
            )
    elif folder.exists():
        raise UserError(f"{key}={path} is a file, not a folder", hint=f"{key}={folder.parent}")
    elif _must_be_local(path):
        raise UserError(f"{key}={path}: no such folder", hint=similar(folder))


def _check_readable(path: str, key: str) -> None:
    place = Path(path)
    if place.exists():
        if not os.access(place, os.R_OK):
            raise UserError(f"{key}={path} cannot be read", hint="check its permissions")
        if place.is_file() and place.stat().st_size == 0:
            raise UserError(f"{key}={path} is empty", hint="name a file with rows in it")
    elif is_glob(path):
        check_pattern(path, key)
    elif _must_be_local(path) or path.endswith(DATA_SUFFIXES):
        raise UserError(f"{key}={path}: no such file or folder", hint=similar(place))


def _must_be_local(path: str) -> bool:
    """Whether the text cannot be a hub name (`name` or `organisation/name`)."""
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1

"""Whatever the user typed has an effect: base models, artifacts and choices that no run reads are errors.

Takes the composed configurations (several of a sweep) and the overrides as typed; raises UserError. What an
experiment says does not count: it is for other steps, too, and a choice beside it may have made it idle.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from common.config import LoraConfig
from common.errors import UserError
from common.stage import Input, Step
from common.training_config import OptimConfig
from pipeline.compose import keys_of_options, parse
from pipeline.config import PipelineConfig
from pipeline.plan import STAGES, named_sources, start_of, wire_run
from pipeline.schema import keys_of_type
from pipeline.state import BASE_MODEL_KEYS

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SET = "a value"
OF_A_CHOICE = {
    "ppo.critic": ("ppo.estimator", ("gae",)),
    "ppo.kl.target": ("ppo.kl.controller", ("adaptive",)),
    "ppo.kl.horizon": ("ppo.kl.controller", ("adaptive",)),
    **{f"model.lora.{field.name}": ("model.lora.enabled", ("true",)) for field in fields(LoraConfig)},
    **{
        f"{step.value}.train.stop_when.patience": (f"{step.value}.train.stop_when.metric", SET)
        for step in Step
    },
    **{
        f"{place}.min_lr_ratio": (f"{place}.scheduler", ("cosine", "wsd"))
        for place in keys_of_type(OptimConfig)
    },
}
"""Keys that only some choices of another key read: that key and these choices; SET: any but null."""
EXAMPLES = {"metric": "eval/loss"}


def check_effects(configs: Sequence[PipelineConfig], overrides: Sequence[str]) -> None:
    """UserError for the first override without an effect."""
    parsed = [parse(text) for text in overrides]
    if configs:
        check_artifacts_are_used(configs, parsed)
        check_base_model_is_used(configs, parsed)
        check_choices_are_used(configs, parsed)


def check_artifacts_are_used(configs: Sequence[PipelineConfig], overrides: Sequence[Override]) -> None:
    """An artifact is an error when its step is in no run.

    Whether a step that runs has a use for it is known when the steps are wired.
    """
    run = {step for config in configs for step in config.steps}
    keys = {
        f"{stage.name.value}.{taken.value}": stage.name
        for stage in STAGES.values()
        for taken in stage.consumes
    }
    for override in overrides:
        step = keys.get(override.key_or_group)
        if step is not None and step not in run and override.value() is not None:
            names = ",".join(known.value for known in Step if known in run)
            raise UserError(
                f"{override.input_line} has no effect: {step.value} is not among steps=[{names}]",
                hint=f"'steps=[{step.value}]' runs it",
            )


def check_base_model_is_used(configs: Sequence[PipelineConfig], overrides: Sequence[Override]) -> None:
    """A base model is an error when no step of a run starts from it."""
    named = [str(override.input_line) for override in overrides if _names_base_model(override)]
    if not named:
        return
    for config in configs:
        wired = wire_run(config, can_lack=[Input.reward_model])  # whether one is needed is not asked here
        if any(start_of(step.stage.name, wired) is None for step in wired):
            return
    sources = named_sources(configs[0])
    steps = {step.value: path for (step, taken), path in sources.items() if taken is Input.policy}
    taken = " and ".join(
        f"{step} takes weights, tokenizer and chat template from {step}.policy={path}"
        for step, path in steps.items()
    )
    keys = " and ".join(f"{step}.policy" for step in steps)
    raise UserError(
        f"{' and '.join(named)} {'has' if len(named) == 1 else 'have'} no effect: {taken}",
        hint=f"leave it out; or, to train a policy first, add sft to steps and leave {keys} out",
    )


def check_choices_are_used(configs: Sequence[PipelineConfig], overrides: Sequence[Override]) -> None:
    """A setting is an error when no run has the choice that reads it; those of steps that do not run pass."""
    for override in overrides:
        place = override.key_or_group
        for key, (choice, needed) in OF_A_CHOICE.items():
            step = key.partition(".")[0]
            of_step = [config for config in configs if step == "model" or Step(step) in config.steps]
            if not of_step or key == choice or not (place == key or place.startswith(f"{key}.")):
                continue
            values: list[Any] = [functools.reduce(getattr, choice.split("."), config) for config in of_step]
            if any(_is_read(value, needed) for value in values):
                continue
            chosen = ", ".join(sorted({_as_typed(value) for value in values}))
            way_out = EXAMPLES.get(choice.rpartition(".")[2], needed[0])
            raise UserError(
                f"{override.input_line} has no effect with {choice}={chosen}",
                hint=f"leave it out, or {choice}={way_out}",
            )


def _is_read(value: Any, needed: str | Sequence[str]) -> bool:
    return value is not None if needed == SET else _as_typed(value) in needed


def _as_typed(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(getattr(value, "name", value))


def _names_base_model(override: Override) -> bool:
    """Whether an override says what the base model is, or how it reads text, and nothing else."""
    key, value = override.key_or_group, override.value()
    if key == "model":
        options = keys_of_options(override)
        return all(keys and keys.issubset(BASE_MODEL_KEYS) for keys in options)
    group, _, rest = key.partition(".")
    return group == "model" and rest.split(".")[0] in BASE_MODEL_KEYS and value is not None and value != {}

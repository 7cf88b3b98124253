"""Settings: every key with odd values, two at a time, misspelt ones; as mappings and as typed."""

from __future__ import annotations

import random
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from common.config import TokenizerConfig, load_resolved, to_plain
from common.errors import UserError
from common.fields import as_schema, fields_of, without_none
from common.stage import Step
from pipeline import __main__ as command_line
from pipeline import checks, compose, schema, state
from pipeline.config import PROJECT, PipelineConfig
from step1_sft.config import SFTJob
from step2_dpo.config import DPOJob
from step2_reward.config import RewardJob
from step3_ppo.config import PPOJob
from tests.fuzz import odd, oracle
from tests.fuzz.driver import Silent, command, refused_or

KEYS = [(key, schema.types_of(owner)[name], owner, name) for key, owner, name in schema.walk()]
JOBS: dict[Step, Any] = {Step.sft: SFTJob, Step.reward: RewardJob, Step.dpo: DPOJob, Step.ppo: PPOJob}
ROWS = {Step.sft: "sft.jsonl", Step.reward: "preferences.jsonl", Step.dpo: "preferences.jsonl"}
ROWS |= {Step.ppo: "prompts.jsonl"}
PAIRS = (
    ("model.path", "model.tokenizer.train_vocab_size"), ("model.path", "model.config"),
    ("model.tokenizer.path", "model.tokenizer.train_vocab_size"), ("model.quantize", "model.lora.enabled"),
    ("deepspeed.stage", "deepspeed.offload_optimizer"), ("deepspeed.stage", "deepspeed.hpz_partition_size"),
    ("deepspeed.stage", "deepspeed.offload_param"), ("launch.nnodes", "launch.node_rank"),
    ("dpo.loss_type", "dpo.label_smoothing"), ("ppo.kl.controller", "ppo.kl.coef"),
    ("ppo.estimator", "ppo.rollout.samples_per_prompt"), ("ppo.estimator", "ppo.critic.warmup_iterations"),
    ("ppo.data.max_length", "ppo.rollout.max_new_tokens"), ("sft.data.path", "sft.data.sources"),
    ("dpo.data.eval_path", "dpo.data.eval_fraction"), ("dpo.data.eval_path", "dpo.data.eval_split"),
    ("ppo.rewards[].model", "ppo.rewards[].url"),
    ("ppo.train.stop_when.metric", "ppo.evaluation.num_prompts"),
)  # fmt: skip
"""Keys with a rule between them; other pairs are drawn."""


class Typed(NamedTuple):
    """What is given: dotted keys, `[]` behind a list that gets one entry, with their values."""

    values: tuple[tuple[str, Any], ...]
    also_by_a_rank: bool = False
    """whether a rank reads the same from a file"""

    def mapping(self) -> dict[str, Any]:
        """As a file would hold it."""
        whole: dict[str, Any] = {}
        for key, value in self.values:
            inner: Any = whole
            *groups, last = key.split(".")
            for group in groups:
                below = inner.get(group.removesuffix("[]"))
                if group.endswith("[]"):
                    is_group = isinstance(below, list) and below and isinstance(below[0], dict)
                    inner[group[:-2]] = below if is_group else [{}]
                    inner = inner[group[:-2]][0]
                else:
                    inner[group] = below if isinstance(below, dict) else {}
                    inner = inner[group]
            inner[last] = value
        return whole

    def is_named_in(self, text: str) -> bool:
        """Whether a message says which key it is about, or its list or group."""
        keys = [key.partition("[]")[0] for key, _ in self.values]
        keys += [f"{compose.SHARED_GROUPS.get(schema.type_of(key), key)}=" for key in keys]
        return any(key in text for key in keys)


class Settings:
    """Mappings that are read into the schema, by the controller and by a rank."""

    name, share = "settings", 500

    def draw(self, draw: random.Random) -> Typed:
        """One key or two; now and then a key that is none."""
        if draw.random() < 0.05:
            key = draw.choice(KEYS)[0]
            return Typed(((key + draw.choice(("x", "\x1b[31m", " ", "é")), odd.value(draw)),))
        chosen, way = [draw.choice(KEYS)], draw.choice(("one", "one", "two", "two", "rule"))
        if way == "two":
            group = chosen[0][0].partition(".")[0]
            chosen.append(draw.choice([known for known in KEYS if known[0].partition(".")[0] == group]))
        elif way == "rule":
            chosen = [next(known for known in KEYS if known[0] == key) for key in draw.choice(PAIRS)]
        return Typed(tuple((key, _value(draw, key, *about)) for key, *about in chosen), draw.random() < 0.06)

    def outcome(self, case: Typed, folder: Path) -> str:
        """Taken or refused as the oracle has it, and the same by a rank that reads it from a file."""
        expected, nonsense = expected_of(case)
        try:
            config = as_schema(PipelineConfig, case.mapping())
        except UserError as error:
            has_a_form = any(name in key for key, _ in case.values for name in oracle.FREE_TEXT)
            if nonsense is None and not has_a_form:
                raise Silent(f"sense was refused: {error}") from None
            if not case.is_named_in(str(error)):
                raise Silent(f"no key is named that was typed: {error}") from None
            raise
        if nonsense is not None:
            raise Silent(f"nonsense was taken: {nonsense}")
        check_taken(config, expected)
        if case.also_by_a_rank:
            _read_by_a_rank(config, folder)
        return _checked(config)


class CommandLine:
    """The same, typed: through Hydra, up to where a run would begin; and words that are no settings."""

    name, share = "command line", 8

    def draw(self, draw: random.Random) -> tuple[Typed, list[str]]:
        """What is typed, also word by word."""
        known = [key for key in KEYS if "[]" not in key[0]]
        key, *about = draw.choice(known)
        typed = Typed(((key, _value(draw, key, *about)),))
        words = [f"{key}={_written(value)}" for key, value in typed.values]
        if draw.random() < 0.02:
            words = [f"{key}={'9' * 5_000}"]
        elif draw.random() < 0.4:
            content = odd.damaged(draw, words[0].encode("utf-8", "surrogatepass"))
            return Typed(()), [content.decode("utf-8", "replace").replace("\0", "")[:20_000]]
        return typed, words

    def outcome(self, case: tuple[Typed, list[str]], folder: Path) -> str:
        """Taken or refused as the oracle has it."""
        typed, words = case
        if any(word.startswith("-") for word in words):
            return "flag"
        with mock.patch.object(command_line, "execute", return_value=0) as execute:
            status, printed = command("run", *words)
        outcome = refused_or("accepted", status, printed)
        if not typed.values or "${" in words[0]:
            return outcome
        expected, nonsense = expected_of(typed)
        if outcome == "accepted" and isinstance(nonsense, oracle.No):
            raise Silent(f"nonsense was taken: {nonsense}")
        if outcome == "accepted" and nonsense is None:
            check_taken(execute.call_args.args[1], expected)
        if outcome == "refused" and not typed.is_named_in(printed):
            raise Silent(f"no key is named that was typed: {printed}")
        return outcome


def expected_of(case: Typed) -> tuple[Any, object]:
    """What the settings are when they are taken, and why they must not be; None where they make sense."""
    try:
        expected = oracle.taken(PipelineConfig, case.mapping(), "", {})
    except oracle.No as no:
        return None, no
    return expected, next(oracle.without_sense(oracle.merged(expected, oracle.DEFAULTS)), None)


def check_taken(config: Any, expected: Any) -> None:
    """`Silent` where a setting became another value than was given."""
    if not oracle.holds(to_plain(config), expected):
        raise Silent(f"taken as another value than {expected}")


def _checked(config: PipelineConfig) -> str:
    """Whether a run would begin, were a model and data named, which are those of the demo."""
    model = config.model
    if model.path is None and not model.config:
        model = replace(model, config={"model_type": "llama"})
    if model.config and model.tokenizer.path is None:
        model = replace(model, tokenizer=TokenizerConfig(train_vocab_size=512))
    config = replace(config, model=model)
    for step, rows in ROWS.items():
        part = getattr(config, step.value)
        if not part.data.all_sources():
            part.data = replace(part.data, path=str(PROJECT / "demo" / "data" / rows))
    with mock.patch.object(command_line, "dispatch", lambda arguments: checks.check(config, 1) or 0):
        return "accepted" if command()[0] == 0 else "refused by a check"


def _read_by_a_rank(config: PipelineConfig, folder: Path) -> None:
    """What the controller writes is what a step's ranks read."""
    resolved = state.write_resolved(config, folder)
    for step in config.steps:
        job = load_resolved(resolved, JOBS[step])
        for name in (step.value, "model", "deepspeed", "launch", "seed"):
            if to_plain(getattr(job, name)) != to_plain(getattr(config, name)):
                raise Silent(f"a rank reads another {name} than was composed")


def _value(draw: random.Random, key: str, declared: Any, owner: Any, name: str) -> Any:
    """A value for a key: one that it may have, at the ends of its range, or anything."""
    if key == "model.config" and draw.random() < 0.8:
        sizes = {size: draw.choice((4, 8, 8, 16, 6, *odd.NUMBERS)) for size in draw.sample(oracle.SIZES, 3)}
        return {"model_type": "llama", **sizes}
    about = fields_of(owner)[name].metadata
    return odd.value(draw) if draw.random() < 0.4 else _fitting(draw, declared, about)


def _fitting(draw: random.Random, declared: Any, about: Mapping[str, Any]) -> Any:
    inner = without_none(declared)
    if inner is not declared and draw.random() < 0.1:
        return None
    items = typing.get_args(inner)
    if typing.get_origin(inner) is list:
        return [_fitting(draw, items[0], about) for _ in range(draw.randint(0, 3))]
    if typing.get_origin(inner) is dict:
        return {draw.choice(("a", "sft", "stop")): _fitting(draw, items[1], about) for _ in range(2)}
    if is_dataclass(inner):
        return {}
    if isinstance(inner, type) and issubclass(inner, Enum):
        return draw.choice([*inner.__members__])
    if inner is bool:
        return draw.choice((True, False, "yes", 0))
    if inner not in (int, float):
        return draw.choice(("a", "rows.jsonl", "b/c", *odd.TEXTS))
    ends = [about["range"].minimum, about["range"].maximum]
    steps = (-1, 1) if inner is int else (-1, 1, -1e-9, 1e-9)
    near = [end + step for end in ends for step in steps]
    between = [inner(draw.uniform(*ends)), inner(min(max(draw.choice((0, 1, 2, 8)), ends[0]), ends[1]))]
    return draw.choice([*map(inner, ends), *near, *between])


def _written(value: Any) -> str:
    """A value in the grammar of the command line."""
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_written(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return "null" if value is None else str(value)

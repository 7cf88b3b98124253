"""Command-line overrides in, a checked PipelineConfig out.

Hydra composes; this module decides what is said about it. Overrides are brought into the form that
Hydra understands (`steps=sft`, text that looks like a number, `optim=muon`), the embedded demo is
filled in when nothing is named, and every error names the key, the value and the way out. Nothing
here looks at a file that the configuration names (see `pipeline/checks.py`).
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from common.config import DataConfig
from common.errors import UserError
from common.fields import TOO_DEEP, UnknownKey, as_schema, expected, is_deeper
from common.redact import credentials_in
from common.stage import Step
from common.training_config import OptimConfig
from pipeline import schema
from pipeline.config import CONF, PipelineConfig, register
from pipeline.experiments import content, of_other_rows
from pipeline.habits import meant, not_offered
from pipeline.plan import STAGES

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


SHARED_GROUPS = {DataConfig: "data", OptimConfig: "optim"}  # mounted once per step: data@sft.data
DEFAULT_STEPS = ("sft",)
DEMO = "no model and no data named: running the embedded demo (experiment=demo)"
DEMO_DATA = "no data named: taking the embedded demo's (experiment=demo)"
NAME_OF_A_SECRET = "launch.k8s.secret"  # noqa: S105 - a key
"""A key whose value only names where credentials are."""


@dataclass(frozen=True)
class Prepared:
    """Overrides as Hydra takes them, and what the user should be told about it."""

    overrides: list[str]
    notes: list[str]


def prepare(overrides: Sequence[str], *, multirun: bool = False) -> Prepared:
    """Check the keys of the overrides, rewrite short forms, and add the demo when nothing is named."""
    parsed = [parse(_mounted(parse(_short_steps(text, multirun)))) for text in overrides]
    steps = _steps_of(parsed)
    names_a_job = any(_names_a_job(override, steps or DEFAULT_STEPS) for override in parsed)
    steps = steps or ([*DEFAULT_STEPS] if names_a_job else _steps_in("demo"))
    parsed = [parse(_for_one_step(override, steps)) for override in parsed]
    ready = []
    for override in parsed:
        refuse_credentials({override.key_or_group: _values_of(override)})
        _check_key(override, steps)
        ready.append(_rewritten(override))
    if names_a_job:
        left_out, notes = of_other_rows(parsed)
        return Prepared([*ready, *left_out], notes)
    has_policy = any(override.key_or_group.endswith((".policy", ".reward_model")) for override in parsed)
    return Prepared(["experiment=demo", *ready], [DEMO_DATA if has_policy else DEMO])


def compose(overrides: Sequence[str]) -> PipelineConfig:
    """Compose prepared overrides into the configuration. UserError for whatever Hydra refuses."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            node = hydra_compose("config", overrides=list(overrides))
        return to_config(node, overrides)
    except (HydraException, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise explain(error) from error


def to_config(node: DictConfig, overrides: Sequence[str]) -> PipelineConfig:
    """A composed node as dataclasses, checked against the schema, interpolations resolved."""
    from omegaconf import OmegaConf

    plain = cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    plain.pop("hydra", None)
    as_written = cast(dict[str, Any], OmegaConf.to_container(node))  # with the names of environment variables
    refuse_credentials({key: as_written[key] for key in plain})
    refuse_credentials(plain)
    _replace_what_an_experiment_chose(plain, overrides)
    try:
        return as_schema(PipelineConfig, plain)
    except UnknownKey as error:
        hint = error.hint if "[" in error.key else _did_you_mean(error.key)
        raise UserError(error.message, hint=hint) from None


def refuse_credentials(settings: Mapping[str, Any]) -> None:
    """UserError for a setting that certainly holds a credential; others are written down as they are."""
    for key in credentials_in(settings):
        if key != NAME_OF_A_SECRET and ".columns." not in key:
            raise UserError(
                f"{key} holds what looks like a credential; it would be written where others can read it",
                hint="take it out: HF_TOKEN, WANDB_API_KEY, RLHF_REWARD_TOKEN are read from the environment; "
                "with launch=k8s they come from a Secret: launch.k8s.secret=NAME",
            )


def jobs_of(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every run of a sweep over comma-separated values.

    A sweep that Hydra's own sweeper cannot split (another sweeper's ranges) counts as no job.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if any(text.startswith("hydra/sweeper=") for text in overrides):
        return []
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise explain(error) from error
    return [list(job) for job in jobs]


def share_a_name(configs: Sequence[PipelineConfig]) -> bool:
    """Whether runs of a sweep have the same run_name, and so the same folder.

    One run, or none that is known beforehand, counts as sharing: more of them may follow under that name.
    """
    return len({config.run_name for config in configs}) < max(len(configs), 2)


def name_of_sweep_job(config: PipelineConfig) -> PipelineConfig:
    """The configuration with a run_name of its own within a sweep: the shared one and a hash."""
    from pipeline.state import config_hash

    if config.run_name is None:
        return config
    return dataclasses.replace(config, run_name=f"{config.run_name}-{config_hash(config)[:8]}")


def explain(error: BaseException) -> UserError:
    """What Hydra or OmegaConf found, in our words: key, value, what is allowed."""
    from hydra.errors import MissingConfigException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if isinstance(error, UserError):
        return error
    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    below = error.__cause__ or error.__context__  # Hydra chains an error of a file's content implicitly
    cause = below if isinstance(below, OmegaConfBaseException) else error
    if isinstance(cause, RecursionError):
        return UserError(f"a file that was named holds {TOO_DEEP}")
    first_line = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        key = str(cause.full_key or cause.key)
        return UserError(f"unknown key {key}", hint=_did_you_mean(key))
    if isinstance(cause, OmegaConfBaseException):
        key = str(getattr(cause, "full_key", "") or "")
        first_line = first_line.removeprefix("KeyError raised while resolving interpolation: ").strip('"')
        place = f"{key}: " if key else ""
        hint = expected(key, declared) if (declared := schema.type_of(key)) is not None else None
        return UserError(place + first_line[:1].lower() + first_line[1:], hint=hint)
    if first_line.startswith("Ambiguous value for argument"):
        text = first_line.partition("'")[2].rstrip("'")
        key, _, value = text.partition("=")
        return UserError(
            f"{text}: several values",
            hint=f"a list: '{key}=[{value}]'; one text: '{key}=\"{value}\"'; a sweep over them: add -m",
        )
    return UserError(" ".join(str(error).split()))


def parse(text: str) -> Override:
    """One override as Hydra reads it. UserError, with the way out, for what it cannot read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = text.partition("=")
    try:
        override = OverridesParser.create().parse_override(text)
        if is_deeper(override.value()):
            raise RecursionError
        return override
    except RecursionError:
        raise UserError(f"{key} cannot be read: {TOO_DEEP}") from None
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise UserError(f"{key} cannot be read: {str(error).partition(';')[0]}") from None
    except HydraException as error:
        reason = (str(error).splitlines() or ["not understood"])[0].rpartition("': ")[2]
        if not equals:
            names = text.strip("[]").split(",")
            is_steps = all(name.strip() in Step.__members__ for name in names)
            hint = f"did you mean steps={text}?" if is_steps else _did_you_mean(text)
            raise UserError(f"{text!r} is not of the form key=value", hint=hint) from None
        if (entry := schema.in_a_list(key.lstrip("+~"))) is not None:
            raise UserError(f"{text}: entries of a list cannot be set one by one", hint=entry) from None
        if value.startswith("~"):
            way_out = f"~ is not expanded here; write {key}={Path(value).expanduser()}"
            raise UserError(f"{text} cannot be read", hint=way_out) from None
        if value.startswith(("[", "{")):
            _raise_for_entries(text, key, value, reason)
        inner = value.replace("\\", "\\\\").replace('"', '\\"')
        quoted = shlex.quote(f'{key}="{inner}"')
        raise UserError(f"{text} cannot be read: {reason}", hint=f"quote the value: {quoted}") from None


def _raise_for_entries(text: str, key: str, value: str, reason: str) -> NoReturn:
    """The error for a list or a mapping that cannot be read: quotes around all of it would make it a text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    mended = f"{key}={_ENTRY_WITH_SIGNS.sub(_quoted_entry, value)}"
    hint = "inside of it, quote each text that holds other signs than letters, digits and . : / - _"
    try:
        OverridesParser.create().parse_override(mended)
        hint = f"quote the text inside of it: {shlex.quote(mended)}"
    except HydraException:
        pass
    raise UserError(f"{text} cannot be read: {reason}", hint=hint) from None


_ENTRY_WITH_SIGNS = re.compile(r"""(\w+:\s*)([^\s"'{}\[\],][^"'{}\[\],]*)""")


def _quoted_entry(entry: re.Match[str]) -> str:
    plain = re.fullmatch(r"[\w.:/ +-]*", entry[2])
    return entry[0] if plain else f'{entry[1]}"{entry[2]}"'


def _short_steps(text: str, multirun: bool) -> str:
    """steps=sft and steps=sft,reward as lists; with -m commas separate the runs of a sweep."""
    key, equals, value = text.partition("=")
    if key != "steps" or not equals or not value or value[0] in "[\"'$" or "(" in value:
        return text
    runs = value.split(",") if multirun else [value]
    return "steps=" + ",".join(f"[{run}]" for run in runs)


def _steps_of(overrides: Sequence[Override]) -> list[str]:
    """Names of the steps that the run has: as typed, else as its experiment says; empty when neither does.

    Several runs of a sweep count together.
    """
    typed: dict[str, Any] = {override.key_or_group: override.value() for override in overrides}
    if "steps" in typed:
        runs = getattr(typed["steps"], "list", [typed["steps"]])  # a sweep holds one list for each run
        names = [str(name) for run in runs for name in (run if isinstance(run, list) else [run])]
        return list(dict.fromkeys(names))
    return _steps_in(str(typed.get("experiment")))


def _steps_in(experiment: str) -> list[str]:
    """`steps` of an experiment's file; empty when it does not say, or is not there."""
    named = content(CONF / "experiment" / f"{experiment}.yaml").get("steps") or []
    return [str(name) for name in named]


def _mounted(override: Override) -> str:
    """sft.optim=muon as optim@sft.optim=muon: shared groups are mounted once per step, or more often."""
    text, key = override.input_line or "", override.key_or_group
    group = SHARED_GROUPS.get(schema.type_of(key))
    if group is None or not isinstance(override.value(), str):
        return text
    return text.replace(key, f"{group}@{key}", 1)


def _for_one_step(override: Override, steps: Sequence[str]) -> str:
    """optim=muon as optim@sft.optim=muon where the run has one step; with several it is asked which."""
    text = override.input_line or ""
    if override.key_or_group not in SHARED_GROUPS.values() or override.package is not None:
        return text
    group, value = override.key_or_group, text.partition("=")[2]
    if len(steps) != 1:
        ways = ", ".join(f"{step}.{group}={value}" for step in steps)
        raise UserError(f"{text}: for which step?", hint=f"one or more of {ways}")
    return text.replace(group, f"{group}@{steps[0]}.{group}", 1)


def _check_key(override: Override, steps: Sequence[str]) -> None:
    """An unknown key is an error, also one added with `+`."""
    key = override.key_or_group
    is_own = override.package is None and key not in _groups() and not schema.is_free_form(key)
    if override.is_delete() and is_own and schema.type_of(key) is not None:
        raise UserError(f"{override.input_line}: a key of the schema cannot be deleted", hint=f"set {key}")
    if override.package is not None or key.split(".")[0].split("/")[0] in ("hydra", *_groups()):
        is_group = override.package is not None or "." not in key
        if is_group or schema.type_of(key) is not None or key.startswith("hydra"):
            return
    if schema.type_of(key) is None:
        raise UserError(f"unknown key {key} (in {override.input_line})", hint=_did_you_mean(key, steps))


def _rewritten(override: Override) -> str:
    """The override as Hydra should see it: text stays text, free-form keys may be new."""
    text, key = override.input_line or "", override.key_or_group
    as_text = isinstance(override.value(), bool | int | float) and (schema.is_text(key) or key in _groups())
    if as_text:  # run_name=12e45678 is a name, not infinity
        name, _, value = text.lstrip("+").partition("=")
        return f'{name}="{value}"'
    if override.package is not None or key.startswith("hydra") or override.is_delete():
        return text
    if schema.is_free_form(key) or (isinstance(override.value(), dict) and schema.is_free_form(f"{key}.any")):
        return "++" + text.lstrip("+")
    if override.is_add():
        return text.lstrip("+")  # every key of the schema is there already
    return text


def _names_a_job(override: Override, steps: Sequence[str]) -> bool:
    """Whether an override names a model, an experiment or a step's data.

    Choosing adapters (model=lora) names no model. Where SFT runs it asks for one nevertheless: adapters on
    the demo's random weights would learn next to nothing.
    """
    key = override.key_or_group
    if key == "model":
        return Step.sft.value in steps or any(
            not keys or not {"path", "config"}.isdisjoint(keys) for keys in keys_of_options(override)
        )
    if key in ("experiment", "model.path", "data") or key.startswith("model.config"):
        return True
    return any(key in (f"{step.value}.data.path", f"{step.value}.data.sources") for step in STAGES)


def keys_of_options(override: Override) -> list[set[str]]:
    """Top-level keys of the file of each option that an override chooses for a group; empty for no file."""
    group = CONF / override.key_or_group
    return [set(content(group / f"{option}.yaml")) for option in _values_of(override)]


def _values_of(override: Override) -> list[Any]:
    """The values that an override gives; several in a sweep."""
    value = override.value()
    return [getattr(item, "text", item) for item in getattr(value, "list", [value])]


def _replace_what_an_experiment_chose(plain: dict[str, Any], overrides: Sequence[str]) -> None:
    """What the command line names takes the place of the other form, which an experiment may have set."""
    keys = {text.partition("=")[0].lstrip("+") for text in overrides}
    model = plain.get("model") or {}
    if "model.path" in keys and model.get("path") and not any(k.startswith("model.config") for k in keys):
        model["config"] = {}
        if "model.tokenizer.train_vocab_size" not in keys:
            model["tokenizer"]["train_vocab_size"] = None
    if "model.tokenizer.path" in keys and "model.tokenizer.train_vocab_size" not in keys:
        model["tokenizer"]["train_vocab_size"] = None
    for place in schema.keys_of_type(DataConfig):
        step, _, group = place.partition(".")
        data = (plain.get(step) or {}).get(group) or {}
        path, sources = f"{place}.path", f"{place}.sources"
        chosen = keys & {f"data@{place}", f"/data@{place}"}  # a file of conf/data, which has a path
        if (path in keys or chosen) and sources not in keys:
            data["sources"] = []
        if sources in keys and path not in keys:
            data["path"] = None
        if f"{place}.eval_fraction" in keys and f"{place}.eval_path" not in keys:
            data["eval_path"] = data["eval_split"] = None
        if f"{place}.eval_path" in keys and f"{place}.eval_fraction" not in keys:
            data["eval_fraction"] = None


def _unknown_option(error: Any) -> UserError:
    """deepspeed=zero9: a group has no such file."""
    group, _, option = str(error.missing_cfg_file or "").rpartition("/")
    options = [str(name) for name in error.options or ()]
    near = schema.nearest(option, options)
    listed = f"allowed: {', '.join(sorted(options))}" if options else f"there is no folder conf/{group}"
    hint = f"did you mean {group}={near}? {listed}" if near else listed
    return UserError(f"{group}={option} is unknown", hint=not_offered(option) or hint)


def _did_you_mean(key: str, steps: Sequence[str] = ()) -> str:
    """What other programs call so, the nearest known key, or what there is at the level it was written at."""
    if (known := meant(key, steps)) is not None:
        return known
    if (entry := schema.in_a_list(key)) is not None:
        return entry
    near = schema.nearest(key, [*schema.known_keys(), *_groups()])
    if near is not None:
        return f"did you mean {near}?"
    parent = key.rpartition(".")[0]
    while parent and schema.type_of(parent) is None:
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    level = [k[len(prefix) :] for k in schema.known_keys() if k.startswith(prefix)]
    return f"known {'below ' + parent if parent else 'keys'}: {', '.join(k for k in level if '.' not in k)}"


def _groups() -> list[str]:
    """Folders of `conf/` that hold YAML files."""
    return sorted({path.parent.name for path in CONF.glob("*/*.yaml")})

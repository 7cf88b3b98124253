"""The model card of an artifact: `README.md` with the head that the hub reads, and text for people.

Takes what a manifest says of an artifact, and nothing else, so that the same training gives the same card.
What the card says of a training is gathered in `common/training/training_record.py`. A card is meant to be
filled in: `artifacts.verify` lets it differ. Imports jinja and the hub's client where they are used.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.artifacts import VARIABLES
from common.estimates import Estimate, within_0_and_1
from common.evidence import Z, share_interval
from common.redact import shown
from common.stage import Input, Role, Step
from common.text import plain

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
HERE = 'model_path = "."'
"""The line of a card's programs that says where the model is; `addressed` changes it."""

STEPS = {
    Step.sft.value: "supervised fine-tuning",
    Step.reward.value: "training a reward model on preferences",
    Step.dpo.value: "direct preference optimization (DPO)",
    Step.ppo.value: "reinforcement learning (PPO)",
}
TAKEN_AS = {
    Input.policy.value: "Policy that training started from",
    Input.reward_model.value: "Reward model that training started from",
    Input.reference.value: "Reference of the loss",
}
TASKS = {Role.policy: "text-generation", Role.reward_model: "text-classification"}
LONGEST_ANSWER = 256
"""Tokens that a card's program samples, at most."""
LICENSE = ("license", "license_name", "license_link")
SHARES_OF_PAIRS = ("eval/accuracy", "eval/rewards/accuracies")
STOP_RATE = "stop_rate"
"""Ends the names of shares that have a standard error."""
ERROR = "_se"
"""Ends the name of a metric that is the standard error of another."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(role: Role, details: Mapping[str, Any]) -> str:
    """The text of a card. details: of the artifact's manifest; what it lacks is left out."""
    import jinja2

    template = TEMPLATE.read_text(encoding="utf-8")
    environment = jinja2.Environment(  # noqa: S701 - Markdown, and cells escape what they hold
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": cell, "code": code, "figure": figure}
    return environment.from_string(template).render(told(role, plain(details)))  # as the manifest has them


def told(role: Role, details: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows, by name. Adapters alone name the base model that they are of."""
    adapter_of = details.get("adapter_of")
    training, origin, data = (dict(details.get(name) or {}) for name in ("training", "origin", "data"))
    variables = data.get(VARIABLES) or {}
    named, link = (cell(origin.get(name) or "") for name in ("license_name", "license_link"))
    return {
        "head": head(role, training, origin, adapter_of),
        "role": role.value,
        "adapter_of": adapter_of,
        "how": STEPS.get(training.get("step", "")),
        "size": size_of(details),
        # the base may be stored in another one, in which the adapters were not trained
        "trained_dtype": f', dtype="{details["dtype"]}"' if adapter_of and details.get("dtype") else "",
        "here": HERE,
        "variables": "".join(f", {name}={value!r}" for name, value in variables.items()),
        "answer_length": min(LONGEST_ANSWER, (details.get("context_length") or 2 * LONGEST_ANSWER) // 2),
        "terminators": list(details.get("terminators") or []),
        "calibration": details.get("calibration") or {},
        "origin": origin,
        "licence": (named or cell(origin.get("license") or "")) + (f" ({link})" if link else ""),
        "parents": details.get("parents") or [],
        "taken_as": TAKEN_AS,
        "imported": details.get("imported"),
        "merged": any(
            name.startswith("adapter") for name in (details.get("imported") or {}).get("weights", ())
        ),
        "training": training,
        "rows_sha256": data.get("rows_sha256"),
        "progress": details.get("progress"),
        "measured": measured(details),
    }


def size_of(details: Mapping[str, Any]) -> str:
    """Parameters, dtype and context, as far as they are known, to follow what it is."""
    words = {"parameters": " of {} parameters", "dtype": " in {}", "context_length": ", context {} tokens"}
    return "".join(text.format(figure(details[name])) for name, text in words.items() if details.get(name))


def head(
    role: Role, training: Mapping[str, Any], origin: Mapping[str, Any], adapter_of: str | None = None
) -> str:
    """The card's metadata as YAML; without what is not known."""
    from huggingface_hub import ModelCardData

    step = {"reward": "reward-model"}.get(training.get("step", ""), training.get("step"))
    is_lora = bool(training.get("adapters")) or adapter_of is not None
    tags = ["rlhf-pipeline", *filter(None, [step]), *(["lora"] if is_lora else [])]
    base = adapter_of or origin.get("base_model")
    known = {name: origin[name] for name in LICENSE if origin.get(name)}
    data = ModelCardData(
        **known,
        base_model=base if base is not None and HUB_NAME.fullmatch(base) else None,
        library_name="transformers" if adapter_of is None else "peft",
        pipeline_tag=TASKS[role],
        tags=tags,
    )
    return data.to_yaml()


def addressed(card: str, name: str) -> str:
    """The card with a model's name on the hub where its programs say that the model is in this folder."""
    return card.replace(HERE, f'model_path = "{name}"')


def license_in(readme: Path) -> dict[str, str]:
    """The licence that the head of a card names; empty where there is none, or none that can be read."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    found: Mapping[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        found = metadata_load(readme) or {}
    return {name: found[name] for name in LICENSE if isinstance(found.get(name), str)}


def measured(details: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Held-out metrics: name, before the training and after it, with intervals where they are known."""
    after, before = details.get("metrics") or {}, (details.get("training") or {}).get("before") or {}
    names = [name for name in sorted(after) if name.startswith("eval/") and not name.endswith(ERROR)]
    pairs = _pairs(details)
    return [(name, *(with_interval(side, name, pairs) for side in (before, after))) for name in names]


def _pairs(details: Mapping[str, Any]) -> int:
    """Held-out pairs; of other rows, how many are held out."""
    recorded = (details.get("calibration") or {}).get("pairs")
    rows = (details.get("training") or {}).get("rows") or []
    return int(recorded or sum(row.get("rows_held_out", 0) for row in rows))


def with_interval(metrics: Mapping[str, Any], name: str, pairs: int) -> str:
    """A metric as it is read, with a 95 % interval of a share of pairs or by its standard error."""
    value, error = metrics.get(name), metrics.get(name + ERROR)
    if not isinstance(value, int | float):
        return ""
    if name in SHARES_OF_PAIRS and pairs and 0 <= value <= 1:
        low, high = share_interval(value, pairs)
    elif isinstance(error, int | float) and error > 0:
        of_mean = Estimate(value, value - Z * error, value + Z * error)
        ends = within_0_and_1(of_mean) if name.endswith(STOP_RATE) else of_mean
        low, high = ends.low, ends.high
    else:
        return figure(value)
    return f"{figure(value)} ({figure(low)} to {figure(high)})"


def figure(value: Any) -> str:
    """A number in four figures, a count with its thousands apart, a list in brackets."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return f"[{', '.join(map(figure, value))}]" if isinstance(value, list | tuple) else str(value)


def cell(value: Any) -> str:
    """What stands in a table, on one line and without a credential."""
    return " ".join(shown(figure(value)).split()).replace("|", "\\|")


def code(value: Any) -> str:
    """The same as code."""
    return f"`{cell(value).replace('`', '')}`"

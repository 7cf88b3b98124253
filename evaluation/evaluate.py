"""Which rows are measured by what, for one model or for two on the same rows.

Takes an `EvaluateJob`; prints a table of estimates with intervals and, where asked, writes them and the
numbers of every row to a file. The data decide: completions are sampled and scored where functions or a
reward model are named; else pairs are ordered, and demonstrations have their loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from common.artifacts import write_json
from common.config import DataConfig, to_plain
from common.data import sources
from common.data.columns import rename
from common.data.dataset_types import (
    DEMONSTRATIONS,
    PREFERENCES,
    PROMPTS,
    DatasetType,
    Opened,
    prompts_with_room,
)
from common.decoding.generate import say
from common.errors import UserError
from common.inference_config import EvaluateJob
from common.stage import Role
from evaluation import completions, demonstrations, preferences
from evaluation.inference_model import InferenceModel, load_inference_model, places_of
from evaluation.values import Measured, Values, by_row, changes, estimates, plain, table


@dataclass(frozen=True)
class Outcome:
    """What was measured. models: of each. between: of both together. texts: what each said, by row."""

    keys: Sequence[str]
    models: Sequence[Measured]
    between: Values = field(default_factory=dict)
    texts: Sequence[Mapping[str, list[str]]] = ()


def evaluate(job: EvaluateJob) -> int:
    """Measure, print and write. Returns 0; UserError for what the user can fix."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = {"model": ("MODEL", job.model), "against": ("--against", job.against)}
    models = [
        load_inference_model(path, job.names.get(name, path), key, job.settings.dtype, device)
        for name, (key, path) in named.items()
        if path is not None
    ]
    is_scored = bool(job.functions) or job.reward_model is not None
    kind = PROMPTS if is_scored else dataset_type_of(job.data)
    check_roles(models, kind)
    if kind is PREFERENCES:
        outcome = on_pairs(job, models)
    elif kind is DEMONSTRATIONS:
        outcome = on_demonstrations(job, models)
    else:
        outcome = on_prompts(job, models, device)
    tell(job, kind, models, outcome)
    return 0


def dataset_type_of(data: DataConfig) -> DatasetType[Any]:
    """Whether the first row is a pair or a demonstration. UserError where it is neither."""
    source = data.all_sources()[0]
    raw = next(iter(sources.rows_of(source, lambda place, reason: None)), None)
    if raw is None:
        raise UserError(f"{source.path}: no row can be read", hint="correct its first rows")
    columns = rename(raw.columns, source.columns)
    for kind in (PREFERENCES, DEMONSTRATIONS):
        with contextlib.suppress(UserError):
            kind.recognise(columns, name=source.format, origin=str(raw.place))
            return kind
    raise UserError(
        f"{raw.place} is neither a pair nor a demonstration (columns {', '.join(columns) or 'none'})",
        hint="prompts are scored with --functions package.module:function or --reward-model MODEL",
    )


def check_roles(models: Sequence[InferenceModel], kind: DatasetType[Any]) -> None:
    """UserError for models that these rows say nothing of, and for two that are not for the same."""
    for model in models:
        if model.role is Role.reward_model and kind is not PREFERENCES:
            raise UserError(
                f"{model.key} {model.named} is a reward model, which is measured on pairs",
                hint="name rows with chosen and rejected, or a policy with --reward-model",
            )
        if model.role is not models[0].role:
            raise UserError(
                f"{model.key} {model.named} is a {model.role.value}, MODEL a {models[0].role.value}",
                hint="compare two of one role",
            )


def on_demonstrations(job: EvaluateJob, models: Sequence[InferenceModel]) -> Outcome:
    """Loss and accuracy of each model."""
    read = _read(job, models, DEMONSTRATIONS)
    keys = _common([dict.fromkeys(map(rows.place, range(len(rows)))) for rows in read])
    if any(not model.reads_as(models[0]) for model in models):
        say("note: the two models make other tokens of a text: compare loss_per_row, not losses per token")
    wanted = set(keys)
    pairs = zip(models, read, strict=True)
    return Outcome(keys, [demonstrations.measure(model, rows, wanted) for model, rows in pairs])


def on_pairs(job: EvaluateJob, models: Sequence[InferenceModel]) -> Outcome:
    """How each model orders the pairs, and the log-ratios of two policies."""
    read = _read(job, models, PREFERENCES)
    places = list(map(places_of, read))
    keys = _common(places)
    measured = [
        preferences.measure(model, rows, {key: found[key] for key in keys})
        for model, rows, found in zip(models, read, places, strict=True)
    ]
    between = preferences.compared(*(each.values for each in measured)) if len(models) > 1 else {}
    return Outcome(keys, measured, between)


def on_prompts(job: EvaluateJob, models: Sequence[InferenceModel], device: torch.device) -> Outcome:
    """Scores of completions of each model, and how often those of the first win."""
    functions = completions.named_functions(job.functions)
    judges = []
    if job.reward_model is not None:
        typed = job.names.get("reward_model", job.reward_model)
        judges.append(
            load_inference_model(
                job.reward_model, typed, "--reward-model", job.settings.dtype, device, Role.reward_model
            )
        )
    read = _read(job, models, prompts_with_room(job.settings.max_new_tokens))
    places = list(map(places_of, read))
    keys = _common(places)
    for rows, found in zip(read, places, strict=True):
        completions.check_columns(rows, (found[key] for key in keys), functions)
    answers = []
    for model, rows, found in zip(models, read, places, strict=True):
        answers.append(completions.answer(model, rows, {key: found[key] for key in keys}, job.settings))
        completions.score_by_functions(answers[-1], functions)
    for judge in judges:
        completions.score_by_model(judge, list(zip(models, answers, strict=True)))
    between = completions.wins(*answers) if len(answers) > 1 else {}
    return Outcome(keys, [each.measured() for each in answers], between, [each.texts for each in answers])


def _read(job: EvaluateJob, models: Sequence[InferenceModel], kind: DatasetType[Opened]) -> list[Opened]:
    """The rows as each model reads them. What became of them is said once for models that read alike."""
    heard: set[str] = set()

    def say_once(line: str) -> None:
        if line not in heard:
            heard.add(line)
            say(line)

    whole = job.whole_context
    return [model.rows(job.data, kind, whole_context=whole, say=say_once) for model in models]


def _common(places: Sequence[Iterable[str]]) -> list[str]:
    """The keys that all have, in the order of the first; says how many are left out."""
    others = [set(each) for each in places[1:]]
    first = list(places[0])
    kept = [key for key in first if all(key in each for each in others)]
    if not kept:
        raise UserError("no row is left that all models can read", hint="see what became of them above")
    if left_out := len(set(first).union(*others)) - len(kept):
        say(f"note: {left_out:,} rows are left out, which not all models have: see what was dropped above")
    return kept


def tell(
    job: EvaluateJob, kind: DatasetType[Any], models: Sequence[InferenceModel], outcome: Outcome
) -> None:
    """Print the table, and write the file."""
    values = [measured.values for measured in outcome.models]
    found = [estimates(each) for each in values]
    heads, columns = [model.named for model in models], [*found]
    between = estimates(outcome.between)
    if len(found) > 1:
        heads, columns = [*heads, "change"], [*columns, changes(*values)]
    say(f"\n{kind.name}: {len(outcome.keys):,} rows; in brackets 95% intervals")
    say("\n".join(table(heads, columns)))
    if between:
        say("\n".join(["", *table([f"{heads[0]} against {heads[1]}"], [between])]))
    if job.out is not None:
        names = ("metrics", "against", "change")
        write_json(job.out, {
            "kind": kind.name, "models": job.names, "data": to_plain(job.data.all_sources()),
            "settings": to_plain(asdict(job.settings)), "functions": job.functions,
            **{name: plain(each) for name, each in zip(names, columns, strict=False)},
            **({"between": plain(between)} if between else {}),
            "rows": _rows_of(outcome),
        })  # fmt: skip
        say(f"\nwritten   {job.out}")


def _rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    """What is known of each row: of MODEL as it is, of the other below `against`."""
    first, *others = (measured.rows for measured in outcome.models)
    rows = by_row({**first, **outcome.between}, outcome.keys)
    for number, values in enumerate(others):
        for row, other in zip(rows, by_row(values, outcome.keys), strict=True):
            row["against"] = {**other, **_said(outcome, number + 1, row["row"])}
    return [{**row, **_said(outcome, 0, row["row"])} for row in rows]


def _said(outcome: Outcome, number: int, key: str) -> dict[str, Any]:
    return {"completions": outcome.texts[number][key]} if outcome.texts else {}

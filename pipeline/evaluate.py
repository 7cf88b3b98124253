"""`python -m pipeline evaluate MODEL --data FILE`: what a model is worth on rows, with intervals.

Takes a policy or a reward model in every form that `chat` takes a policy, and rows in every form that steps
take; the work is done by a process of its own, `evaluation`. Trains nothing and keeps nothing but what
`--out` names.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.artifacts import read_manifest
from common.errors import UserError
from common.files import disk_errors
from common.handoff import check_is_artifact
from common.inference_config import EvaluateJob, EvaluationSettings
from common.stage import Role
from pipeline.config import PipelineConfig
from pipeline.generate import cached_rows, check_engine, work
from pipeline.options import Options, data_given, data_of, fields_given
from pipeline.sources import artifact_of, artifacts_in, models_below, role_of_published
from step3_ppo.rewards.config import check_reference

EVALUATOR = "evaluation"

Say = Callable[[str], None]


def evaluate_verb(arguments: Sequence[str], *, say: Say = print) -> int:
    """The verb. Returns the exit status of its process."""
    given, typed = evaluate_options(arguments)
    output_dir = PipelineConfig().output_dir
    data = data_of(given.data, "--data", typed, cached_rows(output_dir))
    settings = fields_given(EvaluationSettings, given)
    check_engine(settings)
    if given.out is not None:
        check_new(Path(given.out))
    for reference in given.functions:
        check_reference(reference, "--functions")
    models = models_below(output_dir)
    model = artifact_of_any(given.model, "MODEL", models, say)
    against = None if given.against is None else artifact_of_any(given.against, "--against", models, say)
    judge = None if given.reward_model is None else judge_of(given.reward_model, models, say)
    named = {"model": given.model, "against": given.against, "reward_model": given.reward_model}
    return work(
        EVALUATOR,
        EvaluateJob(
            model, against, data, given.functions, judge, settings, given.out, "max_length" not in typed,
            {name: text for name, text in named.items() if text is not None},
        ),
    )  # fmt: skip


def check_new(out: Path) -> None:
    """Make the folder of a file that is to be written. UserError where that, or the file, cannot be."""
    if out.exists():
        raise UserError(f"--out {out} exists, and nothing is overwritten", hint="name a new file")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)


def evaluate_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """What was typed after `evaluate`, and the keys of data. UserError for what cannot be read."""
    others, typed = data_given(arguments)
    parser = Options("evaluate", "MODEL --data FILE", "Measure a model on rows.")
    what = "an artifact, a step, a run (its policy), a model's folder, a hub model"
    parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument("--data", metavar="FILE", help="as sft.data.path; further keys as data.KEY=VALUE")
    parser.add_argument("--against", metavar="MODEL", help="another, measured on the same rows")
    parser.add_argument("--functions", nargs="+", default=[], metavar="MODULE:NAME", help="score completions")
    parser.add_argument("--reward-model", metavar="MODEL", help="scores completions, and judges --against")
    parser.add_argument("--out", metavar="FILE.json", help="the numbers, in all and by row")
    parser.add_fields(EvaluationSettings)
    return parser.parse_args(others), typed


def artifact_of_any(named: str, key: str, models: Path, say: Say) -> str:
    """The artifact that was named: of a run its newest policy, else its reward model; of a folder that
    transformers reads what its config says."""
    for role in (Role.policy, Role.reward_model):
        if found := artifacts_in(Path(named), role):
            return str(found[0])
    role = role_of_published(Path(named).expanduser())
    path = artifact_of(named, role, key, models, say)
    check_is_artifact(path, role, key)
    return path


def judge_of(named: str, models: Path, say: Say) -> str:
    """The artifact of a reward model. UserError where it is none."""
    path = artifact_of(named, Role.reward_model, "--reward-model", models, say)
    check_is_artifact(path, Role.reward_model, "--reward-model")
    if (role := read_manifest(path).role) is not Role.reward_model:
        raise UserError(f"--reward-model {named} is a {role and role.value}", hint="name a reward model")
    return path

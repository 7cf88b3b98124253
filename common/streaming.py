"""Which settings go together with `data.streaming`, under which nobody knows how many rows there are."""

from __future__ import annotations

from common.config import DataConfig
from common.errors import UserError
from common.stage import Step
from common.training_config import TrainConfig


def check_streaming(data: DataConfig, train: TrainConfig, step: Step, name: str = "data") -> None:
    """UserError where a setting needs the number of rows, which is known when the last one is read.

    name: of the data among the step's settings.
    """
    if not data.streaming:
        return
    key = f"{step.value}.{name}"
    asked = f"{key}.streaming=true"
    if step is not Step.sft:
        raise _refused(asked, f"{step.value} reads its rows again and again", f"{key}.streaming=false")
    if train.max_steps is None:
        why = f"how many steps {step.value}.train.epochs={train.epochs:g} comes to is known when all are read"
        raise _refused(asked, why, f"{step.value}.train.max_steps=N")
    if data.held_out_fraction():
        given = "" if data.eval_fraction is not None else " (unless it is set)"
        why = f"{key}.eval_fraction={data.held_out_fraction():g}{given} is a share of all rows"
        raise _refused(asked, why, f"{key}.eval_path=FILE, or {key}.eval_fraction=0")
    for at, source in enumerate(data.all_sources()):
        named = f"{key}.sources[{at}]"
        if source.weight != 1:
            why = f"{named}.weight={source.weight:g} is a share of its rows"
            raise _refused(asked, why, f"{named}.weight=1, or {key}.streaming=false")
        if source.max_rows is not None:
            why = f"{named}.max_rows={source.max_rows} is drawn from all rows"
            raise _refused(asked, why, f"leave it out; {step.value}.train.max_steps bounds what is read")


def _refused(asked: str, why: str, way_out: str) -> UserError:
    return UserError(f"{asked} reads rows while they are trained on, and {why}", hint=way_out)

"""Steps in, an ordered and wired list of stages out.

Pure: reads no file and starts nothing. `STAGES` is the table of steps that exist; a step's stage
says what it consumes and produces, and everything here follows from that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.errors import UserError
from common.stage import Input, Stage, Step
from pipeline.config import PipelineConfig
from step1_sft.config import STAGE as SFT
from step2_dpo.config import STAGE as DPO
from step2_reward.config import STAGE as REWARD
from step3_ppo.config import STAGE as PPO

STAGES: Mapping[Step, Stage] = {stage.name: stage for stage in (SFT, REWARD, DPO, PPO)}
EXPORT = "export"
"""Where in its own folder a step leaves its artifact."""


@dataclass(frozen=True)
class Wired:
    """A stage and where each artifact that it uses comes from."""

    stage: Stage
    sources: Mapping[Input, Step | str] = field(default_factory=dict)  # an earlier step, or a path

    def folder_of(self, taken: Input, run_dir: Path) -> Path:
        """Where the artifact is, or will be when the run gets there."""
        source = self.sources[taken]
        return run_dir / source.value / EXPORT if isinstance(source, Step) else Path(source)


def stages_of(steps: Sequence[Step]) -> list[Stage]:
    """The stages of the named steps, in the order in which steps may follow each other."""
    return [STAGES[step] for step in Step if step in steps]


def wire(
    steps: Sequence[Step],
    given: Mapping[tuple[Step, Input], str] | None = None,
    *,
    needs: Callable[[Step, Input], bool] = lambda step, taken: True,
    can_lack: Collection[Input] = (),
) -> list[Wired]:
    """Order the steps and find the source of every artifact that they use.

    given: paths the user named, by step and input; they come before earlier steps. The latest earlier
    step that produces its role is an input's source. needs: whether a step's settings make use of an
    input that its stage consumes. can_lack: those that are left out where they have no source. UserError when
    another has none, or a path is named in vain.
    """
    paths = given or {}
    wired: list[Wired] = []
    for stage in stages_of(steps):
        sources: dict[Input, Step | str] = {}
        for taken in stage.consumes:
            path = paths.get((stage.name, taken))
            made = any(other.stage.produces is taken.role for other in wired) and not taken.is_named
            if not needs(stage.name, taken):
                if path is not None:
                    raise _in_vain(stage, taken, path)
            elif path is not None:
                sources[taken] = path
            elif made or not (taken.is_named or taken in can_lack):
                sources[taken] = _earlier(stage, taken, wired)
        wired.append(Wired(stage, sources))
    return wired


def wire_run(config: PipelineConfig, *, can_lack: Collection[Input] = ()) -> list[Wired]:
    """The run's steps in order, with the artifacts that the user named and those of earlier steps.

    A step's settings may have `needs(taken)`; without it a step uses all that its stage consumes. can_lack:
    see `wire`.
    """

    def needs(step: Step, taken: Input) -> bool:
        asked = getattr(getattr(config, step.value), "needs", None)
        return asked is None or bool(asked(taken))

    return wire(config.steps, named_sources(config), needs=needs, can_lack=can_lack)


def named_sources(config: PipelineConfig) -> dict[tuple[Step, Input], str]:
    """Paths the user named, such as reward.policy, by step and input."""
    given = {}
    for stage in stages_of(config.steps):
        for taken in stage.consumes:
            path = getattr(getattr(config, stage.name.value), taken.value)
            if path is not None:
                given[stage.name, taken] = path
    return given


def start_of(step: Step, wired: Sequence[Wired], taken: Input = Input.policy) -> str | None:
    """The path of the artifact whose weights the step starts from; None when that is the base model.

    Followed through earlier steps of the run: DPO after SFT starts from the base model, and so does the
    reward model that PPO scores with. taken: which of the artifacts that the step uses is followed.
    """
    sources = {w.stage.name: w.sources for w in wired}
    source = sources[step].get(taken) if step in sources else None
    while isinstance(source, Step):
        source = sources[source].get(Input.policy) if source in sources else None
    return source


def with_sources(config: PipelineConfig, wired: Sequence[Wired], run_dir: Path) -> PipelineConfig:
    """The configuration with a path for every artifact that a step uses, as the ranks read it."""
    filled = {}
    for step in wired:
        name = step.stage.name.value
        paths = {taken.value: str(step.folder_of(taken, run_dir)) for taken in step.sources}
        filled[name] = replace(getattr(config, name), **paths)
    return replace(config, **filled)


def _earlier(stage: Stage, taken: Input, before: Sequence[Wired]) -> Step:
    for other in reversed(before):
        if other.stage.produces is taken.role:
            return other.stage.name
    name = stage.name.value
    earlier = itertools.takewhile(lambda step: step is not stage.name, Step)
    makers = [step.value for step in earlier if STAGES[step].produces is taken.role]
    add = f"add {' or '.join(makers)} to steps, or " if makers else ""
    ways = f"{add}set {name}.{taken.value}=PATH, also of a published model"
    if taken is Input.reward_model:
        ways += f", or score without one: '{name}.rewards=[{{function: package.module:function}}]'"
    raise UserError(f"{name} needs a {taken.value}", hint=ways)


def _in_vain(stage: Stage, taken: Input, path: str) -> UserError:
    key = f"{stage.name.value}.{taken.value}"
    return UserError(
        f"{key}={path} has no effect: with these settings {stage.name.value} uses no {taken.value}",
        hint=f"leave it out, or {key}=null where an experiment names it",
    )

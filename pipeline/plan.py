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
from common.stage import Role, Stage, Step
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
    sources: Mapping[Role, Step | str] = field(default_factory=dict)  # an earlier step, or a path

    def folder_of(self, role: Role, run_dir: Path) -> Path:
        """Where the artifact is, or will be when the run gets there."""
        source = self.sources[role]
        return run_dir / source.value / EXPORT if isinstance(source, Step) else Path(source)


def stages_of(steps: Sequence[Step]) -> list[Stage]:
    """The stages of the named steps, in the order in which steps may follow each other."""
    return [STAGES[step] for step in Step if step in steps]


def wire(
    steps: Sequence[Step],
    given: Mapping[tuple[Step, Role], str] | None = None,
    *,
    needs: Callable[[Step, Role], bool] = lambda step, role: True,
    can_lack: Collection[Role] = (),
) -> list[Wired]:
    """Order the steps and find the source of every artifact that they use.

    given: paths the user named, by step and role; they come before earlier steps. The latest
    earlier step that produces a role is its source. needs: whether a step's settings make use of a
    role that its stage consumes. can_lack: roles that are left out where they have no source. UserError when
    another has none, or a path is named in vain.
    """
    paths = given or {}
    wired: list[Wired] = []
    for stage in stages_of(steps):
        sources: dict[Role, Step | str] = {}
        for role in stage.consumes:
            path = paths.get((stage.name, role))
            made = any(other.stage.produces is role for other in wired)
            if needs(stage.name, role) and (path is not None or made or role not in can_lack):
                sources[role] = path if path is not None else _earlier(stage, role, wired)
            elif path is not None:
                raise _in_vain(stage, role, path)
        wired.append(Wired(stage, sources))
    return wired


def wire_run(config: PipelineConfig, *, can_lack: Collection[Role] = ()) -> list[Wired]:
    """The run's steps in order, with the artifacts that the user named and those of earlier steps.

    A step's settings may have `needs(role)`; without it a step uses all that its stage consumes. can_lack:
    see `wire`.
    """

    def needs(step: Step, role: Role) -> bool:
        asked = getattr(getattr(config, step.value), "needs", None)
        return asked is None or bool(asked(role))

    return wire(config.steps, named_sources(config), needs=needs, can_lack=can_lack)


def named_sources(config: PipelineConfig) -> dict[tuple[Step, Role], str]:
    """Paths the user named, such as reward.policy, by step and role."""
    given = {}
    for stage in stages_of(config.steps):
        for role in stage.consumes:
            path = getattr(getattr(config, stage.name.value), role.value)
            if path is not None:
                given[stage.name, role] = path
    return given


def start_of(step: Step, wired: Sequence[Wired], role: Role = Role.policy) -> str | None:
    """The path of the artifact whose weights the step starts from; None when that is the base model.

    Followed through earlier steps of the run: DPO after SFT starts from the base model, and so does the
    reward model that PPO scores with. role: which of the artifacts that the step uses is followed.
    """
    sources = {w.stage.name: w.sources for w in wired}
    source = sources[step].get(role) if step in sources else None
    while isinstance(source, Step):
        source = sources[source].get(Role.policy) if source in sources else None
    return source


def with_sources(config: PipelineConfig, wired: Sequence[Wired], run_dir: Path) -> PipelineConfig:
    """The configuration with a path for every artifact that a step uses, as the ranks read it."""
    filled = {}
    for step in wired:
        name = step.stage.name.value
        paths = {role.value: str(step.folder_of(role, run_dir)) for role in step.sources}
        filled[name] = replace(getattr(config, name), **paths)
    return replace(config, **filled)


def _earlier(stage: Stage, role: Role, before: Sequence[Wired]) -> Step:
    for other in reversed(before):
        if other.stage.produces is role:
            return other.stage.name
    name = stage.name.value
    earlier = itertools.takewhile(lambda step: step is not stage.name, Step)
    makers = [step.value for step in earlier if STAGES[step].produces is role]
    add = f"add {' or '.join(makers)} to steps, or " if makers else ""
    ways = f"{add}set {name}.{role.value}=PATH, also of a published model"
    if role is Role.reward_model:
        ways += f", or score without one: '{name}.rewards=[{{function: package.module:function}}]'"
    raise UserError(f"{name} needs a {role.value}", hint=ways)


def _in_vain(stage: Stage, role: Role, path: str) -> UserError:
    key = f"{stage.name.value}.{role.value}"
    return UserError(
        f"{key}={path} has no effect: with these settings {stage.name.value} uses no {role.value}",
        hint=f"leave it out, or {key}=null where an experiment names it",
    )

"""What the user names as a policy or a reward model, settled as an artifact that is verified.

Takes a configuration in which `STEP.policy` or `STEP.reward_model` is an artifact, a run, a folder that
transformers reads, or a hub model; returns it with artifacts in their place. A published model is imported
once, by a process of its own, and kept by content under `<output_dir>/.cache/models`. In `model.path` only a
run is replaced: SFT starts from published models as they are. Rows are settled in `rows.py`. Functions that
score are tried by a process, too.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from common.artifacts import MANIFEST, Artifact, content_sha256, read_json
from common.errors import UserError
from common.files import OUTPUT_DIR, disk_errors, written_where, written_with
from common.handoff import check_same_tokens, load_named, scores_text, similar
from common.stage import Input, Role, Step
from common.streaming import check_streaming
from launch.agent import STOPPED
from launch.local import Job
from launch.supervise import supervise
from pipeline.config import PipelineConfig
from pipeline.options import Options
from pipeline.plan import EXPORT, STAGES, Wired, named_sources, start_of, wire_run
from pipeline.rows import settle_rows
from pipeline.state import data_of, fingerprint, run_name, write_resolved
from step3_ppo.config import CriticStart

IMPORTER = "common.training.import_model"
ADAPTER_CONFIG = "adapter_config.json"

Say = Callable[[str], None]


def settle_sources(
    config: PipelineConfig, say: Say = print, *, can_lack: Collection[Input] = ()
) -> PipelineConfig:
    """The configuration with an artifact for everything that the user named, each verified.

    Those that meet in a step must read text alike, also where one of them is what another is made from.
    can_lack: see `plan.wire`. UserError naming the key where there is nothing that fits.
    """
    for step in config.steps:  # before a model is imported
        for key, data in data_of(config, step).items():
            check_streaming(data, getattr(config, step.value).train, step, key.partition(".")[2])
    models = models_below(config.output_dir)
    config = replace(config, run_name=run_name(config))  # of what was typed, on all machines
    options = ["--trust-remote-code"] if config.model.trust_remote_code else []
    for (step, taken), named in named_sources(config).items():
        path = artifact_of(named, taken.role, f"{step.value}.{taken.value}", models, say, options=options)
        settled = replace(getattr(config, step.value), **{taken.value: path})
        config = replace(config, **{step.value: settled})
    if config.model.path is not None and (found := artifacts_in(Path(config.model.path), Role.policy)):
        config = replace(config, model=replace(config.model, path=str(found[0])))
    loaded: dict[tuple[str, Role], Artifact] = {}
    wired = wire_run(config, can_lack=can_lack)
    for each in wired:
        for taken, source in each.sources.items():
            if not isinstance(source, Step) and (source, taken.role) not in loaded:
                key = f"{each.stage.name.value}.{taken.value}"
                loaded[source, taken.role] = load_named(source, taken.role, key)
    if any(scores_text(artifact) for artifact in loaded.values()):
        config = with_critic_of_policy(config, say)
    for each in wired:
        starts = [(start_of(each.stage.name, wired, taken), taken.role) for taken in each.sources]
        met = [loaded.get((path, role)) or loaded.get((path, Role.policy)) for path, role in starts if path]
        for left, right in itertools.combinations(filter(None, met), 2):
            check_same_tokens(left, right)
    return settle_rows(config, say)


def with_critic_of_policy(config: PipelineConfig, say: Say) -> PipelineConfig:
    """The critic begins as the policy where the reward model is given text: it reads the policy's tokens.

    UserError where it was told to begin as the reward model.
    """
    critic = config.ppo.critic
    if not config.ppo.has_critic or critic.start is CriticStart.policy:
        return config
    if critic.start is CriticStart.reward_model:
        raise UserError(
            "ppo.critic.start=reward_model cannot be: a critic reads the policy's tokens, and this reward "
            "model is given text",
            hint="ppo.critic.start=policy, or leave it out",
        )
    say("note: the critic begins as the policy, with a new head: the reward model reads other tokens")
    critic = replace(critic, start=CriticStart.policy)
    return replace(config, ppo=replace(config.ppo, critic=critic))


def check_functions(config: PipelineConfig, wired: Sequence[Wired], run_dir: Path) -> int:
    """Let PPO import what it scores with, and look for vLLM, before hours are spent on the steps before it.

    A process of the step does it, since it is the user's code: it prints what is wrong. Returns its exit
    status; 0 without asking where there is nothing to look at, or PPO is done.
    """
    steps = {step.stage.name: step for step in wired}
    done = (run_dir / Step.ppo.value / EXPORT / MANIFEST).exists()
    asks = config.ppo.names_code or config.ppo.rollout.vllm_here
    if Step.ppo not in steps or not asks or (done and not config.force):
        return 0
    with tempfile.TemporaryDirectory(prefix="rlhf_check_") as folder:
        resolved = write_resolved(config, Path(folder))
        job = Job(steps[Step.ppo].stage.module, ("--check", "--config", str(resolved)))
        ended = supervise(job)
    return STOPPED if ended.stopped else ended.status


def models_below(output_dir: str) -> Path:
    """Where imported models are kept."""
    return Path(output_dir) / ".cache" / "models"


def artifact_of(
    named: str, role: Role, key: str, models: Path, say: Say = print, *, options: Sequence[str] = ()
) -> str:
    """The folder of the artifact that `key=named` means: of a run or step the newest with this role, of a
    published model what is made of it below `models`. As it was named where it is neither.

    options: of the importer.
    """
    path = Path(named)
    if found := artifacts_in(path, role):
        return str(found[0])
    if is_published(named):
        return str(import_model(named, role, f"{key}={named}", models, say, options))
    is_run = any((path / step.value).is_dir() for step in Step)
    below = sorted(path.iterdir()) if named and path.is_dir() and not is_run else []
    if runs := [folder for folder in below if artifacts_in(folder, role)]:
        listed = ", ".join(map(str, runs[:8])) + (", ..." if len(runs) > 8 else "")
        raise UserError(
            f"{key}={path} holds {len(runs)} run(s) with a {role.value}, and is none itself",
            hint=f"name one: {listed}",
        )
    return named


def artifacts_in(path: Path, role: Role) -> list[Path]:
    """The artifact at a path, of a step, or of a run, those of its latest steps first; empty without one."""
    makers = [step for step in reversed(Step) if STAGES[step].produces is role]
    below = [path / EXPORT, *(path / step.value / EXPORT for step in makers)]
    return [folder for folder in (path, *below) if (folder / MANIFEST).exists()]


def is_published(named: str) -> bool:
    """Whether it is a folder that transformers or peft reads, or can be a hub model's name, ORG/NAME@REV."""
    path = Path(named).expanduser()
    if path.exists():
        return any((path / name).exists() for name in ("config.json", ADAPTER_CONFIG))
    is_hub_name = named.count("/") == 1 and not named.startswith((".", "/", "~")) and not named.endswith("/")
    return is_hub_name and not path.parent.exists()


def role_of_published(folder: Path) -> Role:
    """A reward model where its config names a sequence classifier; else a policy."""
    try:
        heads = read_json(folder / "config.json")["architectures"]
        is_classifier = any(name.endswith("ForSequenceClassification") for name in heads)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Role.policy
    return Role.reward_model if is_classifier else Role.policy


def import_model(named: str, role: Role, typed: str, models: Path, say: Say, options: Sequence[str]) -> Path:
    """The artifact that is made of a published model, found again by its content (a hub model: its name).

    typed: what messages call it. options: of the importer.
    """
    path = Path(named).expanduser()
    content = fingerprint(path)["sha256"] if path.exists() else named
    name = Path(named.partition("@")[0]).name or "model"
    out = models / f"{name}-{content_sha256([content, role.value, *options])[:12]}"
    if (out / MANIFEST).exists():
        say(f"{typed} was imported before: {out}")
        return out
    say(f"{typed} is imported as an artifact: {out}")
    # a verb without settings keeps it below the working directory
    elsewhere = f"python -m pipeline import {named} --out FOLDER, and name that"
    with written_with(OUTPUT_DIR if written_where() == OUTPUT_DIR else elsewhere):
        start_import(named, role, typed, out, options)
    return out


def import_verb(arguments: Sequence[str], *, say: Say = print) -> int:
    """`python -m pipeline import MODEL --out FOLDER`: an artifact of a published model. Returns 0."""
    given = import_options(arguments)
    if given.out.exists():
        raise UserError(f"--out {given.out} exists, and nothing is overwritten", hint="name a new folder")
    place, role = Path(given.model).expanduser(), Role(given.role)
    if not is_published(given.model):
        if not place.exists():
            raise UserError(f"{given.model} does not exist", hint=similar(Path(given.model)))
        found = "holds neither config.json nor adapter_config.json" if place.is_dir() else "is a file"
        raise UserError(f"{given.model} {found}", hint="name the folder of a saved model, or ORG/NAME")
    if role is Role.policy and role_of_published(place) is Role.reward_model:
        raise UserError(f"{given.model} is a sequence classifier, and no policy", hint="--as reward_model")
    options = ["--chat-template", given.chat_template] if given.chat_template else []
    options += ["--trust-remote-code"] if given.trust_remote_code else []
    start_import(given.model, role, given.model, given.out, options)
    artifact = Artifact.load(given.out, role)
    say(f"artifact  {given.out} ({artifact.sha256[:12]}), a {given.role}")
    return 0


def import_options(arguments: Sequence[str]) -> argparse.Namespace:
    """What was typed after `import`. UserError for what cannot be read."""
    parser = Options("import", "MODEL --out FOLDER", "Make an artifact of a published model.")
    parser.add_argument("model", metavar="MODEL", help="a model's folder, or ORG/NAME@REVISION")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the artifact's folder")
    parser.add_argument("--as", dest="role", choices=[role.value for role in Role], default=Role.policy.value)
    parser.add_argument("--chat-template", metavar="NAME", help="as model.chat_template, in place of its own")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code of the model's own")
    return parser.parse_args(list(arguments))


def start_import(named: str, role: Role, typed: str, out: Path, options: Sequence[str] = ()) -> None:
    """Make the artifact `out` of a published model. SystemExit where its process has said why it did not."""
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    path, _, revision = named.partition("@") if not Path(named).expanduser().exists() else (named, "", "")
    arguments = [path, "--out", str(out), "--role", role.value, f"--named={typed}", *options]
    outcome = supervise(Job(IMPORTER, (*arguments, *(["--revision", revision] if revision else []))))
    if outcome.status != 0:
        raise SystemExit(outcome.status)

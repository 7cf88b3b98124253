"""The command line: `python -m pipeline VERB ...`, also installed as `rlhf`.

Takes the verb off the arguments and hands the rest to it. What the user can fix ends with exit
status 2 and no traceback. Hydra's own flags (-m, --cfg, --help, --info, ...) are Hydra's own.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.files import OUTPUT_DIR, written_with
from common.redact import shown
from common.text import did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from pipeline.config import PipelineConfig
    from pipeline.sweep import Ended

USAGE = """\
usage: python -m pipeline VERB ...

  run [overrides]       run the steps; the same command again resumes, or skips what is done
  plan [overrides]      steps, data, schedule, memory and launch command, before a device is touched
  preview [overrides]   rows as the model sees them, with the trained tokens marked
  verify PATH           re-hash an artifact, a checkpoint or a whole run
  report RUN [RUN ...]  one HTML page: curves, samples, lineage; of several runs side by side
  dashboard [PROJECT]   the same sections on W&B: a workspace and a report
  chat PATH [options]   talk to a policy in the terminal
  generate MODEL ...    completions of a file of prompts, resumable
  evaluate MODEL ...    loss, ordered pairs or rewards on rows, with intervals; two models side by side
  export PATH [options] an artifact of a checkpoint: the best, the last, any; other dtypes, the hub, GGUF
  import MODEL --out F  an artifact of a model that others published
  doctor                what this machine can do, and what would stop a run on it
  explain KEY           type, default and meaning of a key, or of all keys of a group

  python -m pipeline run                                              the embedded demo: sft, reward, ppo
  python -m pipeline run model.path=FOLDER sft.data.path=FILE.jsonl   your model, your data
  python -m pipeline run 'steps=[sft,reward]'                         SFT, then a reward model from it
  python -m pipeline run 'steps=[sft,dpo]'                            SFT, then preferences without one
  python -m pipeline run 'steps=[dpo]' dpo.policy=runs/NAME/sft/export dpo.data.path=PAIRS.jsonl
  python -m pipeline run 'steps=[sft,reward,ppo]' model.path=FOLDER sft.data.path=ROWS.jsonl \\
      reward.data.path=PAIRS.jsonl ppo.data.path=PROMPTS.jsonl        the whole chain
  python -m pipeline run 'steps=[ppo]' ppo.policy=FOLDER ppo.reward_model=FOLDER ppo.data.path=PROMPTS.jsonl
  python -m pipeline chat runs/NAME                                   its newest policy
  python -m pipeline generate runs/NAME --prompts PROMPTS.jsonl --out COMPLETIONS.jsonl
  python -m pipeline evaluate runs/NAME --data ROWS.jsonl --against FOLDER
  python -m pipeline run --help                                       all settings
"""

VERBS = (
    "run", "plan", "preview", "verify", "report", "dashboard", "chat", "generate", "evaluate", "export",
    "import", "doctor", "explain",
)  # fmt: skip
TAKES = {
    "verify": (
        "PATH", "runs/NAME", "Re-hash an artifact, a checkpoint or a whole run, and check its lineage.",
        "a run's folder, that of a step, an artifact or a checkpoint, or what runs have cached",
    ),
    "explain": (
        "KEY", "sft.optim.lr", "Type, default and meaning of a key, or of all keys of a group.",
        "dotted, as run takes it: sft.optim.lr, or a group: sft.optim, launch; docs/keys.md has all of them",
    ),
}  # fmt: skip
"""What a verb with one argument takes, an example of it, what is done with it, and what it may be."""
WRITES = {
    "report": "--out FILE.html", "generate": "--out FILE", "evaluate": "--out FILE", "export": "--out FOLDER",
    "import": "--out FOLDER", "chat": "a working directory on another disk",
}  # fmt: skip
"""With what a verb is told to write elsewhere; the others take output_dir=DIR."""
INTERRUPTED = 130
SEARCHPATH = "hydra.searchpath="


def main() -> None:
    """Entry point of `python -m pipeline` and of the console script; ends the process."""
    try:
        status = dispatch(sys.argv[1:])
    except UserError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        status = UserError.EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {shown(error.filename)}: no file can have so long a name", file=sys.stderr)
        status = UserError.EXIT_CODE
    sys.exit(status)


def dispatch(arguments: Sequence[str]) -> int:
    """Run one verb; returns the exit status."""
    with written_with(WRITES.get(arguments[0] if arguments else "", OUTPUT_DIR)):
        return dispatched(arguments)


def dispatched(arguments: Sequence[str]) -> int:
    """`dispatch`, where it is known with what the verb writes elsewhere."""
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if not arguments:
        print(USAGE, end="", file=sys.stderr)
        return UserError.EXIT_CODE
    verb, rest = arguments[0], list(arguments[1:])
    if verb in ("run", "plan", "preview"):
        return composed(verb, rest)
    if verb == "verify":
        from pipeline.verify import verify_path

        return verify_path(Path(only(verb, rest)), say=say)
    if verb == "report":
        from pipeline.report.verb import report_verb

        return report_verb(rest, say=say)
    if verb == "chat":
        from pipeline.chat import chat

        return chat(rest)
    if verb == "generate":
        from pipeline.generate import generate_verb

        return generate_verb(rest, say=say)
    if verb == "evaluate":
        from pipeline.evaluate import evaluate_verb

        return evaluate_verb(rest, say=say)
    if verb == "export":
        from pipeline.export import export_verb

        return export_verb(rest, say=say)
    if verb == "import":
        from pipeline.sources import import_verb

        return import_verb(rest, say=say)
    if verb == "dashboard":
        from pipeline.dashboard import dashboard_verb

        return dashboard_verb(rest, say=say)
    if verb == "doctor":
        from pipeline.doctor import doctor

        return doctor(rest, say=say)
    if verb == "explain":
        from pipeline.reference import explain

        say(explain(only(verb, rest).partition("=")[0]))
        return 0
    way_out = did_you_mean(verb, VERBS, f"verbs: {', '.join(VERBS)}")
    if "=" in verb:
        way_out = f"name a verb first: python -m pipeline run {' '.join(arguments)}"
    raise UserError(f"unknown verb {verb}", hint=way_out)


def only(verb: str, arguments: Sequence[str]) -> str:
    """The one argument of a verb that takes one. SystemExit behind --help."""
    from pipeline.options import Options

    named, example, description, what = TAKES[verb]
    parser = Options(verb, example, description)
    parser.add_argument("only", metavar=named, help=what)
    return str(parser.parse_args(list(arguments)).only)


def composed(verb: str, arguments: Sequence[str]) -> int:
    """`run`, `plan`, `preview`: compose the configuration once, or leave that to Hydra when flags ask."""
    from pipeline.compose import compose, prepare
    from pipeline.effects import check_effects

    overrides = [text for text in arguments if not text.startswith("-")]
    if len(overrides) == len(arguments):
        prepared = prepare(overrides)
        for note in prepared.notes:
            print(shown(note))
        config = compose(prepared.overrides)
        check_effects([config], overrides)
        return execute(verb, config, overrides)
    return with_hydra(verb, arguments)


def execute(verb: str, config: object, overrides: Sequence[str]) -> int:
    """Do what the verb says with a finished configuration, which was made from these overrides."""
    from pipeline.config import PipelineConfig
    from pipeline.preview import preview
    from pipeline.run import run
    from pipeline.submit import is_for_other_machines, submit

    assert isinstance(config, PipelineConfig)
    if verb == "plan":
        from pipeline.planning.show import plan

        return plan(config, overrides, say=say)
    if verb == "run" and is_for_other_machines(config):
        return submit(config, overrides, say=say)
    return run(config, say=say) if verb == "run" else preview(config)


def with_hydra(verb: str, arguments: Sequence[str]) -> int:
    """Let Hydra read its own flags; a sweep calls back once per run."""
    import hydra
    from hydra._internal.utils import get_args_parser

    from pipeline.compose import compose, jobs_of, prepare, share_a_name
    from pipeline.config import CONF, register
    from pipeline.effects import check_effects
    from pipeline.sweep import conclude

    refuse_options_of_others(arguments)
    args = get_args_parser().parse_args(list(arguments))
    prepared = prepare(args.overrides, multirun=args.multirun)
    register()
    jobs = jobs_of(prepared.overrides) if args.multirun else [prepared.overrides]
    configs: list[PipelineConfig] = []
    own_config = args.config_path or args.config_name or args.experimental_rerun
    beside = [f"{SEARCHPATH}[file://{Path(args.config_dir).absolute()}]"] if args.config_dir else []
    if not own_config and not args.hydra_help and not args.shell_completion:
        # errors of every job in our words, before the first one starts
        configs = [compose([*job, *beside]) for job in jobs]
        check_effects(configs, args.overrides)
    if args.multirun or not any((args.cfg, args.help, args.info)):
        for note in prepared.notes:
            print(shown(note))
    flags = [text for text in arguments if text not in args.overrides]
    # overrides first: after a flag with an optional value (--info) the first one would be taken for it
    sys.argv = [f"{sys.argv[0]}", *prepared.overrides, *beside, *flags]
    task = _Task(verb, is_sweep=args.multirun, shared_name=args.multirun and share_a_name(configs))
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    finally:
        if task.ended:
            conclude(task.ended, say)
    return 0


def refuse_options_of_others(arguments: Sequence[str]) -> None:
    """UserError for --learning_rate and its like, which are keys here."""
    from pipeline.habits import meant

    for text in arguments:
        option, _, value = text.partition("=")
        if option.startswith("--") and (way_out := meant(option)) is not None:
            raise UserError(f"{option} is no option: settings are KEY={value or 'VALUE'}", hint=way_out)


class _Task:
    """What Hydra calls with a composed configuration, once or once per run of a sweep."""

    def __init__(self, verb: str, *, is_sweep: bool, shared_name: bool) -> None:
        self.verb, self.is_sweep, self.shared_name = verb, is_sweep, shared_name
        self.ended: list[Ended] = []  # runs of a sweep, as far as this process starts them
        self.__name__ = verb

    def __call__(self, node: DictConfig) -> float | None:
        """The objective of a run of a sweep."""
        from hydra.core.hydra_config import HydraConfig

        from common.launch_config import Launcher
        from pipeline.compose import name_of_sweep_job, to_config
        from pipeline.state import run_folder
        from pipeline.submit import is_for_other_machines
        from pipeline.sweep import Ended, judged, objective_of, run_in_child

        try:
            hydra = HydraConfig.get()
            searched = [text for text in hydra.overrides.hydra if text.startswith(SEARCHPATH)]
            overrides = [*hydra.overrides.task, *searched]  # other machines look there, too
            config = to_config(node, overrides)
            if self.shared_name:
                config = name_of_sweep_job(config)
            is_judged = self.verb == "run" and self.is_sweep
            if is_judged and not is_for_other_machines(config):
                self.ended.append(Ended(run_folder(config)))
                objective = run_in_child(config)
                self.ended[-1] = Ended(run_folder(config), judged(config))
                return objective
            launcher, sweeper = config.launch.kind, hydra.runtime.choices["hydra/sweeper"]
            if is_judged and launcher is not Launcher.ssh and sweeper != "basic":
                raise UserError(
                    f"hydra/sweeper={sweeper} learns from what runs come to; launch={launcher.value} "
                    "only queues them",
                    hint="launch=local or launch=ssh; or leave hydra/sweeper out",
                )
            status = execute(self.verb, config, overrides)
            if status == 0 and is_judged and launcher is Launcher.ssh:
                return objective_of(config)
        except UserError as error:
            print(f"error: {shown(error)}", file=sys.stderr)
            status = UserError.EXIT_CODE
        if status != 0:
            sys.exit(status)
        return None


def say(line: str) -> None:
    """Print a line at once, so that it stays in order with what the ranks print."""
    print(shown(line), flush=True)


if __name__ == "__main__":
    main()

"""Which curves a step is shown with: its metrics in, charts out, the telling ones apart from the rest.

Every metric that was logged is drawn exactly once. The catalogue says which come first and together; what it
does not know (a reward source, a new metric) is drawn among the rest under its own name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from common.stage import Step
from pipeline.report.charts import Chart, Line, lay_out
from pipeline.report.files import Series
from pipeline.report.glance import EVAL, GREEDY, NAMES, UNITS

Lines = Sequence[tuple[str, str]]
"""Metric and how its line is called."""


@dataclass(frozen=True)
class Plan:
    """One chart: its title and lines; `percent` when the values are shares."""

    title: str
    lines: Lines
    percent: bool = False
    unit: str = ""


TRAIN, HELD_OUT = "training", "held out"


def _both(title: str, metric: str, *, percent: bool = False, unit: str = "") -> Plan:
    return Plan(title, ((metric, TRAIN), (EVAL + metric, HELD_OUT)), percent, unit)


OPTIMIZER = (
    Plan("Learning rate", (("learning_rate", "learning rate"),)),
    Plan("Gradient norm", (("grad_norm", "before clipping"),)),
)

MAIN: Mapping[str, Sequence[Plan]] = {
    Step.sft.value: (
        _both("Loss", "loss", unit="nats per token"),
        _both("Tokens predicted", "mean_token_accuracy", percent=True),
        _both("Entropy", "entropy", unit="nats"),
        *OPTIMIZER,
        Plan("Speed", (("perf/tokens_per_second", "tokens per second"),), unit="tokens per second"),
    ),
    Step.reward.value: (
        _both("Loss", "loss"),
        _both("Pairs in order", "accuracy", percent=True),
        _both("Margin", "margin"),
        Plan("Rewards", (("chosen_reward", "chosen"), ("rejected_reward", "rejected"))),
        *OPTIMIZER,
    ),
    Step.dpo.value: (
        _both("Loss", "loss"),
        _both("Pairs in order", "rewards/accuracies", percent=True),
        _both("Margin", "rewards/margins"),
        Plan("Implicit rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
        *OPTIMIZER,
    ),
    Step.ppo.value: (
        Plan(
            "Scores of the roll-outs", (("objective/scores", "score"), ("objective/rlhf_reward", "after KL"))
        ),
        Plan("KL of the roll-outs", (("objective/kl", "KL"),), unit="nats per response"),
        Plan("KL coefficient", (("kl_coef", "coefficient"),)),
        Plan("Entropy", (("policy/entropy_avg", "policy"),), unit="nats"),
        Plan(
            "Length of responses",
            (("response/length_mean", "mean"), ("response/length_max", "longest")),
            unit="tokens",
        ),
        Plan("Responses cut off", (("response/truncated_share", "share"),), percent=True),
        Plan("Policy loss", (("loss/policy_avg", "policy"),)),
        Plan("Value loss", (("loss/value_avg", "value"),)),
        Plan("Explained variance", (("val/explained_variance", "of the returns"),)),
        Plan("Clipped", (("policy/clipfrac_avg", "policy"), ("val/clipfrac_avg", "value")), percent=True),
        Plan("Approximate KL of the updates", (("policy/approxkl_avg", "policy"),), unit="nats"),
        Plan("Learning rate", (("learning_rate", "policy"), ("critic/learning_rate", "critic"))),
        Plan(
            "Time of an iteration",
            (("time/rollout", "roll-out"), ("time/score", "score"), ("time/learn", "learn")),
            unit="seconds",
        ),
    ),
}

PERCENT = {
    "perf/padding_share", "perf/slot_utilisation", "perf/mfu", "eval/stop_rate", "eval/accuracy",
    "eval/accuracy_chosen_longer", "eval/accuracy_chosen_shorter", "eval/accuracy_same_length",
    "response/truncated_share",
}  # fmt: skip


def curves(
    step: str,
    metrics: Mapping[str, Series],
    functions: Sequence[str] = (),
    errors: Mapping[str, Series] | None = None,
) -> tuple[list[Chart], list[Chart]]:
    """The telling charts of a step, and the rest.

    functions: the user's evaluations, in their order. errors: standard errors, by the metric's name.
    """
    x_name = "iteration" if step == Step.ppo.value else "step"
    plans = list(MAIN.get(step, (_both("Loss", "loss"),)))
    if step == Step.ppo.value:
        plans = [*_evaluations(metrics, functions), *_sources(metrics), *plans]
    rest = _rest(metrics, {metric for plan in plans for metric, _ in plan.lines})

    def drawn(plan: Plan) -> Chart | None:
        lines = [
            Line(name, metrics[metric], index, metric.startswith(EVAL), dict((errors or {}).get(metric, [])))
            for index, (metric, name) in enumerate(plan.lines)
            if metrics.get(metric)
        ]
        return lay_out(plan.title, lines, x_name=x_name, percent=plan.percent, unit=plan.unit)

    main, further = ([chart for chart in map(drawn, part) if chart is not None] for part in (plans, rest))
    return main, further


def _evaluations(metrics: Mapping[str, Series], functions: Sequence[str]) -> list[Plan]:
    """A chart per evaluation of PPO: sampled and greedy."""
    names = [m.removeprefix(GREEDY).removeprefix(EVAL) for m in metrics if m.startswith(EVAL)]
    ordered = [name for name in functions if name in names] + ["reward", "kl", "stop_rate", "length"]
    ordered += sorted(set(names) - set(ordered))
    plans = []
    for name in ordered:
        lines = ((EVAL + name, "sampled"), (GREEDY + name, "greedy"))
        values = [value for metric, _ in lines for _, value in metrics.get(metric, [])]
        percent = name in ("stop_rate", "correct") and all(0 <= value <= 1 for value in values)
        plans.append(Plan(f"{NAMES.get(name, name)}, held out", lines, percent, UNITS.get(name, "")))
    return plans


def _sources(metrics: Mapping[str, Series]) -> list[Plan]:
    """One chart for what each source of rewards gave, before weights and clipping; of many, one each."""
    names = sorted(metric for metric in metrics if metric.startswith("reward/"))
    lines = [(name, name.removeprefix("reward/")) for name in names]
    if len(lines) <= 4:
        return [Plan("Rewards by source", lines)] if lines else []
    return [Plan(f"Reward of {label}", ((name, label),)) for name, label in lines]


def _rest(metrics: Mapping[str, Series], known: Collection[str]) -> list[Plan]:
    """A chart per metric that is not known, with its held-out values when it has both; the halves of those
    whose other half is known come last."""
    plans, halves = [], []
    for metric in sorted(metrics.keys() - known):
        other = metric.removeprefix(EVAL) if metric.startswith(EVAL) else EVAL + metric
        alone = Plan(metric, ((metric, metric),), metric in PERCENT)
        if other not in metrics:
            plans.append(alone)
        elif other in known:
            halves.append(alone)
        elif not metric.startswith(EVAL):
            plans.append(_both(metric, metric, percent=metric in PERCENT))
    return [*plans, *halves]

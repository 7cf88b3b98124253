"""Which curves a step is shown with: its metrics in, charts out, the telling ones apart from the rest.

Every metric that was logged is drawn exactly once. The catalogue says which come first and together; what it
does not know (a reward source, a new metric) is drawn among the rest under its own name. Of one run a chart
has several metrics; of several runs it has one, with a line for each run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from common.stage import Step
from pipeline.report.charts import Chart, Line, lay_out
from pipeline.report.files import Series
from pipeline.report.glance import EVAL, GREEDY, NAMES, SAMPLED, UNITS, evaluated, is_share


@dataclass(frozen=True)
class Plan:
    """One chart: its title, and what its lines are called, by metric."""

    title: str
    lines: Mapping[str, str]
    unit: str = ""


@dataclass(frozen=True)
class Logged:
    """What a run logged of a step: series, and standard errors of some, by metric.

    name, mark, colour: how its lines are told from those of other runs; a run alone needs none.
    """

    metrics: Mapping[str, Series]
    errors: Mapping[str, Series] = field(default_factory=dict)
    name: str = ""
    mark: str = ""
    colour: int = 0


def _both(title: str, metric: str, unit: str = "") -> Plan:
    return Plan(title, {metric: "training", EVAL + metric: "held out"}, unit)


OPTIMIZER = (
    Plan("Learning rate", {"learning_rate": "learning rate"}),
    Plan("Gradient norm", {"grad_norm": "before clipping"}),
)

MEMORY = Plan(
    "Memory of rank 0", {"perf/memory_gb": "after the step", "perf/peak_memory_gb": "peak so far"}, "GB"
)
SYSTEM = (Plan("Speed", {"perf/tokens_per_second": "all"}, "tokens per second"), MEMORY)

MAIN: Mapping[str, Sequence[Plan]] = {
    Step.sft.value: (
        _both("Loss", "loss", "nats per token"),
        _both("Tokens predicted", "mean_token_accuracy"),
        _both("Entropy", "entropy", "nats"),
        *OPTIMIZER,
        *SYSTEM,
    ),
    Step.reward.value: (
        _both("Loss", "loss"),
        _both("Pairs in order", "accuracy"),
        _both("Margin", "margin"),
        Plan("Rewards", {"chosen_reward": "chosen", "rejected_reward": "rejected"}),
        *OPTIMIZER,
        *SYSTEM,
    ),
    Step.dpo.value: (
        _both("Loss", "loss"),
        _both("Pairs in order", "rewards/accuracies"),
        _both("Margin", "rewards/margins"),
        Plan("Implicit rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
        *OPTIMIZER,
        *SYSTEM,
    ),
    Step.ppo.value: (
        Plan("Scores of the roll-outs", {"objective/scores": "score", "objective/rlhf_reward": "after KL"}),
        Plan("KL of the roll-outs", {"objective/kl": "KL"}, "nats per response"),
        Plan("KL coefficient", {"kl_coef": "coefficient"}),
        Plan("Entropy", {"policy/entropy_avg": "policy"}, "nats"),
        Plan(
            "Length of responses",
            {"response/length_mean": "mean", "response/length_max": "longest"},
            "tokens",
        ),
        Plan("Responses cut off", {"response/truncated_share": "share"}),
        Plan("Policy loss", {"loss/policy_avg": "policy"}),
        Plan("Value loss", {"loss/value_avg": "value"}),
        Plan("Explained variance", {"val/explained_variance": "of the returns"}),
        Plan("Clipped", {"policy/clipfrac_avg": "policy", "val/clipfrac_avg": "value"}),
        Plan("Approximate KL of the updates", {"policy/approxkl_avg": "policy"}, "nats"),
        Plan("Learning rate", {"learning_rate": "policy", "critic/learning_rate": "critic"}),
        Plan(
            "Time of an iteration",
            {"time/rollout": "roll-out", "time/score": "score", "time/learn": "learn"},
            "seconds",
        ),
        Plan(
            "Speed",
            {"perf/tokens_per_second": "all", "perf/rollout_tokens_per_second": "roll-out"},
            "tokens per second",
        ),
        MEMORY,
    ),
}


def curves(
    step: str, logged: Sequence[Logged], functions: Sequence[str] = (), *, is_alone: bool = True
) -> tuple[list[Chart], list[Chart]]:
    """The telling charts of a step, and the rest.

    functions: the user's evaluations, in their order. is_alone: there is one run on the page, not only in
    this step.
    """
    x_name = "iteration" if step == Step.ppo.value else "step"
    metrics = list(dict.fromkeys(metric for run in logged for metric in run.metrics))
    plans = list(MAIN[step])
    if step == Step.ppo.value:
        plans = [*evaluations(metrics, functions), *_sources(metrics), *plans]
    rest = _rest(metrics, {metric for plan in plans for metric in plan.lines})
    if not is_alone:
        plans, rest = list(_apart(plans)), list(_apart(rest))

    def drawn(plan: Plan) -> Chart | None:
        lines = list(_lines(plan, logged, is_alone=is_alone))
        values = [value for line in lines for _, value in line.series]
        percent = all(is_share(metric, values) for metric in plan.lines)
        return lay_out(plan.title, lines, x_name=x_name, percent=percent, unit=plan.unit)

    main, further = ([chart for chart in map(drawn, part) if chart is not None] for part in (plans, rest))
    return main, further


def _lines(plan: Plan, logged: Sequence[Logged], *, is_alone: bool) -> Iterator[Line]:
    """Of one run a line per metric; of several a line per run."""
    for run in logged:
        for index, (metric, name) in enumerate(plan.lines.items()):
            if series := run.metrics.get(metric):
                yield Line(
                    name if is_alone else run.name, series,
                    colour=index if is_alone else run.colour, dash=index if is_alone else 0,
                    mark=run.mark, sparse=metric.startswith(EVAL), errors=dict(run.errors.get(metric, [])),
                )  # fmt: skip


def _apart(plans: Sequence[Plan]) -> Iterator[Plan]:
    """A chart per metric, named by both where several shared one."""
    for plan in plans:
        for metric, name in plan.lines.items():
            title = plan.title if len(plan.lines) == 1 else f"{plan.title}, {name}"
            yield Plan(title, {metric: name}, plan.unit)


def evaluations(metrics: Collection[str], functions: Sequence[str]) -> list[Plan]:
    """A chart per evaluation of PPO: sampled and greedy."""
    return [
        Plan(
            f"{NAMES.get(name, name)}, held out",
            {EVAL + name: SAMPLED, GREEDY + name: "greedy"},
            UNITS.get(name, ""),
        )
        for name in evaluated(metrics, functions)
    ]


def _sources(metrics: Collection[str]) -> list[Plan]:
    """One chart for what each source of rewards gave, before weights and clipping; of many, one each."""
    lines = {name: name.removeprefix("reward/") for name in sorted(metrics) if name.startswith("reward/")}
    if len(lines) <= 4:
        return [Plan("Rewards by source", lines)] if lines else []
    return [Plan(f"Reward of {label}", {name: label}) for name, label in lines.items()]


def _rest(metrics: Collection[str], known: Collection[str]) -> list[Plan]:
    """A chart per metric that is not known, with its held-out values when it has both; the halves of those
    whose other half is known come last."""
    plans, halves = [], []
    for metric in sorted(set(metrics).difference(known)):
        other = metric.removeprefix(EVAL) if metric.startswith(EVAL) else EVAL + metric
        if other in known and other in metrics:
            halves.append(Plan(metric, {metric: metric}))
        elif other not in metrics:
            plans.append(Plan(metric, {metric: metric}))
        elif not metric.startswith(EVAL):
            plans.append(_both(metric, metric))
    return [*plans, *halves]

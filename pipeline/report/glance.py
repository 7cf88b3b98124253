"""The chain at a glance: what was measured before a step and after it, with intervals; files in, rows out.

PPO is judged on held-out prompts before its first iteration and at its last evaluation, sampled and greedy
apart; the other steps by their held-out loss and by what their evaluation calls accuracy. Sentences are made
from intervals: a change whose interval holds zero is not called one. Which evaluation function exists is not
known here: whatever is logged as `eval/<name>` is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common import estimates
from common.estimates import Estimate
from common.stage import Step
from pipeline.report import shown
from pipeline.report.files import RunFiles, StepFiles, mapping, whole
from step3_ppo.config import MEASURED

EVAL, GREEDY = "eval/", "eval/greedy/"
SAMPLED = "sampled"

SHARES = {
    "accuracy", "accuracy_chosen_longer", "accuracy_chosen_shorter", "accuracy_same_length", "correct",
    "mean_token_accuracy", "perf/mfu", "perf/padding_share", "perf/rollout_balance", "perf/slot_utilisation",
    "policy/clipfrac_avg", "response/truncated_share", "rewards/accuracies", "stop_rate", "val/clipfrac_avg",
}  # fmt: skip
"""Metrics, in training, held out or both, that are shown in percent."""
NAMES = {
    "loss": "Held-out loss",
    "perplexity": "Held-out perplexity",
    "mean_token_accuracy": "Tokens predicted",
    "accuracy": "Held-out pairs in order",
    "rewards/accuracies": "Held-out pairs in order",
    "margin": "Margin of rewards",
    "rewards/margins": "Margin of implicit rewards",
    "reward": "Reward",
    "kl": "KL from the reference",
    "length": "Length of responses",
    "stop_rate": "Responses that stop",
    "gold": "Gold score",
    "correct": "Correct answers",
    "style": "Style score",
}
UNITS = {"kl": "nats", "length": "tokens"}
BY_STEP = {
    Step.sft.value: ("loss", "mean_token_accuracy", "stop_rate"),
    Step.reward.value: ("accuracy", "loss", "margin"),
    Step.dpo.value: ("rewards/accuracies", "rewards/margins", "loss", "stop_rate"),
}
OF_PAIRS = ("accuracy", "rewards/accuracies")


@dataclass(frozen=True)
class Measure:
    """One thing that was measured before and after, or once."""

    step: str
    name: str  # as in eval/<name>
    mode: str  # "sampled", "greedy", or ""
    over: str  # what was counted: "prompts", "pairs"
    is_share: bool
    before: Estimate | None
    before_step: int | None
    after: Estimate
    after_step: int
    change: Estimate | None
    is_function: bool = False

    @property
    def title(self) -> str:
        return NAMES.get(self.name, self.name)

    @property
    def unit(self) -> str:
        return UNITS.get(self.name, "")

    @property
    def x_name(self) -> str:
        return "iteration" if self.step == Step.ppo.value else "step"

    @property
    def decimals(self) -> int | None:
        """Decimals of all its numbers: three figures of the largest; None where powers of ten are needed."""
        low, high = self.bounds
        return 3 if (low, high) == (0, 1) else shown.decimals_for(max(abs(low), abs(high)), 3)

    @property
    def bounds(self) -> tuple[float, float]:
        """Ends of the axis on which the values are drawn: 0 to 1 for what lies there, else what they span."""
        sides = [side for side in (self.before, self.after) if side is not None]
        is_within = (self.is_share or self.is_function) and all(0 <= side.value <= 1 for side in sides)
        ends = [v for side in sides for v in (side.value, side.low, side.high) if math.isfinite(v)]
        low, high = min([*ends, 0.0]), max([*ends, 0.0])
        return (0.0, 1.0) if is_within or low == high else (low, high)

    @property
    def bound_texts(self) -> list[str]:
        return [shown.share(bound) if self.is_share else shown.brief(bound) for bound in self.bounds]

    def place(self, value: float) -> float:
        """Where a value lies between the bounds, from 0 to 100."""
        low, high = self.bounds
        at = 100 * (value / 2 - low / 2) / (high / 2 - low / 2)
        return round(min(max(at, 0.0), 100.0), 1) if math.isfinite(at) else 0.0

    def text(self, value: float) -> str:
        """A value of this measure as it is shown."""
        return shown.share(value) if self.is_share else shown.fixed(value, self.decimals)

    def signed(self, value: float) -> str:
        """A change of it, with its sign; that of a share is in percentage points."""
        return shown.points(value) if self.is_share else shown.fixed(value, self.decimals, signed=True)

    def interval(self, estimate: Estimate) -> str:
        """`0.42 to 0.51`; empty without an interval."""
        low, high = self.text(estimate.low).removesuffix("%"), self.text(estimate.high)
        return f"{low} to {high}" if estimate.has_interval else ""

    @property
    def change_text(self) -> str:
        if self.change is None:
            return ""
        return f"{self.signed(self.change.value)}{' points' if self.is_share else ''}"

    @property
    def change_interval(self) -> str:
        if self.change is None or not self.change.has_interval:
            return ""
        return f"{self.signed(self.change.low)} to {self.signed(self.change.high)}"

    @property
    def over_text(self) -> str:
        """What it was measured on; empty when that is not known."""
        return f"{self.after.count:,} held-out {self.over}" if self.after.count else ""


@dataclass(frozen=True)
class Glance:
    """What the top of the page says."""

    cards: list[Measure]  # the main ones: sampled, or of a step without sampling
    table: list[Measure]  # all of them
    sentences: list[str]
    cautions: list[str]


def at_a_glance(run: RunFiles) -> Glance:
    """The main numbers of a run, PPO's first, then in the order of the steps."""
    others: list[Measure] = []
    of_ppo: list[Measure] = []
    for step in run.steps:
        if step.name == Step.ppo.value:
            functions = list(mapping(run.setting("ppo.evaluation.functions")))
            of_ppo = ppo_measures(step, functions)
        else:
            others += step_measures(step)
    sampled = [m for m in of_ppo if m.mode == SAMPLED]
    cards = [m for m in sampled if m.is_function] + [m for m in others if m.name in OF_PAIRS]
    if sampled:
        cards += [m for m in sampled if m.name in ("reward", "kl", "stop_rate")]
    else:
        cards += [m for m in others if m.name not in OF_PAIRS]
    sentences, cautions = conclusions(sampled, others)
    return Glance(cards, of_ppo + others, sentences, cautions)


def evaluated(metrics: Iterable[str], functions: Iterable[str]) -> list[str]:
    """What PPO evaluated, by name: the user's functions in their order, others, then what is built in."""
    names = {name.removeprefix(GREEDY).removeprefix(EVAL) for name in metrics if name.startswith(EVAL)}
    ordered = [name for name in functions if name in names]
    ordered += sorted(names.difference(ordered, MEASURED))
    return ordered + [name for name in MEASURED if name in names]


def ppo_measures(step: StepFiles, functions: Iterable[str] = ()) -> list[Measure]:
    """Everything that PPO evaluated, each sampled, then greedy."""
    found = (
        before_and_after(step, name, prefix + name, mode, is_function=name not in MEASURED)
        for name in evaluated(step.metrics, functions)
        for mode, prefix in ((SAMPLED, EVAL), ("greedy", GREEDY))
    )
    return [measure for measure in found if measure is not None]


def step_measures(step: StepFiles) -> list[Measure]:
    """The held-out numbers of SFT, the reward model or DPO."""
    found = (before_and_after(step, name, EVAL + name, "", is_function=False) for name in BY_STEP[step.name])
    return [measure for measure in found if measure is not None]


def is_share(metric: str, values: Iterable[float]) -> bool:
    """Whether a metric's values are shares: by its name, unless one of them cannot be."""
    name = metric.removeprefix(GREEDY).removeprefix(EVAL)
    return name in SHARES and not any(value < 0 or value > 1 for value in values)


def before_and_after(
    step: StepFiles, name: str, metric: str, mode: str, *, is_function: bool
) -> Measure | None:
    """The first and last value of an evaluation metric; None when there is none.

    Before is the first evaluation, and there is an after only: when that is the only one.
    """
    series = step.metrics.get(metric)
    if not series:
        return None
    (first_step, first), (last_step, last) = series[0], series[-1]
    two = len(series) > 1
    pairs = pairs_of(step) if name in OF_PAIRS else 0
    groups = [values_of(step, at, name, mode) for at in (first_step, last_step)]
    errors = dict(step.errors.get(metric, []))

    def estimate(value: float, values: Mapping[str, list[float]], at: int) -> Estimate:
        if pairs:
            return estimates.of_share(value, pairs)
        trials = is_function or name == "stop_rate"
        found = estimates.of_mean(values, value, may_be_share=trials)
        if found is None and (error := errors.get(at)) is not None and error > 0:
            found = Estimate(value, value - estimates.Z * error, value + estimates.Z * error)
        found = found or Estimate(value)
        return estimates.within_0_and_1(found) if name == "stop_rate" else found

    change = estimates.of_change(groups[0], groups[1], last - first) or Estimate(last - first)
    return Measure(
        step.name, name, mode, "pairs" if pairs else "prompts",
        is_share=is_share(metric, (value for _, value in series)),
        before=estimate(first, groups[0], first_step) if two else None,
        before_step=first_step if two else None,
        after=estimate(last, groups[1], last_step),
        after_step=last_step,
        change=change if two else None,
        is_function=is_function,
    )  # fmt: skip


def pairs_of(step: StepFiles) -> int:
    """Held-out pairs: as the artifact says, or as the ledger counts them."""
    recorded = whole(mapping(step.details.get("calibration")).get("pairs"))
    return recorded or sum(row.counts.get("rows_held_out", 0) for row in step.ledger)


def conclusions(sampled: list[Measure], others: list[Measure]) -> tuple[list[str], list[str]]:
    """Sentences on what changed, and what the reader must be warned of."""
    functions = [m for m in sampled if m.is_function]
    rewards = [m for m in sampled if m.name == "reward"]
    sentences = [_change_sentence(m, m.change) for m in (functions or rewards)[:3] if m.change is not None]
    for measure in others:
        if measure.name in OF_PAIRS:
            who = "The reward model" if measure.step == Step.reward.value else "The policy after DPO"
            interval = measure.interval(measure.after)
            between = f" (95% interval {interval})" if interval else ""
            number = f"{measure.after.count:,} " if measure.after.count else ""
            share = measure.text(measure.after.value)
            sentences.append(f"{who} puts {share} of {number}held-out pairs in the right order{between}.")
    gold, reward = ([m.change for m in found[:1] if m.change is not None] for found in (functions, rewards))
    if gold and reward and gold[0].high < 0 < reward[0].low:  # both clearly
        title = functions[0].title
        return sentences, [
            f"The reward rose while held-out {title[:1].lower()}{title[1:]} fell: the policy has learned to "
            "please the reward, not to do better. Do not read the reward as success."
        ]
    return sentences, []


def _change_sentence(measure: Measure, change: Estimate) -> str:
    before, after = (measure.text(e.value) for e in (measure.before, measure.after) if e is not None)
    interval = f", 95% interval {measure.change_interval}" if change.has_interval else ""
    over = f" on {change.count:,} held-out prompts" if change.count else ""
    at = "" if measure.before_step == 0 else f" since iteration {measure.before_step:,}"
    if interval and not change.is_clear:
        return (
            f"{measure.title} did not measurably change{over}{at}: {before} before, {after} after "
            f"(change {measure.change_text}{interval})."
        )
    verb = "rose" if change.value > 0 else "fell" if change.value < 0 else "stayed"
    where = f"from {before} to {after}" if verb != "stayed" else f"at {after}"
    between = f" (change {measure.change_text}{interval})" if interval else ""
    return f"{measure.title} {verb} {where}{over}{at}{between}."


def values_of(step: StepFiles, at: int, name: str, mode: str) -> dict[str, list[float]]:
    """What the samples of one evaluation say about a metric, by prompt."""
    values: dict[str, list[float]] = {}
    for sample in step.samples.get(at, []):
        own = {"reward": sample.reward, "kl": sample.kl, "stop_rate": sample.stopped}
        value = own[name] if name in own else sample.scores.get(name)
        if value is not None and (not mode or sample.mode == mode):
            values.setdefault(sample.prompt, []).append(float(value))
    return values

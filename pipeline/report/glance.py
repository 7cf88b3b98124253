"""The chain at a glance: what was measured before a step and after it, with intervals; files in, rows out.

PPO is judged on held-out prompts before its first iteration and at its last evaluation, sampled and greedy
apart; the other steps by their held-out loss and by what their evaluation calls accuracy. Sentences are made
from intervals: a change whose interval holds zero is not called one. Which evaluation function exists is not
known here: whatever is logged as `eval/<name>` is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from common.stage import Step
from pipeline.report import estimates, shown
from pipeline.report.estimates import Estimate
from pipeline.report.files import RunFiles, SampleRow, StepFiles, mapping, whole
from step3_ppo.config import MEASURED

EVAL, GREEDY = "eval/", "eval/greedy/"
SAMPLED = "sampled"

SHARES = {"accuracy", "mean_token_accuracy", "rewards/accuracies", "stop_rate", "correct"}
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
    title: str
    mode: str  # "sampled", "greedy", or ""
    over: str  # what was counted: "prompts", "pairs"
    is_share: bool
    unit: str
    before: Estimate | None
    before_step: int | None
    after: Estimate
    after_step: int
    change: Estimate | None
    is_function: bool = False

    @property
    def x_name(self) -> str:
        return "iteration" if self.step == Step.ppo.value else "step"

    def text(self, value: float) -> str:
        """A value of this measure as it is shown."""
        return shown.share(value) if self.is_share else shown.fixed(value, self.decimals)

    @property
    def decimals(self) -> int | None:
        """Decimals of all its numbers: three figures of the largest; None where powers of ten are needed."""
        low, high = self.bounds
        return 3 if (low, high) == (0, 1) else shown.decimals_for(max(abs(low), abs(high)), 3)

    def interval(self, estimate: Estimate) -> str:
        """`0.42 to 0.51`; empty without an interval."""
        if estimate.low is None or estimate.high is None:
            return ""
        return f"{self.text(estimate.low).removesuffix('%')} to {self.text(estimate.high)}"

    @property
    def change_text(self) -> str:
        """The change, with its sign; that of a share is in percentage points."""
        if self.change is None:
            return ""
        return f"{self._signed(self.change.value)}{' points' if self.is_share else ''}"

    @property
    def change_interval(self) -> str:
        if self.change is None or self.change.low is None or self.change.high is None:
            return ""
        return f"{self._signed(self.change.low)} to {self._signed(self.change.high)}"

    @property
    def over_text(self) -> str:
        """What it was measured on; empty when that is not known."""
        return f"{self.after.count:,} held-out {self.over}" if self.after.count else ""

    @property
    def bounds(self) -> tuple[float, float]:
        """Ends of the axis on which the values are drawn: 0 to 1 for what lies there, else what they span."""
        sides = [side for side in (self.before, self.after) if side is not None]
        if (self.is_share or self.is_function) and all(0 <= side.value <= 1 for side in sides):
            return 0.0, 1.0
        values = [v for e in sides for v in (e.value, e.low, e.high) if v is not None and math.isfinite(v)]
        if not values:
            return 0.0, 1.0
        low, high = min(*values, 0.0), max(*values, 0.0)
        return (low, high) if high > low else (0.0, 1.0)

    @property
    def bound_texts(self) -> list[str]:
        return [shown.share(bound) if self.is_share else shown.brief(bound) for bound in self.bounds]

    def place(self, value: float) -> float:
        """Where a value lies between the bounds, from 0 to 100."""
        low, high = self.bounds
        at = 100 * (value / 2 - low / 2) / (high / 2 - low / 2)
        return round(min(max(at, 0.0), 100.0), 1) if math.isfinite(at) else 0.0

    def _signed(self, value: float) -> str:
        if self.is_share:
            return shown.points(value)
        return shown.fixed(value, self.decimals, signed=True)


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


def ppo_measures(step: StepFiles, functions: Iterable[str] = ()) -> list[Measure]:
    """Everything that PPO evaluated: user's functions in their order first, each sampled, then greedy."""
    names = {name.removeprefix(GREEDY).removeprefix(EVAL) for name in step.metrics if name.startswith(EVAL)}
    ordered = [name for name in functions if name in names]
    ordered += sorted(names.difference(ordered, MEASURED))
    of_user = set(ordered)
    ordered += [name for name in MEASURED if name in names]
    found = []
    for name in ordered:
        for mode, prefix in ((SAMPLED, EVAL), ("greedy", GREEDY)):
            measure = before_and_after(step, name, prefix + name, mode, is_function=name in of_user)
            found += [measure] if measure is not None else []
    return found


def step_measures(step: StepFiles) -> list[Measure]:
    """The held-out numbers of SFT, the reward model or DPO."""
    names = BY_STEP.get(step.name, ("loss",))
    found = (before_and_after(step, name, EVAL + name, "", is_function=False) for name in names)
    return [measure for measure in found if measure is not None]


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
    groups = [_values(step, at, name, mode) for at in (first_step, last_step)]
    errors = dict(step.errors.get(metric, []))

    def estimate(value: float, values: Mapping[str, list[float]], at: int) -> Estimate:
        if pairs:
            return estimates.of_share(value, pairs)
        trials = is_function or name == "stop_rate"
        if (found := estimates.of_mean(values, value, may_be_share=trials)) is not None:
            return found
        if (error := errors.get(at)) is not None and error > 0:
            return Estimate(value, value - estimates.Z * error, value + estimates.Z * error)
        return Estimate(value)

    change = estimates.of_change(groups[0], groups[1], last - first) or Estimate(last - first)
    return Measure(
        step.name, name, NAMES.get(name, name), mode, "pairs" if pairs else "prompts",
        is_share=name in SHARES and all(0 <= value <= 1 for _, value in series),
        unit=UNITS.get(name, ""),
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
    sentences, cautions = [], []
    functions = [m for m in sampled if m.is_function]
    reward = next((m for m in sampled if m.name == "reward"), None)
    for measure in (functions or [m for m in [reward] if m is not None])[:3]:
        if (sentence := _change_sentence(measure)) is not None:
            sentences.append(sentence)
    for measure in others:
        if measure.name in OF_PAIRS:
            who = "The reward model" if measure.step == Step.reward.value else "The policy after DPO"
            interval = measure.interval(measure.after)
            between = f" (95% interval {interval})" if interval else ""
            number = f"{measure.after.count:,} " if measure.after.count else ""
            share = measure.text(measure.after.value)
            sentences.append(f"{who} puts {share} of {number}held-out pairs in the right order{between}.")
    if functions and reward is not None and _went(functions[0], down=True) and _went(reward, down=False):
        title = functions[0].title
        cautions.append(
            f"The reward rose while held-out {title[:1].lower()}{title[1:]} fell: the policy has learned to "
            "please the reward, not to do better. Do not read the reward as success."
        )
    return sentences, cautions


def _change_sentence(measure: Measure) -> str | None:
    if measure.before is None or measure.change is None:
        return None
    before, after = measure.text(measure.before.value), measure.text(measure.after.value)
    change, interval = measure.change_text, measure.change_interval
    over = f" on {measure.change.count:,} held-out prompts" if measure.change.count else ""
    at = "" if measure.before_step == 0 else f" since iteration {measure.before_step:,}"
    if interval and not estimates.is_clear(measure.change):
        return (
            f"{measure.title} did not measurably change{over}{at}: {before} before, {after} after "
            f"(change {change}, 95% interval {interval})."
        )
    verb = "rose" if measure.change.value > 0 else "fell" if measure.change.value < 0 else "stayed"
    where = f"from {before} to {after}" if verb != "stayed" else f"at {after}"
    between = f" (change {change}, 95% interval {interval})" if interval else ""
    return f"{measure.title} {verb} {where}{over}{at}{between}."


def _went(measure: Measure, *, down: bool) -> bool:
    """Whether it clearly fell, or rose."""
    change = measure.change
    return (
        change is not None and estimates.is_clear(change) and (change.value < 0 if down else change.value > 0)
    )


def _values(step: StepFiles, at: int, name: str, mode: str) -> dict[str, list[float]]:
    """What the samples of one evaluation say about a metric, by prompt."""
    if step.samples is None:
        return {}
    read = _READERS.get(name, lambda sample: sample.scores.get(name))
    rows = step.samples.first if at == step.samples.first_step else []
    rows = step.samples.last if at == step.samples.last_step else rows
    values: dict[str, list[float]] = {}
    for sample in rows:
        value = read(sample)
        if value is not None and (not mode or sample.mode == mode):
            values.setdefault(sample.prompt, []).append(float(value))
    return values


_READERS: dict[str, Callable[[SampleRow], float | None]] = {
    "reward": lambda sample: sample.reward,
    "kl": lambda sample: sample.kl,
    "stop_rate": lambda sample: None if sample.stopped is None else float(sample.stopped),
}

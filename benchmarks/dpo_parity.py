"""DPO, step by step, beside TRL's DPOTrainer: `python -m benchmarks.dpo_parity`.

Both sides start from the same fp32 policy and see the same pairs in the same steps: ours is the real
command, `python -m pipeline run 'steps=[dpo]'`; TRL gets the tokens that our step saw. Same AdamW, schedule
and clipping. The criterion is a relative difference of at most 1e-4 at every step, in the loss, rewards,
margins, accuracies, log-probabilities and gradient norms. Writes `results/dpo_parity.json` (with
`--loss-type` also in its name); exit status 1 when it fails.

What TRL does differently is kept out of that comparison and shown apart, with the number that explains it:
`label_smoothing` has no effect on its sigmoid loss; a pair whose sides have moved equally counts as wrong (½
with us), which is every pair of the first step; and its own preparation trains on what a chat template
writes behind the terminator.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import pair_parity, pairs_workload, parity
from benchmarks.measure import write_results
from benchmarks.pair_sides import dpo_columns
from benchmarks.parity import GRAD_NORM, LEARNING_RATE, LOSS, Quantity

QUANTITIES = (
    LOSS,
    Quantity("rewards/chosen", signed=True),
    Quantity("rewards/rejected", signed=True),
    Quantity("rewards/margins", signed=True),
    Quantity("rewards/accuracies", signed=True),
    Quantity("logps/chosen"),
    Quantity("logps/rejected"),
    GRAD_NORM,
    LEARNING_RATE,
)
"""Not mean_token_accuracy: TRL's is that of chosen answers, ours of both."""

SMOOTHING = 0.2
TIED = 0.5


def main() -> int:
    """Run both sides, print the table; 0 when every step agrees."""
    parser = pair_parity.parser_of("dpo_parity")
    parser.add_argument("--loss-type", choices=("sigmoid", "ipo", "hinge"), default="sigmoid")
    arguments = parser.parse_args()
    kind = arguments.loss_type
    with tempfile.TemporaryDirectory(prefix="dpo_parity_") as temporary:
        folder = arguments.work or Path(temporary)
        pairs = arguments.steps * pair_parity.PAIRS_PER_STEP
        made = pairs_workload.prepare(folder / "workload", arguments.pairs, pairs)
        trial = pair_parity.Trial("dpo", made, folder, made.policy, arguments.steps, arguments.threads)
        ours, theirs = compare(trial, kind)
        known = known_differences(trial, ours, theirs)
        if kind == "sigmoid":
            known["smoothed_gradients"] = smoothed_gradients(trial, ours, theirs)
    result = {
        "pairs": arguments.pairs,
        "pairs_per_step": pair_parity.PAIRS_PER_STEP,
        "loss_type": kind,
        **parity.summary(ours, with_ties_as_half(theirs), QUANTITIES),
        "known_differences": known,
    }
    print(parity.render(ours, with_ties_as_half(theirs), QUANTITIES))
    print(parity.verdict(result))
    print("\nwhere TRL differs, apart from that:\n" + "\n".join(explained(known)))
    name = "dpo_parity" if kind == "sigmoid" else f"dpo_parity_{kind}"
    print(f"written: {write_results(name, result, to=arguments.results)}")
    return 0 if result["passed"] else 1


def compare(trial: pair_parity.Trial, loss_type: str) -> tuple[pair_parity.Steps, pair_parity.Steps]:
    """(ours, TRL's), one entry per step."""
    overrides = [f"dpo.loss_type={loss_type}", "dpo.sampling.num_prompts=0"]
    ours = pair_parity.run_ours(trial, "ours", overrides)
    columns = dpo_columns(pair_parity.tokens_of_ours(trial))
    return ours, pair_parity.run_trl(trial, "trl", columns, QUANTITIES, {"loss_type": [loss_type]})


def with_ties_as_half(steps: pair_parity.Steps) -> pair_parity.Steps:
    """TRL's steps with accuracy ½ where policy and reference are the same, so that all pairs are tied."""
    return [{**step, "rewards/accuracies": TIED} if is_at_the_reference(step) else step for step in steps]


def is_at_the_reference(step: parity.Step) -> bool:
    """Whether no log-probability has moved."""
    return step["rewards/chosen"] == step["rewards/rejected"] == 0.0


def known_differences(
    trial: pair_parity.Trial, ours: pair_parity.Steps, theirs: pair_parity.Steps
) -> dict[str, Any]:
    """What TRL does to the same rows, and with ties."""
    pairs = pair_parity.tokens_of_ours(trial)
    behind = pair_parity.surplus(pair_parity.prepared_by_trl(trial), pairs)
    return {
        "prepared_by_trl": pair_parity.described(behind, trial.base),
        "first_accuracy": {"ours": ours[0]["rewards/accuracies"], "trl": theirs[0]["rewards/accuracies"]},
    }


def smoothed_gradients(
    trial: pair_parity.Trial, ours: pair_parity.Steps, theirs: pair_parity.Steps
) -> dict[str, float]:
    """The first gradient's norm with label smoothing, as a multiple of that without, on both sides."""
    overrides = [f"dpo.label_smoothing={SMOOTHING}", "dpo.sampling.num_prompts=0"]
    columns, argument = dpo_columns(pair_parity.tokens_of_ours(trial)), {"label_smoothing": SMOOTHING}
    smoothed = pair_parity.run_ours(trial, "ours_smoothed", overrides, steps=1)
    their_smoothed = pair_parity.run_trl(trial, "trl_smoothed", columns, QUANTITIES, argument, steps=1)
    return {
        "ours": smoothed[0]["grad_norm"] / ours[0]["grad_norm"],
        "trl": their_smoothed[0]["grad_norm"] / theirs[0]["grad_norm"],
    }


def explained(known: dict[str, Any]) -> list[str]:
    """The known differences, one line each."""
    first, quotients = known["first_accuracy"], known.get("smoothed_gradients")
    lines = [
        f"* prepared by TRL itself: {known['prepared_by_trl']}; it trains on all of them",
        f"* at the reference all pairs are tied: accuracy {first['ours']} here, {first['trl']} in TRL",
        "* mean_token_accuracy is not compared: TRL's is that of chosen answers, ours of both",
    ]
    if quotients is not None:
        lines.append(
            f"* label_smoothing={SMOOTHING} with the sigmoid loss: cDPO's first gradient is 1 - 2 x "
            f"{SMOOTHING} = {1 - 2 * SMOOTHING:.1f} times DPO's. Ours is {quotients['ours']:.6f} times, "
            f"TRL's {quotients['trl']:.6f} times: there it has no effect"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())

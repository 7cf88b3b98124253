"""The reward model, step by step, beside TRL's RewardTrainer: `python -m benchmarks.reward_parity`.

Both sides start from the same fp32 weights and the same head and see the same pairs in the same steps: ours
is the real command, `python -m pipeline run 'steps=[reward]'`; TRL gets the tokens that our step saw. Same
AdamW, schedule and clipping. The criterion is a relative difference of at most 1e-4 at every step, in the
loss, margins, rewards, accuracies and gradient norms. Writes `results/reward_parity.json`; exit status 1 when
it fails.

What TRL does differently is kept out of that comparison and shown apart, with the number that explains it:
its own preparation leaves what a chat template writes behind the terminator, where the reward is then read;
and where pad is the token that ends an answer (pad = eos, for most models) it reads the reward one token
early.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import pair_parity, pairs_workload, parity
from benchmarks.measure import write_results
from benchmarks.pair_sides import PairTokens, initial_reward_model, reward_columns
from benchmarks.parity import GRAD_NORM, LEARNING_RATE, LOSS, Quantity

QUANTITIES = (
    LOSS,
    Quantity("margin", signed=True),
    Quantity("mean_reward", signed=True),
    Quantity("accuracy", signed=True),
    GRAD_NORM,
    LEARNING_RATE,
)
"""Not min_reward and max_reward: TRL's are means over its micro-batches of their smallest and largest."""


def main() -> int:
    """Run both sides, print the table; 0 when every step agrees."""
    parser = pair_parity.parser_of("reward_parity")
    parser.add_argument("--center", type=float, default=0.01, help="center_rewards_coefficient of both sides")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reward_parity_") as temporary:
        folder = arguments.work or Path(temporary)
        pairs = arguments.steps * pair_parity.PAIRS_PER_STEP
        made = pairs_workload.prepare(folder / "workload", arguments.pairs, pairs)
        base = initial_reward_model(made, folder / "base")
        trial = pair_parity.Trial("reward", made, folder, base, arguments.steps, arguments.threads)
        ours, theirs = compare(trial, arguments.center)
        known = known_differences(trial)
    result = {
        "pairs": arguments.pairs,
        "pairs_per_step": pair_parity.PAIRS_PER_STEP,
        "center_rewards_coefficient": arguments.center,
        **parity.summary(ours, theirs, QUANTITIES),
        "known_differences": known,
    }
    print(parity.render(ours, theirs, QUANTITIES))
    print(parity.verdict(result))
    print("\nwhere TRL differs, apart from that:\n" + "\n".join(explained(known)))
    print(f"written: {write_results('reward_parity', result, to=arguments.results)}")
    return 0 if result["passed"] else 1


def compare(trial: pair_parity.Trial, center: float) -> tuple[pair_parity.Steps, pair_parity.Steps]:
    """(ours, TRL's), one entry per step."""
    ours = pair_parity.run_ours(trial, "ours", [f"reward.center_rewards_coefficient={center}"])
    columns = reward_columns(pair_parity.tokens_of_ours(trial))
    arguments = {"center_rewards_coefficient": center}
    return ours, pair_parity.run_trl(trial, "trl", columns, QUANTITIES, arguments)


def known_differences(trial: pair_parity.Trial) -> dict[str, Any]:
    """What TRL does to the same rows, and to the same tokens where pad is the terminator."""
    from transformers import AutoTokenizer

    pairs = pair_parity.tokens_of_ours(trial)
    behind = pair_parity.surplus(pair_parity.prepared_by_trl(trial), pairs)
    terminator = AutoTokenizer.from_pretrained(trial.base).convert_ids_to_tokens(pairs[0].chosen[-1])
    argument = {"pad_token": terminator}
    logged = pair_parity.run_trl(trial, "padded", reward_columns(pairs), QUANTITIES, argument, steps=1)
    first = pairs[: pair_parity.PAIRS_PER_STEP]
    return {
        "prepared_by_trl": pair_parity.described(behind, trial.base),
        "pad": terminator,
        "mean_reward_where_pad_is_the_terminator": logged[0]["mean_reward"],
        "mean_score_at_the_terminator": mean_score(trial.base, first, before_the_end=0),
        "mean_score_one_token_before": mean_score(trial.base, first, before_the_end=1),
    }


def mean_score(base: Path, pairs: Sequence[PairTokens], before_the_end: int) -> float:
    """Mean over both sides of the initial score so many tokens before the end, each document on its own."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32).eval()
    scores = []
    with torch.no_grad():
        for pair in pairs:
            for answer in (pair.chosen, pair.rejected):
                ids = torch.tensor([pair.prompt + answer])
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
                scores.append(float(model.score(hidden[-1 - before_the_end])))
    return sum(scores) / len(scores)


def explained(known: dict[str, Any]) -> list[str]:
    """The known differences, one line each."""
    return [
        f"* prepared by TRL itself: {known['prepared_by_trl']}; the reward is read at the last token",
        f"* where pad is the terminator {known['pad']} (pad = eos, for most models) its mean reward in the "
        f"first step is {known['mean_reward_where_pad_is_the_terminator']:.7f}; the score at the terminator "
        f"is {known['mean_score_at_the_terminator']:.7f}, one token before it "
        f"{known['mean_score_one_token_before']:.7f}",
        "* min_reward and max_reward are not compared: TRL logs means of its micro-batches' extremes",
    ]


if __name__ == "__main__":
    sys.exit(main())

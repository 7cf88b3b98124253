"""What a reward model or a policy makes of pairs: whether chosen answers come out above rejected ones.

A reward model is measured as its step measures it (`step2_reward/evaluate.py`), one that others published
where plain transformers reads it. A policy has the log-probabilities of both answers; two of them have the
log-ratios between them, which order pairs as DPO's implicit rewards do, with the second as the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from common.data.batches import collate_pairs
from common.data.stored import PairDataset
from common.data.types import IGNORE, PairBatch, TokenizedExample, TokenizedPair
from common.handoff import scores_text
from common.model.packed import batch_arguments
from common.model.tokenizer import terminators_of
from common.runtime.progress import Progress
from common.stage import Role
from evaluation.inference_model import InferenceModel
from evaluation.values import Measured, Values
from step2_dpo.loss import ChosenRejected, answer_sums, count_answers
from step2_reward.evaluate import by_length, by_pair, by_source, score_pairs
from step2_reward.loss import in_order
from step3_ppo.rewards.reading import TextReader

IMPLICIT = ("log_ratio/accuracy", "log_ratio/margin")
"""What the log-ratios of two policies are measured by."""


def measure(model: InferenceModel, rows: PairDataset, keys: Mapping[str, int]) -> Measured:
    """The metrics of these pairs; keys: indices into `rows`, by key."""
    measured = _rewards if model.role is Role.reward_model else _log_probabilities
    return measured(model, rows, keys)


def _rewards(model: InferenceModel, rows: PairDataset, keys: Mapping[str, int]) -> Measured:
    batches = _batches(rows, keys, _tail_of(model))
    pairs = score_pairs(model.packed(), batches, model.device)
    of_pair, names = by_pair(pairs), {index: key for key, index in keys.items()}
    order = [names[index] for index in pairs.pair_ids.tolist()]
    found = {name: dict(zip(order, each.tolist(), strict=True)) for name, each in of_pair.items()}
    some = {**by_length(pairs.lengths), **by_source(pairs.source_ids, rows.sources)}
    for name, members in some.items():
        is_in = zip(order, members.tolist(), strict=True)
        if chosen := {key: found["accuracy"][key] for key, is_member in is_in if is_member}:
            found[name] = chosen
    chosen_rewards, rejected_rewards = (
        dict(zip(order, side, strict=True)) for side in pairs.scores.T.tolist()
    )
    kept = {name: found[name] for name in ("accuracy", "margin")}
    return Measured(found, {"chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards, **kept})


@torch.no_grad()
def _log_probabilities(model: InferenceModel, rows: PairDataset, keys: Mapping[str, int]) -> Measured:
    module, names = model.packed(), ("logps/chosen", "logps/rejected", "accuracy", "accuracy_per_token")
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for key, batch in zip(keys, _batches(rows, keys), strict=True):
        batch = batch.to(model.device)
        losses = module(**batch_arguments(batch.documents), per_token=True).token_losses
        logps = ChosenRejected(*(-side for side in answer_sums(losses, batch.document_of_target, 1)))
        per_token = [side / count for side, count in zip(logps, count_answers(batch), strict=True)]
        found["logps/chosen"][key], found["logps/rejected"][key] = map(float, logps)
        found["accuracy"][key] = float(in_order(torch.stack(tuple(logps), 1)))
        found["accuracy_per_token"][key] = float(in_order(torch.stack(per_token, 1)))
    return Measured(found, found)


def _batches(rows: PairDataset, keys: Mapping[str, int], tail: Sequence[int] = ()) -> Iterator[PairBatch]:
    """A pair at a time: what a pair is scored does not depend on those beside it. tail: see `_tail_of`."""
    with Progress(len(keys), label="evaluate") as progress:
        for done, index in enumerate(keys.values()):
            pair = rows[index]
            chosen, rejected = (_extended(side, tail) for side in (pair.chosen, pair.rejected))
            pair = TokenizedPair(chosen, rejected, pair.margin)
            yield collate_pairs([pair], [index], [int(rows.source_ids[index])], share_prefix=False)
            progress.update(done + 1)


def _tail_of(model: InferenceModel) -> list[int]:
    """What the chat template writes behind the last terminator: there a published reward model is read."""
    if not scores_text(model.artifact):
        return []
    (ids,) = TextReader(model.artifact, model.tokenizer)(["a"], ["b"], {})
    ends = np.flatnonzero(np.isin(ids, terminators_of(model.tokenizer)))
    return ids[ends[-1] + 1 :].tolist() if len(ends) else []


def _extended(side: TokenizedExample, tail: Sequence[int]) -> TokenizedExample:
    ids, labels = (np.append(side.input_ids, tail), np.append(side.labels, [IGNORE] * len(tail)))
    return TokenizedExample(ids.astype(np.int32), labels.astype(np.int32), side.source)


def compared(ours: Values, theirs: Values) -> Values:
    """Of two policies: how their log-ratios log π − log π_ref order the pairs; empty for reward models."""
    if "logps/chosen" not in ours:
        return {}
    margin = {
        key: (ours["logps/chosen"][key] - theirs["logps/chosen"][key])
        - (ours["logps/rejected"][key] - theirs["logps/rejected"][key])
        for key in ours["logps/chosen"]
    }
    ordered = {key: float(value > 0) + 0.5 * (value == 0) for key, value in margin.items()}
    return dict(zip(IMPLICIT, (ordered, margin), strict=True))

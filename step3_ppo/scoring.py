"""Part 2 of an iteration: responses as text, and their scores by every reward source.

Takes an `Experience` with sampled responses; returns it with the raw scores of each source and the reward of
each response. Models score and train the sampled token ids; their text is for reward functions, servers and
people only, and is never tokenized again.

All ranks know all responses as tokens. Each decodes every R-th group and has it scored; scores are gathered
as arrays. A prompt's group is on one rank and in one call, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from common.artifacts import Artifact
from common.data.batches import BatchPlan
from common.data.stored import PromptDataset
from common.data.types import Batch
from common.errors import UserError
from common.runtime.distributed import (
    World,
    all_gather_arrays_or_raise,
    all_gather_objects,
    all_reduce_sum,
)
from step3_ppo.config import PPOConfig
from step3_ppo.minibatches import batches_in, computed, per_response
from step3_ppo.networks import Networks
from step3_ppo.rewards.calls import in_whole_groups
from step3_ppo.rewards.functions import ScoreFunction, load_functions
from step3_ppo.rewards.reading import TextReader
from step3_ppo.rewards.sources import Calibration, RewardSources
from step3_ppo.rollout import Experience, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


ROWS_LOOKED_AT = 100
"""Rows of each data source that are read to know its columns."""


@dataclass(frozen=True)
class Texts:
    """The responses that this rank has scored, as reward functions see them: prompts as the rows had them,
    completions without their terminator, and the rows' other columns, None where a row has no such column.

    groups: int64, the responses to one prompt share one. places: int64 each, by rank, which of all
    responses it has scored. rank: this one.
    """

    prompts: list[Any]
    completions: list[str]
    columns: dict[str, list[Any]]
    groups: np.ndarray
    places: Sequence[np.ndarray]
    rank: int

    @property
    def own(self) -> np.ndarray:
        """Which of the responses of all ranks these are."""
        return self.places[self.rank]

    def placed(self, shares: Sequence[np.ndarray]) -> np.ndarray:
        """float64 [B], of all responses. shares: by rank, a number for each response that it has scored."""
        found = np.empty(sum(map(len, self.places)), np.float64)
        for places, share in zip(self.places, shares, strict=True):
            found[places] = share
        return found


def same_score_for_same_tokens(responses: Sequence[Response], scores: np.ndarray) -> np.ndarray:
    """float64 [B]: scores [B]; responses to a prompt with the same tokens get the score of the first of them.

    A model's score of the same tokens differs by rounding from batch to batch; that must not become a group's
    spread.
    """
    of_first: dict[tuple[int, bytes], float] = {}
    alike = ((response.prompt_id, response.tokens.tobytes()) for response in responses)
    return np.array([of_first.setdefault(key, score) for key, score in zip(alike, scores, strict=True)])


class Scoring:
    """All sources of `ppo.rewards`, and the functions of `ppo.evaluation`, ready to score."""

    def __init__(
        self,
        ppo: PPOConfig,
        reward_model: Artifact | None,
        tokenizer: PreTrainedTokenizerFast,
        world: World,
        reader: TextReader | None = None,
        plan: BatchPlan | None = None,
    ) -> None:
        """tokenizer: the policy's. reader: of a reward model that is given text; plan: of what it reads."""
        self._ppo, self._tokenizer, self._world = ppo, tokenizer, world
        self._reader, self._plan = reader, plan
        self._sources = RewardSources(ppo.rewards)
        self._functions: dict[str, ScoreFunction] = load_functions(
            ppo.evaluation.functions, "ppo.evaluation.functions"
        )
        self._known: set[str] = set()  # columns, also where no row of a batch has one
        self.calibration: Calibration | None = None
        if self._sources.has_model and reader is None:
            assert reward_model is not None
            self.calibration = Calibration.of(reward_model.manifest.details, reward_model.path)

    @property
    def needs_calibration(self) -> bool:
        """Whether the reward model is a source and the mean and deviation of its scores are not known yet."""
        return self._sources.has_model and self.calibration is None

    def check(self, rows: PromptDataset, *, held_out: bool = False) -> None:
        """UserError when a function needs a column that no source of the rows has.

        Reads the first rows of each source, as a row may lack a column. From now on every batch has these
        columns. held_out: the message says that the rows are held out.
        """
        firsts = [np.flatnonzero(rows.source_ids == i)[:ROWS_LOOKED_AT] for i in np.unique(rows.source_ids)]
        columns = sorted({name for index in np.concatenate(firsts) for name in rows[int(index)].columns})
        try:
            self._sources.check(columns)
            for function in self._functions.values():
                function.check(columns)
        except UserError as error:
            if not held_out:
                raise
            raise UserError(f"{error.message} that are held out", hint=error.hint) from None
        self._known.update(columns)

    def score(
        self, experience: Experience, texts: Texts, batches: Sequence[Batch], networks: Networks
    ) -> Experience:
        """The experience with scores and rewards. texts, batches: this rank's of its responses.

        A collective; the UserError of one rank is raised on all.
        """
        by_model = self.by_model(experience, texts, networks, batches)
        own = None if by_model is None else by_model[texts.own]
        scores = _gathered(
            texts,
            self._sources.names,
            lambda: self._sources.score(texts.prompts, texts.completions, texts.columns, texts.groups, own),
        )
        rewards = self._sources.total(
            scores,
            np.array([response.stopped for response in experience.responses]),
            missing_eos_penalty=self._ppo.missing_eos_penalty,
            reward_clip=self._ppo.reward_clip,
            calibration=self.calibration,
        )
        return replace(experience, scores=scores, rewards=rewards)

    def by_model(
        self, experience: Experience, texts: Texts, networks: Networks, batches: Sequence[Batch] = ()
    ) -> np.ndarray | None:
        """The reward model's raw scores, float64 [B]; None where it is no source.

        Arguments as of `score`. batches: needed by one that is given tokens.
        """
        if networks.reward_model is None:
            return None
        asked = experience
        if self._reader is not None:
            assert self._plan is not None
            asked = self._read(experience, texts, self._reader)
            longest = max(len(response.prompt) + 1 for response in asked.responses)
            plan = replace(self._plan, max_length=max(longest, self._plan.max_length))
            batches = batches_in(asked, replace(plan, share_prefix=networks.share_prefix))
        with networks.reward_model.present():
            scores = computed(batches, networks.document_scores)
        scored = per_response(asked, batches, scores)
        return same_score_for_same_tokens(experience.responses, scored)

    def _read(self, experience: Experience, texts: Texts, reader: TextReader) -> Experience:
        """The same responses in the tokens of a reward model that is given text."""

        def read() -> list[np.ndarray]:
            documents = reader(texts.prompts, texts.completions, texts.columns)
            lengths = np.array([len(ids) for ids in documents], np.int64)
            return [np.concatenate([np.empty(0, np.int32), *documents]), lengths]

        asked = list(experience.responses)
        for places, (flat, lengths) in zip(texts.places, all_gather_arrays_or_raise(read), strict=True):
            for place, ids in zip(places, np.split(flat, np.cumsum(lengths)[:-1]), strict=False):
                asked[place] = replace(asked[place], prompt=ids[:-1], tokens=ids[-1:])
        return Experience(asked)

    def look(self, texts: Texts) -> dict[str, np.ndarray]:
        """Scores by the functions of `ppo.evaluation`, float64 [B] each, of the responses of all ranks."""
        return _gathered(
            texts,
            list(self._functions),
            lambda: {
                name: in_whole_groups(function, texts.prompts, texts.completions, texts.columns, texts.groups)
                for name, function in self._functions.items()
            },
        )

    def texts(self, responses: Sequence[Response], rows: PromptDataset) -> Texts:
        """This rank's responses as text. responses: of all ranks, which all call this."""
        groups = np.array([response.group for response in responses], np.int64)
        rank, ranks = self._world.rank, self._world.size
        places = [np.flatnonzero(groups % ranks == each) for each in range(ranks)]
        own = [responses[place] for place in places[rank].tolist()]
        prompts = [rows[response.prompt_id] for response in own]
        return Texts(
            [prompt.prompt for prompt in prompts],
            [self.completion(response) for response in own],
            self._columns([prompt.columns for prompt in prompts]),
            groups[places[rank]],
            places,
            rank,
        )

    def completion(self, response: Response) -> str:
        """A response as text, without its terminator."""
        tokens = response.tokens[:-1] if response.stopped else response.tokens
        return str(self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def _columns(self, rows: Sequence[Mapping[str, object]]) -> dict[str, list[Any]]:
        unknown = set[str]().union(*rows) - self._known
        if any(all_reduce_sum([len(unknown)])):
            unknown = unknown.union(*all_gather_objects(unknown))
        names = sorted(self._known | unknown)
        return {name: [row.get(name) for row in rows] for name in names}


def _gathered(
    texts: Texts, names: Sequence[str], score: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """float64 [B] by name, of the responses of all ranks. score: gives those of `texts`."""
    if not names:
        return {}

    def own() -> list[np.ndarray]:
        scores = score()
        return [scores[name] for name in names]

    shares = all_gather_arrays_or_raise(own)
    return {name: texts.placed([share[i] for share in shares]) for i, name in enumerate(names)}

"""PPO's evaluation on held-out prompts: rewards and scores of greedy and of sampled responses, and samples.

Prompts and draws are the same every time, so that evaluations differ by the actor alone. `eval/<name>` is the
mean over sampled responses, `eval/greedy/<name>` over greedy ones, `<name>_se` its standard error over
prompts. The KL to the reference is of the sampled responses, in nats per response. Of several samples of a
prompt the mean counts, and the first is kept to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.data.batches import BatchPlan
from common.data.stored import PromptDataset
from step3_ppo.advantages import response_kl
from step3_ppo.config import MEASURED, EvaluationConfig
from step3_ppo.data import held_out_sample
from step3_ppo.metrics import mean_with_error
from step3_ppo.minibatches import batches_in
from step3_ppo.networks import Networks
from step3_ppo.rollout import Experience, Response, Sampler
from step3_ppo.scoring import Scoring, Texts

MODES = {"sampled": "eval/", "greedy": "eval/greedy/"}


@dataclass(frozen=True)
class Evaluation:
    """Held-out prompts (`prompt_ids` into `rows`), and the scoring of their responses."""

    rows: PromptDataset
    prompt_ids: Sequence[int]
    scoring: Scoring
    plan: BatchPlan
    seed: int
    samples_per_prompt: int = 1  # of the sampled responses; one greedy response says it all

    def __call__(
        self, networks: Networks, sampler: Sampler
    ) -> tuple[dict[str, float], list[dict[str, object]]]:
        """Metrics, and a row of samples.jsonl for each first response; the same on every rank."""
        metrics: dict[str, float] = {}
        samples: list[dict[str, object]] = []
        for mode, prefix in MODES.items():
            count = 1 if mode == "greedy" else self.samples_per_prompt
            responses = sampler(
                self.rows, self.prompt_ids, key=(self.seed,), samples=count, greedy=mode == "greedy",
                to_the_end=True,
            )  # fmt: skip
            assert responses is not None
            texts = self.scoring.texts(responses, self.rows)
            values = self._measure(Experience(responses), texts, networks, with_kl=mode == "sampled")
            for name, of_responses in values.items():
                of_prompts = of_responses.reshape(-1, count).mean(axis=1)
                metrics[prefix + name], metrics[f"{prefix}{name}_se"] = mean_with_error(of_prompts)
            samples += self._samples(mode, responses, values, texts, count)
        return metrics, samples

    def _measure(
        self, experience: Experience, texts: Texts, networks: Networks, *, with_kl: bool
    ) -> dict[str, np.ndarray]:
        """Each number as [B], by name."""
        batches = batches_in(experience, self.plan)
        experience = self.scoring.score(experience, texts, batches, networks)
        assert experience.rewards is not None
        values = {
            "reward": experience.rewards,
            **self.scoring.look(texts),
            "length": np.diff(experience.offsets).astype(np.float64),
            "stop_rate": np.array([float(response.stopped) for response in experience.responses]),
        }
        if with_kl and networks.has_reference:
            experience = networks.with_token_numbers(experience, batches, values=False)
            kl = response_kl(experience)
            assert kl is not None
            values["kl"] = kl
        return values

    def _samples(
        self,
        mode: str,
        responses: Sequence[Response],
        values: dict[str, np.ndarray],
        texts: Texts,
        count: int,
    ) -> list[dict[str, object]]:
        """Rows for samples.jsonl: the first of every `count` responses. All ranks know them as tokens, and
        turn into text what they did not score."""
        scored = dict(zip(texts.own.tolist(), texts.completions, strict=True))
        return [
            {
                "prompt": shown(self.rows[responses[index].prompt_id].prompt),
                "completion": (
                    scored[index] if index in scored else self.scoring.completion(responses[index])
                ),
                "stopped": responses[index].stopped,
                "mode": mode,
                "reward": float(values["reward"][index]),
                "kl": float(values["kl"][index]) if "kl" in values else None,
                "scores": {name: float(v[index]) for name, v in values.items() if name not in MEASURED},
            }
            for index in range(0, len(responses), count)
        ]


def evaluation_of(
    held_out: PromptDataset | None, scoring: Scoring, plan: BatchPlan, config: EvaluationConfig, seed: int
) -> Evaluation | None:
    """An evaluation on `num_prompts` held-out prompts; None without held-out prompts, or for 0."""
    if held_out is None or not config.num_prompts:
        return None
    prompt_ids = held_out_sample(held_out, config.num_prompts, seed)
    return Evaluation(held_out, prompt_ids, scoring, plan, seed, config.samples_per_prompt)


def shown(prompt: object) -> str:
    """A prompt to be read: its text, or its turns."""
    if isinstance(prompt, list):
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
    return str(prompt)

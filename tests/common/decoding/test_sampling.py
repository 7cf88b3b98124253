"""Completions of a small random model, on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from common.config import SamplingConfig
from common.decoding import sampling
from common.decoding.sampling import Sample, sample_completions, stop_rate
from common.model import attention
from common.runtime.distributed import World
from tests.programs.gradients import VOCABULARY, tiny_llama
from tests.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALONE = World(0, 1, 0, torch.device("cpu"))
PROMPTS = [np.array(ids, np.int32) for ids in ([5, 9, 17], [7], [40, 41, 42, 43, 44, 45])]


@pytest.fixture(scope="module")
def model() -> Any:
    attention.register()
    return tiny_llama(attention.NAME)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def complete(
    model: Any, tokenizer: Any, prompts: list[np.ndarray], terminators: tuple[int, ...] = (), **sampling: Any
) -> list[Sample]:
    config = SamplingConfig(**{"max_new_tokens": 5, **sampling})
    return sample_completions(
        model,
        tokenizer,
        prompts,
        terminators or (VOCABULARY - 1,),
        config,
        ALONE,
        seed=1,
        is_partitioned=False,
    )


def greedy(model: Any, prompt: np.ndarray, count: int) -> list[int]:
    """The likeliest tokens one after the other, each from a forward pass over everything before it."""
    ids = prompt.astype(np.int64).tolist()
    with torch.no_grad(), attention.plain_attention(model):
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_batch_of_prompts_is_completed_as_each_would_be_alone(model: Any, tokenizer: Any) -> None:
    model.eval()
    expected = [greedy(model, prompt, 5) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) > 1
    samples = complete(model, tokenizer, PROMPTS)
    assert [sample.completion for sample in samples] == [tokenizer.decode(tokens) for tokens in expected]
    assert [sample.prompt for sample in samples] == [tokenizer.decode(prompt) for prompt in PROMPTS]


def test_a_completion_ends_before_its_terminator(model: Any, tokenizer: Any) -> None:
    model.eval()
    tokens = greedy(model, PROMPTS[0], 5)
    end = tokens[-1]
    before = tokens[: tokens.index(end)]
    (sample,) = complete(model, tokenizer, PROMPTS[:1], terminators=(end,))
    assert sample == Sample(tokenizer.decode(PROMPTS[0]), tokenizer.decode(before), True)
    (cut,) = complete(model, tokenizer, PROMPTS[:1], terminators=(end,), max_new_tokens=max(1, len(before)))
    assert cut.stopped is (len(before) == 0)


def test_sampling_changes_neither_the_models_mode_nor_the_generators(model: Any, tokenizer: Any) -> None:
    model.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    complete(model, tokenizer, PROMPTS, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert model.config._attn_implementation == attention.NAME


def test_with_a_temperature_completions_are_drawn_and_the_same_each_time(model: Any, tokenizer: Any) -> None:
    drawn = [complete(model, tokenizer, PROMPTS * 4, temperature=2.0) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len({sample.completion for sample in drawn[0][::3]}) > 1


def test_samples_are_drawn_without_cuda_graphs_where_that_is_set(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    class Asked(sampling.Decoder):
        def __init__(self, model: Any, *, slots: int, cuda_graphs: bool = True) -> None:
            asked.append(cuda_graphs)
            super().__init__(model, slots=slots, cuda_graphs=cuda_graphs)

    monkeypatch.setattr(sampling, "Decoder", Asked)
    complete(model, tokenizer, PROMPTS)
    complete(model, tokenizer, PROMPTS, cuda_graphs=False)
    assert asked == [True, False]


def test_the_stop_rate_is_the_share_that_stopped() -> None:
    assert stop_rate([Sample("a", "b", stopped) for stopped in (True, False, True, True)]) == 0.75

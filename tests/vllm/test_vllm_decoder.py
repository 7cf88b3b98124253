"""vLLM beside the builtin decoder and plain transformers, on small random models in fp32."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import Dtype, LoraConfig, ModelConfig
from common.decoding.decoder import Decoder
from common.decoding.requests import Completion, Request, SamplingParams
from common.decoding.vllm_decoder import EngineSize, VLLMDecoder
from common.decoding.vllm_server import VLLMServers
from common.errors import UserError
from common.model.adapters import ADAPTER, add_adapters
from tests.runs import LLAMA
from tests.vllm.conftest import WIDTHS

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("world")]

CLOSE = 1e-5
"""Nats: sums in fp32 in another order."""
CPU = torch.device("cpu")
SIZE = EngineSize(slots=4, max_length=64)
TERMINATORS = (7, 9)


def written(folder: Path, **config: Any) -> ModelConfig:
    """A random model on the disk, whose terminators are rather likely."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**LLAMA, **WIDTHS, "vocab_size": 60, "initializer_range": 0.2, **config}
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(folder)
    return ModelConfig(path=str(folder), dtype=Dtype.fp32)


def loaded(model: ModelConfig) -> Any:
    """The same for the trainer, with every weight another one than on the disk."""
    from transformers import AutoModelForCausalLM

    from common.model import attention

    attention.register()
    network = AutoModelForCausalLM.from_pretrained(
        model.path, dtype=torch.float32, attn_implementation="packed"
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def weights_of(network: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach()) for name, parameter in network.named_parameters()]


def requests(count: int = 6) -> list[Request]:
    """Prompts of different lengths, each twice in a row."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(10, 60, 3 + 4 * number).astype(np.int32) for number in range(-(-count // 2))]
    return [Request(prompts[number // 2], (5, number)) for number in range(count)]


def scored(network: Any, request: Request, completion: Completion, temperature: float) -> np.ndarray:
    """Log-probabilities of a completion's tokens, over all tokens."""
    ids = torch.from_numpy(np.concatenate([request.prompt, completion.tokens]).astype(np.int64))[None]
    length = ids.shape[1]
    bounds = torch.tensor([0, length], dtype=torch.int32)
    with torch.no_grad():
        logits = network(ids, attention_mask=None, cu_seq_lens_q=bounds, max_length_q=length).logits[0]
    logits = logits[len(request.prompt) - 1 : -1]
    of_all = torch.log_softmax(logits / temperature, -1)
    return of_all[torch.arange(len(completion.tokens)), ids[0, len(request.prompt) :]].numpy()


def sampled(
    decoder: VLLMDecoder | VLLMServers, network: Any, asked: Sequence[Request], params: SamplingParams
) -> list[Completion]:
    with decoder.holding(weights_of(network)):
        found = decoder.decode(asked, params)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return written(tmp_path_factory.mktemp("model") / "tied")


@pytest.fixture(scope="module")
def network(model: ModelConfig) -> Any:
    return loaded(model)


@pytest.fixture(scope="module")
def decoder(model: ModelConfig, world: None) -> VLLMDecoder:
    return VLLMDecoder(model, SIZE, CPU)


def test_greedily_it_says_what_the_builtin_decoder_says(decoder: VLLMDecoder, network: Any) -> None:
    params = SamplingParams(0.0, 12, TERMINATORS)
    ours = Decoder(network, slots=4).decode(requests(), params)
    assert ours is not None
    for one, other in zip(ours, sampled(decoder, network, requests(), params), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.stopped is other.stopped
        assert other.logprobs == pytest.approx(one.logprobs, abs=CLOSE)


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_that_are_handed_over_are_those_that_sample(tied: bool, tmp_path: Path) -> None:
    """Also where the output layer shares them with the embeddings, and at the second hand-over, too."""
    model = written(tmp_path / "model", tie_word_embeddings=tied)
    decoder, params = VLLMDecoder(model, SIZE, CPU), SamplingParams(0.7, 12, TERMINATORS)
    for _ in range(2):
        network = loaded(model)  # other weights each time
        found = sampled(decoder, network, requests(), params)
        for request, completion in zip(requests(), found, strict=True):
            expected = scored(network, request, completion, 0.7)
            assert completion.logprobs == pytest.approx(expected, abs=CLOSE)


def test_a_draw_depends_on_the_requests_key_and_on_nothing_beside_it(
    decoder: VLLMDecoder, network: Any
) -> None:
    params = SamplingParams(1.0, 12, TERMINATORS)
    first = sampled(decoder, network, requests(), params)
    assert first[0].tokens.tolist() != first[1].tokens.tolist()  # of one prompt, with other keys
    torch.manual_seed(99)
    again = sampled(decoder, network, requests()[3:], params)
    assert [each.tokens.tolist() for each in again] == [each.tokens.tolist() for each in first[3:]]
    assert decoder.counts.tokens == sum(len(each.tokens) for each in again)


def test_a_response_ends_at_its_terminator_or_at_its_limit(decoder: VLLMDecoder, network: Any) -> None:
    asked = [Request(np.arange(10, 20, dtype=np.int32), (6, number), 9) for number in range(40)]
    found = sampled(decoder, network, asked, SamplingParams(1.0, 30, TERMINATORS))
    assert {each.stopped for each in found} == {True, False}
    for each in found:
        assert not set(each.tokens[:-1].tolist()) & set(TERMINATORS)
        assert (int(each.tokens[-1]) in TERMINATORS) is each.stopped
        assert each.stopped or len(each.tokens) == 9


def test_a_prompt_without_room_is_refused_and_one_with_a_little_room_is_cut(
    decoder: VLLMDecoder, network: Any
) -> None:
    prompt = np.full(62, 11, np.int32)
    (found,) = sampled(decoder, network, [Request(prompt, (1,))], SamplingParams(1.0, 30, ()))
    assert len(found.tokens) == 2
    with pytest.raises(UserError, match="a prompt of 64 tokens leaves no room"):
        sampled(decoder, network, [Request(np.full(64, 11, np.int32), (1,))], SamplingParams(1.0, 30, ()))


def test_with_top_k_log_probabilities_are_still_over_all_tokens(model: ModelConfig, network: Any) -> None:
    decoder = VLLMDecoder(model, SIZE, CPU, filters=True)
    found = sampled(decoder, network, requests(), SamplingParams(1.0, 12, TERMINATORS, top_k=3))
    for request, completion in zip(requests(), found, strict=True):
        expected = scored(network, request, completion, 1.0)
        assert completion.logprobs == pytest.approx(expected, abs=CLOSE)
    assert min(each.logprobs.min() for each in found) > np.log(1 / 60)  # of the three likeliest


def test_told_to_stop_it_returns_nothing_and_can_go_on(decoder: VLLMDecoder, network: Any) -> None:
    params = SamplingParams(1.0, 12, TERMINATORS)
    asked: list[int] = []

    def told() -> bool:
        asked.append(1)
        return True

    with decoder.holding(weights_of(network)):
        assert decoder.decode(requests(), params, should_stop=told) is None
    assert len(asked) == 1
    assert len(sampled(decoder, network, requests(), params)) == 6


def test_completions_are_given_out_as_they_end(decoder: VLLMDecoder, network: Any) -> None:
    seen: dict[int, Completion] = {}
    with decoder.holding(weights_of(network)):
        found = decoder.decode(requests(), SamplingParams(1.0, 12, TERMINATORS), ready=seen.__setitem__)
    assert found is not None and [seen[number] for number in range(6)] == found


def test_generators_and_threads_are_left_as_they_were(model: ModelConfig, network: Any) -> None:
    def drawn() -> list[object]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(4), np.random.seed(4), torch.manual_seed(4)  # type: ignore[func-returns-value]

    seed()
    expected, function = drawn(), torch.set_num_threads
    seed()
    sampled(VLLMDecoder(model, SIZE, CPU), network, requests(), SamplingParams(1.0, 12, TERMINATORS))
    assert drawn() == expected and torch.set_num_threads is function


def test_a_weight_that_is_missing_is_an_error(decoder: VLLMDecoder, network: Any) -> None:
    some = [(name, weight) for name, weight in weights_of(network) if "layers.1.mlp" not in name]
    with pytest.raises(UserError, match=r"does not take the policy's weights: .*layers\.1\.mlp"):
        decoder.holding(some).__enter__()


def test_logits_that_are_not_finite_are_the_policys(decoder: VLLMDecoder, network: Any) -> None:
    broken = [(name, torch.full_like(weight, torch.nan)) for name, weight in weights_of(network)]
    with pytest.raises(UserError, match="the policy's logits are not finite"), decoder.holding(broken):
        decoder.decode(requests(), SamplingParams(1.0, 12, TERMINATORS))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": 16}, "cannot sample from the policy on this device: .*head_dim=8"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}, "has experts"),
    ],
)
def test_what_it_would_compute_otherwise_or_not_at_all_is_refused(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        VLLMDecoder(written(tmp_path / "model", **config), SIZE, CPU)
    assert "ppo.rollout.engine=builtin" in str(caught.value.hint)


def adapted(model: ModelConfig, lora: LoraConfig) -> Any:
    """A network whose adapters are no longer zero."""
    network = add_adapters(load_model_of(model), lora, "CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return network.eval()


def load_model_of(model: ModelConfig) -> Any:
    from transformers import AutoModelForCausalLM

    from common.model import attention

    attention.register()
    return AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32, attn_implementation="packed")


def test_an_adapter_is_swapped_in_as_it_is_trained(model: ModelConfig) -> None:
    lora, decoder = LoraConfig(enabled=True, r=4), None
    for _ in range(2):
        network = adapted(model, lora)
        decoder = decoder or VLLMDecoder(model, SIZE, CPU, adapter=network.peft_config[ADAPTER])
        trained = [(name, weight) for name, weight in weights_of(network) if ".lora_" in name]
        with decoder.holding(trained):
            found = decoder.decode(requests(), SamplingParams(0.7, 12, TERMINATORS))
        assert found is not None
        for request, completion in zip(requests(), found, strict=True):
            expected = scored(network, request, completion, 0.7)
            assert completion.logprobs == pytest.approx(expected, abs=CLOSE)


def test_an_adapter_that_it_would_compute_otherwise_is_refused(model: ModelConfig) -> None:
    network = adapted(model, LoraConfig(enabled=True, r=4, dora=True))
    with pytest.raises(UserError, match="neither DoRA nor adapters of experts"):
        VLLMDecoder(model, SIZE, CPU, adapter=network.peft_config[ADAPTER])

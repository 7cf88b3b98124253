from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.architectures import tiny_config
from common.config import Dtype, LoraConfig, ModelConfig
from common.decoding.decoder import Decoder
from common.decoding.requests import Request, SamplingParams
from common.model.attention import positions_within
from common.model.loading import load_model
from common.model.one_by_one import reason_of, side_by_side
from common.model.packed import PackedCausalLM
from common.model.probes import isolate_documents
from common.model.scalar_head import NEW_REWARD_MODEL
from common.training.export import ask_live, export_model
from tests.packed import packed_lm, packed_scorer
from tests.tiny import CHATML, tiny_tokenizer

CPU = torch.device("cpu")
DOCUMENTS = [torch.arange(5, 18), torch.tensor([7, 7, 9, 4, 8, 3, 5, 6, 9, 9]), torch.arange(60, 39, -1)]
LENGTHS = [len(document) for document in DOCUMENTS]
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
FAMILIES = ("qwen3_next", "llama4_text", "falcon")  # a recurrence, chunks, an attention of its own


def saved(family: str, folder: Path) -> Path:
    """A policy's folder: weights that are nowhere near zero."""
    config = tiny_config(family)
    config.vocab_size = len(tiny_tokenizer(CHATML))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def settings(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(**{"path": str(folder), "dtype": Dtype.fp32, **changes})


def loaded(folder: Path, **changes: Any) -> PackedCausalLM:
    return packed_lm(load_model(settings(folder, **changes), tiny_tokenizer(CHATML), seed=0, device=CPU))


def token_losses(packed: PackedCausalLM) -> torch.Tensor:
    """Of every token but the first of each document."""
    ids = torch.cat(DOCUMENTS)
    trained = torch.cat(
        [torch.arange(a, b - 1) for a, b in zip(BOUNDS[:-1].tolist(), BOUNDS[1:].tolist(), strict=True)]
    )
    positions = positions_within(BOUNDS, len(ids))
    return packed(
        ids[None], positions, BOUNDS, max(LENGTHS), trained, ids[trained + 1], per_token=True
    ).token_losses


def plain_losses(model: Any) -> torch.Tensor:
    parts = [model(input_ids=d[None], use_cache=False).logits[0, :-1] for d in DOCUMENTS]
    return torch.cat(
        [F.cross_entropy(p, d[1:], reduction="none") for p, d in zip(parts, DOCUMENTS, strict=True)]
    )


def test_documents_of_about_the_same_length_run_side_by_side() -> None:
    # the shortest beside 8 has 6; empty documents, which fill up boundaries, do not run
    assert side_by_side([5, 8, 0, 6, 2, 7]) == [[1, 5, 3], [0], [4]]
    assert side_by_side([5, 8, 0, 6], in_one_pass=True) == [[1, 3, 0]]


def test_a_convolution_over_neighbours_stays_inside_its_document(tmp_path: Path) -> None:
    packed_model = load_model(
        settings(saved("llama", tmp_path)), tiny_tokenizer(CHATML), seed=0, device=CPU
    ).eval()

    def shift(_: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + F.pad(output, (0, 0, 1, 0))[:, :-1]

    packed_model.model.layers[0].mlp.register_forward_hook(shift)
    isolate_documents(packed_model)
    assert reason_of(packed_model) == "state that crosses documents"
    packed = packed_lm(packed_model)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    plain.model.layers[0].mlp.register_forward_hook(shift)
    torch.testing.assert_close(token_losses(packed), plain_losses(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_documents_alone(family: str, tmp_path: Path) -> None:
    packed = loaded(saved(family, tmp_path))
    assert reason_of(packed.base()) and not packed.shortcuts.shared_prefix
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    # weighted as preferences weigh them: one document up, one down
    weights = torch.linspace(-1, 1, sum(LENGTHS) - len(LENGTHS))
    ours, theirs = token_losses(packed), plain_losses(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for (name, a), (_, b) in zip(packed.base().named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"lora": LoraConfig(enabled=True)}])
def test_recomputed_activations_and_fresh_adapters_change_no_loss(changes: dict, tmp_path: Path) -> None:
    saved("qwen3_next", tmp_path)
    packed = loaded(tmp_path, **changes)
    losses = token_losses(packed)
    torch.testing.assert_close(losses, token_losses(loaded(tmp_path)), rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in packed.parameters())


@pytest.mark.parametrize("family", ["qwen3_next", "falcon"])
def test_a_reward_model_scores_each_document_as_it_does_alone(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "policy")
    packed = packed_scorer(
        load_model(settings(folder), tiny_tokenizer(CHATML), NEW_REWARD_MODEL, seed=5, device=CPU)
    ).eval()
    with torch.no_grad():
        scores = packed.answers(DOCUMENTS)
    folder, probe = tmp_path / "export", ask_live(packed, DOCUMENTS)
    export_model(packed.base(), None, tiny_tokenizer(CHATML), folder, probe, details={})
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    with torch.no_grad():
        alone = torch.cat([plain(input_ids=document[None]).logits[0] for document in DOCUMENTS])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_gives_the_logits_of_the_model_that_was_trained(family: str, tmp_path: Path) -> None:
    packed = loaded(saved(family, tmp_path / "policy")).eval()
    document = DOCUMENTS[0][None]
    probe = ask_live(packed, document)
    export_model(packed.base(), None, tiny_tokenizer(CHATML), tmp_path / "export", probe, details={})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    torch.testing.assert_close(plain(input_ids=document).logits[0], probe.answer, rtol=1e-5, atol=1e-5)


def test_sampling_goes_on_as_plain_transformers_does(tmp_path: Path) -> None:
    packed = loaded(saved("qwen3_next", tmp_path))
    params = SamplingParams(temperature=0, max_new_tokens=4, terminators=())
    prompts = [document.numpy().astype(np.int32) for document in DOCUMENTS]
    completions = Decoder(packed.base(), slots=2).decode(
        [Request(p, (0, i)) for i, p in enumerate(prompts)], params
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert completions is not None
    for document, completion in zip(DOCUMENTS, completions, strict=True):
        ids = document[None]
        for _ in range(4):
            ids = torch.cat([ids, plain(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)[None]], 1)
        assert completion.tokens.tolist() == ids[0, len(document) :].tolist()

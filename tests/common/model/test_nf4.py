from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common.config import Dtype, LoraConfig, ModelConfig, Quantize
from common.errors import UserError
from common.model.loading import load_model
from common.model.nf4 import is_scale, keep_one_layout
from tests.tiny import CHATML, SHAPE, tiny_tokenizer

CPU = torch.device("cpu")
WIDE = {**SHAPE, "hidden_size": 64, "intermediate_size": 128}
"""Widths that bitsandbytes would repack on a CPU with AVX-512 BF16."""


@pytest.fixture
def network(tmp_path: Path) -> torch.nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tokenizer = tiny_tokenizer(CHATML)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **WIDE)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = ModelConfig(
        path=str(tmp_path), lora=LoraConfig(enabled=True), quantize=Quantize.nf4, dtype=Dtype.fp32
    )
    return load_model(model, tokenizer, seed=0, device=CPU)


def layers_of(network: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in network.modules() if hasattr(module, "quant_state")]


def test_products_are_made_in_the_dtype_of_the_model(network: torch.nn.Module) -> None:
    layers = layers_of(network)
    assert len(layers) == 14 and {layer.compute_dtype for layer in layers} == {torch.float32}


def test_an_evaluation_leaves_four_bit_weights_and_gradients_as_they_are(network: torch.nn.Module) -> None:
    layer = layers_of(network)[0]
    before = layer.weight.data.clone()
    row = torch.randn(8, layer.in_features)
    with torch.no_grad():
        evaluated = layer.eval()(row)
    row.requires_grad_()
    trained = layer.train()(row)
    assert torch.equal(layer.weight.data, before) and torch.equal(evaluated, trained)
    trained.sum().backward()
    assert row.grad is not None and row.grad.abs().min() > 0


def test_the_layers_of_a_cpu_with_avx512_bf16_are_told(network: torch.nn.Module) -> None:
    layers = layers_of(network)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as bitsandbytes finds it there
    keep_one_layout(network)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_scales_are_told_from_weights_by_their_names(network: torch.nn.Module) -> None:
    state = network.state_dict()
    scales = [name for name in state if is_scale(name, state)]
    assert len(scales) >= 4 * 14 and not any(name.endswith((".weight", ".bias")) for name in scales)
    assert {name for name, _ in network.named_parameters()} <= set(state) - set(scales)


def test_new_weights_are_not_quantized() -> None:
    model = ModelConfig(config={"model_type": "llama"}, quantize=Quantize.nf4, lora=LoraConfig(enabled=True))
    with pytest.raises(UserError, match="quantize=nf4 needs weights that exist"):
        model.check("model.")

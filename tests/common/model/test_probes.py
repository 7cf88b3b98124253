from __future__ import annotations

import pytest
import torch
from transformers import GraniteConfig

from common.errors import UserError
from common.model.packed import batch_arguments
from common.model.probes import isolate_documents
from tests.common.model.test_packed import BATCH, LLAMA, MODELS, SHAPE, plain_loss, tiny
from tests.packed import packed_lm


@pytest.mark.parametrize("name", MODELS)
def test_models_that_pack_exactly_pass_the_check(name: str) -> None:
    model = tiny(MODELS[name]).train()
    state = torch.get_rng_state()
    isolate_documents(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_a_model_that_changes_its_logits_unannounced_makes_them_itself() -> None:
    model = tiny(GraniteConfig(**SHAPE, logits_scaling=4.0))
    model.config.logits_scaling = 1.0
    original = model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    packed = packed_lm(model)
    assert not packed.shortcuts.fused_loss
    torch.testing.assert_close(
        packed(**batch_arguments(BATCH)).loss_sum, plain_loss(model, BATCH), rtol=1e-6, atol=1e-5
    )


def test_a_layer_that_looks_at_later_tokens_is_refused() -> None:
    model = tiny(LLAMA)

    def shift(_: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + output.roll(-1, 1)

    model.model.layers[0].mlp.register_forward_hook(shift)
    with pytest.raises(UserError, match="model_type=llama has attention to later tokens"):
        isolate_documents(model)


def test_a_forward_pass_that_fails_names_the_family() -> None:
    model = tiny(LLAMA)

    def fail(*_: object) -> None:
        raise KeyError("alibi")

    model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="model_type=llama has a forward pass that fails .KeyError: 'alibi'"):
        isolate_documents(model)

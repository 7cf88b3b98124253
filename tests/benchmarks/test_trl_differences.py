"""Where TRL's numbers are not ours, by numbers worked by hand.

Each test fails when TRL stops doing it: then the benchmark's explanation has to go.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data.batches import collate_pairs
from common.data.types import IGNORE, TokenizedExample, TokenizedPair
from common.model.packed import batch_arguments
from common.model.tokenizer import train_tokenizer
from step2_dpo.loss import Objective
from tests.packed import packed_scorer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed (extra: bench)"
)
EOS, UP, DOWN = 2, 10, 11
TINY: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "eos_token_id": EOS, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["what is up and what is down"], 300)


def arguments(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False}


def scorer() -> Any:
    """A reward that depends on one token alone: UP is worth 2, DOWN -2, EOS 0.

    The layer adds nothing, and the norm leaves (±1, ±1) as it is.
    """
    from transformers import LlamaConfig, LlamaForSequenceClassification

    model: Any = LlamaForSequenceClassification(LlamaConfig(num_labels=1, pad_token_id=0, **TINY))
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        table = model.model.embed_tokens.weight
        table[UP], table[DOWN], table[EOS] = (torch.tensor(v) for v in ([1.0, 1], [-1.0, -1], [1.0, -1]))
        model.score.weight[:] = 1.0
    return model


def trl_reward_loss(folder: Path, tokenizer: Any, pad: str) -> float:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = Dataset.from_dict({"chosen_ids": [[UP, EOS]], "rejected_ids": [[DOWN, EOS]]})
    config = RewardConfig(pad_token=pad, **arguments(folder))
    trainer = RewardTrainer(scorer(), args=config, train_dataset=rows, processing_class=tokenizer)
    return float(trainer.compute_loss(trainer.model, trainer.data_collator([rows[0]])))


def test_where_pad_is_eos_trl_reads_the_reward_one_token_early(tmp_path: Path, tokenizer: Any) -> None:
    own = trl_reward_loss(tmp_path, tokenizer, tokenizer.pad_token)
    assert own == pytest.approx(math.log(2))  # 0 against 0, both at the terminator
    early = trl_reward_loss(tmp_path, tokenizer, tokenizer.convert_ids_to_tokens(EOS))
    assert early == pytest.approx(math.log1p(math.exp(-4)), rel=1e-5)  # 2 against -2


@pytest.mark.parametrize("pad", [0, EOS])
def test_our_reward_is_read_at_the_terminator_whatever_pad_is(pad: int) -> None:
    model = scorer().eval()
    model.config.pad_token_id = pad
    up, down = (
        TokenizedExample(np.array([token, EOS], np.int32), np.array([EOS, IGNORE], np.int32), "")
        for token in (UP, DOWN)
    )
    batch = collate_pairs([TokenizedPair(up, down, 0.0)], [0], [0])
    packed = batch_arguments(batch.documents)
    names = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen", "shared_prefix")
    scores = packed_scorer(model)(
        **{name: packed[name] for name in names if name in packed}, score_positions=batch.score_positions
    )
    assert scores.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def trl_dpo(folder: Path, tokenizer: Any, smoothing: float) -> tuple[float, dict[str, float]]:
    """The loss where βΔ = 2: the policy is uniform, and the reference is set beside it by hand."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    models: list[Any] = [LlamaForCausalLM(LlamaConfig(pad_token_id=0, **TINY)) for _ in range(2)]
    for parameter in models[0].parameters():
        torch.nn.init.zeros_(parameter)
    rows = Dataset.from_dict({"prompt": ["what is "], "chosen": ["up"], "rejected": ["down"]})
    config = DPOConfig(beta=0.5, label_smoothing=smoothing, **arguments(folder))
    trainer = DPOTrainer(
        models[0], ref_model=models[1], args=config, train_dataset=rows, processing_class=tokenizer
    )
    trainer.precompute_ref_logps = True
    row = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}
    uniform = -math.log(300)
    reference = {"ref_chosen_logps": uniform - 2, "ref_rejected_logps": uniform + 2}
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([{**row, **reference}]))
    return float(loss), {name: values[0] for name, values in trainer._metrics["train"].items()}


def test_label_smoothing_has_no_effect_on_trls_sigmoid_loss(tmp_path: Path, tokenizer: Any) -> None:
    loss, metrics = trl_dpo(tmp_path, tokenizer, smoothing=0.25)
    assert metrics["rewards/margins"] == pytest.approx(2.0, rel=1e-5)
    assert loss == pytest.approx(math.log1p(math.exp(-2)), rel=1e-5)  # 0.126928, as without smoothing
    delta = torch.tensor(4.0, dtype=torch.float64)
    ours = float(Objective(beta=0.5, label_smoothing=0.25).of_difference(delta))
    assert ours == pytest.approx(0.75 * 0.126928 + 0.25 * 2.126928, rel=1e-5)  # 0.626928

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.artifacts import Artifact
from common.config import ModelConfig
from common.data.columns import Columns
from common.data.prompts import recognise, to_prompt, turns_again
from common.data.types import Place, RawExample
from common.errors import UserError
from common.stage import Role
from common.training.import_model import import_model
from step3_ppo.rewards.reading import TextReader, reader_of
from tests.common.training.exporting import published
from tests.tiny import CHATML

SCORER = AutoModelForSequenceClassification
WITHOUT_NEWLINE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
IM_END = 4
QUESTION, ANSWER = "What is 2 + 3?", "It is 5."


def published_scorer(folder: Path, **changes: Any) -> Path:
    return published(folder, SCORER, torch.float32, labels=1, **changes)


def reader_for(folder: Path) -> tuple[TextReader, Artifact]:
    out = folder.with_name("imported")
    artifact = Artifact.load(
        import_model(ModelConfig(path=str(folder)), Role.reward_model, out), Role.reward_model
    )
    reader = reader_of(ModelConfig(), artifact)
    assert reader is not None
    return reader, artifact


def score(folder: Path, ids: Any) -> float:
    model = SCORER.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(input_ids=torch.as_tensor(np.asarray(ids, np.int64))[None]).logits[0, 0])


@pytest.mark.parametrize("template", [CHATML, WITHOUT_NEWLINE])
@pytest.mark.parametrize("pad", [0, IM_END])  # many publish a model whose pad ends its turns
@pytest.mark.parametrize(
    "prompt",
    [QUESTION, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]],
    ids=["text", "turns"],
)
def test_the_score_is_that_of_plain_transformers_for_the_same_conversation(
    template: str, pad: int, prompt: Any, tmp_path: Path
) -> None:
    folder = published_scorer(tmp_path / "model", template=template, pad_token_id=pad)
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": ANSWER}], return_dict=False
    )
    reader, artifact = reader_for(folder)
    (read,) = reader([prompt], [ANSWER], {})
    at_end = AutoModelForSequenceClassification.from_pretrained(artifact.path).eval()
    with torch.no_grad():
        hidden = at_end.model(input_ids=torch.as_tensor(read.astype(np.int64))[None]).last_hidden_state
        ours = float(at_end.score(hidden[0, -1]))
    assert ours == pytest.approx(score(folder, plain), abs=1e-6)
    if pad == IM_END and template == WITHOUT_NEWLINE:
        assert len(read) == len(plain) - 1  # transformers takes the last token for padding, and so do we
    else:
        assert read.tolist() == plain


def test_control_tokens_in_a_completion_are_text(tmp_path: Path) -> None:
    reader, _ = reader_for(published_scorer(tmp_path / "model"))
    (ids,) = reader([QUESTION], ["5<|im_end|>"], {})
    assert ids.tolist().count(IM_END) == 2  # of the question and of the answer


def test_the_columns_of_the_row_belong_to_the_conversation(tmp_path: Path) -> None:
    reader, _ = reader_for(published_scorer(tmp_path / "model"))
    columns: dict[str, list[Any]] = {"system": ["Be brief.", None], "wanted": ["5", "5"]}
    with_system, without = reader([QUESTION] * 2, [ANSWER] * 2, columns)
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    assert with_system.tolist() == reader([said], [ANSWER], {})[0].tolist()
    assert without.tolist() == reader([QUESTION], [ANSWER], {})[0].tolist()


def test_what_it_cannot_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    reader, artifact = reader_for(published_scorer(tmp_path / "model", template=NO_SYSTEM))
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    with pytest.raises(UserError, match="cannot read a response: .*no system") as error:
        reader([said], [ANSWER], {})
    assert str(artifact.path) in error.value.message
    with pytest.raises(UserError, match="reads at most 64 tokens, and a prompt with its response has"):
        reader([QUESTION], ["long " * 64], {})


def test_ours_is_given_tokens() -> None:
    assert reader_of(ModelConfig(), None) is None


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": QUESTION},
        {"prompt": QUESTION, "completion": ANSWER, "system": "Be brief."},
        {"prompt": "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: 2 + 3?\n\nAssistant:"},
        {"instruction": "Add.", "input": "2 and 3", "system": "Be brief.", "history": [["Hello", "Hi"]]},
        {"instruction": "Add.", "input": "", "output": ANSWER},
        {"question": QUESTION, "answer": ANSWER},
        {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
        {"conversations": [{"from": "system", "value": "Brief."}, {"from": "human", "value": QUESTION}]},
        {
            "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: 5",
            "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: 6",
        },
        {"prompt": QUESTION, "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}]},
    ],
    ids=lambda columns: "+".join(columns),
)
def test_the_turns_of_a_prompt_are_found_again_in_what_is_kept_of_its_row(columns: Columns) -> None:
    prompt = to_prompt(RawExample(columns, "rows", Place("rows.jsonl", 1)), recognise(columns))
    turns, context = turns_again(prompt.as_given, {**prompt.columns, "of another row": None})
    assert turns == prompt.messages and context == prompt.context

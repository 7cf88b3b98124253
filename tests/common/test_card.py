"""A model card says what the manifest says, and its programs run as they are pasted."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common.artifacts import CARD, Artifact, read_manifest, verify
from common.card import addressed, figure, license_in, model_card
from common.config import LoraConfig, ModelConfig
from common.errors import UserError
from common.stage import Role
from common.training.import_model import import_model
from pipeline.__main__ import dispatch
from tests.common.training.exporting import KINDS, exported, published, trained
from tests.common.training.test_export import exported_scorer, trained_scorer
from tests.tiny import CHATML

DETAILS: dict[str, Any] = {
    "training": {
        "step": "reward", "adapters": True, "settings": {"reward.optim.lr": 2e-5, "seed": 1},
        "rows": [
            {"name": "a|b", "rows_read": 1200, "rows_kept": 9, "rows_held_out": 3, "tokens": 10,
             "trained_tokens": 4, "dropped": 1},
        ],
        "before": {"eval/loss": 3.0},
    },
    "metrics": {"eval/loss": 2.123456, "eval/accuracy": 0.9, "eval/x": 1.0, "eval/x_se": 0.1, "loss": 7.0},
    "calibration": {"mean": 0.5, "std": 2.0, "pairs": 100},
    "progress": {"step": 7, "num_tokens": 1000},
    "origin": {"base_model": "org/name", "license": "other", "license_name": "llama", "license_link": "URL"},
}  # fmt: skip


def programs(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / CARD).read_text(), re.DOTALL)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the card's program where its reader would; what it has defined."""
    (program,) = programs(folder)
    defined: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(compile(program, CARD, "exec"), defined)  # noqa: S102 - a card of ours
    return defined


def test_the_program_of_a_policys_card_prints_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    details = {"data": {"chat_template_kwargs": {"enable_thinking": False}}}
    folder = exported(trained(KINDS["tied"]), tmp_path / "export", details=details)
    assert "enable_thinking=False" in programs(folder)[0]
    capsys.readouterr()
    defined = run(folder, monkeypatch)
    prompt = defined["inputs"]["input_ids"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(prompt[0]).endswith("<|im_start|>assistant\n")
    greedy = model.generate(prompt, max_new_tokens=32)[0, prompt.shape[1] :]
    assert capsys.readouterr().out.strip() == tokenizer.decode(greedy, skip_special_tokens=True).strip()


def test_the_program_of_a_reward_models_card_scores_at_the_terminator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = trained_scorer(tmp_path / "policy")
    folder = exported_scorer(packed, tmp_path / "export")
    score = run(folder, monkeypatch)["score"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "ok"}]
    text = "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nok<|im_end|>"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    document = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    with torch.no_grad():
        assert score(messages) == pytest.approx(float(packed.answers([document])[0]), abs=1e-5)


@pytest.mark.parametrize(("pad", "newline"), [(0, True), (0, False), (4, True), (4, False)])
def test_the_program_of_a_published_reward_models_card_scores_as_it_does_itself(
    pad: int, newline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = AutoModelForSequenceClassification
    template = CHATML if newline else CHATML.replace("{{ '\n' }}", "")
    assert newline or template != CHATML
    folder = published(
        tmp_path / "model", scorer, torch.float32, labels=1, pad_token_id=pad, template=template
    )
    out = import_model(ModelConfig(path=str(folder)), Role.reward_model, tmp_path / "imported")
    said = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(said, return_dict=False)
    with torch.no_grad():
        plain = scorer.from_pretrained(folder).eval()(torch.tensor([ids])).logits[0, 0].item()
    assert run(out, monkeypatch)["score"](said) == pytest.approx(plain, abs=1e-6)


def test_the_head_is_what_the_hub_reads() -> None:
    card = model_card(Role.reward_model, DETAILS)
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "base_model": "org/name", "library_name": "transformers", "license": "other", "license_name": "llama",
        "license_link": "URL", "pipeline_tag": "text-classification",
        "tags": ["rlhf-pipeline", "reward-model", "lora"],
    }  # fmt: skip
    bare = yaml.safe_load(model_card(Role.policy, {"origin": {"base_model": "/home/me/m"}}).split("---\n")[1])
    assert bare == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rlhf-pipeline"]
    }  # fmt: skip


def test_the_text_has_rows_settings_and_numbers_before_and_after_with_intervals() -> None:
    card = model_card(Role.reward_model, DETAILS)
    for line in (
        r"| a\|b | 1,200 | 9 | 3 | 10 | 4 | 1 |",
        "| `reward.optim.lr` | 2e-05 |",
        "| `eval/loss` | 3 | 2.123 |",
        "| `eval/accuracy` |  | 0.9 (0.8256 to 0.9448) |",
        "| `eval/x` |  | 1 (0.804 to 1.196) |",
        "* Licence of the base model: llama (URL)",
        "Over the 100 pairs that it was calibrated on, scores have mean 0.5 and standard\ndeviation 2.",
    ):
        assert line in card
    assert "| `loss`" not in card and "eval/x_se" not in card


def test_a_card_can_be_filled_in_and_the_artifact_stays_whole(tmp_path: Path) -> None:
    folder = exported(trained(KINDS["tied"]), tmp_path / "export")
    assert CARD in read_manifest(folder).files
    said: list[str] = []
    (folder / CARD).write_text("for chess")
    assert Artifact.load(folder, Role.policy).sha256
    from pipeline.verify import verify_path

    assert verify_path(folder, say=said.append) == 0 and said[0].endswith(f"; {CARD} was edited")
    (folder / CARD).unlink()
    verify(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        verify(folder)


def test_the_card_of_an_artifact_follows_from_its_manifest(tmp_path: Path) -> None:
    parents = [{"role": Role.policy, "path": "sft/export", "manifest_sha256": "abc"}]
    details = {**DETAILS, "parents": parents, "metrics": {"eval/loss": math.nan}}
    folder = exported(trained(KINDS["tied"]), tmp_path / "export", details=details)
    assert "* Policy that training started from: manifest `abc`" in (folder / CARD).read_text()
    assert model_card(Role.policy, read_manifest(folder).details) == (folder / CARD).read_text()


def test_adapters_beside_merged_weights_have_no_card_of_their_own(tmp_path: Path) -> None:
    packed = trained({"model_type": "llama"}, lora=LoraConfig(enabled=True, r=4, alpha=8))
    folder = exported(packed, tmp_path / "export")
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_an_imported_model_keeps_the_licence_of_its_card(tmp_path: Path) -> None:
    from tests.common.training.exporting import published

    folder = published(tmp_path / "model")
    (folder / CARD).write_text("---\nlicense: mit\n---\n# A model\n")
    assert dispatch(["import", str(folder), "--out", str(tmp_path / "policy")]) == 0
    card = (tmp_path / "policy" / CARD).read_text()
    assert "license: mit" in card and "the published ones, unchanged" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    "text", ["", "# A model", "---\n[]\n---\n", "---\na: [\n---\n", "---\nlicense: 3\n---"]
)
def test_a_card_without_a_licence_names_none(text: str, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(text)
    assert license_in(tmp_path / CARD) == {}


def test_a_card_on_the_hub_has_the_models_name_in_its_program() -> None:
    card = model_card(Role.policy, {})
    assert addressed(card, "me/mine") == card.replace('model_path = "."', 'model_path = "me/mine"') != card


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"), (0.000012345, "1.234e-05"), (True, "true"), (None, "none"),
        ([0.9, 0.95], "[0.9, 0.95]"), ("x", "x"), (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_figures_are_short(value: Any, text: str) -> None:
    assert figure(value) == text

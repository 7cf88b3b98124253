from __future__ import annotations

import pytest

from benchmarks.architectures import RESULTS, Outcome, families, table, try_family
from common.model.one_by_one import decoder_of

PACKED = ("llama", "gemma2", "gpt_oss", "deepseek_v3")  # soft caps, sinks, compressed keys and values
ONE_BY_ONE = {
    "falcon": "an attention of its own",
    "gptj": "an attention of its own",
    "gpt_neo": "an attention of its own",
    "nemotron": "layers that are not told where documents begin",
    "nemotron_h": "an attention of its own",
    "lfm2": "layers of type conv",
    "falcon_h1": "an attention of its own",
    "granitemoehybrid": "layers of type linear_attention",
    "blt": "an attention of its own",
    "dots3_note_text": "layers of type indexed_attention",
}
DRAFTS = "the keys and values of another model as its input (it drafts for that model)"
REFUSED = {
    "bert": "attention to later tokens (it is an encoder)",
    "bart": "an encoder and a decoder",
    "gemma4_unified_assistant": DRAFTS,
}


@pytest.mark.parametrize("family", PACKED)
def test_packed_logits_and_gradients_are_those_of_plain_transformers(family: str) -> None:
    outcome = try_family(family)
    assert (outcome.result, outcome.reason) == ("packed", "")
    assert outcome.logits is not None and outcome.gradient is not None


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_what_cannot_be_packed_is_exact_one_by_one(family: str) -> None:
    outcome = try_family(family)
    assert (outcome.result, outcome.reason) == ("one by one", ONE_BY_ONE[family])


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_no_decoder_is_refused_by_its_name(family: str) -> None:
    assert try_family(family) == Outcome(family, families()[family], "refused", REFUSED[family])


def test_a_family_that_cannot_be_made_for_lack_of_a_package_is_refused_as_a_user_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def from_config(*_: object, **__: object) -> None:
        raise ImportError("it requires the PIL library")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", from_config)
    outcome = try_family("llama")
    assert (outcome.result, outcome.reason) == (
        "refused",
        "no causal LM: ImportError: it requires the PIL library",
    )


def test_a_wrong_row_is_counted_and_shown() -> None:
    text = table([Outcome("a", "A", "wrong", "x|y", 0.5, 0.25), Outcome("b", "B", "packed", "", 1e-7, 2e-7)])
    assert "1 wrong, 1 packed." in text
    assert "| a | A | wrong | 5.0e-01 | 2.5e-01 | x\\|y |" in text


def test_packing_that_sees_other_documents_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.model import probes

    # as if the check at load had found nothing: convolutions then run over all documents at once
    monkeypatch.setattr(probes, "isolate_documents", lambda base: None)
    assert try_family("lfm2").result == "wrong"


@pytest.mark.parametrize("family", ["llama4_text", "modernbert-decoder"])
def test_the_decoder_is_what_turns_ids_into_hidden_states(family: str) -> None:
    from transformers import AutoModelForCausalLM

    from benchmarks.architectures import tiny_config

    model = AutoModelForCausalLM.from_config(tiny_config(family))
    assert decoder_of(model) is model.model


def test_the_recorded_table_has_every_family_and_no_wrong_or_unknown_one() -> None:
    import transformers

    text = RESULTS.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert {row[2] for row in rows} <= {"packed", "one by one", "refused"}
    if f"transformers {transformers.__version__}," in text:
        assert [row[0].removeprefix("| ") for row in rows] == list(families())

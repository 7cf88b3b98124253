"""Tiny models measured on a few rows: the numbers are those of the steps, and of plain transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common.artifacts import read_manifest, write_manifest
from common.config import DataConfig, Dtype, ModelConfig, SourceConfig
from common.data.batches import BatchPlan, evaluation_batches, evaluation_pair_batches
from common.data.dataset_types import DEMONSTRATIONS, PREFERENCES
from common.errors import UserError
from common.estimates import student_quantile
from common.inference_config import EvaluateJob, EvaluationSettings
from common.stage import Role
from common.training.import_model import import_model
from evaluation import completions
from evaluation.evaluate import evaluate
from evaluation.inference_model import InferenceModel, load_inference_model
from step1_sft.evaluate import evaluate as sft_evaluate
from step2_reward.evaluate import held_out_metrics, score_pairs
from tests.common.training.exporting import published
from tests.step2_dpo.runs import make_policy, pairs, write_rows
from tests.tiny import CHATML, tiny_tokenizer

CPU = torch.device("cpu")
OTHER_TEMPLATE = CHATML.replace("<|im_start|>", "<|start_header_id|>").replace("<|im_end|>", "<|eot_id|>")
PAIRS = pairs(12)
PROMPTS = [{"prompt": f"What is {a} + {a}?", "answer": str(2 * a)} for a in range(6)]
SETTINGS = EvaluationSettings(max_new_tokens=8, dtype=Dtype.fp32)
PLAN = BatchPlan(max_length=200, packing=True, global_batch_size=1, micro_batch_size=1, seed=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies; reward models that read as they do and with a template of their own, each published and,
    as if a step had made it, ours."""
    folder = tmp_path_factory.mktemp("models")
    tiny_tokenizer(CHATML).save_pretrained(folder / "tokenizer")
    for seed, name in enumerate(("policy", "other")):
        make_policy(folder / name, folder / "tokenizer", seed=seed, initializer_range=0.3)
    for name, template in (("alike", CHATML), ("stranger", OTHER_TEMPLATE)):
        made = published(
            folder / f"plain_{name}", AutoModelForSequenceClassification, template=template, labels=1,
            dtype=torch.float32, max_position_embeddings=512,
        )  # fmt: skip
        taken = import_model(ModelConfig(path=str(made)), Role.reward_model, folder / f"published_{name}")
        ours = shutil.copytree(taken, folder / f"our_{name}")
        manifest = read_manifest(ours)
        details = {key: each for key, each in manifest.details.items() if key != "imported"}
        write_manifest(ours, dataclasses.replace(manifest, details=details))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Demonstrations of two files, pairs and prompts."""
    good = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    write_rows(tmp_path / "sums.jsonl", good[:8])
    write_rows(tmp_path / "more.jsonl", good[8:])
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    return tmp_path


def data(rows: Path, *names: str) -> DataConfig:
    return DataConfig(
        sources=[SourceConfig(path=str(rows / f"{name}.jsonl")) for name in names], max_length=200,
        cache_dir=str(rows / "cache"),
    )  # fmt: skip


def measured(models: Path, rows: Path, *names: str, model: str = "policy", **changes: Any) -> dict[str, Any]:
    """What `evaluate` writes."""
    for name in ("against", "reward_model"):
        if name in changes:
            changes[name] = str(models / changes[name])
    given = {"settings": SETTINGS, "whole_context": False, **changes}
    assert (
        evaluate(
            EvaluateJob(str(models / model), data=data(rows, *names), out=str(rows / "out.json"), **given)
        )
        == 0
    )
    found: dict[str, Any] = json.loads((rows / "out.json").read_text())
    return found


def model_of(models: Path, name: str) -> InferenceModel:
    return load_inference_model(str(models / name), name, "MODEL", Dtype.fp32, CPU)


def value(found: dict[str, Any], name: str, part: str = "metrics") -> float:
    return float(found[part][name]["value"])


# --- Demonstrations --------------------------------------------------------------------------------


def test_loss_and_accuracy_are_those_of_sft_in_all_and_by_source(models: Path, rows: Path) -> None:
    found = measured(models, rows, "sums", "more")
    policy = model_of(models, "policy")
    read = policy.rows(data(rows, "sums", "more"), DEMONSTRATIONS, whole_context=False, say=str)
    logged = sft_evaluate(policy.packed(), evaluation_batches(read, PLAN), read.sources, CPU)
    assert found["kind"] == "demonstrations" and len(found["rows"]) == 12
    for name in ("loss", "mean_token_accuracy"):
        assert value(found, name) == pytest.approx(logged[f"eval/{name}"], rel=1e-5)
    for source in ("sums", "more"):
        assert value(found, f"{source}/loss") == pytest.approx(logged[f"eval/{source}/loss"], rel=1e-5)
    assert found["metrics"]["sums/loss"]["count"] == 8
    assert found["metrics"]["loss"]["low"] < value(found, "loss") < found["metrics"]["loss"]["high"]


def test_two_policies_are_compared_on_the_same_rows_with_paired_intervals(models: Path, rows: Path) -> None:
    found = measured(models, rows, "sums", against="other")
    change = found["change"]["loss"]
    assert change["value"] == pytest.approx(value(found, "loss") - value(found, "loss", "against"))
    tokens = [row["tokens"] for row in found["rows"]]
    excess = [  # of the row's nats over what the change says of its tokens
        row["loss_per_row"] - row["against"]["loss_per_row"] - change["value"] * row["tokens"]
        for row in found["rows"]
    ]
    half = student_quantile(7) * stdev(excess) / fmean(tokens) / 8**0.5
    assert (change["low"], change["high"]) == pytest.approx((change["value"] - half, change["value"] + half))
    assert fmean(t * row["loss"] for t, row in zip(tokens, found["rows"], strict=True)) / fmean(
        tokens
    ) == pytest.approx(value(found, "loss"))
    assert all(row["against"]["loss"] for row in found["rows"])
    same = measured(models, rows, "sums", against="policy")
    assert {value(same, name, "change") for name in same["change"]} == {0.0}


def test_with_other_tokens_rows_are_compared_whole(
    models: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer(OTHER_TEMPLATE).save_pretrained(tmp_path / "tokenizer")
    make_policy(tmp_path / "reads otherwise", tmp_path / "tokenizer")
    found = measured(models, rows, "sums", against=str(tmp_path / "reads otherwise"))
    assert "compare loss_per_row" in capsys.readouterr().out
    assert value(found, "loss_per_row") > value(found, "loss")


# --- Pairs -----------------------------------------------------------------------------------------


def test_a_reward_model_is_measured_as_its_step_measures_it(models: Path, rows: Path) -> None:
    found = measured(models, rows, "pairs", model="our_alike")
    judge = model_of(models, "our_alike")
    read = judge.rows(data(rows, "pairs"), PREFERENCES, whole_context=False, say=str)
    scored = score_pairs(judge.packed(), evaluation_pair_batches(read, PLAN), CPU)
    logged = held_out_metrics(scored, read.sources, 0.0)
    for name in ("accuracy", "margin", "loss", "expected_calibration_error", "reward_length_correlation"):
        assert value(found, name) == pytest.approx(logged[f"eval/{name}"], rel=1e-4, abs=1e-6), name
    by_length = {name for name in logged if name.startswith("eval/accuracy_")}
    assert by_length == {f"eval/{name}" for name in found["metrics"] if name.startswith("accuracy_")} != set()
    assert all(value(found, name.removeprefix("eval/")) == pytest.approx(logged[name]) for name in by_length)
    assert found["kind"] == "preferences" and found["metrics"]["accuracy"]["count"] == 12


@pytest.mark.parametrize("judge", ["published_alike", "published_stranger"])
def test_a_published_reward_model_is_read_where_plain_transformers_reads_it(
    judge: str, models: Path, rows: Path
) -> None:
    found = measured(models, rows, "pairs", model=judge)
    for row, pair in zip(found["rows"][:4], PAIRS, strict=False):
        for side in ("chosen", "rejected"):
            ids = conversation(models / judge, pair["prompt"], pair[side])
            assert row[f"{side}_reward"] == pytest.approx(
                plain_score(models / judge, ids), rel=1e-4, abs=1e-5
            )


def conversation(folder: Path, prompt: str, answer: str) -> list[int]:
    """As the folder's own template writes it, up to its last sign."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.endswith("|>\n")
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def test_a_policy_orders_pairs_by_the_log_probabilities_of_plain_transformers(
    models: Path, rows: Path
) -> None:
    found = measured(models, rows, "pairs")
    logps = [plain_logps(models / "policy", row) for row in PAIRS]
    assert [row["logps/chosen"] for row in found["rows"]] == pytest.approx([c for c, _ in logps], rel=1e-4)
    assert [row["logps/rejected"] for row in found["rows"]] == pytest.approx([r for _, r in logps], rel=1e-4)
    assert value(found, "accuracy") == sum(c > r for c, r in logps) / len(logps)


def test_the_log_ratios_of_two_policies_order_pairs_as_dpos_rewards_do(models: Path, rows: Path) -> None:
    found = measured(models, rows, "pairs", against="other")
    ratios = []
    for row in PAIRS:
        ours, theirs = (plain_logps(models / name, row) for name in ("policy", "other"))
        ratios.append((ours[0] - theirs[0]) - (ours[1] - theirs[1]))
    assert value(found, "log_ratio/margin", "between") == pytest.approx(sum(ratios) / 12, rel=1e-3)
    assert value(found, "log_ratio/accuracy", "between") == sum(ratio > 0 for ratio in ratios) / 12


def plain_logps(folder: Path, row: dict[str, str]) -> tuple[float, float]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    said = []
    for name in ("chosen", "rejected"):
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        before, after = (
            tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, f"{row[name]}<|im_end|>")
        )
        ids = torch.tensor([before + after])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        said.append(float(logprobs[len(before) - 1 : -1].gather(1, torch.tensor(after)[:, None]).sum()))
    return said[0], said[1]


# --- Prompts ---------------------------------------------------------------------------------------

FUNCTIONS = ["tests.evaluation.scorers:characters", "tests.evaluation.scorers:knows"]


def test_completions_are_greedy_unless_a_temperature_is_named_and_functions_score_them(
    models: Path, rows: Path
) -> None:
    found = measured(models, rows, "prompts", functions=FUNCTIONS)
    for row, prompt in zip(found["rows"], PROMPTS, strict=True):
        _, _, text = greedy(models / "policy", prompt["prompt"])
        assert row["completions"] == [text] and row["characters"] == len(text)
        assert row["knows"] == float(prompt["answer"] in text)
    assert {"characters", "knows", "length", "stop_rate"} == set(found["metrics"])


def test_samples_of_a_prompt_are_averaged_first(models: Path, rows: Path) -> None:
    settings = EvaluationSettings(temperature=1.0, samples=3, max_new_tokens=8, dtype=Dtype.fp32)
    found = measured(models, rows, "prompts", functions=FUNCTIONS[:1], settings=settings)
    for row in found["rows"]:
        assert len(row["completions"]) == 3
        assert row["characters"] == pytest.approx(sum(map(len, row["completions"])) / 3)
    assert found["metrics"]["characters"]["count"] == 6


def test_a_reward_model_that_reads_as_the_policy_is_given_the_sampled_tokens(
    models: Path, rows: Path
) -> None:
    found = measured(models, rows, "prompts", reward_model="our_alike")
    for row, prompt in zip(found["rows"], PROMPTS, strict=True):
        asked, said, _ = greedy(models / "policy", prompt["prompt"])
        assert row["reward_model"] == pytest.approx(plain_score(models / "our_alike", asked + said), rel=1e-4)


@pytest.mark.parametrize("judge", ["published_alike", "published_stranger", "our_stranger"])
def test_another_one_is_given_the_conversation_as_its_own_template_writes_it(
    judge: str, models: Path, rows: Path
) -> None:
    found = measured(models, rows, "prompts", reward_model=judge)
    for row, prompt in zip(found["rows"], PROMPTS, strict=True):
        ids = conversation(models / judge, prompt["prompt"], row["completions"][0])
        if judge.startswith("our"):  # read at the terminator, not at the newline behind it
            ids = ids[:-1]
        assert row["reward_model"] == pytest.approx(plain_score(models / judge, ids), rel=1e-4, abs=1e-5)


def greedy(folder: Path, prompt: str) -> tuple[list[int], list[int], str]:
    """Tokens of the prompt, tokens and text of the answer, in plain transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    whole = model.generate(**ids, do_sample=False, max_new_tokens=8)[0].tolist()
    asked = ids["input_ids"][0].tolist()
    said = whole[len(asked) :]
    return asked, said, tokenizer.decode(said, skip_special_tokens=True)


def plain_score(folder: Path, ids: list[int]) -> float:
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits)


def test_a_judge_counts_wins_and_the_same_policy_ties_with_itself(models: Path, rows: Path) -> None:
    found = measured(models, rows, "prompts", reward_model="our_alike", against="other")
    won = [row["reward_model"] > row["against"]["reward_model"] for row in found["rows"]]
    assert [row["win_rate"] for row in found["rows"]] == won
    assert value(found, "win_rate", "between") == sum(won) / 6
    same = measured(models, rows, "prompts", reward_model="our_alike", against="policy")
    assert value(same, "win_rate", "between") == 0.5 and value(same, "reward_model", "change") == 0


# --- What cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "changes", "said"),
    [
        (["prompts"], {}, "is neither a pair nor a demonstration"),
        (["sums"], {"model": "our_alike"}, "is a reward model, which is measured on pairs"),
        (["pairs"], {"against": "our_alike"}, "is a reward_model, MODEL a policy"),
        (["prompts"], {"reward_model": "other"}, "is a policy, where a reward_model is needed"),
        (["prompts"], {"functions": [*FUNCTIONS, FUNCTIONS[0]]}, "the second number called characters"),
        (["prompts"], {"functions": ["tests.evaluation.scorers:length"]}, "second number called length"),
        (["prompts"], {"functions": ["tests.evaluation.scorers:nose"]}, "has no nose"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(
    names: list[str], changes: dict[str, Any], said: str, models: Path, rows: Path
) -> None:
    with pytest.raises(UserError, match=said) as error:
        measured(models, rows, *names, **changes)
    assert error.value.hint and not (rows / "out.json").exists()


def test_a_column_that_a_function_needs_is_missed_before_anything_is_sampled(
    models: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "answer", lambda *given: pytest.fail("sampled"))
    with pytest.raises(UserError, match="takes answer, which is neither"):
        measured(models, rows, "sums", functions=FUNCTIONS[1:])


def test_rows_that_one_of_them_cannot_read_are_left_out_and_counted(
    models: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_policy(tmp_path / "short", models / "tokenizer", max_position_embeddings=48)
    found = measured(models, rows, "sums", against=str(tmp_path / "short"), whole_context=True)
    assert 0 < len(found["rows"]) < 8
    assert f"note: {8 - len(found['rows'])} rows are left out" in capsys.readouterr().out
    assert found["metrics"]["loss"]["count"] == found["against"]["loss"]["count"] == len(found["rows"])

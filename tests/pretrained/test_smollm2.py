"""A real pretrained model through every step, from the command line as a user has it.

Four runs of `experiment=smollm2` on a handful of rows: all weights and adapters, in fp32 and bf16, with each
way on from SFT. What they must show is small and sure: the manner of the rows is learned and shows in other
answers, artifacts load in plain transformers, and a run that was killed ends with the same weights.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from common.artifacts import read_json
from common.runtime.tracking import read_metrics
from pipeline.doctor.torch_probe import products
from tests.pretrained import desk
from tests.pretrained.model import HOW_TO_GET_IT, find
from tests.tiny_run import ROOT, weights

pytestmark = [pytest.mark.pretrained, pytest.mark.skipif(find() is None, reason=HOW_TO_GET_IT)]

SECONDS = 1800.0
"""After which a run is taken to hang."""
BEARABLE = 4.0
"""Times as long as in fp32 that products in bf16 may take."""

OF_EACH_STEP = (
    "data.max_length=160", "data.eval_fraction=0.25", "train.global_batch_size=4", "train.micro_batch_size=4",
)  # fmt: skip
SMALL = [
    "experiment=smollm2", "deepspeed=zero1", "tracking=off",
    *(f"{step}.{setting}" for step in ("sft", "reward", "dpo", "ppo") for setting in OF_EACH_STEP),
    "sft.train.max_steps=8", "sft.data.packing=false", "sft.optim.lr=2e-4",
    "sft.sampling.num_prompts=2", "sft.sampling.max_new_tokens=32",
    "reward.train.max_steps=5", "reward.optim.lr=5e-5",
    "dpo.train.max_steps=4", "dpo.optim.lr=1e-4",
    "dpo.sampling.num_prompts=1", "dpo.sampling.max_new_tokens=16",
    "ppo.train.max_steps=2", "ppo.train.eval_every=1", "ppo.optim.lr=1e-5",
    "ppo.rollout.prompts=4", "ppo.rollout.max_new_tokens=16", "ppo.evaluation.num_prompts=2",
]  # fmt: skip
ADAPTERS = ["model.lora.enabled=true", "sft.optim.lr=2e-3"]
GROUPS = [
    "ppo.estimator=grpo", "ppo.rollout.prompts=2", "ppo.rollout.samples_per_prompt=2",
    "ppo.kl.controller=fixed", "ppo.rewards=[{function: 'tests.pretrained.rewards:brief'}]",
    "ppo.optim.lr=1e-4",
]  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """A finished run, and what it printed."""

    folder: Path
    printed: str

    def lines(self, step: str, name: str) -> list[dict[str, Any]]:
        """The lines of a step's metrics.jsonl that hold a number of this name."""
        return [line for line in read_metrics(self.folder / step / "metrics.jsonl") if name in line]

    def first_and_last(self, step: str, name: str) -> tuple[float, float]:
        """A number at the first and at the last step that has it; the first must be step 0."""
        lines = self.lines(step, name)
        assert lines[0]["step"] == 0 and len(lines) > 1
        return lines[0][name], lines[-1][name]


def command(folder: Path, name: str, *overrides: str) -> list[str]:
    return [
        sys.executable, "-m", "pipeline", "run", *SMALL, *desk.write(folder), *base_model(overrides),
        f"output_dir={folder}", f"run_name={name}", *overrides,
    ]  # fmt: skip


def base_model(overrides: Sequence[str]) -> list[str]:
    """Of SFT; a run without it names its policy."""
    return [f"model.path={find()}"] if any("=[sft" in override for override in overrides) else []


def run(folder: Path, name: str, *overrides: str) -> Ran:
    """Run to the end, which must be a good one."""
    done = subprocess.run(
        command(folder, name, *overrides),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return Ran(folder / name, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of all runs; some GB that are not left behind."""
    made = tmp_path_factory.mktemp("pretrained")
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def half() -> str:
    """bf16; fp32, with a warning, on a CPU whose products in bf16 would take the tier an hour."""
    speed = products("cpu")
    if speed["bf16"] > speed["fp32"] / BEARABLE:
        return "model.dtype=bf16"
    times = speed["fp32"] / speed["bf16"]
    warnings.warn(f"products in bf16 are {times:.0f} times slower here: bf16 is NOT TESTED", stacklevel=1)
    return "model.dtype=fp32"


@pytest.fixture(scope="module")
def full_fp32(folder: Path) -> Ran:
    return run(folder, "full_fp32", "model.dtype=fp32", "steps=[sft,reward,ppo]")


@pytest.fixture(scope="module")
def full_bf16(folder: Path, half: str) -> Ran:
    return run(folder, "full_bf16", half, "steps=[sft,dpo]")


@pytest.fixture(scope="module")
def lora_bf16(folder: Path, half: str) -> Ran:
    return run(folder, "lora_bf16", half, *ADAPTERS, *GROUPS, "steps=[sft,ppo]")


@pytest.fixture(scope="module")
def lora_fp32(folder: Path) -> Ran:
    return run(folder, "lora_fp32", *LORA_FP32)


LORA_FP32 = ("model.dtype=fp32", *ADAPTERS, "steps=[sft]", "sft.train.save_every=3")
RUNS = ["full_fp32", "full_bf16", "lora_bf16", "lora_fp32"]


@pytest.mark.parametrize("name", RUNS)
def test_the_manner_of_the_rows_is_learned_and_told_in_plain_transformers(
    name: str, request: pytest.FixtureRequest
) -> None:
    ran: Ran = request.getfixturevalue(name)
    before, after = ran.first_and_last("sft", "eval/loss")
    assert after < before - 0.5
    said = ask(ran.folder / "sft" / "export", "May I bring my dog?")
    assert said.startswith(desk.THANKS), said
    assert desk.THANKS not in ask(Path(str(find())), "May I bring my dog?")


@pytest.mark.parametrize("name", RUNS)
def test_answers_are_sampled_from_a_cache(name: str, request: pytest.FixtureRequest) -> None:
    ran: Ran = request.getfixturevalue(name)
    logs = [path.read_text() for path in ran.folder.glob("*/logs/*")]
    assert logs and not [text for text in [ran.printed, *logs] if "cannot decode from a cache" in text]


@pytest.mark.parametrize("name", RUNS)
def test_all_that_a_run_left_verifies(name: str, request: pytest.FixtureRequest) -> None:
    assert pipeline("verify", str(request.getfixturevalue(name).folder)).returncode == 0


def test_the_reward_model_learns_to_order_pairs_and_scores_in_plain_transformers(full_fp32: Ran) -> None:
    before, after = full_fp32.first_and_last("reward", "eval/loss")
    assert after < before
    export = full_fp32.folder / "reward" / "export"
    asked = "Do you lend games?"
    answers = [desk.polite("Games are lent for a week."), "Look it up yourself."]
    kind, curt = (score(export, asked, answer) for answer in answers)
    assert kind > curt


def test_ppo_with_a_critic_starts_at_its_reference_and_ends_with_a_policy(full_fp32: Ran) -> None:
    first, last = full_fp32.first_and_last("ppo", "eval/kl")
    assert first == pytest.approx(0.0, abs=1e-4)  # nats over a response, of fp32 sums
    assert math.isfinite(last) and last > 0
    errors = [line["val/first_ratio_error"] for line in full_fp32.lines("ppo", "val/first_ratio_error")]
    assert len(errors) == 2 and max(errors) < 1e-3
    assert ask(full_fp32.folder / "ppo" / "export", "Do you lend games?")


def test_dpo_starts_at_log_two_and_prefers_what_was_chosen(full_bf16: Ran) -> None:
    first = full_bf16.lines("dpo", "loss")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert full_bf16.lines("dpo", "eval/rewards/margins")[-1]["eval/rewards/margins"] > 0
    assert ask(full_bf16.folder / "dpo" / "export", "Do you lend games?")


def test_grpo_with_adapters_learns_and_ends_with_a_merged_policy(lora_bf16: Ran) -> None:
    assert [line["step"] for line in lora_bf16.lines("ppo", "objective/scores")] == [1, 2]
    assert lora_bf16.lines("ppo", "policy/approxkl_avg")[-1]["policy/approxkl_avg"] >= 0
    assert (lora_bf16.folder / "ppo" / "export" / "adapter").is_dir()
    assert ask(lora_bf16.folder / "ppo" / "export", "Do you lend games?")


def test_ppo_and_dpo_start_from_the_plain_folder_and_leave_it_as_their_reference(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from tests.common.training.exporting import published

    scorer = published(  # of another tokenizer
        folder / "scorer", AutoModelForSequenceClassification, torch.float32, labels=1,
        max_position_embeddings=2048,
    )  # fmt: skip
    plain = str(find())
    ppo = run(
        folder, "plain_ppo", "model.dtype=fp32", "steps=[ppo]", f"ppo.policy={plain}",
        f"ppo.reward_model={scorer}", "ppo.train.max_steps=1",
    )  # fmt: skip
    assert "is given text, which it reads in its own tokens" in ppo.printed
    assert abs(ppo.lines("ppo", "eval/kl")[0]["eval/kl"]) < 1e-3
    dpo = run(
        folder, "plain_dpo", "model.dtype=fp32", "steps=[dpo]", f"dpo.policy={plain}", "dpo.train.max_steps=2"
    )
    assert dpo.lines("dpo", "loss")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    given = load_file(Path(plain) / "model.safetensors")
    for ran, step in ((ppo, "ppo"), (dpo, "dpo")):
        (policy,) = (
            p
            for p in read_json(ran.folder / "lineage.json")["artifacts"][step]["parents"]
            if p["role"] == "policy"
        )
        reference = load_file(Path(policy["path"]) / "model.safetensors")
        assert given.keys() == reference.keys()
        assert all(torch.equal(tensor, reference[name]) for name, tensor in given.items())


def test_dpo_compares_with_the_plain_model_where_that_is_named(folder: Path, full_fp32: Ran) -> None:
    policy = full_fp32.folder / "sft" / "export"
    dpo = run(
        folder, "other_reference", "model.dtype=fp32", "steps=[dpo]", f"dpo.policy={policy}",
        f"dpo.reference={find()}", "dpo.train.max_steps=1",
    )  # fmt: skip
    first = dpo.lines("dpo", "loss")[0]
    assert math.isfinite(first["loss"]) and abs(first["loss"] - math.log(2)) > 1e-3
    parents = read_json(dpo.folder / "lineage.json")["artifacts"]["dpo"]["parents"]
    assert [parent.get("taken_as") for parent in parents] == [None, "reference"]
    assert parents[1]["imported"]["from"] == str(find())


def test_the_chat_answers_as_the_policy_was_taught(full_fp32: Ran) -> None:
    said = pipeline(
        "chat", str(full_fp32.folder / "sft" / "export"), "--max-new-tokens", "12", "--temperature", "0",
        typed="May I bring my dog?\n",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(desk.THANKS)


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_weights(folder: Path, lora_fp32: Ran) -> None:
    process = subprocess.Popen(
        command(folder, "killed", *LORA_FP32), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    checkpoints, end = folder / "killed" / "sft" / "checkpoints", time.monotonic() + SECONDS
    while not list(checkpoints.glob("step_*[0-9]")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "killed" / "sft" / "export").exists()
    ran = run(folder, "killed", *LORA_FP32)
    assert [line["step"] for line in ran.lines("sft", "loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert weights(ran.folder) == weights(lora_fp32.folder)


def test_a_file_of_completions_of_the_plain_folder_is_gone_on_with_after_a_kill(tmp_path: Path) -> None:
    desk.write(tmp_path)
    files = [tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"]
    commands = [
        [
            sys.executable, "-m", "pipeline", "generate", str(find()), "--prompts", "prompts.jsonl",
            "--out", file.name, "--max-new-tokens", "8", "--slots", "4", "--samples", "2", "--dtype", "fp32",
        ]
        for file in files
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        commands[0], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + SECONDS
    while not files[0].exists() or files[0].read_bytes().count(b"\n") < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for command in commands:
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=SECONDS)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes().count(b"\n") == len(desk.ANSWERS)


def test_evaluate_sees_what_sft_taught_beside_the_plain_folder(full_fp32: Ran, tmp_path: Path) -> None:
    desk.write(tmp_path)
    sft, reward, ppo = (str(full_fp32.folder / step) for step in ("sft", "reward", "ppo"))
    asked = {
        "loss": [sft, "--data", "rows.jsonl", "--against", str(find())],
        "pairs": [reward, "--data", "pairs.jsonl"],
        "judged": [
            sft, "--data", "prompts.jsonl", "--against", ppo, "--reward-model", reward,
            "--max-new-tokens", "8",
        ],
    }  # fmt: skip
    found = {}
    for name, arguments in asked.items():
        done = pipeline("evaluate", *arguments, "--out", f"{name}.json", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["loss"]["change"]["loss"]["high"] < -0.5
    assert found["pairs"]["metrics"]["accuracy"]["value"] > 0.5
    assert found["judged"]["metrics"]["reward_model"]["count"] == len(desk.ANSWERS)
    assert 0 <= found["judged"]["between"]["win_rate"]["value"] <= 1


def pipeline(*arguments: str, typed: str = "", folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=folder, input=typed, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def ask(export: Path, question: str) -> str:
    """What a policy says to a question, greedily, loaded and decoded by plain transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [desk.turn("user", question)], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def score(export: Path, question: str, answer: str) -> float:
    """What a reward model says of an answer, loaded by plain transformers in fp32."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32)
    turns = [desk.turn("user", question), desk.turn("assistant", answer)]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")  # it ends with the terminator
    with torch.no_grad():
        return float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0])

"""Experiments that follow published recipes, at tiny shapes: each step to its end, on rows like theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from common.artifacts import Artifact
from common.config import ModelConfig, TokenizerConfig
from common.model.tokenizer import load_tokenizer, read_template
from common.runtime.tracking import read_metrics
from common.stage import Role, Step
from pipeline.compose import compose, prepare
from pipeline.plan import STAGES
from tests import forked
from tests.recipes.test_ppo_experiments import ppo
from tests.runs import LLAMA, Base, finish, write_job
from tests.step2_dpo.runs import dpo, write_rows
from tests.step2_reward.runs import reward

Row = dict[str, Any]

PROGRAMS: Mapping[Step, Callable[..., int]] = {
    Step.sft: forked.sft, Step.reward: reward, Step.dpo: dpo, Step.ppo: ppo
}  # fmt: skip
SUMS = [(a, b) for a in range(3, 9) for b in range(11, 17)]
TINY = [
    "model.path=null", "model.dtype=fp32", "model.gradient_checkpointing=false", "deepspeed=zero1",
    "tracking=off", *(f"model.config.{key}={value}" for key, value in LLAMA.items()),
    *(f"{step}.sampling.num_prompts=2" for step in ("sft", "dpo")),
    *(f"{step}.sampling.max_new_tokens=4" for step in ("sft", "dpo")),
    *(f"{step.value}.data.max_length=96" for step in Step), "ppo.ptx_data.max_length=96",
    *(f"{step.value}.data.eval_fraction=0.2" for step in Step),
    *(f"{step.value}.train.global_batch_size=4" for step in Step),
    *(f"{step.value}.train.micro_batch_size=2" for step in Step),
    *(f"{step.value}.train.max_steps=3" for step in Step),
    "ppo.rollout.prompts=4", "ppo.rollout.max_new_tokens=6", "ppo.rollout.slots=8", "ppo.ptx_batch_size=2",
    "ppo.evaluation.num_prompts=2",
]  # fmt: skip


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def asked(a: int, b: int) -> str:
    return f"What is {a} + {b}?"


def thought(a: int, b: int) -> str:
    return f"<think>\n{a} and {b}\n</think>\n\n{a + b}"


def rm_static(a: int, b: int) -> Row:
    answer = f" It is {a + b}."
    return {
        "prompt": f"\n\nHuman: {asked(a, b)}\n\nAssistant:", "response": answer, "chosen": answer,
        "rejected": f" It is {a}.",
    }  # fmt: skip


def open_orca(a: int, b: int) -> Row:
    return {"id": f"flan.{a}", "system_prompt": "", "question": asked(a, b), "response": f"It is {a + b}."}


def tulu(a: int, b: int) -> Row:
    turns = [
        turn("user", asked(a, b)),
        turn("assistant", f"{a + b}"),
        turn("user", "Sure?"),
        turn("assistant", "Yes."),
    ]
    return {"id": f"s_{a}", "messages": turns, "source": "sums"}


def mixture_of_thoughts(a: int, b: int) -> Row:
    turns = [turn("user", asked(a, b)), turn("assistant", thought(a, b))]
    return {"messages": turns, "num_tokens": 20, "source": "open-r1/OpenR1-Math-220k"}


def llmtwin(a: int, b: int) -> Row:
    return {"instruction": asked(a, b), "output": f"It is {a + b}."}


def llmtwin_dpo(a: int, b: int) -> Row:
    return {"prompt": asked(a, b), "rejected": f"It is {a}.", "chosen": f"It is {a + b}."}


def ultrachat(a: int, b: int) -> Row:
    return {"prompt": asked(a, b), "prompt_id": f"{a}", "messages": tulu(a, b)["messages"]}


def ultrafeedback(a: int, b: int) -> Row:
    sides = {
        name: [turn("user", asked(a, b)), turn("assistant", said)]
        for name, said in (("chosen", f"It is {a + b}."), ("rejected", f"It is {a}."))
    }
    scores = {"score_chosen": 8.0, "score_rejected": 5.0}
    return {"prompt": asked(a, b), "prompt_id": f"{a}", **sides, "messages": sides["chosen"], **scores}


class Ran:
    """The steps of an experiment, each run to its end on its own rows; folders as the controller has them."""

    def __init__(self, folder: Path, base: Base, name: str, rows: Mapping[str, str], *typed: str) -> None:
        self.folder = folder
        start = [f"experiment={name}", f"output_dir={folder}", f"model.tokenizer.path={base.tokenizer}"]
        named = [f"{key}={sources}" for key, sources in rows.items()]
        self.overrides = [*start, *TINY, *named, *typed]
        self.config = compose(prepare(self.overrides).overrides)
        made: dict[Role, Path] = {}
        for step in self.config.steps:
            stage = STAGES[step]
            wanted = [taken for taken in stage.consumes if not taken.is_named]
            consumed = [f"{step.value}.{taken.value}={made[taken.role]}" for taken in wanted]
            self._run(step, consumed)
            made[stage.produces] = folder / step.value / "export"

    def _run(self, step: Step, consumed: list[str]) -> None:
        typed = [*self.overrides, f"steps=[{step.value}]", *consumed]
        job = compose(prepare(typed).overrides)
        finish(write_job(job, self.folder), 1, PROGRAMS[step])

    def lines(self, step: str, name: str) -> list[dict[str, Any]]:
        return [line for line in read_metrics(self.folder / step / "metrics.jsonl") if name in line]

    def ledger(self, step: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.folder / step / "ledger.json").read_text())["sources"]
        return found

    def check(self, step: Step, metric: str = "loss") -> None:
        """Three steps of finite numbers, every row read and none of them faulty, and an artifact."""
        lines = self.lines(step.value, metric)
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert all(math.isfinite(value) for line in lines for value in line.values())
        for entry in self.ledger(step.value):
            assert entry["rows_read"] == len(SUMS) and not entry["bad_rows"]
        Artifact.load(self.folder / step.value / "export", STAGES[step].produces)

    def tokenizer(self, step: str) -> Any:
        return AutoTokenizer.from_pretrained(self.folder / step / "export")

    def template(self, step: str) -> str:
        return (self.folder / step / "export" / "chat_template.jinja").read_text()


def file_of(folder: Path, row: Callable[[int, int], Row], name: str = "rows") -> str:
    return str(write_rows(folder / f"{name}.jsonl", [row(a, b) for a, b in SUMS]))


def test_deepspeed_chat_shares_its_rows_out_to_three_steps_with_ema_and_ptx(
    tmp_path: Path, base: Base
) -> None:
    path = file_of(tmp_path, rm_static)
    chosen, pairs = f"[{{path: {path}, format: chosen}}]", f"[{{path: {path}}}]"
    rows = {"sft.data.sources": chosen, "reward.data.sources": pairs, "ppo.data.sources": pairs}
    ran = Ran(tmp_path, base, "deepspeed_chat", {**rows, "ppo.ptx_data.sources": chosen})
    ran.check(Step.sft)
    ran.check(Step.reward)
    ran.check(Step.ppo, "objective/scores")
    assert ran.template("ppo") == read_template("transcript")
    kept = [ran.ledger(step)[0]["rows_kept"] for step in ("sft", "reward", "ppo")]
    assert sum(kept) == len(SUMS) and min(kept) > 0
    assert all(math.isfinite(line["loss/ptx_avg"]) for line in ran.lines("ppo", "objective/scores"))


def test_openrlhf_sft_trains_adapters_of_rank_64_on_packed_questions_and_responses(
    tmp_path: Path, base: Base
) -> None:
    sources = f"[{{path: {file_of(tmp_path, open_orca)}, max_rows: 500000, columns: {{prompt: question}}}}]"
    ran = Ran(tmp_path, base, "openrlhf_sft", {"sft.data.sources": sources})
    ran.check(Step.sft)
    assert ran.template("sft") == read_template("user_assistant")
    (entry,) = ran.ledger("sft")
    assert entry["format"] == "prompt/response"
    adapter = json.loads((tmp_path / "sft" / "export" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (64, 16)
    assert ran.config.sft.data.packing


def test_tulu3_sft_mixes_by_weight_and_its_rate_falls_to_nothing(tmp_path: Path, base: Base) -> None:
    first, second = (file_of(tmp_path, tulu, name) for name in ("first", "second"))
    sources = f"[{{path: {first}, weight: 1.0}}, {{path: {second}, weight: 0.5}}]"
    ran = Ran(tmp_path, base, "tulu3_sft", {"sft.data.sources": sources}, "sft.train.max_steps=3")
    ran.check(Step.sft)
    assert ran.template("sft") == read_template("tulu")
    assert [entry["format"] for entry in ran.ledger("sft")] == ["messages", "messages"]
    rates = [line["learning_rate"] for line in ran.lines("sft", "loss")]
    assert rates == pytest.approx([0.0, 5e-6, 2.5e-6])  # one step up, then down to 0 behind the last


def test_open_r1_distill_trains_the_thoughts_of_an_answer(tmp_path: Path, base: Base) -> None:
    sources = f"[{{path: {file_of(tmp_path, mixture_of_thoughts)}}}]"
    ran = Ran(tmp_path, base, "open_r1_distill", {"sft.data.sources": sources})
    ran.check(Step.sft)
    assert ran.template("sft") == read_template("chatml")
    tokenizer = ran.tokenizer("sft")
    words = sum(len(tokenizer.encode(thought(a, b) + "<|im_end|>")) for a, b in SUMS)
    assert ran.ledger("sft")[0]["trained_tokens"] == words  # all of the answer and its terminator


@pytest.mark.parametrize("form", ["in the content", "apart"])
def test_thoughts_are_the_same_tokens_in_the_content_and_in_a_key_of_their_own(form: str, base: Base) -> None:
    said = thought(3, 11) if form == "in the content" else "14"
    apart = {} if form == "in the content" else {"reasoning_content": "3 and 11"}
    turns = [turn("user", asked(3, 11)), {**turn("assistant", said), **apart}]
    tokenizer = load_tokenizer(
        ModelConfig(tokenizer=TokenizerConfig(path=str(base.tokenizer)), chat_template="chatml")
    )
    written = tokenizer.apply_chat_template(turns, tokenize=False)
    assert written.endswith(f"<|im_start|>assistant\n{thought(3, 11)}<|im_end|>\n")


def test_engineers_handbook_aligns_what_it_taught_with_adapters_both_times(
    tmp_path: Path, base: Base
) -> None:
    rows = {
        "sft.data.sources": f"[{{path: {file_of(tmp_path, llmtwin)}}}]",
        "dpo.data.sources": f"[{{path: {file_of(tmp_path, llmtwin_dpo, 'pairs')}}}]",
    }
    assert compose(prepare(["experiment=engineers_handbook"]).overrides).dpo.optim.name.value == "adamw_8bit"
    ran = Ran(tmp_path, base, "engineers_handbook", rows, "sft.optim=adamw", "dpo.optim=adamw")
    ran.check(Step.sft)
    ran.check(Step.dpo)
    assert ran.template("dpo") == read_template("alpaca")
    assert ran.ledger("sft")[0]["format"] == "instruction"
    for step in ("sft", "dpo"):
        adapter = json.loads((tmp_path / step / "export" / "adapter" / "adapter_config.json").read_text())
        assert (adapter["r"], adapter["lora_alpha"], len(adapter["target_modules"])) == (32, 32, 7)
    assert (ran.config.sft.optim.lr, ran.config.sft.optim.warmup_steps) == (3e-4, 10)


def test_zephyr_dpo_reads_sides_that_repeat_the_prompt(tmp_path: Path, base: Base) -> None:
    rows = {
        "sft.data.sources": f"[{{path: {file_of(tmp_path, ultrachat)}}}]",
        "dpo.data.sources": f"[{{path: {file_of(tmp_path, ultrafeedback, 'pairs')}}}]",
    }
    held_out = compose(prepare(["experiment=zephyr_dpo"]).overrides).dpo.data
    assert (held_out.eval_path, held_out.eval_split) == (held_out.sources[0].path, "test_prefs")
    ran = Ran(tmp_path, base, "zephyr_dpo", rows, "dpo.data.eval_path=null", "dpo.data.eval_split=null")
    ran.check(Step.sft)
    ran.check(Step.dpo)
    assert ran.template("dpo") == read_template("zephyr")
    (entry,) = ran.ledger("dpo")
    tokenizer = ran.tokenizer("dpo")
    words = [len(tokenizer.encode(f"It is {said}.</s>")) for a, b in SUMS for said in (a + b, a)]
    assert entry["trained_tokens"] == sum(words)  # the answers of both sides, and no question
    assert ran.lines("dpo", "loss")[0]["loss"] == pytest.approx(math.log(2))

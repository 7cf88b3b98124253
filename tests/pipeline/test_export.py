from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from common.artifacts import CARD, Artifact, Manifest, hash_files, verify, write_manifest
from common.config import Dtype, LoraConfig, ModelConfig
from common.errors import UserError
from common.model.loading import load_model
from common.stage import Role, Step
from common.training_config import Exported, SchedulerName
from pipeline.__main__ import dispatch
from pipeline.export import Form, checkpoint_of, is_made_of, lay_out
from tests import runs, tiny_run
from tests.common.training.exporting import (
    CPU,
    KINDS,
    PROBE,
    exported,
    published,
    reloaded_logits,
    trained,
)
from tests.packed import packed_lm
from tests.tiny import CHATML, tiny_tokenizer

PPO_STEPS = {2: {"step": 1, "update": 0}, 3: {"step": 1, "update": 1}, 4: {"step": 2, "update": 0}}


def checkpoint(folder: Path, number: int, **counters: int | None) -> Path:
    made = folder / "checkpoints" / f"step_{number:08d}"
    made.mkdir(parents=True)
    (made / "counters.json").write_text(json.dumps({"step": number, **counters}))
    write_manifest(made, Manifest("checkpoint", None, hash_files(made), {}))
    return made


def refusal(path: Path, wanted: str = "best") -> UserError:
    with pytest.raises(UserError) as error:
        checkpoint_of(path, wanted)
    return error.value


def test_a_checkpoint_is_meant_by_best_last_number_step_run_or_itself(tmp_path: Path) -> None:
    sft = tmp_path / "sft"
    two, four, six = (checkpoint(sft, number, best_step=4) for number in (2, 4, 6))
    (sft / "checkpoints" / "step_00000008").mkdir()  # not finished
    for path, wanted, folder in (
        (tmp_path, "best", four), (tmp_path, "last", six), (sft, "2", two), (two, "best", two),
    ):  # fmt: skip
        assert checkpoint_of(path, wanted).folder == folder
    found = checkpoint_of(tmp_path, "best")
    assert (found.run, found.step, found.counters["step"]) == (tmp_path, Step.sft, 4)
    dpo = checkpoint(tmp_path / "dpo", 3)
    assert checkpoint_of(tmp_path, "best").folder == dpo  # no best is known: the last, of the latest step


def test_what_is_no_checkpoint_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    assert refusal(tmp_path / "r").message.endswith("does not exist")
    assert refusal(tmp_path).message == f"{tmp_path} has no checkpoints"
    sft = tmp_path / "sft"
    (sft / "checkpoints").mkdir(parents=True)
    assert "has no checkpoint yet" in refusal(tmp_path).message
    checkpoint(sft, 2), checkpoint(sft, 4)
    assert refusal(tmp_path, "3").hint == "kept are 2, 4; or best, last"
    assert refusal(tmp_path, "lst").hint == "did you mean --step last?"
    for damaged in ("{", "[]", '{"step": null}', "{}"):
        (sft / "checkpoints" / "step_00000004" / "counters.json").write_text(damaged)
        assert "step_00000004 is damaged" in refusal(tmp_path).message


def test_a_run_without_its_configuration_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "sft", 2)
    with pytest.raises(UserError, match=r"resolved\.yaml cannot be read"):
        dispatch(["export", str(tmp_path)])
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["checkpoints"]


def test_a_checkpoint_within_an_iteration_is_not_exported(tmp_path: Path) -> None:
    made = {
        number: checkpoint(tmp_path / "ppo", number, **counters) for number, counters in PPO_STEPS.items()
    }
    assert checkpoint_of(tmp_path, "1").folder == made[2]
    assert checkpoint_of(tmp_path, "last").folder == made[4]
    error = refusal(made[3])
    assert error.message == f"{made[3]} is in the midst of an iteration" and "1, 2" in str(error.hint)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    checkpoint(tmp_path / "sft", 2)
    (tmp_path / "sft" / "export.step_2").mkdir()
    with pytest.raises(UserError, match=r"export\.step_2 exists, and nothing is overwritten"):
        dispatch(["export", str(tmp_path)])


def test_a_step_of_two_ranks_under_zero_3_is_exported_by_one_as_the_run_had_it(tmp_path: Path) -> None:
    base = runs.Base.make(tmp_path)
    job = base.job(max_steps=4, save_every=2, eval_every=0)
    job.deepspeed.stage = 3
    job.sft.optim.scheduler, job.sft.optim.warmup_ratio = SchedulerName.constant, 0.0
    run = base.run("whole", job, ranks=2)
    job.sft.train.max_steps = 2
    half = base.run("half", job, ranks=2)
    for number, wanted in ((2, half), (4, run)):
        out = tmp_path / f"step_{number}"
        lay_out(checkpoint_of(run, str(number)), out)
        runs.finish(out, 1)
        made, kept = (dict(verify(folder / "sft" / "export").files) for folder in (out, wanted))
        assert made.pop(CARD) and kept.pop(CARD)  # at step 2 the run was not evaluated
        assert made == kept


def test_the_record_of_a_checkpoint_is_that_of_its_run_and_says_how_far_that_was(tmp_path: Path) -> None:
    base = runs.Base.make(tmp_path)
    job = base.job(max_steps=4, save_every=2, eval_every=0)
    job.model.dtype = Dtype.bf16
    run = base.run("whole", job)
    (run / "sft" / "state.json").write_text('{"status": "running", "config": {}, "inputs": {}}')
    lay_out(checkpoint_of(run, "2"), tmp_path / "unfinished", Dtype.fp32)
    (run / "sft" / "state.json").write_text('{"status": "done", "config": {}, "inputs": {}}')
    lay_out(checkpoint_of(run, "2"), tmp_path / "done")
    own = verify(run / "sft" / "export")
    assert "Step 4 of 4" in (run / "sft" / "export" / CARD).read_text()
    for folder, ended in (("unfinished", "not ended"), ("done", "ended")):
        runs.finish(tmp_path / folder, 1)
        made = verify(tmp_path / folder / "sft" / "export")
        assert re.search(
            rf"\nStep 2 of 4, [\d,]+ tokens; the training had {ended} when this was exported\. Settings that",
            (tmp_path / folder / "sft" / "export" / CARD).read_text(),
        )
        assert made.details["training"]["settings"] == own.details["training"]["settings"]
        assert made.details["resolved_config_hash"] == own.details["resolved_config_hash"]


def test_the_best_step_is_exported_where_the_step_is_told_so(tmp_path: Path) -> None:
    base = runs.Base.make(tmp_path)
    job = base.job(max_steps=6, eval_every=1, export=Exported.best)
    job.sft.optim.lr, job.sft.optim.scheduler = 0.3, SchedulerName.constant  # it gets worse at once
    run = base.run("best", job)
    losses = {line["step"]: line["eval/loss"] for line in runs.evaluation_lines(run) if line["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best < 6
    lay_out(checkpoint_of(run, "best"), tmp_path / "again")
    assert runs.finish(tmp_path / "again", 1)
    own, again = (verify(folder / "sft" / "export") for folder in (run, tmp_path / "again"))
    assert own.files["model.safetensors"] == again.files["model.safetensors"]
    assert own.details["progress"]["step"] == best and own.details["metrics"]["eval/loss"] == losses[best]
    assert f"exporting step {best}, the best on held-out rows" in (run / "output.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["sft,reward,ppo", "sft,dpo"])
def test_the_last_checkpoint_of_each_step_gives_the_artifact_that_the_step_left(
    steps: str, tmp_path: Path
) -> None:
    short = [f"{step}.train.max_steps=2" for step in steps.split(",")]
    options = ["run_name=r", f"output_dir={tmp_path}", "tracking=off", "ppo.rollout.prompts=8"]
    options += ["ppo.train.global_batch_size=16", "ppo.ema_decay=0.5"]
    tiny_run.finish(["experiment=demo", f"steps=[{steps}]", *options, *short])
    for step in steps.split(","):
        assert dispatch(["export", str(tmp_path / "r" / step), "--step", "last"]) == 0
        made, own = (verify(tmp_path / "r" / step / name) for name in ("export.step_2", "export"))
        assert made.files == own.files
        assert made.details["metrics"] == own.details["metrics"]


def test_another_dtype_is_rounded_once_from_the_weights_that_the_optimizer_kept(tmp_path: Path) -> None:
    base = runs.Base.make(tmp_path)
    job = base.job(max_steps=3)
    job.model.dtype = Dtype.bf16
    run = base.run("bf16", job)
    lay_out(checkpoint_of(run, "last"), tmp_path / "fp32", Dtype.fp32)
    assert "ZeRO-2 on 1 rank in bf16 -> ZeRO-2 on 1 rank in fp32" in runs.finish(tmp_path / "fp32", 1)
    own, kept = (
        load_file(folder / "sft" / "export" / "model.safetensors") for folder in (run, tmp_path / "fp32")
    )
    assert all(torch.equal(kept[name].bfloat16(), tensor) for name, tensor in own.items())
    assert any(not torch.equal(kept[name], tensor.float()) for name, tensor in own.items())


def adapted(folder: Path) -> Path:
    """An artifact of trained adapters merged into a base in `folder`/base."""
    config = ModelConfig(path=str(published(folder / "base", dtype=torch.float32)), dtype=Dtype.fp32)
    config.lora = LoraConfig(enabled=True, r=4, alpha=8)
    model = load_model(config, tiny_tokenizer(CHATML), seed=0, device=CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return exported(packed_lm(model.eval()), folder / "export")


def test_adapters_alone_load_on_their_base_and_answer_as_the_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    merged = adapted(Path("models"))  # a path that looks like a name on the hub
    assert dispatch(["export", str(merged), "--adapter"]) == 0
    alone = tmp_path / "models" / "export.adapter"
    assert verify(alone).kind == "adapter" and not list(alone.glob("model*"))
    with torch.no_grad():
        (answer,) = AutoPeftModelForCausalLM.from_pretrained(alone)(PROBE).logits
    assert torch.allclose(answer, reloaded_logits(merged), atol=1e-5)
    card = (alone / CARD).read_text()
    assert "library_name: peft" in card and str(tmp_path) not in card
    assert 'from_pretrained(model_path, dtype="float32")' in card and "base_model:" not in card
    monkeypatch.chdir(alone)
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], {})  # noqa: S102 - a card of ours
    with pytest.raises(UserError, match="holds adapters alone, where a policy is needed"):
        Artifact.load(alone, Role.policy)
    with pytest.raises(UserError, match="is an artifact already"):
        dispatch(["export", str(alone)])


def test_adapters_of_a_model_with_further_tokens_are_refused(tmp_path: Path) -> None:
    merged = adapted(tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    with pytest.raises(UserError, match=r"has \d+ tokens and its base .*base 7"):
        dispatch(["export", str(merged), "--adapter"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "export"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "is an artifact already"),
        (["--dtype", "fp32"], "is an artifact already"),
        (["--adapter"], "was trained without LoRA"),
        (["--adapter", "--merge"], "not allowed with"),
        (["--dtype", "f16"], "invalid choice: 'f16'"),
    ],
)
def test_forms_that_an_artifact_cannot_have_are_refused(
    options: list[str], says: str, tmp_path: Path
) -> None:
    folder = exported(trained(KINDS["llama"]), tmp_path / "export")
    with pytest.raises(UserError, match=says):
        dispatch(["export", str(folder), *options])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_what_was_made_of_the_same_checkpoint_in_the_same_form_is_not_made_again(tmp_path: Path) -> None:
    progress = {"step": 4, "num_tokens": 9, "watchdogs": {}}
    made = exported(trained(KINDS["llama"]), tmp_path / "export", details={"progress": progress})
    checkpoint(tmp_path / "sft", 4, num_tokens=9)
    found = checkpoint_of(tmp_path, "4")
    assert is_made_of(made, found, Form()) and is_made_of(made, found, Form(Dtype.fp32))
    other = exported(trained(KINDS["llama"]), tmp_path / "other")  # says nothing of a training
    for folder, form in (
        (made, Form(Dtype.fp16)), (made, Form(adapters=True)), (tmp_path / "none", Form()), (other, Form()),
    ):  # fmt: skip
        assert not is_made_of(folder, found, form)
    checkpoint(tmp_path / "sft", 6, num_tokens=10)
    assert not is_made_of(made, checkpoint_of(tmp_path, "6"), Form())


def test_an_artifact_can_be_had_in_another_dtype(tmp_path: Path) -> None:
    folder = exported(trained(KINDS["llama"]), tmp_path / "export")
    assert dispatch(["export", str(folder), "--dtype", "fp16", "--out", str(tmp_path / "half")]) == 0
    assert Artifact.load(tmp_path / "half", Role.policy).manifest.details["dtype"] == "float16"

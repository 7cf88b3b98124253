"""Credentials in a configuration are refused, and what only sounds like one is not."""

from __future__ import annotations

import operator

import pytest

from tests.pipeline.composing import JOB, composed, error_of

HUB = "hf_" + "abcdefghijklmnopqrstuvwxyz01234567"


@pytest.mark.parametrize(
    "override",
    [
        "+tracking.hf_token=mine", "++sft.api_key=1", "sft.data.path=https://me:mine@host/a.jsonl",
        f"tracking.entity={HUB}", "+x={wandb: {api_key: mine}}", f"+x=[a,{HUB}]", f"run_name=a-{HUB}",
        "sft.data.sources=[{path: 'https://host/a.jsonl?X-Amz-Signature=mine'}]",
        "launch.k8s.env.WANDB_API_KEY=mine", f"launch.k8s.env.X={HUB}", "run_name=${oc.env:MINE_API_KEY}",
        "run_name=${oc.env:HARMLESS}", "hydra.job.env_set.HF_TOKEN=mine", "model.config.auth_token=mine",
    ],
)  # fmt: skip
def test_a_credential_is_refused_and_not_repeated(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMLESS", HUB)
    monkeypatch.setenv("MINE_API_KEY", "anything")
    said = error_of("sft.data.path=rows.jsonl", override)
    assert "holds what looks like a credential" in said and "launch.k8s.secret=NAME" in said
    assert "mine" not in said and HUB not in said


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        (f"model.path=hub/models--org--name/snapshots/{'a1' * 20}", "model.path", None),
        (f"model.revision={'a1' * 20}", "model.revision", "a1" * 20),
        (f"model.revision='{'12' * 20}'", "model.revision", "12" * 20),
        (f"output_dir=/shared/{'c' * 40}/runs", "output_dir", None),
        (f"dpo.policy=runs/{'0f' * 32}/export", "dpo.policy", None),
        ("sft.data.path=data/hf_checkpoints/sk-learn-classification/a.jsonl", "sft.data.path", None),
        ("sft.data.sources=[{path: a.jsonl, columns: {token: key}}]", "sft.data.sources", "token"),
        ("launch.k8s.secret=keys", "launch.k8s.secret", None),
        ("model.config.pad_token=x", "model.config", "pad_token"),
        ("output_dir=${oc.env:HOME}/runs", "output_dir", "/runs"),
        (f"launch.k8s.image=me/rlhf:{'d' * 40}", "launch.k8s.image", None),
    ],
)
def test_what_only_sounds_like_a_credential_passes_unharmed(
    override: str, key: str, value: str | None
) -> None:
    made = composed(override)
    assert (value or override.partition("=")[2]) in str(operator.attrgetter(key)(made))


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    assert error_of("run_name=${oc.env:NOT_SET}", *JOB) == "environment variable 'NOT_SET' not found"

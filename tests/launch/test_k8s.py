"""The TrainJob: held against the schema of Kubeflow Trainer v2, and run as its pods would run it."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import UserError
from common.launch_config import KubernetesConfig, LaunchConfig
from launch import k8s

TYPED = ["steps=[sft,reward]", 'sft.data.path="/data/it\'s $(HOME) $HOME $$.jsonl"', "launch=k8s"]


def config(**changes: Any) -> LaunchConfig:
    values = {
        "image": "me/rlhf:1",
        "volume_claim": "runs",
        "gpus_per_node": 8,
        "resources": {"memory": "64Gi"},
    }
    return LaunchConfig(nnodes=2, k8s=KubernetesConfig(**{**values, **changes}))


def job(*overrides: str, name: str = "a", **changes: Any) -> dict[str, Any]:
    return dict(yaml.safe_load(k8s.render(config(**changes), overrides or TYPED, name, k8s.NOT_SET)))


def pod(made: dict[str, Any]) -> dict[str, Any]:
    template = made["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]
    return dict(template["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"])


# --- The schema ------------------------------------------------------------------------------------


def validate(made: dict[str, Any]) -> None:
    """Check it against the schema; keys that the schema does not know are errors, at any depth."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    read_back = models.TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(made)).to_dict()
    assert read_back == made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gpus_per_node": None, "resources": {}},
        {"namespace": "team", "env": {"A": "1"}, "secret": "keys"},
    ],
)
def test_the_job_is_what_the_schema_of_trainer_v2_allows(changes: dict[str, Any]) -> None:
    validate(job(**changes))


def test_the_check_against_the_schema_finds_unknown_keys_and_wrong_types() -> None:
    misspelt = job()
    misspelt["spec"]["trainer"]["numNode"] = misspelt["spec"]["trainer"].pop("numNodes")
    deep = job()
    pod(deep)["containers"][0]["volumeMount"] = pod(deep)["containers"][0].pop("volumeMounts")
    text = job()
    text["spec"]["trainer"]["numNodes"] = "2"
    for broken in (misspelt, deep, text):
        with pytest.raises((AssertionError, ValueError)):
            validate(broken)


def test_the_job_names_runtime_nodes_resources_and_the_shared_volume() -> None:
    made = job()
    spec, trainer = made["spec"], made["spec"]["trainer"]
    assert (made["apiVersion"], made["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    assert (trainer["numNodes"], trainer["image"]) == (2, "me/rlhf:1")
    assert trainer["resourcesPerNode"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 8}
    assert pod(made)["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
    mount = {"name": pod(made)["volumes"][0]["name"], "mountPath": "/runs"}
    assert pod(made)["containers"] == [{"name": "node", "volumeMounts": [mount]}]
    assert "namespace" not in made["metadata"] and job(namespace="team")["metadata"]["namespace"] == "team"


def test_credentials_are_named_and_read_in_the_cluster() -> None:
    made = job(secret="keys", env={"NCCL_DEBUG": "INFO", "X": "$(HOME)"})
    by_name = {entry["name"]: entry for entry in made["spec"]["trainer"]["env"]}
    assert (
        by_name["NCCL_DEBUG"]["value"] == "INFO"
        and expanded(by_name["X"]["value"], {"HOME": "/"}) == "$(HOME)"
    )
    for key in ("WANDB_API_KEY", "HF_TOKEN"):
        reference = {"name": "keys", "key": key, "optional": True}
        assert by_name[key]["valueFrom"] == {"secretKeyRef": reference}
    assert "env" not in job()["spec"]["trainer"]


@pytest.mark.parametrize("name", ["a", "sft-1a2b3c4d", "My Run_é/9", "9-lives", "-", "x" * 200, "a.b."])
def test_any_run_has_a_job_name_that_kubernetes_takes(name: str) -> None:
    prefix = job(name=name)["metadata"]["generateName"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", f"{prefix}x7k2p") and len(prefix) + 5 <= 46


# --- What a pod runs -------------------------------------------------------------------------------


def expanded(text: str, environment: dict[str, str]) -> str:
    """Command and arguments as Kubernetes passes them on: $(NAME) replaced where it is known, $$ as $."""

    def replace(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\((\w+)\)", replace, text)


def test_a_pod_runs_the_same_command_with_what_the_runtime_tells_it(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "python"
    program.write_text('#!/bin/sh\npwd > "$CALLS/pwd"\nprintf "%s\\0" "$@" > "$CALLS/argv"\n')
    program.chmod(0o755)
    made = job(workdir=str(tmp_path))
    trainer = made["spec"]["trainer"]
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path), "HOME": "/root",
        "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a-x-node-0-0.a-x", "PET_MASTER_PORT": "29400",
    }  # fmt: skip
    command = [expanded(text, environment) for text in (*trainer["command"], *trainer["args"])]
    subprocess.run(command, env=environment, check=True, cwd="/")
    assert (tmp_path / "pwd").read_text().strip() == str(tmp_path)
    assert (tmp_path / "argv").read_text().split("\0")[:-1] == [
        "-m", "pipeline", "run", *TYPED[:2], "launch=local", "launch.nnodes=2", "run_name=a",
        "output_dir=/runs", "launch.node_rank=1", "launch.rdzv_endpoint=a-x-node-0-0.a-x:29400",
    ]  # fmt: skip


def test_the_pod_s_arguments_compose() -> None:
    from pipeline.compose import compose, prepare

    arguments = k8s.train_job(
        config(), ["experiment=demo", "launch=k8s", "launch.k8s.image=x"], "a", k8s.NOT_SET
    )["spec"]
    own = ["launch.node_rank=1", "launch.rdzv_endpoint=a-x-node-0-0.a-x:29400"]
    made = compose(prepare([*arguments["trainer"]["args"][2:], *own]).overrides)
    assert (made.launch.kind.value, made.launch.nnodes, made.launch.node_rank) == ("local", 2, 1)
    assert made.launch.rdzv_endpoint == "a-x-node-0-0.a-x:29400"
    assert (made.output_dir, made.run_name) == ("/runs", "a")


@pytest.mark.parametrize("typed", [["output_dir=/runs/mine"], ["++output_dir=/runs/mine"], []])
def test_the_output_folder_is_the_one_that_is_set_on_the_volume(typed: list[str]) -> None:
    trainer = k8s.train_job(config(), typed, "a", "/runs/mine")["spec"][
        "trainer"
    ]  # typed, or of an experiment
    assert [text for text in trainer["args"] if "output_dir" in text] == ["output_dir=/runs/mine"]


@pytest.mark.parametrize("elsewhere", ["mine", "/runsx", "/tmp/runs"])  # noqa: S108 - is not written to
def test_an_output_folder_that_is_not_on_the_volume_is_refused(elsewhere: str) -> None:
    with pytest.raises(UserError, match=f"output_dir={elsewhere} is not on the volume"):
        k8s.launch(config(), TYPED, Path(elsewhere) / "a", print)


@pytest.mark.parametrize("key", ["image", "volume_claim"])
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(UserError, match=f"launch.k8s.{key}"):
        job(**{key: None})


# --- Submitting ------------------------------------------------------------------------------------


def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kubectl: str | None) -> list[str]:
    """Launch with a kubectl that does what is given, or with none."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    if kubectl is not None:
        (tmp_path / "bin" / "kubectl").write_text(f"#!/bin/sh\n{kubectl}\n")
        (tmp_path / "bin" / "kubectl").chmod(0o755)
    lines: list[str] = []
    monkeypatch.chdir(tmp_path)
    k8s.launch(config(), TYPED, Path("runs/a"), lines.append)
    return lines


def test_the_manifest_is_written_and_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = submit(tmp_path, monkeypatch, 'test -f "$3" && echo "$1 $2"')
    assert lines == ["k8s       runs/a/k8s/trainjob.yaml", "  create --filename"]


@pytest.mark.parametrize(
    ("kubectl", "said"),
    [
        (None, "no kubectl .* is written but not submitted"),
        ("echo no such kind >&2; exit 1", "refused .*no such kind"),
    ],
)
def test_a_job_that_cannot_be_created_is_an_error_and_the_manifest_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kubectl: str | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        submit(tmp_path, monkeypatch, kubectl)
    assert (tmp_path / "runs" / "a" / "k8s" / "trainjob.yaml").exists()


def test_without_submission_the_command_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    made = config()
    made.submit = False
    assert k8s.launch(made, TYPED, Path("runs/a"), lines.append) == 0
    assert "kubectl create --filename" in lines[-1]

"""A run as a TrainJob of Kubeflow Trainer v2: one controller per pod of the runtime `torch-distributed`.

Takes the launch configuration and the overrides as typed; writes a manifest into the run's folder on this
machine and hands it to the cluster. In the pods the run's folder lies on a volume that all of them mount.
Waits for nothing and knows nothing of steps. Written for Trainer 2.2 and later (`runtimePatches`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import UserError
from common.launch_config import KubernetesConfig, LaunchConfig
from launch.command import hand_over, keep, machine_arguments

API_VERSION = "trainer.kubeflow.org/v1alpha1"
MANAGER = "rlhf-pipeline/launch"
NODE = "node"
"""What the runtime calls the pods that train, and the container in each."""
FOLDER = "k8s"
MANIFEST = "trainjob.yaml"
NOT_SET = "runs"
"""The output_dir of a configuration that sets none; this machine's folder for what is rendered."""
GRACE_SECONDS = 120
"""How long a pod that is told to leave may save."""
KEYS = ("WANDB_API_KEY", "HF_TOKEN")
"""Credentials that the pods take from launch.k8s.secret."""
LONGEST_NAME = 40
"""Characters of a job's name; the names of its pods are longer by what Kubernetes adds."""

SCRIPT = (
    'cd -- "$0" && exec python -m pipeline "$@" '
    'launch.node_rank="$PET_NODE_RANK" launch.rdzv_endpoint="$PET_MASTER_ADDR:$PET_MASTER_PORT"'
)


def launch(config: LaunchConfig, overrides: Sequence[str], run_dir: Path, say: Callable[[str], None]) -> int:
    """Write `<run>/k8s/trainjob.yaml` and create the job; with launch.submit=false only write it. Returns 0.

    overrides: as typed; their paths are those in the container. UserError where a setting is missing, there
    is no kubectl, or it refuses the job.
    """
    text = render(config, overrides, run_dir.name, str(run_dir.parent))
    if run_dir.is_relative_to(config.k8s.volume_path):
        run_dir = Path(NOT_SET) / run_dir.name  # the volume is in the cluster, the manifest is here
    path = keep(text, run_dir, FOLDER, MANIFEST)
    say(f"k8s       {path}")
    command = ["kubectl", "create", "--filename", str(path)]
    typed = shlex.join(command)
    if config.submit:
        say(f"  {hand_over(command, path, elsewhere=f'where there is one: {typed}', refused=typed)}")
    else:
        say(f"  create it with: {typed}")
    return 0


def render(config: LaunchConfig, overrides: Sequence[str], run_name: str, output_dir: str) -> str:
    """The manifest as YAML. Pure."""
    import yaml

    head = "# Create it with: kubectl create --filename THIS_FILE. Each time is a new job of the same run.\n"
    job = train_job(config, overrides, run_name, output_dir)
    return head + yaml.safe_dump(job, sort_keys=False, allow_unicode=True)


def train_job(
    config: LaunchConfig, overrides: Sequence[str], run_name: str, output_dir: str
) -> dict[str, Any]:
    """The TrainJob. Pure. UserError where launch.k8s lacks what it cannot do without.

    output_dir: of the composed configuration.
    """
    k8s = config.k8s
    for key, value in (("image", k8s.image), ("volume_claim", k8s.volume_claim)):
        if not value:
            raise UserError(
                f"launch=k8s needs launch.k8s.{key}",
                hint="launch.k8s.image=IMAGE with this project in it, launch.k8s.volume_claim=CLAIM that all "
                "nodes mount: the run's folder lies there",
            )
    folder = folder_on_volume(k8s.volume_path, output_dir)
    arguments = machine_arguments(overrides, config.nnodes, {"run_name": run_name, "output_dir": folder})
    metadata: dict[str, Any] = {"generateName": f"{dns_label(run_name)}-"}
    if k8s.namespace is not None:
        metadata["namespace"] = k8s.namespace
    trainer: dict[str, Any] = {
        "image": k8s.image,
        "command": ["/bin/sh", "-c", escaped(SCRIPT)],
        "args": [escaped(text) for text in (k8s.workdir, *arguments)],
        "numNodes": config.nnodes,
    }
    if variables := environment(k8s):
        trainer["env"] = variables
    gpus = {} if k8s.gpus_per_node is None else {"nvidia.com/gpu": k8s.gpus_per_node}
    if resources := {**k8s.resources, **gpus}:
        trainer["resourcesPerNode"] = {"limits": resources, "requests": dict(resources)}
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": {
            "runtimeRef": {"apiGroup": API_VERSION.partition("/")[0], "kind": "ClusterTrainingRuntime"}
            | {"name": k8s.runtime},
            "trainer": trainer,
            "runtimePatches": [patch(str(k8s.volume_claim), k8s.volume_path)],
        },
    }


def environment(k8s: KubernetesConfig) -> list[dict[str, Any]]:
    """Environment variables of the pods; credentials are only named, and read from the Secret there."""
    variables: list[dict[str, Any]] = [
        {"name": name, "value": escaped(str(value))} for name, value in k8s.env.items()
    ]
    for key in KEYS if k8s.secret is not None else ():
        reference = {"name": k8s.secret, "key": key, "optional": True}
        variables.append({"name": key, "valueFrom": {"secretKeyRef": reference}})
    return variables


def patch(claim: str, path: str) -> dict[str, Any]:
    """What the runtime's pods have beside: the volume, and time to save when they are told to leave."""
    pod = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}],
        "containers": [{"name": NODE, "volumeMounts": [{"name": "runs", "mountPath": path}]}],
    }
    job = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    return {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}


def folder_on_volume(volume: str, output_dir: str) -> str:
    """Where the pods write: the volume, or the folder on it that was set."""
    if output_dir == NOT_SET:
        return volume
    if not PurePosixPath(output_dir).is_relative_to(volume):
        raise UserError(
            f"output_dir={output_dir} is not on the volume, which is mounted at {volume}: the run would "
            "vanish with its pods",
            hint=f"output_dir={volume}, or leave it out",
        )
    return output_dir


def escaped(text: str) -> str:
    """Text that Kubernetes leaves as it is: it would replace $(NAME)."""
    return text.replace("$", "$$")


def dns_label(name: str) -> str:
    """A run's name as the beginning of a job's: lower-case letters, digits and hyphens, a letter first."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:LONGEST_NAME].rstrip("-")
    return plain if plain[:1].isalpha() else f"rlhf-{plain}".rstrip("-")

"""Schemas that launching reads: where the ranks run, and what a cluster is asked for.

Plain dataclasses, one docstring line per field; nothing here starts anything. What the ranks themselves read
is in `config.py`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Dict, List, Optional

from common.errors import UserError
from common.fields import EMPTY_TOO, number, require


class Launcher(Enum):
    local = "local"
    ssh = "ssh"
    slurm = "slurm"
    k8s = "k8s"


@dataclass
class SlurmConfig:
    """What the rendered sbatch file asks for; what is not set is left to the cluster's defaults."""

    partition: Optional[str] = None
    """partition to run in"""
    account: Optional[str] = None
    """account that pays"""
    qos: Optional[str] = None
    """quality of service"""
    time: Optional[str] = None
    """limit of one allocation, as sbatch takes it (04:00:00); a requeued job goes on where it was"""
    gpus_per_node: Optional[int] = number(None, 0, 1_024)
    """GPUs of each node"""
    cpus_per_task: Optional[int] = number(None, 1, 65_536)
    """cores of each node's task"""
    mem: Optional[str] = None
    """memory of each node, as sbatch takes it (64G)"""
    signal_seconds: int = number(300, 1, 65_535)
    """how long before the limit the job is told to save and leave"""
    requeue: bool = True
    """queue the job again when it was told to leave, until it is done"""
    options: List[str] = field(default_factory=list)
    """further #SBATCH options, such as --exclusive"""
    setup: List[str] = field(default_factory=list)
    """shell lines that every node runs first, such as module load cuda"""


@dataclass
class KubernetesConfig:
    """What the rendered TrainJob (Kubeflow Trainer v2) asks for."""

    image: Optional[str] = None
    """container image with this project and its packages"""
    namespace: Optional[str] = None
    """namespace of the job"""
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime"""
    workdir: str = "/workspace"
    """folder of the project in the image"""
    volume_claim: Optional[str] = None
    """PersistentVolumeClaim for output_dir, shared by all nodes"""
    volume_path: str = "/runs"
    """where it is mounted"""
    gpus_per_node: Optional[int] = number(None, 0, 1_024)
    """GPUs of each node"""
    resources: Dict[str, str] = field(default_factory=dict)
    """further resources of each node, such as memory: 64Gi"""
    env: Dict[str, str] = field(default_factory=dict, metadata=EMPTY_TOO)
    """environment variables of each node, such as NCCL_DEBUG: INFO; credentials belong into secret"""
    secret: Optional[str] = None
    """Secret whose WANDB_API_KEY and HF_TOKEN become environment variables, those of them that it has"""


@dataclass
class LaunchConfig:
    """Where the ranks run."""

    kind: Launcher = Launcher.local
    """local: this machine, one of nnodes; ssh: the machines of a hostfile; slurm, k8s: a cluster's job"""
    nproc_per_node: str = "auto"
    """ranks on each machine: a number, or auto (one per GPU; one on a machine without)"""
    nnodes: int = number(1, 1, 65_536)
    """machines; all of them see output_dir"""
    node_rank: Optional[int] = number(None, 0, 65_535)
    """which of them this one is, from 0; ssh, slurm and k8s set it"""
    rdzv_endpoint: Optional[str] = None
    """HOST:PORT of machine 0, where all meet; PORT + 1 is used as well"""
    sequence_parallel: int = number(1, 1, 1_024)
    """ranks that share each row, consecutive tokens on each; for documents longer than a device holds"""
    read_once_per_node: bool = False
    """one rank of each machine reads a model's weights and hands them on, for a disk that is slow or shared;
    false: each reads what it needs"""
    check_memory: bool = True
    """refuse a step whose weights and optimizer need more memory than a rank has, by `plan`'s estimate"""
    join_seconds: int = number(600, 1, 1_000_000)
    """how long machines wait for each other at the start"""
    max_restarts: int = number(0, 0, 1_000_000)
    """how often ranks that failed are started again from the last checkpoint, without being asked"""
    hostfile: Optional[str] = None
    """ssh: lines of HOST slots=N, machine 0 first"""
    ssh_options: List[str] = field(default_factory=list)
    """ssh: options of the ssh command, such as -p 2222"""
    submit: bool = True
    """slurm, k8s: hand the rendered file to the cluster; false: only write it"""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """of launch=slurm"""
    k8s: KubernetesConfig = field(default_factory=KubernetesConfig)
    """of launch=k8s"""

    @property
    def is_elsewhere(self) -> bool:
        """Whether other machines run the steps; one that has its number takes part in it."""
        return self.kind is not Launcher.local and self.node_rank is None

    def check_read_once(self, quantized: bool) -> None:
        """UserError where the ranks of a machine cannot read for each other."""
        if self.read_once_per_node and quantized:
            raise UserError(
                "launch.read_once_per_node=true hands on tensors as they are, and model.quantize=nf4 rounds "
                "them while it reads",
                hint="launch.read_once_per_node=false, or model.quantize=none",
            )

    def data_ranks(self, ranks: int) -> int:
        """How many of so many ranks have rows of their own; the others share theirs."""
        return ranks // self.sequence_parallel

    def check_sequence_parallel(self, ranks: int, heads: int | None) -> None:
        """UserError where the ranks that share a row cannot share its heads, or are not a part of all ranks.

        heads: of the network's attention; None: not known.
        """
        asked = self.sequence_parallel
        for count, things in ((heads, "attention heads"), (ranks, "rank(s)")):
            if count is not None and count % asked:
                raise UserError(
                    f"launch.sequence_parallel={asked} does not divide the {count} {things}",
                    hint=self._ways_to_share(ranks, heads),
                )

    def _ways_to_share(self, ranks: int, heads: int | None) -> str:
        """What divides ranks and heads, the nearest first; and how many ranks take what was asked for."""
        asked = self.sequence_parallel
        fits = [n for n in range(1, ranks + 1) if ranks % n == 0 and (heads or 0) % n == 0]
        nearest, *others = sorted(fits, key=lambda n: (abs(n - asked), n))
        heads_too = "" if heads is None else f" and the {heads} attention heads"
        also = f", and so do {', '.join(map(str, others))}" if others else ""
        line = f"launch.sequence_parallel={nearest} divides the {ranks} rank(s){heads_too}{also}"
        if (heads or 0) % asked == 0:
            line += f"; {asked} takes a multiple of {asked} ranks: launch.nproc_per_node, launch.nnodes"
        return line

    def check(self, at: str) -> None:
        """Of so many machines this is one."""
        rank = self.node_rank
        require(rank is None or rank < self.nnodes, f"{at}node_rank", rank, f"0 to {self.nnodes - 1}")

"""A real SLURM on this machine: slurmctld and one slurmd per node, on the loopback interface.

Takes a folder of its own and the number of nodes; `environment` is what sbatch and srun need to talk to it.
Needs root and Debian's slurmctld, slurmd and slurm-client. The nodes' names do not resolve, so that
launch.rdzv_endpoint must be given.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.forked import free_port

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PATIENCE_SECONDS = 240.0

CONF = """\
ClusterName=rehearsal
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def is_possible() -> bool:
    """Whether a cluster can be started here."""
    return os.geteuid() == 0 and all(shutil.which(name) for name in NEEDED)


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path
    environment: dict[str, str]

    def ask(self, *command: str) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def show(self, job: str, key: str) -> str:
        """A field of `scontrol show job`."""
        fields = dict(part.partition("=")[::2] for part in self.ask("scontrol", "show", "job", job).split())
        return fields[key]

    def wait_for(self, job: str, *states: str) -> str:
        """Wait until the job is in one of the states; returns it."""
        end = time.monotonic() + PATIENCE_SECONDS
        while (state := self.show(job, "JobState")) not in states:
            assert time.monotonic() < end, f"job {job} is {state}"
            time.sleep(0.1)
        return state


@contextmanager
def cluster(folder: Path, nodes: int = 2) -> Iterator[Cluster]:
    """Run a cluster for as long as the context is open."""
    (folder / "state").mkdir(parents=True)
    host = socket.gethostname()
    ports = [free_port() for _ in range(nodes + 1)]
    lines = []
    for number, port in enumerate(ports[1:], 1):
        (folder / f"spool_n{number}").mkdir()
        lines.append(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000"
        )
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, controller_port=ports[0], folder=folder, nodes="\n".join(lines)))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    made = Cluster(folder, {**clean, "SLURM_CONF": str(conf)})
    with ExitStack() as stack:
        started = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"n{n}"] for n in range(1, nodes + 1))]
        for command in started:
            output = stack.enter_context(open(folder / f"{'_'.join(command)}.out", "wb"))
            process = subprocess.Popen(command, env=made.environment, stdout=output, stderr=output)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        end = time.monotonic() + 30
        while not is_up(made, nodes):
            assert time.monotonic() < end, (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.1)
        stack.callback(lambda: subprocess.run(["scancel", "--user=root"], env=made.environment, check=False))
        yield made


def is_up(made: Cluster, nodes: int) -> bool:
    """Whether every node is idle."""
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=made.environment, capture_output=True, text=True
    )
    return done.stdout.split() == ["idle"] * nodes

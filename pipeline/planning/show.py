"""`python -m pipeline plan`: all that is known of a run before a device is touched, as plain text.

Takes a finished configuration and the overrides it was made from; prints, and returns the exit status. Starts
no step and writes nothing but tokenized rows, and published models that it imports, into the cache.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap

from common.artifacts import MANIFEST, file_sha256
from common.counts import DataCounts
from common.launch_config import Launcher
from common.rates import Rates, few_steps
from common.stage import Input, Step
from common.text import table
from common.vllm_fit import FITTING, fits, installed_vllm
from launch import k8s, slurm, ssh
from launch.command import machine_arguments
from launch.local import count_gpus, gpus_of, ranks_of
from pipeline import checks, state
from pipeline.config import PipelineConfig
from pipeline.plan import EXPORT, Wired, wire_run
from pipeline.planning import counting, devices, memory
from pipeline.planning.fitting import Room, rows_that_fit, ways_out_of
from pipeline.planning.unfit import refuse_unfit
from pipeline.planning.whole import refuse_whole_actor
from pipeline.planning.work import Workload, with_stage
from pipeline.planning.workload import accumulation, rows_per_pass, workload_of
from pipeline.sources import check_functions, settle_sources

Say = Callable[[str], None]
STAGES = (1, 2, 3)
GUESSED = "what GPUs the machines of launch={kind} have is not known here: planned as for this one"
NOT_IMPORTED = "what ppo scores with beside a reward model is tried where it runs, before the first step"
WHOLE_ROLL_OUTS = "ppo: ranks share rows to score and to learn; each samples prompts of its own, unshared"
WIDTH = 98
"""Of a section's lines, which are moved in by two more."""
COLUMNS = {
    "weights": "weights", "optimizer": "states", "gradients": "grads", "buffers": "buffers",
    "activations": "kept", "logits": "logits", "KV cache": "KV",
}  # fmt: skip
"""Terms of the estimate that have a column of their own, and its head."""


@dataclass(frozen=True)
class Where:
    """The ranks of the run. here: on one machine, the one with the most."""

    ranks: int
    here: int
    gpu: bool
    hosts: Mapping[str, int] = field(default_factory=dict)
    """over ssh: the machines, and the ranks of each"""
    elsewhere: bool = False
    """whether these are other machines than this one"""


def plan(config: PipelineConfig, overrides: Sequence[str], *, say: Say = print) -> int:
    """Print the plan; of a job of Kubernetes its launch only, for its paths are those in the container.

    Returns 0; UserError for what a run would refuse, or its status where that is the user's own code. What
    has no room is refused last, below the table that shows what would have.
    """
    wired = wire_run(config)
    if config.launch.kind is Launcher.k8s:
        sections = {"launch": k8s_lines(config, overrides)}
    else:
        where = where_of(config)
        config = settle_sources(config, say)
        wired = wire_run(config)
        config, line = state.settle_dtype(config, state.run_folder(config), gpu=where.gpu)
        measured = "" if where.elsewhere else "; `doctor` measures which dtype is faster here"
        in_doubt = [f"{line}{measured}"] if line is not None else []
        checks.check(config, where.ranks, [*where.hosts.values()] or [where.here])
        refuse_whole_actor(config, devices.gpu_memory() if where.gpu and not where.elsewhere else None)
        run_dir = state.run_folder(config)
        if not where.elsewhere and (status := check_functions(config, wired, run_dir)):
            return status
        counts = counting.count(config, wired)
        sections = {
            "run": [*run_lines(config, where), *in_doubt],
            "steps": step_lines(config, wired),
            "data": data_lines(counts),
            "schedule": schedule_lines(config, wired, where, counts),
            "memory": memory_lines(config, wired, where, counts),
            "launch": launch_lines(config, overrides, where),
        }
    for name, lines in sections.items():
        say(name)
        for line in lines:
            say(f"  {line}".rstrip())
    if config.launch.kind is not Launcher.k8s and not where.elsewhere:
        refuse_unfit(config, where.ranks, where.here, gpu=where.gpu)
    return 0


def where_of(config: PipelineConfig) -> Where:
    """How many ranks there will be, and on what: SLURM's nodes as they were asked for, others as this one."""
    launch = config.launch
    known = gpus_of(launch)
    gpu = bool(count_gpus() if known is None else known)
    is_given = launch.nproc_per_node.strip() != "auto"
    if launch.kind is Launcher.ssh and launch.node_rank is None:
        hosts = {
            host.name: ranks_of(launch) if is_given or host.slots is None else host.slots
            for host in ssh.hosts_of(launch)
        }
        return Where(sum(hosts.values()), max(hosts.values()), gpu, hosts, elsewhere=True)
    here = ranks_of(launch)
    return Where(here * launch.nnodes, here, gpu, elsewhere=launch.is_elsewhere)


def run_lines(config: PipelineConfig, where: Where) -> list[str]:
    """Name, folder, ranks."""
    device = "one per GPU" if where.gpu else "on the CPU"
    number = len(where.hosts) or config.launch.nnodes
    guessed = gpus_of(config.launch) is None
    machines = f" on {number} machines" if number > 1 else ""
    return [
        f"{state.run_name(config)} in {state.run_folder(config)}, seed {config.seed}",
        f"{where.ranks} rank(s){machines}, {device}, ZeRO {config.deepspeed.stage}, "
        f"{config.model.dtype.value}",
        *([GUESSED.format(kind=config.launch.kind.value)] if guessed else []),
        *([NOT_IMPORTED] if where.elsewhere and Step.ppo in config.steps and config.ppo.names_code else []),
    ]


def step_lines(config: PipelineConfig, wired: Sequence[Wired]) -> list[str]:
    """What each step starts from, with the hash of what is there, and where it leaves its artifact."""
    run_dir = state.run_folder(config)
    rows = []
    for step in wired:
        name = step.stage.name.value
        sources = [f"{taken.value} {_source(step, taken, run_dir)}" for taken in step.sources]
        takes = ", ".join(sources) or f"base model {_base(config)}"
        folder = run_dir / name / EXPORT
        done = f", done ({file_sha256(folder / MANIFEST)[:12]})" if (folder / MANIFEST).exists() else ""
        rows.append((name, takes, f"-> {step.stage.produces.value} {folder}{done}"))
    return table(rows)


def data_lines(counts: dict[Step, DataCounts]) -> list[str]:
    """Each step's ledger and its share of trained tokens."""
    lines = []
    for step, found in counts.items():
        about = "" if found.scale == 1 else f"; estimated from a sample, 1 row in {found.scale:.3g}"
        share = f", {found.trained_share:.1%} of them trained" if found.trained_tokens else ""
        lines.append(
            f"{step.value}: {found.documents:,} to train on, {found.held_out:,} held out, "
            f"{found.tokens:,} tokens{share}{about}"
        )
        if found.seen and found.seen != found.documents:
            lines.append(f"  by the weights of their sources {found.seen:,} an epoch")
        lines += [f"  {line}" for line in found.ledger]
        for notice in found.notices:
            lines += wrap(f"  notice: {notice}", WIDTH, subsequent_indent="    ")
    return lines


def schedule_lines(
    config: PipelineConfig, wired: Sequence[Wired], where: Where, counts: dict[Step, DataCounts]
) -> list[str]:
    """Rows of an epoch, optimizer steps, and how the global batch comes about."""
    head = "step|rows per epoch|fill|optimizer steps|global batch|= ranks x micro x accumulation"
    rows, notes = [head.split("|")], []
    for step in wired:
        name = step.stage.name
        part, found = getattr(config, name.value), counts[name]
        ranks = config.launch.data_ranks(where.ranks)
        batch, micro = part.train.global_batch_size, rows_per_pass(part.train, ranks)
        times = accumulation(part.train, ranks)
        unit = {Step.ppo: "prompts", Step.sft: "rows"}.get(name, "pairs")
        steps = _updates(config, found.total_steps) if name is Step.ppo else found.total_steps
        fill = f"{found.fill:.1%}" if name is Step.sft else ""
        about = "~" if found.scale != 1 else ""
        packed = "packed " if name is Step.sft and part.data.packing else ""
        equals = "=" if ranks * micro * times == batch else "<="
        sum_up = f"{equals} {ranks} x {micro} x {times}"
        counted = f"{about}{found.rows:,} {packed}{unit}"
        rows.append([name.value, counted, fill, f"{about}{steps:,}", str(batch), sum_up])
        if name is Step.ppo:
            each = (
                f"{part.responses_per_iteration:,} responses and {steps // max(found.total_steps, 1)} updates"
            )
            notes.append(f"ppo: {about}{found.total_steps:,} iterations, {each} in each")
            notes += [line for line in [part.filling(found.rows)] if line]
            notes += [WHOLE_ROLL_OUTS] * (config.launch.sequence_parallel > 1)
        elif few := few_steps(part.train, found.total_steps, name.value):
            notes.append(f"{name.value}: {few}")
        for label, rates in learning_rates(config, name, found.total_steps).items():
            notes.append(f"{label}: learning rate {rates.in_words()}")
    if any(not row[5].startswith("= ") for row in rows):
        notes.append("<=: rows of pairs and responses are packed within a step, or the last pass is short")
    return [*table(rows), *notes]


def learning_rates(config: PipelineConfig, step: Step, total_steps: int) -> dict[str, Rates]:
    """Of each network that a step trains. total_steps: optimizer steps, of PPO iterations."""
    part, lora = getattr(config, step.value), config.model.lora.enabled
    if step is not Step.ppo:
        return {step.value: Rates.of(part.optim, part.peak_lr(lora=lora), total_steps)}
    alone = part.critic.warmup_iterations if part.has_critic else 0
    learning = {"ppo actor": (part, total_steps - alone)}
    if part.has_critic:
        learning["ppo critic"] = (part.critic, total_steps)
    return {
        label: Rates.of(of.optim, of.peak_lr(lora=lora), max(_updates(config, iterations), 1))
        for label, (of, iterations) in learning.items()
    }


def memory_lines(
    config: PipelineConfig, wired: Sequence[Wired], where: Where, counts: dict[Step, DataCounts]
) -> list[str]:
    """Per step a table: one line for each ZeRO stage, the chosen one marked."""
    available = None if where.elsewhere else devices.memory_per_rank(where.gpu, where.here)
    room = None if available is None else Room.here(where.gpu, where.here)
    has = "" if available is None else f"; a rank has {gigabytes(available)} GB"
    has += "; what a rank has there is not known here" if where.elsewhere else ""
    lines = [f"estimated peak per rank in GB (10^9 bytes){has}"]
    for step in wired:
        name = step.stage.name
        found = counts[name]
        work = workload_of(
            config, name, where.ranks, gpu=where.gpu, vocabulary=found.vocabulary, longest=found.longest,
            mean_length=found.mean_length, trained_share=share_read(name, found),
        )  # fmt: skip
        if work is None:
            lines.append(f"{name.value}: not estimated, for the model's config.json is not here yet")
            continue
        about, passes = work_in_words(work)
        lines += [f"{name.value}: {about}", f"  {passes}", *vllm_lines(work)]
        rows = [["ZeRO", *COLUMNS.values(), "others", "total", ""]]
        for stage in STAGES:
            of_stage = memory.estimate(with_stage(work, stage))
            mark = "<- chosen" if stage == work.sharding.stage else ""
            if available is not None and of_stage.device > available:
                mark = f"{mark}, does not fit".lstrip(", ")
            if room is not None and of_stage.host_at_most > room.host:
                mark = f"{mark}, no room in host memory".lstrip(", ")
            if of_stage.host:
                mark = f"{mark} + {gigabytes(of_stage.host)} GB of host memory".lstrip()
            if of_stage.host_to_load > of_stage.host:
                mark = f"{mark}; loading: {gigabytes(of_stage.host_to_load)} GB of the host's".lstrip("; ")
            terms = [of_stage.of(column) for column in COLUMNS]
            sizes = [*terms, of_stage.device + of_stage.host - sum(terms), of_stage.device]
            rows.append([str(stage), *map(gigabytes, sizes), mark])
        lines += [f"  {line}" for line in table(rows, right=range(1, len(COLUMNS) + 3))]
        if where.gpu:
            lines.append(f"  {rows_that_fit(work, name, config, where.ranks, room)}")
        if room is not None and not room.takes(memory.estimate(work)):
            ways = ways_out_of(work, name, config, room)
            lines += [f"  does not fit; {way}" for way in ways] or ["  does not fit, whatever is set"]
    base = memory.GPU_BASE if where.gpu else memory.CPU_BASE
    loaded = "the CUDA context and workspaces" if where.gpu else "a process with torch and DeepSpeed loaded"
    left_out = "not in it: freed blocks that a process keeps where rows vary in length, and the host's data"
    return [
        *lines,
        "states: the optimizer's and fp32 masters; kept: activations, for the backward pass",
        "others: frozen models, gathered weights, hpZ's shares, an average, a checkpoint that is written",
        "  beside training, on GPUs at ZeRO-3 a network as it is loaded;",
        f"  {loaded} ({gigabytes(base)} GB)",
        *([] if where.gpu else [left_out]),
    ]


def vllm_lines(work: Workload) -> list[str]:
    """What vLLM takes, where it samples, and which one there is."""
    if work.decoding is None or not work.decoding.by_vllm:
        return []
    weights, cache = gigabytes(memory.weights_of_vllm(work)), gigabytes(memory.kv_cache(work))
    span = "while it samples" if work.gpu else "from its start to the end"
    found = installed_vllm()
    here = "is not installed here" if found is None else f"here: {' '.join(found)}"
    fitting = "" if found is not None and fits(found[1]) else f", and {FITTING} is expected"
    return [
        f"  vLLM samples, with weights of its own ({weights} GB) and a cache ({cache} GB) {span}; "
        f"vLLM {here}{fitting}"
    ]


def share_read(step: Step, counts: DataCounts) -> float:
    """Share of the tokens at which something is read: those trained, or of pairs each answer's last one."""
    if step is Step.reward:
        return min(1.0, 2 * counts.documents / max(counts.tokens, 1))
    return counts.trained_share


def launch_lines(config: PipelineConfig, overrides: Sequence[str], where: Where) -> list[str]:
    """The command, or the file that the cluster is given."""
    run_dir = state.run_folder(config)
    command = command_of(overrides)
    if config.launch.kind is Launcher.slurm:
        arguments = machine_arguments(overrides, config.launch.nnodes, {"run_name": run_dir.name})
        text = slurm.render(config.launch, arguments, run_dir.absolute(), Path.cwd(), sys.executable)
        return [command, "which writes and submits", *text.splitlines()]
    if where.hosts:
        each = [f"{name}: {ranks} rank(s)" for name, ranks in where.hosts.items()]
        return [command, "which starts over ssh, for every step", *each]
    if config.launch.kind is Launcher.local and config.launch.nnodes > 1 and config.launch.node_rank is None:
        return [f"{command} launch.node_rank={rank}" for rank in range(config.launch.nnodes)]
    how = "directly" if where.ranks == 1 else "by torchrun's elastic agent"
    return [command, f"which starts {where.here} rank(s) {how} for every step"]


def k8s_lines(config: PipelineConfig, overrides: Sequence[str]) -> list[str]:
    """The command, what Kubernetes is given, and where the rest of the plan can be made."""
    run_dir = state.run_folder(config)
    text = k8s.render(config.launch, overrides, run_dir.name, str(run_dir.parent))
    rest = "steps, data, schedule and memory: plan in a container, where the paths lie, with launch=local"
    return [command_of(overrides), "which writes and creates", *text.splitlines(), rest]


def command_of(overrides: Sequence[str]) -> str:
    """What starts the run."""
    return f"python -m pipeline run {shlex.join(overrides)}".rstrip()


def work_in_words(work: Workload) -> list[str]:
    """What learns and what is frozen, and how large a pass is."""
    networks = [part.network for part in work.networks]
    sizes = " and ".join(f"{network.parameters:,}" for network in networks)
    counted = "" if all(network.is_exact for network in networks) else " by the config"
    learn = sum(part.trained for part in work.networks)
    part = f", of which {learn:,} learn" if learn < sum(network.parameters for network in networks) else ""
    frozen = f", {len(work.frozen)} frozen model(s)" if work.frozen else ""
    passes = f"passes of {work.batch.tokens:,} tokens, {work.batch.trained:,} of them read by the loss"
    if work.decoding is not None:
        passes += f"; {work.decoding.slots} x {work.decoding.capacity} tokens of KV cache"
    return [f"{sizes} parameters{counted}{part}{frozen}", passes]


def gigabytes(size: float) -> str:
    """10^9 bytes, with three digits where they say something."""
    number = size / 1e9
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _updates(config: PipelineConfig, iterations: int) -> int:
    """Optimizer steps of PPO's actor."""
    ppo = config.ppo
    each = ppo.ppo_epochs * math.ceil(ppo.responses_per_iteration / ppo.train.global_batch_size)
    return each * iterations


def _source(step: Wired, taken: Input, run_dir: Path) -> str:
    source, folder = step.sources[taken], step.folder_of(taken, run_dir)
    known = f" ({file_sha256(folder / MANIFEST)[:12]})" if (folder / MANIFEST).exists() else ""
    return f"from {source.value if isinstance(source, Step) else source}{known}"


def _base(config: PipelineConfig) -> str:
    model = config.model
    if model.path is not None:
        return model.path if model.revision is None else f"{model.path}@{model.revision}"
    return f"{model.config.get('model_type')}, at random"

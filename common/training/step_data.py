"""From a step's settings to rows on disk, and how they become this rank's batches; alike for all steps.

The first rank of each machine tokenizes, or compares the hashes of what the cache has, while the others wait;
then they map the same files: rows are read once on each machine, not by every rank.
`common/data/prompt_rule.py` decides the loss mask, `common/data/batches.py` which rows make a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from common.artifacts import VARIABLES, Artifact, content_sha256, write_json
from common.config import DataConfig, JobConfig, to_plain
from common.data import cache, dataset
from common.data.batches import BatchPlan
from common.data.dataset_types import DatasetType
from common.data.ledger import Ledger
from common.data.reader import named_sources
from common.data.stored import PairDataset, PromptDataset, TokenizedDataset
from common.data.stream import WINDOW, StreamedRows, folder_of, stream
from common.errors import with_step
from common.phases import enter
from common.runtime.distributed import World, from_first_of_machine
from common.runtime.progress import Progress, console
from common.stage import Step
from common.training_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Say = Callable[[str], None]
Rows = TypeVar("Rows", TokenizedDataset, PairDataset, PromptDataset)


@dataclass(frozen=True)
class StepData(Generic[Rows]):
    """The rows that a step trains and evaluates on."""

    train: Rows
    held_out: Rows | None
    ledger: Ledger
    weights: dict[str, float]  # by source name
    stage_split: dict[str, Any] | None = None  # seed and shares, when steps share out the rows
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def fingerprints(self) -> dict[str, Any]:
        """Hashes of everything that decided the rows and of the tokenized rows themselves, for the manifest;
        how they are shared out and variables of the chat template, if there are any."""
        held_out = None if self.held_out is None else self.held_out.fingerprint
        split = {} if self.stage_split is None else {"stage_split": self.stage_split}
        given = dict(self.chat_template_kwargs)
        variables = {VARIABLES: given} if given else {}
        rows: dict[str, Any] = {}
        if not isinstance(self.train, StreamedRows):  # whose windows have a hash each
            rows["rows_sha256"] = cache.rows_sha256(self.train.folder)
        return {"train": self.train.fingerprint, "held_out": held_out, **rows, **split, **variables}


def cache_dir(job: JobConfig, data: DataConfig) -> Path:
    return Path(data.cache_dir or Path(job.output_dir) / ".cache" / "data")


def build_data(
    job: JobConfig,
    step: Step,
    data: DataConfig,
    kind: DatasetType[Rows],
    tokenizer: PreTrainedTokenizerFast,
    say: Say,
    *,
    world: World | None = None,
) -> StepData[Rows]:
    """Tokenize the sources, or find them in the cache. world: of the ranks that want them; None: one process.

    All of a machine's ranks call it with the same arguments.
    """
    if data.streaming:
        return _streamed(job, step, data, kind, tokenizer, say, world)
    with _bar() as show:
        folder = _by_one(world, kind.name, data, lambda: dataset.prepare(
            data, tokenizer, kind=kind, stage=step.value, seed=job.seed, cache_dir=cache_dir(job, data),
            report=say, show=show,
        ))  # fmt: skip
    train, held_out, ledger = dataset.records(folder, data, kind)
    weights, split = dataset.source_weights(data), _stage_split(job, data)
    return StepData(train, held_out, ledger, weights, split, data.chat_template_kwargs)


def _by_one(world: World | None, name: str, data: DataConfig, make: Callable[[], Path]) -> Path:
    """The folder that the first rank of this machine makes, on each of its ranks."""
    if world is None:
        return make()
    asked = f"{name} of {content_sha256(to_plain(data))}"
    return Path(from_first_of_machine(world, asked, lambda: str(make())))


def _stage_split(job: JobConfig, data: DataConfig) -> dict[str, Any] | None:
    """How rows are shared out between the steps, as artifacts record it."""
    return {"seed": job.seed, "shares": dict(data.stage_split)} if data.stage_split else None


def _streamed(
    job: JobConfig,
    step: Step,
    data: DataConfig,
    kind: DatasetType[Rows],
    tokenizer: PreTrainedTokenizerFast,
    say: Say,
    world: World | None,
) -> StepData[Rows]:
    """The rows from the first one on, while those behind are tokenized; of held-out rows all."""
    held_out, ledger = None, Ledger()
    if data.eval_path is not None:
        (*_, (_, source)) = named_sources(data)
        alone = replace(data, path=None, sources=[source], eval_path=None, eval_fraction=0.0, streaming=False)
        held_out = build_data(job, step, alone, kind, tokenizer, say, world=world)
        ledger = held_out.ledger
    say(
        "streaming: rows are tokenized while they are trained on, and packed and shuffled"
        f" {WINDOW:,} at a time; what became of them is said when the last is read"
    )
    folder = _by_one(world, "stream", data, lambda: folder_of(
        data, tokenizer, stage=step.value, seed=job.seed, cache_dir=cache_dir(job, data)
    ))  # fmt: skip
    wait = world is not None and world.local_rank > 0
    rows: Any = stream(data, tokenizer, folder, stage=step.value, seed=job.seed, report=say, wait=wait)
    weights, split = dict.fromkeys(rows.sources, 1.0), _stage_split(job, data)
    evaluated = None if held_out is None else held_out.train
    return StepData(rows, evaluated, ledger, weights, split, data.chat_template_kwargs)


@contextmanager
def _bar() -> Iterator[Callable[[float], None] | None]:
    """Is told the share of the rows that are tokenized; None where there is no terminal to show it on."""
    if not console().is_terminal:
        yield None
        return
    bar: Progress | None = None

    def show(share: float) -> None:
        nonlocal bar
        bar = bar or Progress(100, label="tokenizing, %")
        bar.update(round(100 * share))

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def load_data(
    job: JobConfig,
    step: Step,
    data: DataConfig,
    kind: DatasetType[Rows],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    world: World,
    say: Say,
    *,
    policy: Artifact | None = None,
) -> StepData[Rows]:
    """`build_data` on every rank; shows the ledger and writes it to `folder/ledger.json`.

    policy: the artifact that the step starts from. A warning says when it split the rows between steps in
    another way, or rendered its chat template with other variables.
    """
    enter("data")
    built = build_data(job, step, data, kind, tokenizer, say, world=world)

    def account(ledger: Ledger) -> None:
        if world.is_rank0:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "ledger.json", ledger.to_json())
        if ledger.sources:
            say(with_step("\n".join(ledger.lines()), step.value))

    account(built.ledger)
    if isinstance(built.train, StreamedRows):
        built.train.when_over = account
    if policy is not None:
        lines = (
            other_split(step, built.stage_split, policy),
            other_variables(step, data.chat_template_kwargs, policy),
        )
        for line in filter(None, lines):
            say(line)
    return built


def other_variables(step: Step, ours: Mapping[str, Any], policy: Artifact) -> str | None:
    """A warning when the step's prompts are rendered with other variables than those the policy learned."""
    theirs = policy.template_variables
    if dict(ours) == theirs or "data" not in policy.manifest.details:
        return None
    return (
        f"warning: {step.value} renders its prompts in another way than its policy {policy.path} was trained:"
        f" data.chat_template_kwargs is {dict(ours)}, and was {theirs} there"
    )


def other_split(step: Step, ours: Mapping[str, Any] | None, policy: Artifact) -> str | None:
    """A warning when rows of the step may be among those its policy was trained on.

    That may be so when the policy's step split rows with this step, or this step splits rows too, and the
    splits or their seeds differ. ours: as in a manifest; None without a split. Without a split in its
    manifest a policy counts as trained on other data.
    """
    theirs = (policy.manifest.details.get("data") or {}).get("stage_split")
    if theirs is None or ours == theirs or (ours is None and step.value not in theirs["shares"]):
        return None
    return (
        f"warning: {step.value} may see rows that its policy {policy.path} was trained on: "
        f"data.stage_split is {_shown(ours)}, and was {_shown(theirs)} there"
    )


def _shown(split: Mapping[str, Any] | None) -> str:
    if split is None:
        return "empty"
    shares = ", ".join(f"{name}: {share:g}" for name, share in sorted(split["shares"].items()))
    return f"{{{shares}}} with seed={split['seed']}"


def batch_plan(
    job: JobConfig, data: DataConfig, train: TrainConfig, world: World, *, share_prefix: bool = True
) -> BatchPlan:
    """How the rows become this rank's batches. share_prefix: see `probes.Shortcuts`."""
    return BatchPlan(
        max_length=data.max_length,
        packing=data.packing,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        seed=job.seed,
        rank=world.data_rank,
        world_size=world.data_size,
        sequence_rank=world.sequence_rank,
        sequence_parallel=world.sequence_parallel,
        share_prefix=share_prefix,
    )

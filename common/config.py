"""Schemas that training reads, shared by all steps: dataclasses with enums, one docstring line per field.

A field says which values it may have (`fields.py`); each class checks them in `__post_init__`. Checks that
need two groups are made by the step's own config. What launching reads is in `launch_config.py`. Nothing here
reads a file except `load_resolved`, and nothing imports torch.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Dict, List, Optional, TypeVar

from common.errors import UserError
from common.fields import at_least, check_ranges, ranged, require
from common.launch_config import LaunchConfig

T = TypeVar("T")


class Dtype(Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Quantize(Enum):
    none = "none"
    nf4 = "nf4"


class Truncation(Enum):
    drop = "drop"
    left = "left"
    right = "right"


class TrainOn(Enum):
    all_turns = "all_turns"
    last_turn = "last_turn"


class SpecialTokens(Enum):
    keep = "keep"
    text = "text"
    refuse = "refuse"


class OnBadRow(Enum):
    error = "error"
    skip = "skip"


class OptimizerName(Enum):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    adafactor = "adafactor"
    muon = "muon"


class SchedulerName(Enum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    inverse_sqrt = "inverse_sqrt"
    wsd = "wsd"


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    off = "off"


class Offload(Enum):
    none = "none"
    cpu = "cpu"


def dtype_on(dtype: Dtype, *, gpu: bool) -> Dtype:
    """What `auto` stands for, by the kind of device alone; any other as it is.

    bf16 products on CPUs are several times as fast on some machines and half as fast on others.
    """
    if dtype is not Dtype.auto:
        return dtype
    return Dtype.bf16 if gpu else Dtype.fp32


@dataclass
class LoraConfig:
    """Low-rank adapters (peft)."""

    enabled: bool = False
    """train adapters instead of all weights"""
    r: int = at_least(1, 16)
    """rank"""
    alpha: int = at_least(1, 32)
    """scale: the update is multiplied by alpha / r"""
    dropout: float = ranged(0.0, "0 up to (not including) 1", lambda share: 0 <= share < 1)
    """dropout on the adapter's input"""
    targets: List[str] = field(default_factory=lambda: ["all-linear"])
    """module names, or all-linear"""
    dora: bool = False
    """weight-decomposed LoRA"""

    def __post_init__(self) -> None:
        check_ranges(self, "model.lora")


@dataclass
class TokenizerConfig:
    """Where the tokenizer comes from; by default from the model's own folder."""

    path: Optional[str] = None
    """folder or hub name of another tokenizer"""
    train_vocab_size: Optional[int] = None
    """train a byte-level BPE of this size on the training rows (with model.config only)"""

    def __post_init__(self) -> None:
        if self.path is not None and self.train_vocab_size is not None:
            raise UserError(
                f"model.tokenizer.path={self.path} names a tokenizer and "
                f"model.tokenizer.train_vocab_size={self.train_vocab_size} asks for a new one",
                hint="keep one: model.tokenizer.train_vocab_size=null uses the one that exists",
            )


@dataclass
class ModelConfig:
    """The base model: either `path` (weights) or `config` (random initialisation)."""

    path: Optional[str] = None
    """local folder or hub name"""
    revision: Optional[str] = None
    """commit of the hub model; a branch is resolved, recorded, and refused when it moves under a run"""
    config: Dict[str, Any] = field(default_factory=dict)
    """fields of a transformers config, with model_type: initialise at random from it"""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """where the tokenizer comes from"""
    chat_template: Optional[str] = None
    """chatml, alpaca, plain, or a .jinja file; only needed when the tokenizer has none"""
    dtype: Dtype = Dtype.auto
    """of the weights in the forward pass; auto: bf16 on GPUs, fp32 on CPUs. The optimizer's copy is fp32"""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """low-rank adapters"""
    quantize: Quantize = Quantize.none
    """nf4: 4-bit base weights under LoRA (needs a GPU and bitsandbytes)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    compile: bool = False
    """torch.compile each decoder layer"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""

    def __post_init__(self) -> None:
        if self.path is not None and self.config:
            raise UserError(
                f"model.path={self.path} and model.config are both set",
                hint="keep one: model.path loads weights, model.config initialises at random",
            )
        if self.path is not None and self.tokenizer.train_vocab_size is not None:
            raise UserError(
                f"model.path={self.path} has weights that belong to its own tokenizer; "
                f"model.tokenizer.train_vocab_size={self.tokenizer.train_vocab_size} would train another",
                hint="leave model.tokenizer.train_vocab_size out, or use model.config instead of model.path",
            )
        if self.quantize is Quantize.nf4 and not self.lora.enabled:
            raise UserError("model.quantize=nf4 needs adapters to train", hint="add model.lora.enabled=true")


@dataclass
class SourceConfig:
    """One source of rows."""

    path: str = ""
    """file (.jsonl[.gz|.zst], .json, .csv, .parquet, .arrow), folder, saved data set, or hub name"""
    name: Optional[str] = None
    """how the source is called in logs; by default its path's last part"""
    split: str = "train"
    """split of a hub or saved data set"""
    revision: Optional[str] = None
    """commit of a hub data set"""
    weight: float = ranged(1.0, "above 0, up to 1000", lambda weight: 0 < weight <= 1_000)
    """how often its rows are seen per epoch: 0.5 a seeded half, 2 twice"""
    max_rows: Optional[int] = at_least(1, None)
    """a seeded sample of at most this many rows"""
    format: Optional[str] = None
    """recognised by columns when not given"""
    columns: Dict[str, str] = field(default_factory=dict)
    """our name: theirs, e.g. {prompt: query, completion: reply}"""

    def __post_init__(self) -> None:
        check_ranges(self, "data.sources")


TEMPLATE_ARGUMENTS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
"""What a chat template is given by name besides variables."""


@dataclass
class DataConfig:
    """What to train on, and how rows become tokens."""

    path: Optional[str] = None
    """short form for one source"""
    sources: List[SourceConfig] = field(default_factory=list)
    """the sources, mixed by weight"""
    max_length: int = at_least(2, 2048)
    """tokens per row, prompt and response together"""
    packing: bool = True
    """fill rows with several documents, isolated from each other"""
    truncation: Truncation = Truncation.drop
    """what happens to a document longer than max_length"""
    train_on: TrainOn = TrainOn.all_turns
    """which assistant turns of a row are trained"""
    chat_template_kwargs: Dict[str, Any] = field(default_factory=dict)
    """variables of the chat template, e.g. {enable_thinking: false}; a row's own stand above them"""
    special_tokens_in_content: SpecialTokens = SpecialTokens.keep
    """control tokens that a row's words hold: real tokens (counted), ordinary text, or a bad row"""
    eval_fraction: Optional[float] = ranged(None, "0 up to (not including) 1", lambda share: 0 <= share < 1)
    """share of the rows held out (0.05 unless eval_path is given)"""
    eval_path: Optional[str] = None
    """held-out rows from a file of their own"""
    stage_split: Dict[str, float] = field(default_factory=dict)
    """shares of the rows by step, e.g. {sft: 2, reward: 4, ppo: 4}: each step sees its own part only"""
    on_bad_row: OnBadRow = OnBadRow.error
    """stop at the first bad row, or skip and report it"""
    max_bad_rows: int = at_least(0, 100)
    """with on_bad_row=skip: give up after this many"""
    cache_dir: Optional[str] = None
    """tokenized rows; by default <output_dir>/.cache/data"""

    def __post_init__(self) -> None:
        if self.path is not None and self.sources:
            raise UserError("data.path and data.sources are both set", hint="keep one of them")
        if self.eval_path is not None and self.eval_fraction is not None:
            raise UserError("data.eval_path and data.eval_fraction are both set", hint="keep one of them")
        check_ranges(self, "data")
        taken = TEMPLATE_ARGUMENTS & self.chat_template_kwargs.keys()
        require(not taken, "data.chat_template_kwargs", sorted(taken), "variables that are not given anyway")

    def all_sources(self) -> list[SourceConfig]:
        """The sources, whichever form was used; empty when none is named."""
        return [SourceConfig(path=self.path)] if self.path is not None else list(self.sources)

    def held_out_fraction(self) -> float:
        """Share of the training rows that is held out for evaluation."""
        if self.eval_path is not None:
            return 0.0
        return 0.05 if self.eval_fraction is None else self.eval_fraction


@dataclass
class TrainConfig:
    """The loop."""

    global_batch_size: int = at_least(1, 128)
    """rows per optimizer step, over all ranks (packed rows when packing)"""
    micro_batch_size: int = at_least(1, 1)
    """rows per rank and forward pass; accumulation follows from the three numbers"""
    epochs: float = ranged(1.0, "above 0, up to 10000", lambda epochs: 0.0 < epochs <= 10_000)
    """passes over the data"""
    max_steps: Optional[int] = at_least(1, None)
    """optimizer steps; takes the place of epochs"""
    eval_every: int = at_least(0, 0)
    """steps between evaluations; 0: only at the end"""
    save_every: int = at_least(0, 0)
    """steps between checkpoints; 0: only at the end, when told to stop, and by save_minutes"""
    save_minutes: float = ranged(30.0, "0 (never) or more", lambda minutes: 0 <= minutes < math.inf)
    """and one after so many minutes without; 0: never"""
    keep_checkpoints: int = at_least(1, 2)
    """newest checkpoints kept, beside the best one"""

    def __post_init__(self) -> None:
        check_ranges(self, "train")


@dataclass
class OptimConfig:
    """Optimizer and schedule."""

    name: OptimizerName = OptimizerName.adamw
    """adamw is torch's fused one"""
    lr: Optional[float] = ranged(None, "a number above 0", lambda rate: 0 < rate < math.inf)
    """peak learning rate; by default SFT 2e-5, reward model 1e-5, DPO 5e-7, with LoRA ten times that"""
    betas: List[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates"""
    eps: float = ranged(1e-8, "a number above 0", lambda eps: eps > 0)
    """AdamW's epsilon"""
    weight_decay: float = at_least(0, 0.0)
    """never applied to biases and norms"""
    scheduler: SchedulerName = SchedulerName.cosine
    """shape after warm-up"""
    warmup_ratio: float = ranged(0.03, "0 to 1", lambda share: 0 <= share <= 1)
    """share of the steps with rising learning rate"""
    min_lr_ratio: float = ranged(0.1, "0 to 1", lambda share: 0 <= share <= 1)
    """floor of cosine and wsd, as a share of the peak"""
    max_grad_norm: float = at_least(0, 1.0)
    """clip the global gradient norm; 0: off"""

    def __post_init__(self) -> None:
        check_ranges(self, "optim")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optim.betas",
            self.betas,
            "two numbers from 0 up to (not including) 1",
        )


@dataclass
class SamplingConfig:
    """Completions sampled from held-out prompts at each evaluation."""

    num_prompts: int = at_least(0, 8)
    """held-out prompts; 0: none"""
    max_new_tokens: int = at_least(1, 128)
    """longest completion"""
    temperature: float = ranged(0.0, "0 (greedy) or more", lambda value: 0 <= value < math.inf)
    """0: greedy"""

    def __post_init__(self) -> None:
        check_ranges(self, "sampling")


@dataclass
class DeepSpeedConfig:
    """ZeRO, always stage 1 or higher."""

    stage: int = ranged(2, "1, 2 or 3", lambda stage: stage in (1, 2, 3))
    """1: optimizer state sharded; 2: gradients too; 3: parameters too"""
    offload_optimizer: Offload = Offload.none
    """keep optimizer state in host memory (stage 2, 3)"""
    offload_param: Offload = Offload.none
    """keep parameters in host memory (stage 3)"""
    hpz_partition_size: int = at_least(1, 1)
    """ZeRO++ secondary partition: ranks per node (stage 3)"""
    reduce_bucket_size: int = at_least(1, 200_000_000)
    """elements reduced at once"""
    overlap_comm: bool = True
    """reduce gradients during the backward pass (GPU only)"""

    def __post_init__(self) -> None:
        if self.stage == 0:
            raise UserError(
                "deepspeed.stage=0 is not allowed",
                hint="deepspeed=zero1 (stage 0 takes a wrong first step in bf16, has no NaN guard in fp32)",
            )
        check_ranges(self, "deepspeed")
        if self.offload_optimizer is not Offload.none and self.stage < 2:
            raise UserError(
                "deepspeed.offload_optimizer=cpu needs stage 2 or 3", hint="deepspeed=zero2_offload"
            )
        if self.offload_param is not Offload.none and self.stage != 3:
            raise UserError("deepspeed.offload_param=cpu needs stage 3", hint="use deepspeed=zero3_offload")
        if self.hpz_partition_size > 1 and self.stage != 3:
            raise UserError("deepspeed.hpz_partition_size needs stage 3", hint="use deepspeed=zero3_hpz")


@dataclass
class TrackingConfig:
    """metrics.jsonl is always written; this is about Weights & Biases."""

    wandb: WandbMode = WandbMode.auto
    """auto: online with a key, else offline"""
    project: str = "rlhf"
    """W&B project"""
    entity: Optional[str] = None
    """W&B team or user"""


@dataclass
class JobConfig:
    """The part of resolved.yaml that every step's ranks read; a step adds its own group."""

    run_name: str = ""
    output_dir: str = "runs"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def to_plain(value: Any) -> Any:
    """Dataclasses as dicts and enums by value: what JSON and YAML can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def load_resolved(path: Path, schema: type[T]) -> T:
    """Read a resolved.yaml into `schema`, keeping only the top-level keys that the schema has.

    The controller has composed and checked it; a step reads it and never composes.
    """
    from omegaconf import DictConfig, OmegaConf

    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", hint="give the run's resolved.yaml"
        ) from None
    assert isinstance(loaded, DictConfig)
    known = {f.name for f in fields(schema)}  # type: ignore[arg-type]
    wanted = OmegaConf.masked_copy(loaded, [key for key in loaded if key in known])
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), wanted))  # type: ignore[return-value]

"""Schemas that training reads, shared by all steps: dataclasses with enums, one docstring line per field.

A field says which values it may have, and a group's method `check` which do not go together; `as_schema` asks
both. Checks that need two groups are made by the step's own config. What the loop, launching and tracking
read is in `training_config.py`, `launch_config.py` and `tracking_config.py`. Nothing here reads a file except
`load_resolved`, and nothing imports torch.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Dict, List, Optional, TypeVar

from common.errors import UserError
from common.fields import as_schema, fields_of, number, require
from common.launch_config import LaunchConfig
from common.network_fields import check_sizes
from common.tracking_config import TrackingConfig

T = TypeVar("T")


class Dtype(Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Quantize(Enum):
    none = "none"
    nf4 = "nf4"


class CheckpointingPolicy(Enum):
    full = "full"
    selective = "selective"


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


class Offload(Enum):
    none = "none"
    cpu = "cpu"


NO_NVME = (
    "DeepSpeed 0.19.8 resumes without AdamW's moments and without small tensors, and copies its files past "
    "the checkpoint's hashes: deepspeed=zero3_offload, or optim.name=adamw_bf16 or adamw_8bit"
)
"""Why there is no third."""
WITHOUT_NVME = f"allowed: none, cpu; with nvme {NO_NVME}"


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
    r: int = number(16, 1, 65_536)
    """rank"""
    alpha: int = number(32, 1, 65_536)
    """scale: the update is multiplied by alpha / r"""
    dropout: float = number(0.0, 0, 1, below=True)
    """dropout on the adapter's input"""
    targets: List[str] = field(default_factory=lambda: ["all-linear"])
    """module names, or all-linear"""
    dora: bool = False
    """weight-decomposed LoRA"""

    def check(self, at: str) -> None:
        """Something is adapted."""
        require(bool(self.targets), f"{at}targets", "[]", "names of modules, or all-linear")


@dataclass
class TokenizerConfig:
    """Where the tokenizer comes from; by default from the model's own folder."""

    path: Optional[str] = None
    """folder or hub name of another tokenizer"""
    train_vocab_size: Optional[int] = number(None, 1, 10_000_000)
    """train a byte-level BPE of this size on the training rows (with model.config only)"""

    def check(self, at: str) -> None:
        """One tokenizer is named."""
        if self.path is not None and self.train_vocab_size is not None:
            raise UserError(
                f"{at}path={self.path} names a tokenizer and "
                f"{at}train_vocab_size={self.train_vocab_size} asks for a new one",
                hint=f"keep one: {at}train_vocab_size=null uses the one that exists",
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
    """chatml, alpaca, tulu, zephyr, transcript, user_assistant, plain, or a .jinja file; only needed when the
    tokenizer has none"""
    dtype: Dtype = Dtype.auto
    """of the weights in the forward pass; auto: bf16 on GPUs, fp32 on CPUs. The optimizer's copy is fp32"""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """low-rank adapters"""
    quantize: Quantize = Quantize.none
    """nf4: 4-bit base weights under LoRA (needs bitsandbytes)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    checkpointing_policy: CheckpointingPolicy = CheckpointingPolicy.full
    """of gradient_checkpointing; selective: matrix products and attention are kept and all else recomputed, a
    third to a half less memory of activations and hardly more time"""
    router_aux_loss_coef: float = number(0.0, 0, 100)
    """mixtures of experts: weight of the load-balancing loss over the tokens of each step; 0: none. 0.001 to
    0.02 is usual; it costs one more pass without gradients"""
    tiled_mlp: Optional[bool] = None
    """of gradient_checkpointing: feed-forward networks run in tiles of 8,192 tokens, so that what is between
    their matrices is held of one tile; null: in longer passes, unless compiled or selective"""
    activation_offload: bool = False
    """of gradient_checkpointing: inputs of recomputed layers wait in host memory for the backward pass; on a
    GPU, exact to the bit"""
    compile: Optional[bool] = None
    """torch.compile each decoder layer; null: for SFT and the reward model on a GPU, at ZeRO 1 and 2"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""

    def check(self, at: str) -> None:
        """Weights or a config, the tokenizer that belongs to it, and sizes that a network can have."""
        if self.path is not None and self.config:
            raise UserError(
                f"{at}path={self.path} and {at}config are both set",
                hint=f"keep one: {at}path loads weights, {at}config initialises at random",
            )
        if self.path is not None and self.tokenizer.train_vocab_size is not None:
            raise UserError(
                f"{at}path={self.path} has weights that belong to its own tokenizer; "
                f"{at}tokenizer.train_vocab_size={self.tokenizer.train_vocab_size} would train another",
                hint=f"leave {at}tokenizer.train_vocab_size out, or use {at}config instead of {at}path",
            )
        if self.quantize is Quantize.nf4 and not self.lora.enabled:
            raise UserError(f"{at}quantize=nf4 needs adapters to train", hint=f"add {at}lora.enabled=true")
        if self.quantize is Quantize.nf4 and self.config:
            raise UserError(f"{at}quantize=nf4 needs weights that exist", hint=f"{at}path=MODEL")
        if self.checkpointing_policy is not CheckpointingPolicy.full and not self.gradient_checkpointing:
            raise UserError(
                f"{at}checkpointing_policy={self.checkpointing_policy.value} recomputes nothing by itself",
                hint=f"add {at}gradient_checkpointing=true",
            )
        self._check_recomputation(at)
        if self.compile and self.router_aux_loss_coef:
            raise UserError(
                f"{at}router_aux_loss_coef={self.router_aux_loss_coef:g} does not go with {at}compile=true: "
                "the graph of a layer breaks at its router, or passes by what looks at it",
                hint=f"{at}compile=null, or {at}router_aux_loss_coef=0",
            )
        check_sizes(self.config, f"{at}config.")

    def _check_recomputation(self, at: str) -> None:
        """What is for layers that are recomputed in full, and run as they stand."""
        asked = [name for name in ("tiled_mlp", "activation_offload") if getattr(self, name)]
        if not asked:
            return
        key = f"{at}{asked[0]}=true"
        if not self.gradient_checkpointing:
            raise UserError(
                f"{key} is for layers that are recomputed", hint=f"add {at}gradient_checkpointing=true"
            )
        if self.checkpointing_policy is not CheckpointingPolicy.full:
            raise UserError(
                f"{key} does not go with {at}checkpointing_policy={self.checkpointing_policy.value}, which "
                "keeps on the device what layers compute",
                hint=f"{at}checkpointing_policy=full",
            )
        if self.compile:
            raise UserError(
                f"{key} does not go with {at}compile=true: a compiled layer is recomputed within its graph",
                hint=f"{at}compile=null, or leave {at}{asked[0]} out",
            )

    @property
    def tiles_feed_forward(self) -> bool:
        """Whether recomputed layers compute feed-forward networks in tiles where a pass has more than one."""
        is_full = self.gradient_checkpointing and self.checkpointing_policy is CheckpointingPolicy.full
        return is_full and not self.compile and self.tiled_mlp is not False

    @property
    def needs_plain_layers(self) -> str | None:
        """The setting for which layers are not compiled, as `name=value`; None: there is none."""
        names = ("tiled_mlp", "activation_offload", "router_aux_loss_coef")
        settings = ((name, getattr(self, name)) for name in names)
        return next((f"{name}={str(value).lower()}" for name, value in settings if value), None)


@dataclass
class SourceConfig:
    """One source of rows."""

    path: str = ""
    """file (.jsonl[.gz|.zst], .json, .csv, .parquet, .arrow), pattern (data/*.jsonl), folder, saved data set,
    hub name, or a place elsewhere: https://, s3://, gs://, hf://"""
    name: Optional[str] = None
    """how the source is called in logs; by default its path's last part"""
    subset: Optional[str] = None
    """configuration of a hub data set that has several"""
    split: str = "train"
    """split of a hub or saved data set"""
    revision: Optional[str] = None
    """commit of a hub data set"""
    weight: float = number(1.0, 1e-6, 1_000)
    """how often its rows are seen per epoch: 0.5 a seeded half, 2 twice"""
    max_rows: Optional[int] = number(None, 1, 10**12)
    """a seeded sample of at most this many rows"""
    format: Optional[str] = None
    """recognised by columns when not given"""
    columns: Dict[str, str] = field(default_factory=dict)
    """our name: theirs, e.g. {prompt: query, completion: reply}"""


TEMPLATE_ARGUMENTS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
"""What a chat template is given by name besides variables."""


SEVERAL = {"way_out": "expected one path; several go into '{at}sources=[{{path: FIRST}}, {{path: SECOND}}]'"}


@dataclass
class DataConfig:
    """What to train on, and how rows become tokens."""

    path: Optional[str] = field(default=None, metadata=SEVERAL)
    """short form for one source"""
    sources: List[SourceConfig] = field(default_factory=list)
    """the sources, mixed by weight"""
    max_length: int = number(2048, 2, 10_000_000)
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
    eval_fraction: Optional[float] = number(None, 0, 1, below=True)
    """share of the rows held out (0.05 unless eval_path is given)"""
    eval_path: Optional[str] = None
    """held-out rows from a file of their own"""
    eval_split: Optional[str] = None
    """split of eval_path where that is a hub or saved data set; by default train"""
    stage_split: Dict[str, float] = number({}, 1e-6, 1_000_000)
    """shares of the rows by step, e.g. {sft: 2, reward: 4, ppo: 4}: each step sees its own part only"""
    on_bad_row: OnBadRow = OnBadRow.error
    """stop at the first bad row, or skip and report it"""
    max_bad_rows: int = number(100, 0, 10**12)
    """with on_bad_row=skip: give up after this many"""
    streaming: bool = False
    """SFT: train while the rows behind are tokenized; needs train.max_steps"""
    processes: Optional[int] = number(None, 1, 1024)
    """processes that tokenize; as many as cores unless it is set"""
    cache_dir: Optional[str] = None
    """tokenized rows; by default <output_dir>/.cache/data"""

    def check(self, at: str) -> None:
        """Rows are named in one way, and a template's variables are its own."""
        if self.path is not None and self.sources:
            raise UserError(f"{at}path and {at}sources are both set", hint="keep one of them")
        if self.eval_path is not None and self.eval_fraction is not None:
            raise UserError(f"{at}eval_path and {at}eval_fraction are both set", hint="keep one of them")
        if self.eval_split is not None and self.eval_path is None:
            raise UserError(
                f"{at}eval_split={self.eval_split} has no effect without {at}eval_path",
                hint=f"{at}eval_path=HUB_NAME, or leave it out",
            )
        taken = TEMPLATE_ARGUMENTS & self.chat_template_kwargs.keys()
        require(not taken, f"{at}chat_template_kwargs", sorted(taken), "variables that are not given anyway")

    def all_sources(self) -> list[SourceConfig]:
        """The sources, whichever form was used; empty when none is named."""
        return [SourceConfig(path=self.path)] if self.path is not None else list(self.sources)

    def held_out_fraction(self) -> float:
        """Share of the training rows that is held out for evaluation."""
        if self.eval_path is not None:
            return 0.0
        return 0.05 if self.eval_fraction is None else self.eval_fraction


@dataclass
class SamplingConfig:
    """Completions sampled from held-out prompts at each evaluation."""

    num_prompts: int = number(8, 0, 1_000_000)
    """held-out prompts; 0: none"""
    max_new_tokens: int = number(128, 1, 10_000_000)
    """longest completion"""
    temperature: float = number(0.0, 0.001, 100, zero="greedy")
    """0: greedy"""
    cuda_graphs: bool = True
    """on a GPU, decode with CUDA graphs where the model allows it; false if they fail"""


@dataclass
class DeepSpeedConfig:
    """ZeRO, always stage 1 or higher."""

    stage: int = number(
        2, 1, 3, note="in stage 0 bf16 takes a wrong first step, fp32 has no NaN guard: deepspeed=zero1"
    )
    """1: optimizer state sharded; 2: gradients too; 3: parameters too"""
    offload_optimizer: Offload = field(default=Offload.none, metadata={"way_out": WITHOUT_NVME})
    """keep optimizer state in host memory (stage 2, 3)"""
    offload_param: Offload = field(default=Offload.none, metadata={"way_out": WITHOUT_NVME})
    """keep parameters in host memory (stage 3)"""
    hpz_partition_size: int = number(1, 1, 65_536)
    """ZeRO++ secondary partition: ranks per node (stage 3)"""
    reduce_bucket_size: int = number(200_000_000, 1, 10**12)
    """elements reduced at once"""
    overlap_comm: bool = True
    """reduce gradients during the backward pass (GPU only)"""

    def check(self, at: str) -> None:
        """The stage can do what is asked of it."""
        if self.offload_optimizer is not Offload.none and self.stage < 2:
            raise UserError(f"{at}offload_optimizer=cpu needs stage 2 or 3", hint="deepspeed=zero2_offload")
        if self.offload_param is not Offload.none and self.stage != 3:
            raise UserError(f"{at}offload_param=cpu needs stage 3", hint="use deepspeed=zero3_offload")
        if self.hpz_partition_size > 1 and self.stage != 3:
            raise UserError(f"{at}hpz_partition_size needs stage 3", hint="use deepspeed=zero3_hpz")


@dataclass
class JobConfig:
    """The part of resolved.yaml that every step's ranks read; a step adds its own group."""

    run_name: str = ""
    output_dir: str = "runs"
    seed: int = number(0, 0, 2**63 - 1)
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

    The controller has composed it, and checked it in the same way; a step reads it and never composes.
    """
    from omegaconf import OmegaConf

    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", hint="give a run's resolved.yaml") from None
    plain: Any = OmegaConf.to_container(loaded, resolve=True)
    known = fields_of(schema)
    return as_schema(schema, {key: value for key, value in plain.items() if key in known})

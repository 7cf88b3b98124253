"""What PPO can be told."""

import math
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Dict, List, Optional

from common.addresses import Words, check_url
from common.config import DataConfig, JobConfig
from common.errors import UserError
from common.fields import number
from common.limits import collective_seconds
from common.stage import Input, Role, Stage, Step
from common.training_config import Exported, OptimConfig, TrainConfig
from common.vllm_fit import SamplingEngine, check_vllm_graphs, check_vllm_sampling
from step3_ppo.rewards.config import RewardSourceConfig, check_reference, longest_wait

MEASURED = ("reward", "kl", "length", "stop_rate")
"""What every evaluation measures of a response, beside the functions of ppo.evaluation."""


STAGE = Stage(
    name=Step.ppo, consumes=(Input.policy, Input.reward_model), produces=Role.policy, module="step3_ppo"
)
"""PPO starts from a policy and a reward model, and produces a policy."""
CALIBRATION = "calibration.json"
"""In the step's folder: that of a reward model which others published (`calibrate.py`)."""


class Estimator(Enum):
    gae = "gae"
    grpo = "grpo"
    rloo = "rloo"
    reinforce_pp = "reinforce_pp"


class KLPlacement(Enum):
    auto = "auto"
    reward = "reward"
    loss = "loss"


class KLController(Enum):
    fixed = "fixed"
    adaptive = "adaptive"


class CriticStart(Enum):
    auto = "auto"
    reward_model = "reward_model"
    policy = "policy"


VLLM_SERVER = Words(
    example="http://127.0.0.1:8000",
    sends="prompts",
    instead="put the server's key into VLLM_API_KEY in the environment, and leave it out of the address",
    if_plain="use https, or where the network is yours: ppo.rollout.vllm.allow_http=true",
)


@dataclass
class VLLMConfig:
    """vLLM as what samples; without effect with another engine."""

    servers: Optional[List[str]] = None
    """addresses of running vLLM servers, e.g. [http://127.0.0.1:8000]; null: in each rank, on its device"""
    timeout: float = number(600, 0, 86_400, above=True)
    """seconds within which a server answers: has read new weights, or made a response"""
    allow_http: bool = False
    """let prompts and responses travel unencrypted to servers that are not this machine"""
    cache_gb: Optional[float] = number(None, 0, 1_000_000, above=True)
    """keys and values per rank, in GB; null: room for all slots at data.max_length. With less, vLLM lets
    responses wait"""
    drift_bound: float = number(1e-3, 0, 1_000)
    """importance weights are used in iterations whose log-probabilities by vLLM and by the actor differ by
    more, on average, in nats per token"""
    importance_cap: float = number(2.0, 1, 1_000_000)
    """largest importance weight of a token"""

    def check(self, at: str) -> None:
        """Servers have addresses, and nothing is set that they do not read."""
        if self.servers is None:
            for name in ("timeout", "allow_http"):
                if getattr(self, name) != getattr(VLLMConfig, name):
                    raise UserError(f"{at}{name} has no effect without {at}servers", hint="leave it out")
            return
        if not self.servers:
            raise UserError(f"{at}servers names none", hint=f"{at}servers=null: vLLM in each rank")
        for index, url in enumerate(self.servers):
            check_url(url, f"{at}servers[{index}]", VLLM_SERVER, allow_http=self.allow_http)
        if self.cache_gb is not None:
            raise UserError(
                f"{at}cache_gb has no effect with {at}servers", hint="theirs is --kv-cache-memory-bytes"
            )


@dataclass
class RolloutConfig:
    """How responses are sampled."""

    prompts: int = number(128, 1, 1_000_000)
    """prompts per iteration, over all ranks"""
    samples_per_prompt: int = number(1, 1, 1_000_000)
    """responses to each of them"""
    max_new_tokens: int = number(256, 1, 10_000_000)
    """longest response, its terminator included"""
    temperature: float = number(1.0, 0.001, 100, note="PPO learns from responses that were sampled")
    """of the distribution that is sampled and trained"""
    top_p: float = number(1.0, 0, 1, above=True)
    """sample from the most likely tokens that together have this probability; 1: all. What is trained (the
    ratio, the KL) stays the distribution over all tokens"""
    top_k: int = number(0, 0, 10_000_000)
    """sample from so many of the most likely tokens; 0: all. Trained as with top_p"""
    slots: int = number(64, 1, 1_000_000)
    """responses decoded side by side, per rank"""
    gather_parameters: bool = True
    """ZeRO-3: hold the whole actor while sampling; false gathers it layer by layer, token by token"""
    cuda_graphs: bool = True
    """on a GPU, decode with CUDA graphs where the model allows it; false if they fail"""
    engine: SamplingEngine = SamplingEngine.builtin
    """builtin, or vllm: in each rank, on its device, in the same environment (make vllm), or as servers"""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """vLLM as what samples"""

    @property
    def uses_vllm(self) -> bool:
        return self.engine is SamplingEngine.vllm

    @property
    def vllm_here(self) -> bool:
        """Whether vLLM is in the ranks' processes."""
        return self.uses_vllm and self.vllm.servers is None

    @property
    def leaves_out_tokens(self) -> bool:
        """Whether not all tokens can be sampled."""
        return self.top_p < 1 or self.top_k > 0

    def check(self, at: str) -> None:
        """The engine can do what it is asked for, and nothing is set for another one."""
        if not self.uses_vllm:
            for each in fields(VLLMConfig):
                if getattr(self.vllm, each.name) != each.default:
                    what = f"{at}vllm.{each.name} has no effect with {at}engine={self.engine.value}"
                    raise UserError(what, hint=f"{at}engine=vllm")
            return
        check_vllm_sampling(self.temperature, self.top_p, self.top_k, at)
        if not self.gather_parameters:
            raise UserError(
                f"{at}gather_parameters=false has no effect with {at}engine=vllm, which gets the weights "
                "one tensor at a time",
                hint=f"leave {at}gather_parameters out",
            )
        check_vllm_graphs(self.cuda_graphs, at)

    def notes(self) -> list[str]:
        """What should be known at a run's start: whether not all tokens can be sampled, and what samples."""
        where = "" if self.vllm.servers is None else f" at {', '.join(self.vllm.servers)}"
        by_vllm = [
            f"vLLM{where} samples the responses; in iterations in which its log-probabilities and the "
            f"actor's differ by more than {self.vllm.drift_bound:g} nats per token, tokens get importance "
            f"weights up to {self.vllm.importance_cap:g}"
        ] * self.uses_vllm
        if not self.leaves_out_tokens:
            return by_vllm
        return [
            *by_vllm,
            f"sampled from a part of the tokens (top_p={self.top_p}, top_k={self.top_k}): the ratio and the "
            "KL are of the distribution over all of them",
        ]


@dataclass
class KLConfig:
    """The KL penalty, which keeps the actor close to the reference, the policy it starts from."""

    placement: KLPlacement = KLPlacement.auto
    """reward: each token's reward loses coef times k1; loss: the loss gains coef times k3; auto: loss with
    ppo.estimator=grpo, else reward"""
    coef: float = number(0.05, 0, 1_000)
    """the KL coefficient, per nat; 0: no KL penalty, and no reference is loaded"""
    controller: KLController = KLController.fixed
    """adaptive: coef follows the KL per response towards target"""
    target: float = number(6.0, 0, 1_000_000, above=True)
    """nats per response (adaptive)"""
    horizon: float = number(10_000.0, 0, 1e12, above=True)
    """responses over which an adaptive coef moves (adaptive)"""

    def check(self, at: str) -> None:
        """A coefficient that is multiplied is not 0."""
        if self.controller is KLController.adaptive and self.coef == 0:
            raise UserError(
                f"{at}controller=adaptive cannot move {at}coef=0, which it multiplies",
                hint=f"start from a coefficient above 0, e.g. {at}coef=0.05",
            )


@dataclass
class CriticConfig:
    """The value network; only the estimator gae has one."""

    start: CriticStart = CriticStart.auto
    """reward_model (backbone and head), or policy (with a new head); auto: reward_model if there is one"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """its optimizer and schedule"""
    warmup_iterations: int = number(0, 0, 10**9)
    """first iterations in which only the critic learns"""
    clip: float = number(0.2, 0, 1_000_000)
    """how far a value may move from the old one before it stops being pulled; 0: any way"""

    def peak_lr(self, *, lora: bool) -> float:
        """Its learning rate after warm-up."""
        return self.optim.lr or (9e-5 if lora else 9e-6)


@dataclass
class EvaluationConfig:
    """What is measured on held-out prompts, greedily and sampled."""

    num_prompts: int = number(256, 0, 1_000_000)
    """held-out prompts; 0: no evaluation"""
    samples_per_prompt: int = number(1, 1, 1_000_000)
    """sampled responses to each, over which is averaged"""
    functions: Dict[str, str] = field(default_factory=dict)
    """further scores, only looked at: the name in eval/<name>, and a package.module:function as in rewards"""

    def check(self, at: str) -> None:
        """Functions can be named, and do not take the name of another number."""
        for name, reference in self.functions.items():
            check_reference(reference, f"{at}functions.{name}")
            if name in MEASURED or name.endswith("_se") or "/" in name:
                raise UserError(
                    f"{at}functions.{name}: eval/{name} is, or could be, a number of another kind",
                    hint=f"another name: not {', '.join(MEASURED)}, without a / and without _se at its end",
                )


@dataclass
class PPOConfig:
    """The `ppo` group."""

    policy: Optional[str] = None
    """artifact, run, model's folder or ORG/NAME@REVISION to start from; by default the run's own"""
    reward_model: Optional[str] = None
    """artifact, run, model's folder or ORG/NAME@REVISION; by default the run's own"""
    data: DataConfig = field(default_factory=DataConfig)
    """prompts; max_length is that of a prompt with its response"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """the loop: global_batch_size counts responses per update, max_steps, eval_every, save_every and
    entropy_every count iterations, epochs passes over the prompts"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """the actor's optimizer and schedule"""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """the value network"""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """how responses are sampled"""
    rewards: List[RewardSourceConfig] = field(default_factory=lambda: [RewardSourceConfig(model=True)])
    """what responses are scored with; the weighted sum is the reward"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """held-out prompts"""
    estimator: Estimator = Estimator.gae
    """gae (with a critic), grpo, rloo or reinforce_pp"""
    gamma: float = number(1.0, 0, 1)
    """discount (gae, reinforce_pp)"""
    lam: float = number(0.95, 0, 1)
    """GAE's lambda"""
    whiten_advantages: bool = True
    """mean 0 and standard deviation 1 over all response tokens of an iteration (gae; reinforce_pp always)"""
    ppo_epochs: int = number(1, 1, 10_000)
    """passes over an iteration's responses"""
    clip: float = number(0.2, 0, 1, above=True, below=True)
    """how far the ratio may move from 1 before it stops being pushed"""
    missing_eos_penalty: float = number(1.0, 0, 1_000_000)
    """taken from the reward of a response that did not stop"""
    reward_clip: float = number(10.0, 0, 1_000_000, above=True)
    """largest calibrated reward, either way"""
    entropy_coef: float = number(0.0, 0, 1_000)
    """weight of the entropy bonus, for which every update computes the entropy: train.entropy_every=1"""
    ptx_weight: float = number(0.0, 0, 1_000)
    """weight of the SFT loss on ptx_data, mixed into every update of the actor"""
    ptx_data: DataConfig = field(default_factory=DataConfig)
    """demonstrations for ptx_weight; all of them, where eval_fraction does not leave some out"""
    ptx_batch_size: int = number(32, 1, 1_000_000)
    """rows of ptx_data per update, over all ranks"""
    ema_decay: Optional[float] = number(None, 0, 1, above=True, below=True)
    """average the actor's weights over updates with this decay, and export the average; null: off"""
    target_kl: Optional[float] = number(None, 0, 1_000_000, above=True)
    """an iteration's updates end when the actor has moved this far from where it began; null: off"""
    kl: KLConfig = field(default_factory=KLConfig)
    """the KL penalty to the reference"""
    offload_frozen: bool = False
    """keep reference and reward model in host memory while they have nothing to do (GPU)"""

    def __post_init__(self) -> None:
        if (
            self.ptx_data.eval_fraction is None and self.ptx_data.eval_path is None
        ):  # rows that are held out would be lost
            self.ptx_data = replace(self.ptx_data, eval_fraction=0.0)
        if self.kl.placement is KLPlacement.auto:
            in_loss = self.estimator is Estimator.grpo  # as its paper has it
            self.kl = replace(self.kl, placement=KLPlacement.loss if in_loss else KLPlacement.reward)

    def check(self, at: str) -> None:
        """The parts of an iteration go together."""
        if self.train.export is Exported.best:
            raise UserError(
                f"{at}train.export=best: PPO has no loss on held-out rows, and its rewards can be gamed",
                hint=f"look at eval/ in the report, and python -m pipeline export RUN/ppo --step N; "
                f"{at}train.export=last",
            )
        if self.train.stop_when.metric is not None and not self.evaluation.num_prompts:
            raise UserError(
                f"{at}train.stop_when.metric={self.train.stop_when.metric} watches evaluations, and with "
                f"{at}evaluation.num_prompts=0 there are none",
                hint=f"{at}evaluation.num_prompts=256",
            )
        if self.entropy_coef and self.train.entropy_every != 1:
            raise UserError(
                f"{at}train.entropy_every={self.train.entropy_every} saves nothing with "
                f"{at}entropy_coef={self.entropy_coef:g}, whose bonus every update computes the entropy for",
                hint=f"{at}train.entropy_every=1, or {at}entropy_coef=0",
            )
        if self.ptx_data.eval_path is not None:
            raise UserError(
                f"{at}ptx_data.eval_path={self.ptx_data.eval_path} has no effect: demonstrations are not "
                "evaluated",
                hint="leave it out",
            )
        if not self.rewards:
            raise UserError(
                f"{at}rewards=[] leaves nothing to learn from", hint=f"{at}rewards=[{{model: true}}]"
            )
        if sum(source.model for source in self.rewards) > 1:
            raise UserError(f"{at}rewards names the reward model twice", hint="once, with a weight")
        groups = (Estimator.grpo, Estimator.rloo)
        if self.estimator in groups and self.rollout.samples_per_prompt < 2:
            raise UserError(
                f"{at}estimator={self.estimator.value} compares the responses to a prompt with each other, "
                f"and {at}rollout.samples_per_prompt={self.rollout.samples_per_prompt}",
                hint=f"{at}rollout.samples_per_prompt=4, or {at}estimator=gae",
            )
        if self.estimator is not Estimator.gae and self.critic.warmup_iterations:
            raise UserError(
                f"{at}critic.warmup_iterations={self.critic.warmup_iterations} has no effect with "
                f"{at}estimator={self.estimator.value}, which has no critic",
                hint=f"{at}critic.warmup_iterations=0",
            )
        if self.data.max_length <= self.rollout.max_new_tokens:
            raise UserError(
                f"{at}data.max_length={self.data.max_length} leaves no room for a prompt beside "
                f"{at}rollout.max_new_tokens={self.rollout.max_new_tokens}",
                hint="raise the first or lower the second",
            )

    def measured(self) -> list[str]:
        """Names of what an evaluation gives."""
        names = [*MEASURED, *self.evaluation.functions]
        sampled = [name for name in names if name != "kl" or self.kl.coef > 0]
        both = [*sampled, *(f"greedy/{name}" for name in names if name != "kl")]
        return [f"eval/{name}{ending}" for name in both for ending in ("", "_se")]

    @property
    def responses_per_iteration(self) -> int:
        """Over all ranks."""
        return self.rollout.prompts * self.rollout.samples_per_prompt

    def notes(self) -> list[str]:
        """What should be known at a run's start, beside `filling`."""
        short = self.responses_per_iteration % self.train.global_batch_size
        if not short:
            return self.rollout.notes()
        return [
            *self.rollout.notes(),
            f"the last update of an iteration has {short} responses and the same learning rate: "
            f"ppo.train.global_batch_size={self.train.global_batch_size} does not divide an iteration's "
            f"{self.responses_per_iteration:,}",
        ]

    def iterations_over(self, prompts: int) -> int:
        """Iterations of a run over so many prompts (of a pass), each with all its responses: the last one is
        filled up from the next pass."""
        # a rounding error in 0.1 + 0.2 must not cost an iteration
        passes = math.ceil(prompts * self.train.epochs / self.rollout.prompts - 1e-9)
        return self.train.max_steps or max(passes, 1)

    def filling(self, prompts: int) -> str | None:
        """What to say of a last iteration that is filled up; None where the passes end with it."""
        asked, wanted = self.iterations_over(prompts) * self.rollout.prompts, prompts * self.train.epochs
        if self.train.max_steps or asked - wanted < 1:
            return None
        return (
            f"ppo.train.epochs={self.train.epochs:g} over {prompts:,} prompts are no whole iterations "
            f"of ppo.rollout.prompts={self.rollout.prompts:,}: the last one is filled up with "
            f"{math.floor(asked - wanted):,} prompts of the next pass"
        )

    def check_patience(self, ranks: int) -> None:
        """UserError when the servers of `rewards` may take longer than ranks wait for each other."""
        servers = [source for source in self.rewards if source.url is not None]
        longest = sum(longest_wait(source.timeout, source.retries) for source in servers)
        if ranks > 1 and longest >= collective_seconds():
            listed = ", ".join(
                f"timeout: {source.timeout:g}, retries: {source.retries}" for source in servers
            )
            raise UserError(
                f"ppo.rewards ({listed}) may wait {longest:,.0f} s for scores, and the other "
                f"ranks give up after {collective_seconds():,.0f} s",
                hint="lower timeout or retries, which may take timeout · (2 · retries + 1) and the pauses",
            )

    @property
    def names_code(self) -> bool:
        """Whether only the step can look at something: a function that scores, or a server with its token."""
        return any(not source.model for source in self.rewards) or bool(self.evaluation.functions)

    def peak_lr(self, *, lora: bool) -> float:
        """The actor's learning rate after warm-up."""
        return self.optim.lr or (1e-5 if lora else 1e-6)

    @property
    def has_critic(self) -> bool:
        return self.estimator is Estimator.gae

    @property
    def critic_starts_from(self) -> Input:
        """What the critic's weights are taken from."""
        if self.critic.start is CriticStart.policy:
            return Input.policy
        if self.critic.start is CriticStart.reward_model or any(source.model for source in self.rewards):
            return Input.reward_model
        return Input.policy

    def needs(self, taken: Input) -> bool:
        """Whether the step uses this artifact, with these settings."""
        if taken is Input.policy:
            return True
        by_critic = self.has_critic and self.critic_starts_from is Input.reward_model
        return by_critic or any(source.model for source in self.rewards)


@dataclass
class PPOJob(JobConfig):
    """The part of resolved.yaml that the step's ranks read."""

    ppo: PPOConfig = field(default_factory=PPOConfig)

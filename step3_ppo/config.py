"""What PPO can be told."""

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Dict, List, Optional

from common.config import DataConfig, JobConfig, OptimConfig, TrainConfig
from common.errors import UserError
from common.fields import require
from common.limits import collective_seconds
from common.stage import Role, Stage, Step
from step3_ppo.rewards.config import RewardSourceConfig, check_reference, longest_wait

MEASURED = ("reward", "kl", "length", "stop_rate")
"""What every evaluation measures of a response, beside the functions of ppo.evaluation."""


STAGE = Stage(
    name=Step.ppo, consumes=(Role.policy, Role.reward_model), produces=Role.policy, module="step3_ppo"
)
"""PPO starts from a policy and a reward model, and produces a policy."""


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


@dataclass
class RolloutConfig:
    """How responses are sampled."""

    prompts: int = 128
    """prompts per iteration, over all ranks"""
    samples_per_prompt: int = 1
    """responses to each of them"""
    max_new_tokens: int = 256
    """longest response, its terminator included"""
    temperature: float = 1.0
    """of the distribution that is sampled and trained"""
    top_p: float = 1.0
    """sample from the most likely tokens that together have this probability; 1: all. What is trained (the
    ratio, the KL) stays the distribution over all tokens"""
    top_k: int = 0
    """sample from so many of the most likely tokens; 0: all. Trained as with top_p"""
    slots: int = 64
    """responses decoded side by side, per rank"""
    gather_parameters: bool = True
    """ZeRO-3: hold the whole actor while sampling; false gathers it layer by layer, token by token"""

    def __post_init__(self) -> None:
        require(self.prompts >= 1, "ppo.rollout.prompts", self.prompts, "1 or more")
        samples = self.samples_per_prompt
        require(samples >= 1, "ppo.rollout.samples_per_prompt", samples, "1 or more")
        require(self.max_new_tokens >= 1, "ppo.rollout.max_new_tokens", self.max_new_tokens, "1 or more")
        require(
            0 < self.temperature < math.inf,
            "ppo.rollout.temperature",
            self.temperature,
            "a number above 0: PPO learns from responses that were sampled",
        )
        require(0 < self.top_p <= 1, "ppo.rollout.top_p", self.top_p, "above 0, up to 1")
        require(self.top_k >= 0, "ppo.rollout.top_k", self.top_k, "0 (all) or more")
        require(self.slots >= 1, "ppo.rollout.slots", self.slots, "1 or more")

    def notes(self) -> list[str]:
        """What should be known at a run's start: one line where not all tokens can be sampled."""
        if self.top_p == 1 and self.top_k == 0:
            return []
        return [
            f"sampled from a part of the tokens (top_p={self.top_p}, top_k={self.top_k}): the ratio and the "
            "KL are of the distribution over all of them"
        ]


@dataclass
class KLConfig:
    """The KL penalty, which keeps the actor close to the reference, the policy it starts from."""

    placement: KLPlacement = KLPlacement.auto
    """reward: each token's reward loses coef times k1; loss: the loss gains coef times k3; auto: loss with
    ppo.estimator=grpo, else reward"""
    coef: float = 0.05
    """the KL coefficient, per nat; 0: no KL penalty, and no reference is loaded"""
    controller: KLController = KLController.fixed
    """adaptive: coef follows the KL per response towards target"""
    target: float = 6.0
    """nats per response (adaptive)"""
    horizon: float = 10_000.0
    """responses over which an adaptive coef moves (adaptive)"""

    def __post_init__(self) -> None:
        require(0 <= self.coef < math.inf, "ppo.kl.coef", self.coef, "0 or more")
        require(0 < self.target < math.inf, "ppo.kl.target", self.target, "a number above 0")
        require(0 < self.horizon < math.inf, "ppo.kl.horizon", self.horizon, "a number above 0")
        if self.controller is KLController.adaptive and self.coef == 0:
            raise UserError(
                "ppo.kl.controller=adaptive cannot move ppo.kl.coef=0, which it multiplies",
                hint="start from a coefficient above 0, e.g. ppo.kl.coef=0.05",
            )


@dataclass
class CriticConfig:
    """The value network; only the estimator gae has one."""

    start: CriticStart = CriticStart.auto
    """reward_model (backbone and head), or policy (with a new head); auto: reward_model if there is one"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """its optimizer and schedule"""
    warmup_iterations: int = 0
    """first iterations in which only the critic learns"""
    clip: float = 0.2
    """how far a value may move from the old one before it stops being pulled; 0: any way"""

    def __post_init__(self) -> None:
        warmup = self.warmup_iterations
        require(warmup >= 0, "ppo.critic.warmup_iterations", warmup, "0 or more")
        require(0 <= self.clip < math.inf, "ppo.critic.clip", self.clip, "0 (off) or more")

    def peak_lr(self, *, lora: bool) -> float:
        """Its learning rate after warm-up."""
        return self.optim.lr or (9e-5 if lora else 9e-6)


@dataclass
class EvaluationConfig:
    """What is measured on held-out prompts, greedily and sampled."""

    num_prompts: int = 256
    """held-out prompts; 0: no evaluation"""
    samples_per_prompt: int = 1
    """sampled responses to each, over which is averaged"""
    functions: Dict[str, str] = field(default_factory=dict)
    """further scores, only looked at: the name in eval/<name>, and a package.module:function as in rewards"""

    def __post_init__(self) -> None:
        require(self.num_prompts >= 0, "ppo.evaluation.num_prompts", self.num_prompts, "0 or more")
        samples = self.samples_per_prompt
        require(samples >= 1, "ppo.evaluation.samples_per_prompt", samples, "1 or more")
        for name, reference in self.functions.items():
            check_reference(reference, f"ppo.evaluation.functions.{name}")
            if name in MEASURED or name.endswith("_se") or "/" in name:
                raise UserError(
                    f"ppo.evaluation.functions.{name}: eval/{name} is, or could be, a number of another kind",
                    hint=f"another name: not {', '.join(MEASURED)}, without a / and without _se at its end",
                )


@dataclass
class PPOConfig:
    """The `ppo` group."""

    policy: Optional[str] = None
    """folder of the policy artifact to start from; by default what an earlier step of this run made"""
    reward_model: Optional[str] = None
    """folder of the reward model artifact; by default what an earlier step of this run made"""
    data: DataConfig = field(default_factory=DataConfig)
    """prompts; max_length is that of a prompt with its response"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """the loop: global_batch_size counts responses per update, max_steps, eval_every and save_every count
    iterations, epochs passes over the prompts"""
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
    gamma: float = 1.0
    """discount (gae, reinforce_pp)"""
    lam: float = 0.95
    """GAE's lambda"""
    whiten_advantages: bool = True
    """mean 0 and standard deviation 1 over all response tokens of an iteration (gae; reinforce_pp always)"""
    ppo_epochs: int = 1
    """passes over an iteration's responses"""
    clip: float = 0.2
    """how far the ratio may move from 1 before it stops being pushed"""
    missing_eos_penalty: float = 1.0
    """taken from the reward of a response that did not stop"""
    reward_clip: float = 10.0
    """largest calibrated reward, either way"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    ptx_weight: float = 0.0
    """weight of the SFT loss on ptx_data, mixed into every update of the actor"""
    ptx_data: DataConfig = field(default_factory=DataConfig)
    """demonstrations for ptx_weight; all of them, where eval_fraction does not leave some out"""
    ptx_batch_size: int = 32
    """rows of ptx_data per update, over all ranks"""
    ema_decay: Optional[float] = None
    """average the actor's weights over updates with this decay, and export the average; null: off"""
    target_kl: Optional[float] = None
    """an iteration's updates end when the actor has moved this far from where it began; null: off"""
    kl: KLConfig = field(default_factory=KLConfig)
    """the KL penalty to the reference"""
    offload_frozen: bool = False
    """keep reference and reward model in host memory while they have nothing to do (GPU)"""

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "ppo.gamma", self.gamma, "0 to 1")
        require(0 <= self.lam <= 1, "ppo.lam", self.lam, "0 to 1")
        require(self.ppo_epochs >= 1, "ppo.ppo_epochs", self.ppo_epochs, "1 or more")
        require(0 < self.clip < 1, "ppo.clip", self.clip, "between 0 and 1")
        penalty = self.missing_eos_penalty
        require(0 <= penalty < math.inf, "ppo.missing_eos_penalty", penalty, "0 or more")
        require(self.reward_clip > 0, "ppo.reward_clip", self.reward_clip, "a number above 0")
        require(0 <= self.entropy_coef < math.inf, "ppo.entropy_coef", self.entropy_coef, "0 or more")
        require(0 <= self.ptx_weight < math.inf, "ppo.ptx_weight", self.ptx_weight, "0 or more")
        require(self.ptx_batch_size >= 1, "ppo.ptx_batch_size", self.ptx_batch_size, "1 or more")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "ppo.ema_decay", decay, "between 0 and 1")
        target = self.target_kl
        require(target is None or 0 < target < math.inf, "ppo.target_kl", target, "a number above 0")
        if self.ptx_data.eval_path is not None:
            raise UserError(
                f"ppo.ptx_data.eval_path={self.ptx_data.eval_path} has no effect: demonstrations are not "
                "evaluated",
                hint="leave it out",
            )
        if self.ptx_data.eval_fraction is None:  # rows that are held out would be lost
            self.ptx_data = replace(self.ptx_data, eval_fraction=0.0)
        if self.kl.placement is KLPlacement.auto:
            in_loss = self.estimator is Estimator.grpo  # as its paper has it
            self.kl = replace(self.kl, placement=KLPlacement.loss if in_loss else KLPlacement.reward)
        if not self.rewards:
            raise UserError("ppo.rewards=[] leaves nothing to learn from", hint="ppo.rewards=[{model: true}]")
        if sum(source.model for source in self.rewards) > 1:
            raise UserError("ppo.rewards names the reward model twice", hint="once, with a weight")
        groups = (Estimator.grpo, Estimator.rloo)
        if self.estimator in groups and self.rollout.samples_per_prompt < 2:
            raise UserError(
                f"ppo.estimator={self.estimator.value} compares the responses to a prompt with each other, "
                f"and ppo.rollout.samples_per_prompt={self.rollout.samples_per_prompt}",
                hint="ppo.rollout.samples_per_prompt=4, or ppo.estimator=gae",
            )
        if self.estimator is not Estimator.gae and self.critic.warmup_iterations:
            raise UserError(
                f"ppo.critic.warmup_iterations={self.critic.warmup_iterations} has no effect with "
                f"ppo.estimator={self.estimator.value}, which has no critic",
                hint="ppo.critic.warmup_iterations=0",
            )
        if self.data.max_length <= self.rollout.max_new_tokens:
            raise UserError(
                f"ppo.data.max_length={self.data.max_length} leaves no room for a prompt beside "
                f"ppo.rollout.max_new_tokens={self.rollout.max_new_tokens}",
                hint="raise the first or lower the second",
            )

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
        """Whether something scores that only the step can look at: a function, or a server with its token."""
        return any(not source.model for source in self.rewards) or bool(self.evaluation.functions)

    def peak_lr(self, *, lora: bool) -> float:
        """The actor's learning rate after warm-up."""
        return self.optim.lr or (1e-5 if lora else 1e-6)

    @property
    def has_critic(self) -> bool:
        return self.estimator is Estimator.gae

    @property
    def critic_starts_from(self) -> Role:
        """What the critic's weights are taken from."""
        if self.critic.start is CriticStart.policy:
            return Role.policy
        if self.critic.start is CriticStart.reward_model or any(source.model for source in self.rewards):
            return Role.reward_model
        return Role.policy

    def needs(self, role: Role) -> bool:
        """Whether the step uses an artifact of this role, with these settings."""
        if role is Role.policy:
            return True
        by_critic = self.has_critic and self.critic_starts_from is Role.reward_model
        return by_critic or any(source.model for source in self.rewards)


@dataclass
class PPOJob(JobConfig):
    """The part of resolved.yaml that the step's ranks read."""

    ppo: PPOConfig = field(default_factory=PPOConfig)

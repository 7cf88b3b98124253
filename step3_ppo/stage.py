"""PPO starts from a policy and a reward model, and produces a policy."""

from common.stage import Role, Stage, Step

STAGE = Stage(
    name=Step.ppo, consumes=(Role.policy, Role.reward_model), produces=Role.policy, module="step3_ppo"
)

"""The reward model starts from a policy and produces a reward model."""

from common.stage import Role, Stage, Step

STAGE = Stage(name=Step.reward, consumes=(Role.policy,), produces=Role.reward_model, module="step2_reward")

"""DPO starts from a policy, which is its reference too, and produces a policy."""

from common.stage import Role, Stage, Step

STAGE = Stage(name=Step.dpo, consumes=(Role.policy,), produces=Role.policy, module="step2_dpo")

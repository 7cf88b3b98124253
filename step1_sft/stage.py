"""SFT consumes nothing but the base model and produces a policy."""

from common.stage import Role, Stage, Step

STAGE = Stage(name=Step.sft, consumes=(), produces=Role.policy, module="step1_sft")

"""The fake step in place of the reward model's."""

import sys

from fake_step import main

from common.stage import Role

sys.exit(main("reward", Role.reward_model))

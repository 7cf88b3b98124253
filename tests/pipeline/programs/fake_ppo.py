"""The fake step in place of PPO."""

import sys

from fake_step import main

sys.exit(main("ppo"))

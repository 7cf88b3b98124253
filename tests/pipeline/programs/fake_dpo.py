"""The fake step in place of DPO."""

import sys

from fake_step import main

sys.exit(main("dpo"))

"""Step 2, the other way: direct preference optimization of the policy. Start reading at train.py."""

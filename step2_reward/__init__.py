"""Step 2: a reward model from preference pairs. Start reading at train.py."""

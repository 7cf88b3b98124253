"""Step 1: supervised fine-tuning of the policy. Start reading at train.py."""

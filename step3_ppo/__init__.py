"""Step 3: proximal policy optimization (PPO) against a reward. Start reading at train.py."""

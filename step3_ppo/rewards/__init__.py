"""What rewards a response: the reward model, Python functions and servers. Knows no network and no rank."""

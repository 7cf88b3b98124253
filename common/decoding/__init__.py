"""Sampling: decoder (slots, key/value cache, draws), sampling (completions of held-out prompts), foresight
(what will be slow, before it is)."""

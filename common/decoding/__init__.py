"""Sampling, read in this order: requests, draws, scheduler, slots (the KV cache), passes, decoder.

Then sampling (completions of held-out prompts) and fallbacks (what will be slow, before it is).
"""

"""Limits that the ranks and the controller both go by. Leaf: imports nothing."""

COLLECTIVE_SECONDS = 30 * 60
"""How long ranks wait for each other; then they give the run up."""

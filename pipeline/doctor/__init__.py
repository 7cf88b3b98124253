"""`python -m pipeline doctor`: what this machine can do, and what would stop a run on it."""

from pipeline.doctor.examine import doctor

__all__ = ["doctor"]

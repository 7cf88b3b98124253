"""What is known of a run before it starts: counts, schedule, memory, command. Touches no device."""

from pipeline.planning.fitting import ways_out

__all__ = ["ways_out"]

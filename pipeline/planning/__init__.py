"""What is known of a run before it starts: counts, schedule, memory, command. Touches no device."""

from pipeline.planning.devices import gpu_memory
from pipeline.planning.fitting import ways_out
from pipeline.planning.unfit import refuse_unfit
from pipeline.planning.whole import refuse_whole_actor

__all__ = ["gpu_memory", "refuse_unfit", "refuse_whole_actor", "ways_out"]

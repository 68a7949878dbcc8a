"""What a run needs before it starts: parameters, memory, time, from the run file alone, without torch."""

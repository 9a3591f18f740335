"""Where comm, attention, memory, control and model meet: the step."""

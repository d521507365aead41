"""What a training step takes on chips that are not here: memory, collectives, FLOPs, time and cost."""

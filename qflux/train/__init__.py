"""Training: the loop, its step, schedules, checkpoints and trackers."""

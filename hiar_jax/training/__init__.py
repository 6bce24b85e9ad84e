"""Training: the experiment, its stages from data to samples, their shared loop, and the log."""

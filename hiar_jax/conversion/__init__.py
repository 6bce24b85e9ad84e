"""Published checkpoints: their layouts and sizes, read and written."""

"""Files that others made: tensors, PyTorch archives, lists of prompts."""

"""What a block sees of its past: the KV cache, and the sink that is carried along."""

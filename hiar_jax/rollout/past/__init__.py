"""The past of a block: the KV cache, the masks over it, and the sink at relative positions."""

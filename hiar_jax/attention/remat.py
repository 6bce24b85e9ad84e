"""What the backward pass of a layer finds in memory, and what it computes again."""

import jax

KEPT = "attention"  # the name of a kernel's output and log-sum-exp
_CUDNN = "dot_product_attention_fwd"  # whose results have no names


def _attention(primitive, *avals, **params) -> bool:
  """Keeps what attention's backward pass reads."""
  if primitive.name.startswith(_CUDNN):
    return True
  return jax.checkpoint_policies.save_only_these_names(KEPT)(primitive, *avals, **params)


# name -> policy of jax.checkpoint. A layer of n tokens of width d in 16 bits keeps, besides its
# input of 2 n d bytes:
POLICIES = {
  # its products with weights (those of attention have batch dimensions): 24 n d and more
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # attention's output and log-sum-exp: 2 n d; attention is not computed twice
  "attention": _attention,
  # the same in the host's memory
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[KEPT],
    offload_src="device",
    offload_dst="pinned_host",
  ),
  # nothing
  "full": None,
}

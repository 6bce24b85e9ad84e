"""Splash attention on TPUs: Pallas' flash kernels, with keys that are not there hidden by segments.

Lengths are padded to whole blocks of 128 lanes; queries have segment 1, padding and keys that a row
hides have 0. The blocks fit the 16 MiB of VMEM that XLA gives a kernel by default on every
generation, with segments and with gradients. Over several devices the kernel is mapped by hand:
examples and heads may be split, tokens may not.
"""

import functools

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
import jax.numpy as jnp

from hiar_jax.attention.remat import KEPT
from hiar_jax.parallel.rules import leaf_sharding

LANES = 128
BLOCK, COMPUTE = 1024, 512  # of queries and keys; of the keys that one product takes


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  seen: jax.Array | None = None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Attends q [b n a d] to k, v [b m a d]: [b n a d]. seen: [m], at least one True; None = all.

  interpret: run by Pallas' interpreter, on any device.
  """
  n, m = q.shape[1], k.shape[1]
  # the kernel does not scale; [b n a d] -> [b a n d]
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
  q, (k, v) = _padded(q), (_padded(x) for x in (k, v))
  segments = None
  if seen is not None or k.shape[2] != m:
    there = jnp.ones(m, jnp.int32) if seen is None else seen.astype(jnp.int32)
    queries = jnp.ones(q.shape[2], jnp.int32)
    segments = kernels.SegmentIds(queries, jnp.pad(there, (0, k.shape[2] - m)))
  out = _over_devices(functools.partial(_run, interpret=interpret), q, k, v, segments)
  return jnp.swapaxes(out[:, :, :n], 1, 2)


def _block(n: int) -> int:
  """Returns the length of a block of n cells: all of them in whole lanes, or BLOCK."""
  return min(BLOCK, -(-n // LANES) * LANES)


def _padded(x: jax.Array) -> jax.Array:
  return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % _block(x.shape[2])), (0, 0)))


def _run(q, k, v, segments, interpret: bool) -> jax.Array:
  """[b a n d], [b a m d], all in whole blocks: [b a n d]."""
  rows, columns = _block(q.shape[2]), _block(k.shape[2])
  compute = COMPUTE if columns % COMPUTE == 0 else columns
  blocks = kernels.BlockSizes(
    block_q=rows,
    block_kv=columns,
    block_kv_compute=compute,
    block_q_dkv=rows,
    block_kv_dkv=columns,
    block_kv_dkv_compute=compute,
    block_q_dq=rows,
    block_kv_dq=columns,
  )
  everything = kernels.FullMask((q.shape[2], k.shape[2]))
  kernel = kernels.make_splash_mha(
    kernels.MultiHeadMask([everything] * q.shape[1]),
    block_sizes=blocks,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=KEPT,
    interpret=interpret,
  )
  return jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)


def _over_devices(run, q, k, v, segments) -> jax.Array:
  """Runs on each device's examples and heads: the compiler cannot split a Mosaic kernel."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run(q, k, v, segments)
  split = leaf_sharding("attention/heads", mesh, shape=q.shape).spec
  everywhere = leaf_sharding("attention/segments", mesh).spec
  specs = split, split, split, jax.tree.map(lambda _: everywhere, segments)
  mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
  return mapped(q, k, v, segments)

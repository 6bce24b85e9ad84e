"""Attention of frames of tokens, each run of them to what its view says, by one of several kernels.

    xla         all logits at once, under a mask where views differ: the shortest program
    blockwise   blocks of queries and keys, in plain JAX with its own backward pass: any device
    cudnn       cuDNN's fused kernel: NVIDIA GPUs, 16 bits
    splash      Pallas' flash kernel: TPUs
    auto        xla where logits are small, else the platform's kernel

Softmax is float32 in all. All but `xla` take slices of the keys and hold nothing of queries x keys.
On a mesh that splits the tokens of a frame (axis `ring`) `auto` and `blockwise` are attention.ring.
"""

from collections.abc import Callable
import functools

from absl import logging
import jax
import jax.numpy as jnp

from hiar_jax.attention import blockwise, cudnn, ring, splash
from hiar_jax.attention.softmax import softmax_attention
from hiar_jax.attention.views import Views, dense_mask
from hiar_jax.parallel.rules import constrained

# Bytes of one example's float32 logits up to which `auto` holds them all: every layer of the small
# experiments, and no product of a frame of 480x832 with itself.
SMALL = 16 * 2**20


def _flat(kernel: Callable) -> Callable:
  """The kernel by tokens as one by cells: q [b f t a d], k, v [b p t a d], row [p]."""

  def attend(q, k, v, row=None):
    tokens = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, v))
    row = None if row is None else jnp.repeat(row, k.shape[2])
    return kernel(*tokens, row).reshape(q.shape)

  return attend


# name -> kernel(q [b f t a d], k, v [b p t a d], row [p] | None) -> q's shape, of one view
KERNELS: dict[str, Callable] = {
  "blockwise": _flat(blockwise.attend),
  "cudnn": cudnn.attend,
  "splash": _flat(splash.attend),
  "chunked": _flat(blockwise.attend),  # the name of blockwise in configs of before 2026-12
}
IMPLEMENTATIONS = ("auto", "xla", *KERNELS)
ON_RING = ("auto", "blockwise", "chunked")  # where tokens of a frame lie on several devices
_PLATFORMS = {"cudnn": ("gpu", "cuda", "rocm"), "splash": ("tpu",)}


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, views: Views = (), implementation: str = "auto"
) -> jax.Array:
  """Attends q [b f t a d] to k, v [b p t a d], cells of t tokens, as the views say; () = to all.

  Returns q's shape. implementation: one of IMPLEMENTATIONS.
  """
  if implementation in ON_RING and (mesh := ring.mesh_of(q)):
    if implementation == "auto":
      _say_once("ring", f"the tokens of a frame lie on {mesh.shape[ring.AXIS]} devices")
    return ring.attend(q, k, v, views)
  if implementation == "auto":
    implementation = choose(q, k)
  if implementation == "xla":
    return _dense(q, k, v, views)
  kernel = KERNELS[implementation]
  if not views:
    return kernel(q, k, v)
  return jnp.concatenate(
    [kernel(q[:, slice(*view.queries)], view.of(k), view.of(v), view.row) for view in views], axis=1
  )


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, views: Views) -> jax.Array:
  mask, (tokens, keys) = dense_mask(views, k.shape[1]), (q.shape[2], k.shape[2])
  if mask is not None:  # cells -> tokens: every entry becomes a tile
    mask = jnp.repeat(jnp.repeat(jnp.asarray(mask), tokens, axis=0), keys, axis=1)
  flat = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, v))
  return softmax_attention(*flat, mask).reshape(q.shape)


def attend_text(
  q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = "auto"
) -> jax.Array:
  """Attends q [b f t a d] to a text's k, v [b l a d]: [b f t a d].

  No mask: padding is seen too, as Wan2.1 was trained. k, v [b g l a d] hold a text for each of g
  equal groups of the frames.
  """
  if implementation in ON_RING and ring.mesh_of(q):
    # each device's queries stay there; blocks, since the other kernels map themselves over devices
    k, v = (x if x.ndim == 5 else x[:, None] for x in (k, v))
    return ring.to_text(_to_text, q, k, v)
  # in attention devices split heads: tokens that are split could not be joined with other frames'
  return _to_text(constrained(q, "activations/heads"), k, v, implementation)


def _to_text(q, k, v, implementation: str = "blockwise") -> jax.Array:
  b, f, t, a, d = q.shape
  g = k.shape[1] if k.ndim == 5 else 1
  # groups become batch entries: [b*g 1 f*t/g a d] against [b*g 1 l a d]
  k, v = (x.reshape(b * g, 1, *x.shape[-3:]) for x in (k, v))
  queries = q.reshape(b * g, 1, f * t // g, a, d)
  return attend(queries, k, v, implementation=implementation).reshape(q.shape)


# ------------------------------------------------------------------------------------- which kernel


def choose(q: jax.Array, k: jax.Array) -> str:
  """Returns the kernel that `auto` is at these shapes, on the devices of the mesh in use."""
  logits = 4 * q.shape[3] * q.shape[1] * q.shape[2] * k.shape[1] * k.shape[2]
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = device.platform if device else jax.default_backend()
  name, why = _chosen(platform, str(q.dtype), q.shape[4], logits <= SMALL)
  _say_once(name, why)
  return name


def _chosen(platform: str, dtype: str, width: int, small: bool) -> tuple[str, str]:
  """Returns a kernel and the reason for it. width: of a head."""
  if small:
    return "xla", f"the logits of an example take at most {SMALL // 2**20} MiB"
  for kernel, platforms in _PLATFORMS.items():
    if platform in platforms:
      reason = refused(kernel, platform, dtype, width)
      return (kernel, f"on {platform}") if not reason else ("blockwise", reason)
  return "blockwise", f"on {platform}"


def refused(kernel: str, platform: str, dtype: str, width: int) -> str:
  """Returns why a kernel cannot run; '' where it can. width: of a head."""
  needed = _PLATFORMS.get(kernel)
  if needed and platform not in needed:
    return f"{kernel!r} is for {needed[0].upper()}s, and the devices here are {platform}"
  if kernel == "cudnn" and dtype not in ("bfloat16", "float16"):
    return f"'cudnn' takes 16 bits, and the network computes in {dtype}"
  if kernel == "cudnn" and (width % 8 or width > 128):
    return f"'cudnn' takes heads of a multiple of 8 up to 128, and these are {width} wide"
  if kernel == "splash" and width % splash.LANES:
    return f"'splash' takes heads of a multiple of {splash.LANES}, and these are {width} wide"
  return ""


@functools.cache
def _say_once(name: str, why: str) -> None:
  logging.info("attention = 'auto': %s (%s)", name, why)

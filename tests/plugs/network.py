"""A network of one's own, as a fork would write it: no name of a parameter and no layout is that of
models.dit.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.models.frames import Frames, Out


@flax.struct.dataclass
class JointKV:
  """both: [frames depth 2 a b t d], keys and values."""

  both: jax.Array

  def put(self, slots, new):
    return JointKV(self.both.at[slots].set(new.both.astype(self.both.dtype), mode="drop"))

  def take(self, first, end):
    return JointKV(self.both[first:end])

  def moved(self, distance):
    keys = turned(self.both[:, :, 0], {"frame": distance})
    return JointKV(jnp.stack([keys, self.both[:, :, 1]], axis=2))


@dataclasses.dataclass(frozen=True)
class GroupwiseConfig:
  """The group `model` of an experiment; it has no patch to choose."""

  kind: str = "groupwise"
  width: int = 16
  depth: int = 2
  heads: int = 2
  dtype: str = "float32"

  def network(self, channels: int, text_dim: int, places: tuple[int, int]) -> "Groupwise":
    del places  # what it reads of a clip's start has no period
    return Groupwise(self.width, self.depth, self.heads, channels, text_dim, self.dtype)


@dataclasses.dataclass(frozen=True)
class Groupwise:
  """Attends group by group, layers in a dict each, frames in front: hidden states [k b t width]."""

  width: int
  depth: int
  heads: int
  channels: int
  text_dim: int
  dtype: str = "float32"
  kind = "groupwise"
  sizes = ("width", "depth", "heads", "channels", "text_dim")
  free = ()
  patch = (1, 1, 2)
  reads_start = True
  sharding_rules = (
    ("depth*/wq", (None, "tensor")),
    ("depth*/wo", ("tensor",)),
    ("depth*/up", ("fsdp", "tensor")),
    ("depth*/down", ("tensor", "fsdp")),
    # of each level: [s frames depth 2 a b t d]
    ("past/kv/both", ("level", None, None, None, ("tensor", "sequence"))),
  )

  def init(self, key):
    w, shapes = self.width, {}
    for i in range(self.depth):
      layer = {"wq": (w, w), "wkv": (w, 2 * w), "wo": (w, w), "level": (4, w)}
      layer |= {"xq": (w, w), "xkv": (self.text_dim, 2 * w), "xo": (w, w)}
      shapes[f"depth{i}"] = {**layer, "up": (w, 2 * w), "down": (2 * w, w), "gain": (w,)}
    shapes["enter"], shapes["leave"] = (2 * self.channels, w), (w, 2 * self.channels)
    shapes["later"] = (w,)
    flat, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(flat))
    draw = lambda key, shape: jax.random.normal(key, shape) / math.sqrt(shape[0])
    return tree.unflatten([draw(*pair) for pair in zip(keys, flat, strict=True)])

  def tokens(self, height, width):
    return height * width // 2

  def empty_kv(self, frames, batch, height, width):
    d = self.width // self.heads
    shape = frames, self.depth, 2, self.heads, batch, self.tokens(height, width), d
    return JointKV(jnp.zeros(shape, self.dtype))

  def apply(self, params, groups: tuple[Frames, ...], texts, past=(), start=None) -> Out:
    start = jnp.zeros(texts.shape[1]) if start is None else start
    hidden = [self._enter(params, g, start) for g in groups]
    kept = []
    for i in range(self.depth):
      p = params[f"depth{i}"]
      hidden = [x + levels(g) @ p["level"] for g, x in zip(groups, hidden, strict=True)]
      kept.append([self._keys_and_values(p, g, x) for g, x in zip(groups, hidden, strict=True)])
      layer = functools.partial(self._layer, p, groups, kept[i], [kv.both[:, i] for kv in past])
      hidden = [layer(j, x, texts[groups[j].text]) for j, x in enumerate(hidden)]
    kv = tuple(JointKV(jnp.stack(layers, axis=1)) for layers in zip(*kept, strict=True))
    velocity = zip(groups, hidden, strict=True)
    return Out(tuple(self._leave(params["leave"], g, x) for g, x in velocity), kv)

  def _enter(self, params, group, start):
    b, k, h, w, c = group.x.shape
    x = jnp.asarray(group.x).reshape(b, k, h * w // 2, 2 * c)
    later = jnp.sin(0.3 * start).reshape(1, -1, 1, 1) * params["later"].reshape(1, 1, 1, -1)
    return jnp.moveaxis(x.astype(self.dtype), 1, 0) @ params["enter"] + later.astype(self.dtype)

  def _leave(self, p, group, x):
    return jnp.moveaxis(unit(x) @ p, 0, 1).reshape(group.x.shape).astype(jnp.float32)

  def _heads(self, x):  # [k b t width] -> [k a b t d]
    return jnp.moveaxis(x.reshape(*x.shape[:3], self.heads, -1), 3, 1)

  def _keys_and_values(self, p, group, x):  # [k 2 a b t d]
    x = unit(x) * p["gain"].reshape(1, 1, 1, -1)
    keys, values = map(self._heads, jnp.split(x @ p["wkv"], 2, axis=-1))
    return jnp.stack([turned(keys, places(group)), values], axis=1)

  def _layer(self, p, groups, kept, past, j, x, text):
    """Returns the hidden states of group j after a layer. kept, past: its K/V of the sources."""
    group = groups[j]
    normed = unit(x) * p["gain"].reshape(1, 1, 1, -1)
    q = turned(self._heads(normed @ p["wq"]), places(group))
    x = x + attend(q, *sources(groups, j, kept, past)) @ p["wo"]
    q = self._heads(unit(x) @ p["xq"])
    # the text as one frame [1 2 a b l d] that every frame sees
    words = (text.astype(x.dtype) @ p["xkv"]).reshape(*text.shape[:2], 2, self.heads, -1)
    words = jnp.transpose(words, (2, 3, 0, 1, 4))[None]
    x = x + attend(q, words, np.ones((x.shape[0], 1), bool)) @ p["xo"]
    return x + jnp.tanh(unit(x) @ p["up"]) @ p["down"]

  def matrix_axes(self, path, ndim):
    if not path[0].startswith("depth") or ndim != 2 or path[-1] == "level":
      return None
    return (0, 1)

  def unavailable_on(self, platform):
    return ""

  def splits(self, height):
    rows = height // self.patch[1]
    return {
      ("tensor",): (self.heads, f"{self.heads} heads"),
      ("sequence",): (math.gcd(self.heads, rows), f"{self.heads} heads and {rows} rows"),
      ("tensor", "sequence"): (self.heads, f"the {self.heads} heads"),
    }


def unit(x):
  return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def levels(group):
  """Returns features of the noise level of each frame [k b|1 1 4]."""
  sigma = jnp.asarray(group.sigma, jnp.float32)
  sigma = sigma.T if sigma.ndim == 2 else sigma.reshape(1, -1)
  sigma = jnp.broadcast_to(sigma, (group.x.shape[1], sigma.shape[1]))[..., None, None]
  parts = [jnp.ones_like(sigma), sigma, jnp.sin(3 * sigma), jnp.cos(7 * sigma)]
  return jnp.concatenate(parts, axis=-1)


def places(group):
  """Returns a token's frame [k 1 1 1], row and column [1 1 1 t]."""
  rows, columns = group.x.shape[2], group.x.shape[3] // 2
  row, column = np.divmod(np.arange(rows * columns), columns)
  frame = jnp.asarray(group.positions).reshape(-1, 1, 1, 1)
  return {"frame": frame, "row": row.reshape(1, 1, 1, -1), "column": column.reshape(1, 1, 1, -1)}


SPEEDS = ("frame", 0.4), ("frame", 0.05), ("row", 0.9), ("column", 0.7)


def turned(x, where):
  """Rotates pairs (i, i + d / 2) of x [... a b t d] by the places that are given alone."""
  half = x.shape[-1] // 2
  angles = []
  for name, speed in (SPEEDS * half)[:half]:
    angle = jnp.asarray(where.get(name, 0) * speed, jnp.float32)
    angle = angle.reshape((1,) * (x.ndim - 1 - angle.ndim) + angle.shape)
    angles.append(jnp.broadcast_to(angle, x.shape[:-1]))
  turn = jnp.stack(angles, axis=-1)
  cos, sin = jnp.cos(turn).astype(x.dtype), jnp.sin(turn).astype(x.dtype)
  real, imag = x[..., :half], x[..., half:]
  return jnp.concatenate([real * cos - imag * sin, real * sin + imag * cos], axis=-1)


def sources(groups, j, kept, past):
  """Returns what group j sees: K/V [p 2 a b t d], and which frames see which [k p]."""
  found, k = [], kept[j].shape[0]
  for read in groups[j].reads:
    kv = kept[read.group] if read.past is None else past[read.past]
    seen = np.ones(kv.shape[0], bool) if read.seen is None else read.seen
    if read.past is None and groups[read.group].exists is not None:
      seen = seen & groups[read.group].exists
    first, end = read.frames or (0, kv.shape[0])
    found.append((kv[first:end], jnp.broadcast_to(seen[None, first:end], (k, end - first))))
  exists = np.ones(k, bool) if groups[j].exists is None else groups[j].exists
  found.append((kept[j], exists[None] | np.eye(k, dtype=bool)))  # a frame sees itself in any case
  kv, masks = zip(*found, strict=True)
  return jnp.concatenate(kv), jnp.concatenate(masks, axis=1)


def attend(q, kv, mask):
  """Attends q [k a b t d] to K/V [p 2 a b m d] of the frames in mask [k p]; [k b t width]."""
  scores = jnp.einsum("kabtd,pabmd->kabtpm", q, kv[:, 0])
  scores = jnp.where(jnp.asarray(mask)[:, None, None, None, :, None], scores, -1e30)
  weights = jax.nn.softmax(scores, axis=(-2, -1))
  out = jnp.moveaxis(jnp.einsum("kabtpm,pabmd->kabtd", weights, kv[:, 1]), 1, 3)
  return out.reshape(*out.shape[:3], -1)

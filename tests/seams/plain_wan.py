"""Wan2.1's network written plainly: a loop over layers, and attention group by group.

A second way of computing hiar_jax.models.dit, on the same parameters. It knows groups of frames and
no mask over a whole forward, keeps K/V as a list of layers with heads in front, and has FramePack's
packed frames (as diffusers' HeliosTransformer3DModel does them).
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.models.frames import Frames, Out


def plainly(function):
  """Lets a function's arrays broadcast as numpy's do."""

  @functools.wraps(function)
  def run(*args, **kwargs):
    with jax.numpy_rank_promotion("allow"):
      return function(*args, **kwargs)

  return run


@flax.struct.dataclass
class PlainKV:
  """keys, values: [layers b a p t d]; p counts frames."""

  keys: jax.Array
  values: jax.Array

  def put(self, slots, new):
    return jax.tree.map(lambda old, x: old.at[:, :, :, slots].set(x, mode="drop"), self, new)

  def take(self, first: int, end: int):
    return jax.tree.map(lambda x: x[:, :, :, first:end], self)

  @plainly
  def moved(self, distance):
    pairs = self.keys.shape[-1] // 2
    frame_pairs = pairs - 2 * (pairs // 3)
    angles = jnp.append(distance * frequencies(frame_pairs), jnp.zeros(pairs - frame_pairs))
    return PlainKV(rotate(self.keys, (jnp.cos(angles), jnp.sin(angles))), self.values)


@flax.struct.dataclass
class TextKV:
  """What the layers' cross-attention sees of the texts: each [layers g b l a d]."""

  keys: jax.Array
  values: jax.Array


@dataclasses.dataclass(frozen=True)
class PlainWan:
  """Sizes as dit.DiTConfig's; pools: how many frames, rows and columns of patches an input
  projection takes at once.
  """

  dim: int
  heads: int
  layers: int
  freq_dim: int
  pools: tuple[tuple[str, int], ...] = (("patch_embedding", 1),)

  def empty_kv(self, frames, batch, height, width):
    tokens, head_dim = height * width // 4, self.dim // self.heads
    zeros = jnp.zeros((self.layers, batch, self.heads, frames, tokens, head_dim))
    return PlainKV(zeros, zeros)

  @plainly
  def encode_text(self, params, texts):
    hidden = jax.nn.gelu(dense(params["text_embedding_in"], texts), approximate=True)
    hidden = dense(params["text_embedding_out"], hidden)

    def one_layer(p):
      keys = rms_norm(p["norm_k"], dense(p["k"], hidden))
      return TextKV(self._split(keys), self._split(dense(p["v"], hidden)))

    return jax.lax.map(one_layer, params["layers"]["text_attention"])

  @plainly
  def apply(self, params, groups, texts, past=(), start=None) -> Out:
    del start  # of place embeddings, which Wan2.1 has not
    texts = texts if isinstance(texts, TextKV) else self.encode_text(params, texts)
    inputs = [self.embed(params, g) for g in groups]  # (tokens [b f t dim], turn, time)
    turns = [turn for _, turn, _ in inputs]
    times = [self._modulation(params, time) for *_, time in inputs]

    def one_layer(hidden, layer):
      p, text, past = layer
      tables = [time + p["modulation"][:, None] for time in times]
      qkv = [
        self._project(p["self_attention"], modulated(x, table, 0), turn)
        for x, table, turn in zip(hidden, tables, turns, strict=True)
      ]
      kept = tuple(PlainKV(k, v) for _, k, v in qkv)
      hidden = list(hidden)
      for j, g in enumerate(groups):
        y = attend_frames(qkv[j][0], *sources(groups, j, kept, past))
        x = hidden[j] + dense(p["self_attention"]["o"], y) * tables[j][:, :, None, 2]
        if g.text is not None:
          y = layer_norm(x) * p["norm_text"]["scale"] + p["norm_text"]["bias"]
          x = x + self._hear(p["text_attention"], y, text, g.text)
        y = dense(p["mlp_in"], modulated(x, tables[j], 3))
        y = dense(p["mlp_out"], jax.nn.gelu(y, approximate=True))
        hidden[j] = x + y * tables[j][:, :, None, 5]
      return tuple(hidden), kept

    hidden, kept = jax.lax.scan(
      one_layer, tuple(x for x, *_ in inputs), (params["layers"], texts, past)
    )
    velocities = [
      self._head(params, g, x, time)
      for g, x, (*_, time) in zip(groups, hidden, inputs, strict=True)
    ]
    return Out(tuple(velocities), kept)

  def _split(self, x):  # [... dim] -> [... a d]
    return x.reshape(*x.shape[:-1], self.heads, -1)

  def embed(self, params, group: Frames):
    """Returns tokens [b f t dim], rotations (cos, sin) [1|b f t pairs], time [b f dim]."""
    pool = dict(self.pools)[group.projection]
    x, kernel = jnp.asarray(group.x, jnp.float32), (pool, 2 * pool, 2 * pool)
    patches = cut(pad(x, kernel, axis=1), kernel)  # [b f rows columns c * product(kernel)]
    tokens = dense(params[group.projection], patches)
    b, f, rows, columns, _ = tokens.shape
    turn = rotations(jnp.asarray(group.positions), x.shape[2] // 2, x.shape[3] // 2, self, pool)
    sigma = jnp.asarray(group.sigma, jnp.float32)
    sigma = jnp.broadcast_to(sigma[:, None] if sigma.ndim == 1 else sigma, (b, f))
    angles = (
      1000
      * sigma[..., None]
      * 10_000.0 ** (-np.arange(self.freq_dim // 2) / (self.freq_dim // 2)).astype(np.float32)
    )
    time = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    time = jax.nn.silu(dense(params["time_embedding_in"], time))
    return tokens.reshape(b, f, rows * columns, -1), turn, dense(params["time_embedding_out"], time)

  def _modulation(self, params, time):  # [b f 6 dim]
    return dense(params["time_projection"], jax.nn.silu(time)).reshape(*time.shape[:2], 6, -1)

  def _project(self, p, x, turn):
    """Returns q, k, v, each [b a f t d]."""
    q, k = (rms_norm(p[f"norm_{n}"], dense(p[n], x)) for n in "qk")
    q, k, v = (jnp.moveaxis(self._split(y), 3, 1) for y in (q, k, dense(p["v"], x)))
    turn = tuple(part[:, None] for part in turn)  # the same for all heads
    return rotate(q, turn), rotate(k, turn), v

  def _hear(self, p, x, text, index: int):
    """Cross-attends x [b f t dim] to a text of a layer's."""
    q = self._split(rms_norm(p["norm_q"], dense(p["q"], x)))
    k, v = text.keys[index], text.values[index]
    weights = jax.nn.softmax(
      jnp.einsum("bftad,blad->bftal", q, k) / math.sqrt(q.shape[-1]), axis=-1
    )
    return dense(p["o"], jnp.einsum("bftal,blad->bftad", weights, v).reshape(x.shape))

  def _head(self, params, group: Frames, x, time):
    """Returns the velocity [b k h w c]; None of packed frames, which predict nothing."""
    if dict(self.pools)[group.projection] > 1:
      return None
    table = time[:, :, None] + params["head_modulation"]
    x = dense(params["head"], modulated(x, table, 0))
    b, k, h, w, c = group.x.shape
    x = x.reshape(b, k, h // 2, w // 2, 2, 2, c)
    return jnp.moveaxis(x, 4, 3).reshape(b, k, h, w, c)


def dense(p, x):
  return x @ p["kernel"] + p["bias"]


def rms_norm(p, x):
  return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def layer_norm(x):
  x = x - x.mean(-1, keepdims=True)
  return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def modulated(x, table, row: int):
  """Returns the norm of x [b f t dim] under rows (shift, scale) of a table [b f rows dim]."""
  return layer_norm(x) * (1 + table[:, :, None, row + 1]) + table[:, :, None, row]


def sources(groups, j: int, kept, past):
  """Returns what group j attends to in a layer: [(keys, values, mask [frames of j, frames])]."""
  frames = kept[j].keys.shape[2]
  found = []
  for read in groups[j].reads:
    kv = kept[read.group] if read.past is None else past[read.past]
    first, end = read.frames or (0, kv.keys.shape[2])
    seen = jnp.ones(end - first, bool) if read.seen is None else read.seen
    if read.past is None and groups[read.group].exists is not None:
      seen = seen & groups[read.group].exists[first:end]
    mask = jnp.broadcast_to(seen, (frames, end - first))
    found.append((kv.keys[:, :, first:end], kv.values[:, :, first:end], mask))
  exists = jnp.ones(frames, bool) if groups[j].exists is None else groups[j].exists
  own = exists[None] | jnp.eye(frames, dtype=bool)  # a frame sees itself in any case
  return *found, (kept[j].keys, kept[j].values, own)


def attend_frames(q, *sources):
  """Attends q [b a f t d] to (keys, values [b a p t' d], mask [f p]) of each source."""
  logits, values = [], []
  for k, v, mask in sources:
    b, a, p, t, d = k.shape
    part = jnp.einsum("baftd,bapsd->baftps", q, k) / math.sqrt(d)
    part = jnp.where(mask[:, None, :, None], part, -jnp.inf)
    logits.append(part.reshape(*part.shape[:4], p * t))
    values.append(v.reshape(b, a, p * t, d))
  weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)
  out = jnp.einsum("baftm,bamd->bftad", weights, jnp.concatenate(values, axis=2))
  return out.reshape(*out.shape[:3], -1)


def pad(x, kernel, axis: int):
  """Repeats the last frame, row and column until the axes from `axis` on are whole kernels."""
  widths = [(0, 0)] * x.ndim
  for i, size in enumerate(kernel):
    widths[axis + i] = (0, -x.shape[axis + i] % size)
  return jnp.pad(x, widths, mode="edge")


def cut(x, kernel):
  """[b f h w c] -> [b f' h' w' product(kernel) * c]."""
  (b, f, h, w, c), (pf, ph, pw) = x.shape, kernel
  x = x.reshape(b, f // pf, pf, h // ph, ph, w // pw, pw, c)
  return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, f // pf, h // ph, w // pw, -1)


def frequencies(pairs: int):
  return 10_000.0 ** (-np.arange(pairs) / pairs)


def rotations(positions, rows: int, columns: int, network: PlainWan, pool: int):
  """Returns (cos, sin), each [1|b f t pairs]; packed: each averaged over its kernel."""
  pairs = network.dim // network.heads // 2
  side = pairs // 3
  positions = positions if positions.ndim == 2 else positions[None]
  grid = (*positions.shape, rows, columns)
  angles = jnp.concatenate(
    [
      jnp.broadcast_to(at * frequencies(n), (*grid, n))
      for at, n in (
        (positions[:, :, None, None, None], pairs - 2 * side),
        (jnp.arange(rows)[:, None, None], side),
        (jnp.arange(columns)[None, :, None], side),
      )
    ],
    axis=-1,
  )
  parts = []
  for part in (jnp.cos(angles), jnp.sin(angles)):
    part = cut(pad(part, (pool,) * 3, axis=1), (pool,) * 3)
    part = part.reshape(*part.shape[:4], pool**3, pairs).mean(axis=4)
    parts.append(part.reshape(*part.shape[:2], -1, pairs))
  return tuple(parts)


def rotate(x, turn):
  """Rotates pairs (2i, 2i + 1) of x [b a f t d] by (cos, sin)."""
  real, imag = x[..., ::2], x[..., 1::2]
  cos, sin = turn
  return jnp.stack([real * cos - imag * sin, real * sin + imag * cos], axis=-1).reshape(x.shape)

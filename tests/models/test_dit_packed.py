"""Packed history on the DiT: recordings of the published implementation, projections that begin as
pooling, and pooled rotations by brute force.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.models import dit_packed, rope
from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.frames import PROJECTION, Frames, Read
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.golden_cases import assert_close
from tests.seams import test_packed_history as recorded

NAMES = {"patch_long": "packed_k4", "patch_mid": "packed_k2", "patch_short": "packed_k1"}
PACKED = dataclasses.replace(tiny.CONFIG, packing=(1, 2, 4), place_embedding=True)


def helios(folder):
  """(config, parameters) of a recording."""
  sizes = json.loads((folder / "framepack.json").read_text())["helios"]
  _, params = recorded.network_and_params(folder)
  config = DiTConfig(
    dim=sizes["num_attention_heads"] * sizes["attention_head_dim"],
    ffn_dim=sizes["ffn_dim"],
    num_heads=sizes["num_attention_heads"],
    num_layers=sizes["num_layers"],
    channels=sizes["in_channels"],
    text_dim=sizes["text_dim"],
    freq_dim=sizes["freq_dim"],
    packing=(1, 2, 4),
  )
  return config, {NAMES.get(name, name): tree for name, tree in params.items()}


def groups_of(case, *flags) -> tuple[Frames, ...]:
  return tuple(
    group.replace(projection=NAMES.get(group.projection, group.projection))
    for group in recorded.groups_of(case, *flags)
  )


@pytest.mark.parametrize(("folder", "name"), recorded.CASES, ids=lambda x: getattr(x, "name", x))
def test_golden_sections(folder, name):
  """FramePack's behaviour, and with Helios's flags: history at t = 0, history without a text."""
  case = recorded.read(folder, name)
  config, params = helios(folder)
  run = quick_jit(lambda params, groups, texts: config.apply(params, groups, texts))
  texts = jnp.asarray(case["encoder_hidden_states"])[None]
  for output, flags in recorded.FLAGS.items():
    velocity = run(params, groups_of(case, *flags), texts).velocity[-1]
    assert_close(np.moveaxis(velocity, -1, 1), case[output], f"{name} {output}")


@pytest.mark.parametrize(("folder", "name"), recorded.CASES, ids=lambda x: getattr(x, "name", x))
def test_golden_tokens_and_rotations(folder, name):
  """What enters the first layer, in its order."""
  case = recorded.read(folder, name)
  config, params = helios(folder)
  tokens, turns = [], []
  for group in groups_of(case, False, False):
    pool = dit_packed.pool_of(group) or 1
    _, h, w = group.x.shape[1:4]
    kernel = params[group.projection]
    cut = dit_packed.cut_kernels(jnp.asarray(group.x), (pool, 2 * pool, 2 * pool))
    tokens.append(cut @ kernel["kernel"] + kernel["bias"].reshape(1, 1, -1))
    turns.append(
      rope.pooled_rotation(jnp.asarray(group.positions), h // 2, w // 2, config.head_dim, pool)
    )
  assert_close(np.concatenate(tokens, axis=1), case["tokens"], f"{name} tokens")
  for part, found in enumerate(zip(*turns, strict=True)):
    # recorded [1|b n 2 d]: cosines, then sines, each twice
    expected = np.split(case["rotary"], 2, axis=-1)[part][..., ::2]
    assert_close(np.concatenate(found, axis=1)[:, :, 0], expected, f"{name} rotations {part}")


@pytest.mark.parametrize("folder", recorded.FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("pool", [2, 4, 8])
def test_golden_initial_projections(folder, pool):
  """The kernels as published, bit for bit, and what they give."""
  case = recorded.read(folder, "initial_projection.npz")
  base = case["weight_1x"]  # [d c 1 2 2], as PyTorch stores convolutions
  embedding = {
    "kernel": jnp.asarray(base.transpose(2, 3, 4, 1, 0).reshape(-1, base.shape[0])),
    "bias": jnp.asarray(case["bias"]),
  }
  found = dit_packed.initial_projection(embedding, pool, (1, 2, 2))
  expected = case[f"weight_{pool}x"].transpose(2, 3, 4, 1, 0)
  np.testing.assert_array_equal(found["kernel"], expected.reshape(-1, base.shape[0]))
  x = jnp.moveaxis(jnp.asarray(case["latents"]), 1, -1)
  cut = dit_packed.cut_kernels(x, (pool, 2 * pool, 2 * pool))
  out = np.moveaxis(case[f"out_{pool}x"], 1, -1)
  tokens = cut @ found["kernel"] + found["bias"].reshape(1, 1, -1)
  assert_close(tokens, out.reshape(len(out), -1, out.shape[-1]), f"{pool}x")


@pytest.mark.parametrize("pool", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2)])
def test_an_initial_projection_is_pooling_before_the_patch_embedding(pool, patch):
  """In float64: latents averaged over pool^3, then embedded."""
  with jax.enable_x64(True):
    _, ph, pw = patch
    draw = np.random.default_rng(0)
    embedding = {
      "kernel": jnp.asarray(draw.normal(size=(ph * pw * 3, 5))),
      "bias": jnp.asarray(draw.normal(size=5)),
    }
    x = jnp.asarray(draw.normal(size=(2, pool + 1, 2 * pool * ph, pool * pw, 3)))
    found = dit_packed.initial_projection(embedding, pool, patch)
    tokens = dit_packed.cut_kernels(x, (pool, pool * ph, pool * pw)) @ found["kernel"]
    x = np.asarray(rope.pad_to_kernel(x, (pool, pool * ph, pool * pw)))
    b, f, h, w, c = x.shape
    pooled = x.reshape(b, f // pool, pool, h // pool, pool, w // pool, pool, c).mean((2, 4, 6))
    _, f, h, w, _ = pooled.shape
    patches = pooled.reshape(b, f, h // ph, ph, w // pw, pw, c).transpose(0, 1, 2, 4, 3, 5, 6)
    expected = patches.reshape(b, -1, ph * pw * c) @ np.asarray(embedding["kernel"])
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_pooled_rotations_by_brute_force(pool):
  """The mean over each kernel of cosines and of sines, edges counted again where they repeat."""
  positions, rows, columns, head_dim = np.asarray([7, 8, 9, 40, 41]), 3, 5, 16
  cos, sin = rope.pooled_rotation(jnp.asarray(positions), rows, columns, head_dim, pool)
  split = rope.split_pairs(head_dim)
  angles = lambda f, r, c: np.concatenate(
    [at * rope.frequencies(n) for at, n in zip((f, r, c), split, strict=True)]
  )
  last = (len(positions) - 1, rows - 1, columns - 1)
  expected = []
  for f in range(0, len(positions), pool):
    for r in range(0, rows, pool):
      for c in range(0, columns, pool):
        inside = [
          angles(positions[min(f + i, last[0])], min(r + j, last[1]), min(c + k, last[2]))
          for i in range(pool)
          for j in range(pool)
          for k in range(pool)
        ]
        expected.append((np.cos(inside).mean(0), np.sin(inside).mean(0)))
  for found, part in ((cos, 0), (sin, 1)):
    np.testing.assert_allclose(found[0, :, 0], [e[part] for e in expected], rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------ on the shapes' DiT


def section(history: int = 5, width: int = 4) -> tuple[Frames, ...]:
  """Groups of 2 + 2 + 1 frames by k4, k2 and k1 before a noisy section."""
  x = tiny.random(3, tiny.BATCH, history + width, 8, width, tiny.CONFIG.channels)
  ends, made = [0, 2, 4, 5, 5 + width], []
  for first, end, name in zip(ends, ends[1:], (*PACKED_NAMES, PROJECTION), strict=False):
    positions = np.arange(first, end, dtype=np.int32)
    reads = tuple(Read(group=j) for j in range(4) if j != len(made))
    made.append(Frames(x[:, first:end], 0.7, positions, reads, projection=name))
  return tuple(made)


PACKED_NAMES = ("packed_k4", "packed_k2", "packed_k1")


def packed_params():
  base = {k: v for k, v in tiny.params(dataclasses.replace(PACKED, packing=())).items()}
  return dit_packed.with_projections(PACKED, base)


def test_parameters_are_the_base_s_and_pooled_embeddings():
  params = jax.eval_shape(lambda: PACKED.init(jax.random.key(0)))
  base = jax.eval_shape(lambda: dataclasses.replace(PACKED, packing=()).init(jax.random.key(0)))
  assert set(params) - set(base) == set(PACKED_NAMES)
  made, kept = packed_params(), tiny.params(dataclasses.replace(PACKED, packing=()))
  assert dit_packed.with_projections(PACKED, made) is not made
  for name in kept:
    jax.tree.map(np.testing.assert_array_equal, made[name], kept[name])


def test_the_section_sees_all_of_its_history():
  params, texts = packed_params(), jnp.asarray(tiny.text())[None]
  run = quick_jit(lambda groups: PACKED.apply(params, groups, texts).velocity[-1])
  before = run(section())
  for i in range(3):
    groups = list(section())
    groups[i] = groups[i].replace(x=groups[i].x + 1)
    assert np.abs(run(tuple(groups)) - before).max() > 1e-3


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda g: (*g[:-1], g[-1].replace(projection="packed_k1")), "before the one group"),
    (lambda g: (g[0].replace(projection="packed_k8"), *g[1:]), "kernel k8: .* for k1, k2, k4"),
    (lambda g: (g[0].replace(reads=(Read(past=0),)), *g[1:]), "to no past"),
    (lambda g: (g[0].replace(sigma=np.full((2, 2), 0.5)), *g[1:]), "one noise level a group"),
    (lambda g: (g[0], g[1].replace(text=None), *g[2:]), "stand before those with one"),
  ],
)
def test_what_packed_frames_cannot_do(change, message):
  with pytest.raises(UserError, match=message):
    jax.eval_shape(
      lambda: PACKED.apply(packed_params(), change(section()), jnp.asarray(tiny.text())[None])
    )

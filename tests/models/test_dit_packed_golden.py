"""Packed history on the DiT, against every recorded array of diffusers' Helios and HunyuanVideo,
and of the initial projections.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.conversion.dit_keys import HELIOS, dit_key_map
from hiar_jax.models import dit_packed, rope
from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.dit_layers import Layer, stacked
from hiar_jax.models.frames import Frames
from hiar_jax.packing.orders import Step
from hiar_jax.packing.rows import History, groups_of_row, tables
from hiar_jax.packing.schedule import parse
from tests.helpers.compiling import quick_jit
from tests.helpers.golden_cases import assert_close
from tests.helpers.published_params import from_published
from tests.helpers.slow_cases import few
from tests.seams import test_packed_history as recorded

NAMES = {name: dit_packed.projection_of(pool) for pool, name in HELIOS.items()}
PATCH = (1, 2, 2)
# of HunyuanVideo, in the order of the tokens: latents, weights, pool
HUNYUAN = (
  ("latents_history_4x", "clean_x_embedder.proj_4x", 4),
  ("latents_history_2x", "clean_x_embedder.proj_2x", 2),
  ("latents_clean", "clean_x_embedder.proj", 1),
  ("hidden_states", "x_embedder.proj", 1),
)
HUNYUAN_THETA = 256.0  # its default


def recordings(cases):
  return pytest.mark.parametrize(("folder", "name"), cases, ids=lambda x: getattr(x, "name", x))


each_section = recordings(recorded.CASES)


def all_but(*names):
  """What takes long to compile is left to the slow tests."""
  return recordings(few(recorded.CASES, *(case for case in recorded.CASES if case[1] not in names)))


@functools.cache
def helios(folder):
  """(config, parameters) of a recording."""
  sizes = json.loads((folder / "framepack.json").read_text())["helios"]
  config = DiTConfig(
    dim=sizes["num_attention_heads"] * sizes["attention_head_dim"],
    ffn_dim=sizes["ffn_dim"],
    num_heads=sizes["num_attention_heads"],
    num_layers=sizes["num_layers"],
    channels=sizes["in_channels"],
    text_dim=sizes["text_dim"],
    freq_dim=sizes["freq_dim"],
    packing=tuple(HELIOS),
  )
  weights = recorded.read(folder, "helios_weights.npz")
  return config, from_published(weights, dit_key_map(config, "diffusers"), "Helios")


def recorded_groups(case, *flags) -> tuple[Frames, ...]:
  return tuple(
    group.replace(projection=NAMES.get(group.projection, group.projection))
    for group in recorded.groups_of(case, *flags)
  )


def doubled(turns) -> np.ndarray:
  """Rotations (cos, sin), each [b n 1 pairs], as recorded: cosines, then sines, each twice."""
  return np.concatenate([np.repeat(part[:, :, 0], 2, axis=-1) for part in turns], axis=-1)


def taps(weight: np.ndarray) -> np.ndarray:
  """The weight [d c f h w] of a convolution as the kernel of a projection [f*h*w*c d]."""
  return weight.transpose(2, 3, 4, 1, 0).reshape(-1, weight.shape[0])


def projected(latents: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> jax.Array:
  """Tokens [b n d] of latents [b c f h w], by kernels of the size of the weight [d c f h w]."""
  cut = dit_packed.cut_kernels(jnp.moveaxis(jnp.asarray(latents), 1, -1), weight.shape[2:])
  return cut @ taps(weight) + bias.reshape(1, 1, -1)


@all_but("helios_inverted.npz", "helios_short_only.npz")
def test_golden_sections(folder, name):
  """FramePack's behaviour, and with Helios's flags: history at t = 0, history without a text."""
  case = recorded.read(folder, name)
  config, params = helios(folder)
  run = quick_jit(lambda params, groups, texts: config.apply(params, groups, texts))
  texts = jnp.asarray(case["encoder_hidden_states"])[None]
  for output, flags in recorded.FLAGS.items():
    velocity = run(params, recorded_groups(case, *flags), texts).velocity[-1]
    assert_close(np.moveaxis(velocity, -1, 1), case[output], f"{name} {output}")


@all_but("helios_inverted.npz")
def test_golden_sections_from_a_video(folder, name):
  """Latents of the history put one behind another as a video, of which packing.rows makes the
  groups; attention is blind to their order.
  """
  case = recorded.read(folder, name)
  config, params = helios(folder)
  *history, section = recorded_groups(case, False, False)
  counts = [group.x.shape[1] for group in history]
  notation = "".join(
    f"f{k}k{dit_packed.pool_of(group)}" for k, group in zip(counts, history, strict=True)
  )
  k = section.x.shape[1]
  schedule = parse(f"{notation}_g{k}" if notation else f"g{k}")
  video = np.concatenate([group.x for group in history] or [section.x[:, :0]], axis=1)
  ends = np.cumsum(counts, dtype=int)
  step = Step(
    sections=(0,),
    generates=np.arange(k) + sum(counts),
    indices=section.positions,
    context=tuple(np.arange(end - n, end) for end, n in zip(ends, counts, strict=True)),
    context_indices=tuple(group.positions for group in history),
  )
  row = jax.tree.map(lambda part: part[0], tables([step])[0])
  groups = groups_of_row(schedule, History(), video, row, section.x, section.sigma)
  texts = jnp.asarray(case["encoder_hidden_states"])[None]
  velocity = quick_jit(config.apply)(params, groups, texts).velocity[-1]
  assert_close(np.moveaxis(velocity, -1, 1), case["output"], name)


@each_section
def test_golden_layers(folder, name, monkeypatch):
  """What enters the first layer, in its order, and what each layer gives."""
  case = recorded.read(folder, name)
  config, params = helios(folder)
  entering = {}

  def spied(config):
    layers = stacked(config)

    def run(tokens, past, shared):
      entering.update(tokens=tokens, turns=(shared.cos, shared.sin))
      return layers(tokens, past, shared)

    return run

  monkeypatch.setattr(dit_packed, "stacked", spied)

  def forward(params, groups, text):
    (_, _, lengths), captured = dit_packed.PackedDiT(config).apply(
      {"params": params}, groups, text, capture_intermediates=lambda m, _: isinstance(m, Layer)
    )
    layers, _ = captured["intermediates"]["layers"]["__call__"][0]  # beside their K/V
    turns = tuple(turn[:, 0] for turn in entering["turns"])
    return entering["tokens"][:, 0], layers[:, :, 0], turns, lengths

  groups, text = recorded_groups(case, False, False), case["encoder_hidden_states"]
  tokens, layers, turns, lengths = quick_jit(forward)(params, groups, text)
  found = iter(np.asarray(lengths).tolist())
  counts = [next(found) if latents in case else 0 for *_, latents, _ in recorded.LEVELS]
  assert counts == case["token_counts"].tolist()
  assert_close(tokens, case["tokens"], f"{name} tokens")
  rotary = np.broadcast_to(case["rotary"], (len(tokens), *case["rotary"].shape[1:]))
  assert_close(doubled(turns), rotary, f"{name} rotations")
  assert_close(layers, case["blocks"], f"{name} layers")


HUNYUAN_CASES = [
  (folder, path.name)
  for folder in recorded.FOLDERS
  for path in sorted(folder.glob("hunyuan_*.npz"))
  if path.name != "hunyuan_weights.npz"
]


def test_hunyuan_recordings_are_there():
  assert len(HUNYUAN_CASES) >= 2


pooled_rotation = jax.jit(rope.pooled_rotation, static_argnums=range(1, 7))


@recordings(
  few(HUNYUAN_CASES, *(case for case in HUNYUAN_CASES if case[1] != "hunyuan_padded.npz"))
)
def test_golden_hunyuan_packing(folder, name):
  """Tokens, rotations and their numbers, with HunyuanVideo's split of the pairs and theta."""
  case, weights = recorded.read(folder, name), recorded.read(folder, "hunyuan_weights.npz")
  sizes = json.loads((folder / "framepack.json").read_text())["hunyuan"]
  split = tuple(axis // 2 for axis in sizes["rope_axes_dim"])
  theta = sizes.get("rope_theta", HUNYUAN_THETA)
  tokens, turns = [], []
  for latents, stem, pool in HUNYUAN:
    x, weight = case[latents], weights[f"{stem}.weight"]
    assert weight.shape[2:] == (pool, 2 * pool, 2 * pool)
    tokens.append(jax.jit(projected)(x, weight, weights[f"{stem}.bias"]))
    indices = case["indices_latents" if latents == "hidden_states" else f"indices_{latents}"]
    grid = x.shape[-2] // 2, x.shape[-1] // 2, sizes["attention_head_dim"]
    turn = pooled_rotation(indices, *grid, pool, split, theta)
    assert turn[0].shape[1] == tokens[-1].shape[1]
    turns.append(doubled(turn))
  assert [part.shape[1] for part in tokens] == case["token_counts"].tolist()
  assert_close(np.concatenate(tokens, axis=1), case["tokens"], f"{name} tokens")
  assert_close(np.concatenate(turns, axis=1), case["rotary"], f"{name} rotations")


@pytest.mark.parametrize("folder", recorded.FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("pool", [1, 2, 4, 8])
def test_golden_initial_projections(folder, pool):
  """The kernels as published, bit for bit; what they give; and the pooled latents under the patch
  embedding, which is the same.
  """
  case = recorded.read(folder, "initial_projection.npz")
  base, weight, bias = case["weight_1x"], case[f"weight_{pool}x"], case["bias"]
  embedding = {"kernel": jnp.asarray(taps(base)), "bias": jnp.asarray(bias)}
  found = jax.jit(dit_packed.initial_projection, static_argnums=(1, 2))(embedding, pool, PATCH)
  np.testing.assert_array_equal(found["kernel"], taps(weight))
  np.testing.assert_array_equal(found["bias"], bias)

  flat = lambda out: np.moveaxis(out, 1, -1).reshape(len(out), -1, out.shape[1])
  kernel = (pool, 2 * pool, 2 * pool)

  @jax.jit
  def run(latents, found):
    x = jnp.moveaxis(latents, 1, -1)
    tokens = dit_packed.cut_kernels(x, kernel) @ found["kernel"] + found["bias"].reshape(1, 1, -1)
    whole = rope.pad_to_kernel(x, kernel)
    b, f, h, w, c = whole.shape
    pooled = jax.vmap(lambda clip: rope.pool_patches(clip, pool))(whole)
    pooled = pooled.reshape(b, f // pool, h // pool, w // pool, c)
    return tokens, projected(jnp.moveaxis(pooled, -1, 1), base, bias)

  packed, tokens = run(case["latents"], found)
  assert_close(packed, flat(case[f"out_{pool}x"]), f"{pool}x")
  assert_close(tokens, flat(case[f"out_pooled_{pool}x"]), f"pooled {pool}x")


@pytest.mark.parametrize("folder", recorded.FOLDERS, ids=lambda folder: folder.name)
def test_golden_weights_are_all_read(folder):
  """A rule for each recorded tensor of Helios, a projection for each of HunyuanVideo."""
  config, _ = helios(folder)
  rules = {rule.name: rule.shape for rule in dit_key_map(config, "diffusers")}
  weights = recorded.read(folder, "helios_weights.npz")
  assert rules == {name: array.shape for name, array in weights.items()}
  stems = {name.rpartition(".")[0] for name in recorded.read(folder, "hunyuan_weights.npz")}
  assert stems == {stem for _, stem, _ in HUNYUAN}

"""diffusers' networks with packed history, small and with random weights: Helios's forward through
this project's files, HunyuanVideo's packing and rotations.

Needs the extra `[parity]` (torch, diffusers).
"""

import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hiar_jax.checkpoints import weights
from hiar_jax.conversion.export import export
from hiar_jax.convert import convert
from hiar_jax.models import dit_packed, rope
from hiar_jax.models.dit_layers import embed_time
from hiar_jax.models.frames import Frames
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.models.test_dit_packed_golden import HUNYUAN, HUNYUAN_THETA, doubled, projected
from tests.models.test_dit_parity import WEIGHTS, randomise

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # peers may warn

SIZES = dict(
  num_attention_heads=3,
  attention_head_dim=20,
  rope_dim=(8, 6, 6),
  num_layers=2,
  ffn_dim=40,
  text_dim=7,
  freq_dim=10,
  in_channels=5,
  out_channels=5,
)
# name, pool, frames of the history and their indices in each clip of the batch
LEVELS = (
  ("long", 4, [[0, 1, 2, 3, 4], [40, 41, 42, 43, 44]]),
  ("mid", 2, [[5, 6, 7], [45, 46, 47]]),
  ("short", 1, [[8], [3]]),
)
SECTION = [[9, 10], [50, 51]]
ROWS, COLUMNS = 6, 10  # of latents: neither fills whole kernels


@pytest.fixture(scope="module", params=[False, True], ids=["framepack", "helios"])
def peer(request):
  import diffusers

  flags = dict(zero_history_timestep=request.param, guidance_cross_attn=request.param)
  return randomise(diffusers.HeliosTransformer3DModel(**SIZES, **flags))


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
  path = tmp_path_factory.mktemp("transformer")
  peer.save_pretrained(path)
  return path


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
  path = tmp_path_factory.mktemp("weights")
  list(convert(str(folder), str(path)))
  return path


@pytest.mark.parametrize("present", [("long", "mid", "short"), ("short",), ()], ids="-".join)
def test_forward(peer, converted, present):
  import torch

  config, params = weights.load(converted, "dit")
  assert set(config.packing) == {1, 2, 4}
  helios = peer.config.zero_history_timestep
  shape = (ROWS, COLUMNS, config.channels)
  x, text = tiny.random(0, 2, len(SECTION[0]), *shape), tiny.random(1, 2, 9, config.text_dim)
  timestep = np.asarray([731.0, 12.0], np.float32)
  torch_of = lambda latents: torch.from_numpy(np.moveaxis(latents, -1, 1).copy())
  inputs = {"hidden_states": torch_of(x), "indices_hidden_states": torch.tensor(SECTION)}
  groups = []
  for name, pool, indices in LEVELS:
    if name in present:
      latents = tiny.random(pool, 2, len(indices[0]), *shape)
      inputs[f"latents_history_{name}"] = torch_of(latents)
      inputs[f"indices_latents_history_{name}"] = torch.tensor(indices)
      sigma, heard = (0.0, None) if helios else (timestep / 1000, 0)
      projection = dit_packed.projection_of(pool)
      groups.append(Frames(latents, sigma, np.asarray(indices), text=heard, projection=projection))
  groups.append(Frames(x, timestep / 1000, np.asarray(SECTION)))
  with torch.no_grad():
    text_there, times = torch.from_numpy(text), torch.from_numpy(timestep)
    expected = peer(timestep=times, encoder_hidden_states=text_there, **inputs).sample.numpy()
  found = quick_jit(config.apply)(params, tuple(groups), jnp.asarray(text)[None]).velocity[-1]
  expected = np.moveaxis(expected, 1, -1)
  assert found.shape == expected.shape
  error = np.abs(found - expected).max() / np.abs(expected).max()
  assert error <= 1e-4, error


def test_weights_go_back_and_load(peer, folder, converted, tmp_path):
  import diffusers

  list(export(converted, "diffusers", tmp_path))
  back, original = load_file(tmp_path / "transformer" / WEIGHTS), load_file(folder / WEIGHTS)
  assert back.keys() == original.keys()
  assert all(back[name].tobytes() == array.tobytes() for name, array in original.items())
  config = json.loads((tmp_path / "transformer" / "config.json").read_text())
  assert config["_class_name"] == "HeliosTransformer3DModel"
  made = diffusers.HeliosTransformer3DModel.from_config(config)
  flags = {"zero_history_timestep", "guidance_cross_attn"}  # no weight tells them
  for name, value in peer.config.items():
    if not name.startswith("_") and name not in flags:
      assert made.config[name] == value or list(made.config[name]) == list(value), name
  assert made.config.zero_history_timestep and made.config.guidance_cross_attn


def test_names_and_shapes_at_the_published_size():
  """On torch's meta device, which allocates nothing."""
  import diffusers
  import torch

  from hiar_jax.conversion import catalog
  from hiar_jax.conversion.dit_keys import dit_key_map
  from hiar_jax.models.dit import DiTConfig

  config = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, packing=(1, 2, 4))
  with torch.device("meta"):
    ours = diffusers.HeliosTransformer3DModel.from_config(
      catalog.model_config("dit", config, "diffusers")
    )
    theirs = diffusers.HeliosTransformer3DModel()  # its defaults are those of the published model
  shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
  assert shapes == {rule.name: rule.shape for rule in dit_key_map(config, "diffusers")}
  assert shapes == {name: tuple(value.shape) for name, value in ours.state_dict().items()}


@pytest.mark.slow
def test_hunyuan_packing():
  """What enters its first block, by a hook: tokens and rotations."""
  import diffusers
  import torch

  heads, head_dim, axes, channels = 2, 14, (4, 4, 6), 3
  peer = randomise(
    diffusers.HunyuanVideoFramepackTransformer3DModel(
      in_channels=channels,
      out_channels=channels,
      num_attention_heads=heads,
      attention_head_dim=head_dim,
      num_layers=1,
      num_single_layers=1,
      num_refiner_layers=1,
      text_embed_dim=8,
      pooled_projection_dim=6,
      rope_axes_dim=axes,
      has_image_proj=True,
      image_proj_dim=9,
      has_clean_x_embedder=True,
    )
  )
  counts = {
    "latents_history_4x": 6,
    "latents_history_2x": 3,
    "latents_clean": 2,
    "hidden_states": 4,
  }
  at, inputs = 30, {}
  for name, frames in counts.items():
    latents = tiny.random(frames, 2, channels, frames, 10, 6)
    inputs[name] = torch.from_numpy(latents)
    key = "indices_latents" if name == "hidden_states" else f"indices_{name}"
    inputs[key] = torch.arange(at, at + frames)
    at += frames + 7
  seen = {}

  def hook(module, args):
    seen["tokens"], seen["rotary"] = args[0].numpy(), args[4]

  peer.transformer_blocks[0].register_forward_pre_hook(hook)
  with torch.no_grad():
    peer(
      timestep=torch.tensor([500.0, 20.0]),
      encoder_hidden_states=torch.randn(2, 5, 8),
      encoder_attention_mask=torch.ones(2, 5),
      pooled_projections=torch.randn(2, 6),
      image_embeds=torch.randn(2, 3, 9),
      guidance=torch.tensor([6.0, 6.0]),
      **inputs,
    )
  state = {name: value.numpy() for name, value in peer.state_dict().items()}
  tokens, turns = [], []
  for name, stem, pool in HUNYUAN:
    tokens.append(projected(inputs[name].numpy(), state[f"{stem}.weight"], state[f"{stem}.bias"]))
    key = "indices_latents" if name == "hidden_states" else f"indices_{name}"
    split = tuple(axis // 2 for axis in axes)
    turn = rope.pooled_rotation(
      jnp.asarray(inputs[key].numpy()), 5, 3, head_dim, pool, split, HUNYUAN_THETA
    )
    turns.append(doubled(turn)[0])
  for found, expected in (
    (np.concatenate(tokens, axis=1), seen["tokens"]),
    (np.concatenate(turns), np.concatenate([part.numpy() for part in seen["rotary"]], axis=-1)),
  ):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


# at angles of up to 10,000 an ulp between the two float32 tables of frequencies can be seen
@pytest.mark.parametrize(("scales", "bound"), [((0.3, 0.05), 1e-5), ((10.0, 1.0), 2e-4)])
def test_the_embedding_of_a_guidance_scale(scales, bound):
  """HunyuanVideo's, as its FramePack model has it: 1000 times the scale, added to the time's."""
  from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoConditionEmbedding,
  )
  import torch

  peer = randomise(HunyuanVideoConditionEmbedding(12, 5, guidance_embeds=True))
  with torch.no_grad():
    for parameter in peer.text_embedder.parameters():  # of a pooled text, which Wan has not
      parameter.zero_()
  config = tiny.CONFIG.packed((1,), guided=True)
  config = dataclasses.replace(config, dim=12, freq_dim=256)
  linear = lambda layer: {
    "kernel": layer.weight.detach().numpy().T,
    "bias": layer.bias.detach().numpy(),
  }
  params = {
    "time_embedding_in": linear(peer.timestep_embedder.linear_1),
    "time_embedding_out": linear(peer.timestep_embedder.linear_2),
    "guidance_in": linear(peer.guidance_embedder.linear_1),
    "guidance_out": linear(peer.guidance_embedder.linear_2),
    "time_projection": {"kernel": np.zeros((12, 72), np.float32), "bias": np.zeros(72, np.float32)},
  }
  timestep = np.asarray([731.0, 12.0], np.float32)
  scale = np.asarray(scales, np.float32)

  class Time(nn.Module):
    @nn.compact
    def __call__(self, timestep, scale):
      return embed_time(config, timestep, scale)[0]

  found = Time().apply({"params": params}, jnp.asarray(timestep)[:, None], jnp.asarray(scale))
  with torch.no_grad():
    expected = peer(torch.from_numpy(timestep), torch.zeros(2, 5), torch.from_numpy(1000 * scale))[
      0
    ].numpy()
  error = np.abs(found[:, 0] - expected).max() / np.abs(expected).max()
  assert error <= bound, error

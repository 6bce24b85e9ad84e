"""The seventh hard case: a section of FramePack, against recordings of diffusers' Helios.

Packed history is groups of frames beside the noisy section: with indices of their own, an input
projection each, a noise level, and a text or none. Nothing else of the seams knows of packing.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.conversion.dit_keys import dit_key_map
from hiar_jax.models import frames
from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.frames import Frames, Read
from tests.helpers import golden_cases
from tests.helpers.compiling import quick_jit
from tests.helpers.golden_cases import assert_close
from tests.helpers.published_params import from_published
from tests.helpers.slow_cases import few
from tests.seams.plain_wan import PlainWan, plainly

# our name of the projection, the recording's names of its weights and its latents, its pool;
# in the order of the tokens
LEVELS = (
  ("patch_long", "patch_long", "latents_history_long", 4),
  ("patch_mid", "patch_mid", "latents_history_mid", 2),
  ("patch_short", "patch_short", "latents_history_short", 1),
  ("patch_embedding", "patch_embedding", "hidden_states", 1),
)
FLAGS = {
  "output": (False, False),
  "output_zero_history_timestep": (True, False),
  "output_guidance_cross_attn": (False, True),
  "output_helios": (True, True),
}
FOLDERS = golden_cases.folders("framepack.json")
CASES = [
  (f, p.name) for f in FOLDERS for p in sorted(f.glob("helios_*.npz")) if "weights" not in p.name
]


def read(folder, name: str) -> dict[str, np.ndarray]:
  with np.load(folder / name) as arrays:
    return dict(arrays)


def network_and_params(folder):
  sizes = json.loads((folder / "framepack.json").read_text())["helios"]
  weights = read(folder, "helios_weights.npz")
  width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
  network = PlainWan(
    dim=width,
    heads=sizes["num_attention_heads"],
    layers=sizes["num_layers"],
    freq_dim=sizes["freq_dim"],
    pools=tuple((ours, pool) for ours, _, _, pool in LEVELS),
  )
  history = {
    k: weights.pop(k) for k in list(weights) if k.startswith("patch_") and "embed" not in k
  }
  # Wan2.1's network under diffusers' names, but for this one
  weights["scale_shift_table"] = weights.pop("norm_out.scale_shift_table")
  config = DiTConfig(
    dim=width,
    ffn_dim=sizes["ffn_dim"],
    num_heads=sizes["num_attention_heads"],
    num_layers=sizes["num_layers"],
    channels=sizes["in_channels"],
    text_dim=sizes["text_dim"],
    freq_dim=sizes["freq_dim"],
  )
  params = dict(from_published(weights, dit_key_map(config, "diffusers"), "Helios"))
  for ours, theirs, _, pool in LEVELS[:3]:
    kernel = history[f"{theirs}.weight"]  # [d c pool 2pool 2pool], as PyTorch stores convolutions
    assert kernel.shape[2] == pool
    kernel = kernel.transpose(2, 3, 4, 1, 0).reshape(-1, kernel.shape[0])
    params[ours] = {"kernel": kernel, "bias": history[f"{theirs}.bias"]}
  return network, jax.tree.map(jnp.asarray, params)


def groups_of(case, zero_history: bool, deaf_history: bool) -> tuple[Frames, ...]:
  """The levels that the recording has, each seeing all others."""
  present = [level for level in LEVELS if level[2] in case]
  made = []
  for i, (ours, _, name, _) in enumerate(present):
    history = name != "hidden_states"
    made.append(
      Frames(
        np.moveaxis(case[name], 1, -1),
        0.0 if history and zero_history else case["timestep"] / 1000,
        case[f"indices_{name}"],
        tuple(Read(group=j) for j in range(len(present)) if j != i),
        text=None if history and deaf_history else 0,
        projection=ours,
      )
    )
  return tuple(made)


def test_the_recordings_are_there():
  assert len(CASES) >= 4


QUICK = [case for case in CASES if case[1] == "helios_no_history.npz"]


@pytest.mark.parametrize(
  ("folder", "name"), few(CASES, *QUICK), ids=lambda x: getattr(x, "name", x)
)
def test_7_golden_sections(folder, name):
  case = read(folder, name)
  network, params = network_and_params(folder)
  bound = frames.bind(network, params, case["encoder_hidden_states"])
  run = quick_jit(
    lambda b, groups: b(groups)
  )  # groups are trees, the flags parts of their structure
  for output, flags in FLAGS.items():
    velocity = run(bound, groups_of(case, *flags)).velocity[-1]
    assert_close(np.moveaxis(velocity, -1, 1), case[output], f"{name} {output}")


@pytest.mark.parametrize(("folder", "name"), CASES, ids=lambda x: getattr(x, "name", x))
def test_7_golden_tokens_and_rotations(folder, name):
  """What enters the first layer: attention is blind to the order of keys, these are not."""
  case = read(folder, name)
  network, params = network_and_params(folder)
  groups = groups_of(case, False, False)
  inputs = quick_jit(plainly(lambda g: [network.embed(params, group) for group in g]))(groups)
  tokens = np.concatenate([x.reshape(len(x), -1, x.shape[-1]) for x, _, _ in inputs], axis=1)
  assert_close(tokens, case["tokens"], f"{name} tokens")
  # recorded [1|b n 2 d]: cosines, then sines, each twice
  for part in range(2):
    ours = np.concatenate(
      [r[part].reshape(len(r[part]), -1, r[part].shape[-1]) for _, r, _ in inputs], axis=1
    )
    recorded = np.split(case["rotary"], 2, axis=-1)[part][..., ::2]
    assert_close(ours, recorded, f"{name} rotations {part}")

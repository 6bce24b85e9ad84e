"""A run whose packed model is trained by adapters: through its stages, resumed, and used."""

import json
import shutil

import jax
import numpy as np
import pytest

import hiar_jax
from hiar_jax import train
from hiar_jax.checkpoints.training_state import load_params
from hiar_jax.training import pretrained
from hiar_jax.training.run import open_run
from tests.helpers import tiny_packed, tiny_run
from tests.helpers.untrained import compiles_quickly  # noqa: F401


def config():
  batches = {"teacher__batch": 8, "framepack__batch": 8}  # which eight devices divide
  c = tiny_packed.make_config(**batches, mesh__data=4, mesh__fsdp=2, mesh__min_shard=64)
  with c.unlocked():
    c.framepack.lora = {"rank": 2, "alpha": 4.0}
  return c


@pytest.mark.slow
def test_adapters_go_through_every_stage_and_are_resumed_bit_for_bit(tmp_path):
  straight, again = tmp_path / "straight", tmp_path / "again"
  train.main(config(), str(straight))
  shutil.copytree(straight, again)
  for left in ("framepack/checkpoints/4", "sample"):
    shutil.rmtree(again / left)
  train.main(config(), str(again))
  ends = [tiny_run.state(workdir, "framepack", 4) for workdir in (straight, again)]
  tiny_run.assert_same_arrays(*ends)
  tiny_run.assert_same_arrays(tiny_run.videos(straight), tiny_run.videos(again))
  assert json.loads((straight / "config.json").read_text())["framepack"]["lora"]["rank"] == 2
  # the state has no weights of the base, and its users get all of them, merged
  trained = {name.split("/")[1] for name in ends[0] if name.startswith("params/")}
  assert trained == {"adapters", "packed_k1", "packed_k2"}
  run = open_run(config(), straight, save=False)
  adapters = run.experiment.packed_adapters
  weights = run.experiment.packed_dit.with_projections(pretrained.load_teacher(run))
  weights, found = (
    jax.tree.map(np.asarray, tree)
    for tree in (weights, load_params(straight / "framepack" / "checkpoints"))
  )
  assert jax.tree.structure(found) == jax.tree.structure(weights)
  kernel = weights["layers"]["mlp_in"]["kernel"]
  a, b = (ends[0][f"ema/adapters/layers/mlp_in/kernel/{name}"] for name in "ab")
  merged = found["layers"]["mlp_in"]["kernel"]
  np.testing.assert_allclose(merged, kernel + adapters.config.scale * a @ b, atol=1e-6)
  assert np.abs(merged - kernel).max() > 1e-6
  np.testing.assert_array_equal(found["head"]["kernel"], weights["head"]["kernel"])
  frames = hiar_jax.load(straight).generate("a red circle moving left", frames=6, seed=1)
  assert frames.shape[0] == 6 and frames.dtype == np.uint8

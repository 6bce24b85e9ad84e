"""Every training step gives the same update on any devices, and moves what it should and nothing
else.
"""

import dataclasses
import functools
import math
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from hiar_jax.parallel.mesh import MeshConfig
from tests.helpers import training_steps
from tests.helpers.slow_cases import few
from tests.helpers.training_steps import (
  BATCH,
  MODEL,
  compiled_quickly,  # noqa: F401
  linear_optimizer,  # noqa: F401
  make_batch,
  make_case,
  run,
)


@functools.cache
def on_one_device(kind: str):
  return run(make_case(kind), MeshConfig(data=1), 1)


def close(found, expected) -> None:
  """Within the rounding of float32, of each leaf's largest value."""
  flat = jax.tree_util.tree_leaves_with_path(expected)
  for (path, a), b in zip(flat, jax.tree.leaves(found), strict=True):
    if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = np.asarray(a), np.asarray(b)
      np.testing.assert_allclose(
        b, a, atol=3e-5 * max(1e-3, np.abs(a).max()), err_msg=jax.tree_util.keystr(path)
      )


# (mesh, devices, accumulate)
PLACES = {
  "2 devices": (MeshConfig(data=2), 2, 1),
  "4 devices": (MeshConfig(data=4), 4, 1),
  "8 devices": (MeshConfig(data=8), 8, 1),
  "weights over 8": (MeshConfig(data=1, fsdp=8, min_shard=64), 8, 1),
  "4 x 2": (MeshConfig(data=4, fsdp=2, min_shard=64), 8, 1),
  "2 x 2, a clip on 2": (MeshConfig(data=2, fsdp=2, sequence=2, min_shard=64), 8, 1),
  "4, a clip on 2": (MeshConfig(data=1, fsdp=4, tensor=2, min_shard=64), 8, 1),
  "2 x 2, a ring of 2": (MeshConfig(data=2, fsdp=2, ring=2, min_shard=64), 8, 1),
  "2 x 2, two parts": (MeshConfig(data=2, fsdp=2, min_shard=64), 4, 2),
  "two parts": (MeshConfig(data=1), 1, 2),
  "pmap over 8": (MeshConfig(mapping="pmap"), 8, 1),
  "pmap over 2": (MeshConfig(mapping="pmap"), 2, 1),
  "pmap over 2, two parts": (MeshConfig(mapping="pmap"), 2, 2),
}
KINDS = ("teacher", "causal init, noisy", "causal init, history", "critic", "generator")
QUICK = {"causal init, noisy": ("2 x 2, a ring of 2",)}
GRID = [
  pytest.param(kind, place, marks=() if place in QUICK.get(kind, ()) else pytest.mark.slow)
  for kind in KINDS
  for place in PLACES
]


def shards(leaf) -> int:
  """The parts that an array is split into, by its rule."""
  names = jax.tree.leaves(tuple(leaf.sharding.spec))
  return math.prod(leaf.sharding.mesh.shape[name] for name in names)


@pytest.mark.parametrize("kind, place", GRID)
def test_the_update_is_that_of_one_device(kind, place):
  mesh, devices, accumulate = PLACES[place]
  state, metrics = run(make_case(kind, accumulate), mesh, devices)
  expected, expected_metrics = on_one_device(kind)
  close(state, expected)
  assert metrics.keys() == expected_metrics.keys()
  for name, value in metrics.items():
    assert value == pytest.approx(expected_metrics[name], rel=2e-4), name
  if mesh.fsdp > 1:
    for tree in filter(
      None, (state.params, state.ema, state.opt_state, state.critic, state.critic_opt_state)
    ):
      split = [leaf for leaf in jax.tree.leaves(tree) if leaf.size >= 64]
      assert split and all("fsdp" in leaf.sharding.spec for leaf in split)
      assert all(
        shard.data.size == leaf.size // shards(leaf)
        for leaf in split
        for shard in leaf.addressable_shards
      )


@pytest.mark.parametrize("kind", few(KINDS, *KINDS[:3]))
def test_an_update_moves_its_own_network_alone(kind):
  before = jax.jit(make_case(kind).create)()
  after, metrics = on_one_device(kind)
  moved = lambda name: [
    bool((np.asarray(a) != np.asarray(b)).any())
    for a, b in zip(
      jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)), strict=True
    )
  ]
  mine, others = ["params", "ema", "opt_state"], ["critic", "critic_opt_state"]
  if kind == "critic":
    mine, others = others, mine
  for name in mine:
    assert all(moved(name)) or (name == "opt_state" and any(moved(name))), name
  for name in others:
    assert not any(moved(name)), name
  assert np.isfinite(list(metrics.values())).all() and metrics["grad_norm"] > 0
  assert int(after.step) == 5


PLACED = [*((kind, "clips") for kind in KINDS), ("generator", "trajectories")]


@pytest.mark.parametrize("kind, whose", few(PLACED, ("teacher", "clips")))
def test_a_clip_is_trained_at_its_place(kind, whose, monkeypatch):
  monkeypatch.setattr(
    training_steps, "MODEL", dataclasses.replace(MODEL, place_embedding=True, places=(4, 4))
  )
  case = make_case(kind)
  state = jax.jit(case.create)()
  update = jax.jit(lambda batch: case.step(state, batch, case.frozen)[1]["loss"])

  def loss(start: int) -> float:
    batch, zeros = make_batch(0), np.zeros(BATCH, np.int32)
    batch["start"] = batch["trajectories"]["start"] = zeros
    (batch["trajectories"] if whose == "trajectories" else batch)["start"] = zeros + start
    return float(update(batch))

  assert abs(loss(4) - loss(0)) > 1e-4 and loss(8) == loss(4)  # places repeat


# ------------------------------------------------------------------------------------ two processes

PROCESS = """
import sys
sys.path.insert(0, {root!r})
from tests import conftest
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize("127.0.0.1:{port}", num_processes=2, process_id=int(sys.argv[1]))
import optax
optax.adamw = lambda rate, **_: optax.sgd(rate, momentum=0.9)
from tests.helpers import training_steps as t

rows = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
whole = t.make_batch
t.make_batch = lambda step: jax.tree.map(lambda x: x[rows], whole(step))
state, metrics = t.run(t.make_case("teacher"), t.MeshConfig(), 4, updates=2)
if jax.process_index() == 0:
  leaves = jax.tree.leaves(state.params)
  arrays = [np.asarray(leaf.addressable_data(0)) for leaf in leaves]
  np.savez({out!r}, *arrays, loss=metrics["loss"])
"""


@pytest.mark.slow
def test_two_processes_give_the_update_of_one(tmp_path):
  """Each feeds its own half of the batch to its own two devices."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  root = pathlib.Path(__file__).parents[2]
  code = PROCESS.format(root=str(root), port=port, out=str(tmp_path / "out.npz"))
  start = lambda i: subprocess.Popen(
    [sys.executable, "-c", code, str(i)],
    stderr=subprocess.PIPE,
    env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
  )
  for process in [start(0), start(1)]:
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err.decode()[-3000:]
  state, metrics = run(make_case("teacher"), MeshConfig(data=1), 1, updates=2)
  with np.load(tmp_path / "out.npz") as found:
    close([found[f"arr_{i}"] for i in range(len(found.files) - 1)], jax.tree.leaves(state.params))
    assert float(found["loss"]) == pytest.approx(metrics["loss"], rel=1e-5)

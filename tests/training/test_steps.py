"""Every training step gives the same update on any devices, and moves what it should and nothing
else.
"""

import dataclasses
import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiar_jax import flow
from hiar_jax.components import word_table
from hiar_jax.components.interfaces import Task
from hiar_jax.method import Method
from hiar_jax.models import dit
from hiar_jax.models.dit import DiTConfig
from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, replicated
from hiar_jax.parallel.rules import state_shardings
from hiar_jax.training import causal_init, distill, teacher
from hiar_jax.training import state as states
from hiar_jax.training.distill import DistillConfig, ForwardKLConfig, Student
from hiar_jax.types import LatentShape

MODEL = DiTConfig(
  dim=16, ffn_dim=16, num_heads=1, num_layers=1, patch=(1, 1, 1), channels=4, text_dim=8, freq_dim=8
)
HIAR = Method(block=1, window=3)
HISTORIES = {
  "HiAR": HIAR,
  "Self-Forcing": dataclasses.replace(HIAR, order="block_first", level="clean"),
  "Self-Aligned Forcing": dataclasses.replace(
    HIAR, level="input", gradient="attached", sink=1, sink_level="clean"
  ),
}
TABLE = word_table.word_table(9, 4, 8)
TASK = Task(
  encode=lambda batch: batch["video"],
  embed=lambda tokens: word_table.encode(TABLE, tokens),
  negative=jnp.zeros_like,
  latent=LatentShape(frames=3, height=1, width=2, channels=4),
)
SIGMAS = np.asarray(flow.shifted_schedule((1000, 500), 5.0), np.float32)
BATCH = 8


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
  """These tests compile much and compute little."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def linear_optimizer():
  """AdamW divides by the gradient's size, so that of a parameter without influence its rounding
  would be seen at full scale.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(optax, "adamw", lambda rate, **_: optax.sgd(rate, momentum=0.9))
    yield


def make_batch(step: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(step)
  tokens = rng.integers(0, 9, (BATCH, 4)).astype(np.int32)
  video = rng.normal(size=(BATCH, *TASK.latent.clip)).astype(np.float32)
  trajectory = rng.normal(size=(BATCH, len(SIGMAS), *TASK.latent.clip)).astype(np.float32)
  return {
    "video": video,
    "trajectory": trajectory,
    "tokens": tokens,
    "example_id": np.arange(BATCH, dtype=np.int32),
    "trajectories": {"trajectory": trajectory, "tokens": tokens[::-1].copy()},
  }


def make_params(seed: int):
  """Random weights, none of them zero: a fresh network's head is, and would hide all that is behind
  it.
  """
  shapes, rng = (
    jax.eval_shape(lambda: dit.init(MODEL, jax.random.key(0))),
    np.random.default_rng(seed),
  )
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape) + (x.ndim < 2), jnp.float32), shapes
  )


@dataclasses.dataclass(frozen=True)
class Case:
  """One kind of step: create() -> state; step(state, batch, *frozen, mean)."""

  create: object
  step: object
  frozen: tuple = ()


def make_case(
  kind: str,
  accumulate: int = 1,
  method: Method = HIAR,
  weight: float = 0.1,
  guidance: float = 1.0,
) -> Case:
  common = {
    "steps": 10,
    "batch": BATCH,
    "lr": 0.02,
    "accumulate": accumulate,
    "clip": 0.5,
    "ema_decay": 0.9,
  }
  key = jax.random.key(7)
  if kind == "teacher":
    config = teacher.TeacherConfig(**common, caption_dropout=0.5)
    step = teacher.make_step(config, MODEL, TASK)
    return Case(lambda: states.create(key, make_params(0), config.optimizer()), step)
  if kind.startswith("causal init"):
    config = causal_init.CausalInitConfig(**common, shows=kind.split(", ")[1])
    step = causal_init.make_step(config, MODEL, TASK, SIGMAS, method)
    return Case(lambda: states.create(key, make_params(0), config.optimizer()), step)
  config = DistillConfig(
    **common, critic_lr=0.03, guidance=guidance, forward_kl=ForwardKLConfig(weight=weight)
  )
  student = Student(MODEL, MODEL, MODEL, method, jnp.asarray(SIGMAS), TASK)
  create = lambda: states.create(
    key, make_params(0), config.generator_optimizer(), make_params(1), config.critic_optimizer()
  )
  if kind == "critic":
    return Case(create, distill.make_critic_step(config, student))
  return Case(create, distill.make_generator_step(config, student), (make_params(2),))


def run(case: Case, mesh_config: MeshConfig, devices: int, updates: int = 3):
  """-> (state after `updates`, the last metrics)."""
  mesh = make_mesh(mesh_config, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    shardings = state_shardings(jax.eval_shape(case.create), mesh, mesh_config.min_shard)
    state = jax.jit(case.create, out_shardings=shardings)()
    frozen = jax.device_put(case.frozen, replicated(mesh))
    step = map_step(case.step, shardings, mesh, mesh_config.mapping)
    for i in range(updates):
      state, metrics = step(state, put_batch(make_batch(i), mesh), *frozen)
      # the critic counts the steps, and is not here
      if "generator_loss" not in metrics and case.frozen:
        state = state.replace(step=state.step + 1)
  return state, {name: float(value) for name, value in metrics.items()}


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
  "2 x 2, two parts": (MeshConfig(data=2, fsdp=2, min_shard=64), 4, 2),
  "two parts": (MeshConfig(data=1), 1, 2),
  "pmap over 8": (MeshConfig(mapping="pmap"), 8, 1),
  "pmap over 2": (MeshConfig(mapping="pmap"), 2, 1),
  "pmap over 2, two parts": (MeshConfig(mapping="pmap"), 2, 2),
}
KINDS = ("teacher", "causal init, noisy", "causal init, history", "critic", "generator")
QUICK = {
  "teacher": ("8 devices", "weights over 8", "two parts", "pmap over 2, two parts"),
  "causal init, noisy": ("4 x 2",),
  "critic": ("2 x 2, two parts",),
  "generator": ("pmap over 2",),
}
GRID = [
  pytest.param(kind, place, marks=() if place in QUICK.get(kind, ()) else pytest.mark.slow)
  for kind in KINDS
  for place in PLACES
]


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
        shard.data.size == leaf.size // mesh.fsdp
        for leaf in split
        for shard in leaf.addressable_shards
      )


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_moves_its_own_network_alone(kind):
  if kind == "causal init, history":
    pytest.skip("the same step as noisy")
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
  assert int(after.step) == 3


def influence(case: Case, of: str, on: str) -> float:
  """The largest derivative of the network `on` after an update, along a change of the network `of`
  before it.
  """
  state, batch = jax.jit(case.create)(), jax.tree.map(jnp.asarray, make_batch(0))

  def update(changed):
    frozen = (changed,) if of == "teacher" else case.frozen
    given = state if of == "teacher" else state.replace(**{of: changed})
    return getattr(case.step(given, batch, *frozen, mean=lambda tree: tree)[0], on)

  start = case.frozen[0] if of == "teacher" else getattr(state, of)
  direction = jax.tree.map(jnp.ones_like, start)
  tangent = jax.jit(lambda: jax.jvp(update, (start,), (direction,))[1])()
  return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tangent))


@pytest.mark.parametrize(
  "kind, of, on",
  [
    ("generator", "critic", "params"),
    ("generator", "teacher", "params"),
    ("critic", "params", "critic"),
  ],
)
def test_no_gradient_passes_between_networks(kind, of, on):
  """They see each other's outputs as numbers: the derivative is exactly zero, though the update
  depends on them.
  """
  assert influence(make_case(kind), of, on) == 0.0


PLACED = [
  pytest.param(kind, "clips", marks=() if kind in ("teacher", "critic") else pytest.mark.slow)
  for kind in KINDS
]


@pytest.mark.parametrize("kind, whose", [*PLACED, ("generator", "trajectories")])
def test_a_clip_is_trained_at_its_place(kind, whose, monkeypatch):
  monkeypatch.setitem(
    globals(), "MODEL", dataclasses.replace(MODEL, place_embedding=True, places=(4, 4))
  )
  case = make_case(kind)
  state = jax.jit(case.create)()
  update = jax.jit(
    lambda batch: case.step(state, batch, *case.frozen, mean=lambda tree: tree)[1]["loss"]
  )

  def loss(start: int) -> float:
    batch, zeros = make_batch(0), np.zeros(BATCH, np.int32)
    batch["start"] = batch["trajectories"]["start"] = zeros
    (batch["trajectories"] if whose == "trajectories" else batch)["start"] = zeros + start
    return float(update(batch))

  assert abs(loss(4) - loss(0)) > 1e-4 and loss(8) == loss(4)  # places repeat


@pytest.mark.parametrize(
  "name", ["Self-Aligned Forcing", pytest.param("Self-Forcing", marks=pytest.mark.slow)]
)
def test_the_rivals_go_through_the_same_step(name):
  state, metrics = run(
    make_case("generator", method=HISTORIES[name], weight=0.0, guidance=0.0), MeshConfig(data=1), 1
  )
  assert np.isfinite(list(metrics.values())).all() and metrics["grad_norm"] > 0
  assert "forward_kl" not in metrics
  before = make_params(0)
  assert all(
    (np.asarray(a) != np.asarray(b)).any()
    for a, b in zip(*map(jax.tree.leaves, (before, state.params)), strict=True)
  )


def test_without_forward_kl_no_trajectories_are_needed():
  batch = {name: make_batch(0)[name] for name in ("tokens", "example_id")}

  def shapes(weight):
    case = make_case("generator", weight=weight)
    step = functools.partial(case.step, mean=lambda tree: tree)
    return jax.eval_shape(step, jax.eval_shape(case.create), batch, *case.frozen)[1]

  assert "forward_kl" not in shapes(0.0)
  with pytest.raises(KeyError, match="trajectories"):
    shapes(0.1)


@pytest.mark.parametrize(
  "ratio, warmup, steps, expected",
  [(5, 0, 12, [0, 5, 10]), (1, 0, 3, [0, 1, 2]), (2, 3, 8, [3, 5, 7]), (5, 20, 12, [])],
)
def test_the_critic_is_trained_more_often_and_first(ratio, warmup, steps, expected):
  config = DistillConfig(
    steps=steps, batch=8, lr=1.0, critic_lr=1.0, critic_updates=ratio, critic_warmup=warmup
  )
  assert [i for i in range(steps) if config.updates_generator(i)] == expected
  assert config.generator_steps == len(expected)


def test_the_average_counts_the_generator_s_own_updates(monkeypatch):
  """Five critic updates to each, after a warm-up of ten."""
  monkeypatch.setattr(distill, "update_ema", lambda ema, params, updates, config: updates)
  config = DistillConfig(
    steps=50, batch=BATCH, lr=0.02, critic_lr=0.03, critic_updates=5, critic_warmup=10
  )
  step = distill.make_generator_step(
    config, Student(MODEL, MODEL, MODEL, HIAR, jnp.asarray(SIGMAS), TASK)
  )
  state = states.create(
    jax.random.key(7),
    make_params(0),
    config.generator_optimizer(),
    make_params(1),
    config.critic_optimizer(),
  )
  batch = jax.tree.map(jnp.asarray, make_batch(0))
  count = jax.jit(
    lambda i: step(state.replace(step=i), batch, make_params(2), mean=lambda tree: tree)[0].ema
  )
  turns = [i for i in range(30) if config.updates_generator(i)]
  assert [int(count(i)) for i in turns] == [0, 1, 2, 3]


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
from tests.training import test_steps as t

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

"""Low-rank adapters: what they start as, what they move, and that a network merged with them is any
network.
"""

import dataclasses
import math

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import shapes_framepack
from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, replicated
from hiar_jax.parallel.rules import leaf_sharding, tree_shardings
from hiar_jax.training import framepack
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.framepack import FramePackConfig
from hiar_jax.training.lora import Adapters, LoRAConfig
from hiar_jax.training.state import create_state
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import slow
from tests.helpers.training_steps import compiled_quickly  # noqa: F401

NETWORK = dataclasses.replace(tiny.CONFIG, packing=(1, 2))
WHOLE = ("packed_k1", "packed_k2")
LORA = LoRAConfig(rank=3, alpha=6.0)
ADAPTERS = Adapters(NETWORK, LORA, WHOLE)
FRAMES = 6


def config(**changes) -> FramePackConfig:
  fields = dict(steps=10, batch=4, lr=1e-2, packing="td_f2k2f1k1_g2", caption_dropout=0.0)
  return FramePackConfig(**fields | changes)


def make_batch(size: int = tiny.BATCH) -> dict:
  index = np.arange(size, dtype=np.int32)
  latents = np.tile(tiny.video(1, FRAMES), (size // tiny.BATCH, 1, 1, 1, 1))
  text = np.tile(tiny.text(), (size // tiny.BATCH, 1, 1))
  return {"latents": latents + 0.1 * index.reshape(-1, 1, 1, 1, 1), "text": text} | {
    "example_id": index
  }


def frozen(adapters: Adapters = ADAPTERS) -> framepack.Frozen:
  negative = jnp.asarray(0.1 * tiny.text()[:1])
  return framepack.Frozen(negative, adapters.frozen(tiny.params(NETWORK)))


def start(adapters: Adapters = ADAPTERS):
  return adapters.start(jax.random.key(3), tiny.params(NETWORK))


def apart(x, y) -> dict[str, float]:
  """The largest difference of each leaf."""
  moved = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), x, y)
  return {"/".join(path): value for path, value in traverse_util.flatten_dict(moved).items()}


def opened(seed: int = 5):
  """Adapters whose B is not zero any more."""
  return jax.tree.map(lambda x: x + 0.1 * tiny.random(seed, *x.shape), start())


def test_at_the_start_the_network_is_the_base_bit_for_bit():
  merged = quick_jit(ADAPTERS.merged)(start(), frozen().base)
  assert jax.tree.structure(merged) == jax.tree.structure(tiny.params(NETWORK))
  assert set(apart(merged, tiny.params(NETWORK)).values()) == {0.0}


def test_merged_is_what_is_applied():
  """x W0 + (alpha / rank) x A B, by hand, of every matrix; nothing else moves."""
  trained, base = jax.device_get(opened()), tiny.params(NETWORK)
  merged = jax.device_get(quick_jit(ADAPTERS.merged)(trained, frozen().base))
  merged = traverse_util.flatten_dict(merged)
  changed = 0
  for path, kernel in traverse_util.flatten_dict(base).items():
    if path[0] in WHOLE:
      np.testing.assert_array_equal(merged[path], trained[path[0]][path[1]])
    elif path[0] == "layers" and path[-1] == "kernel":
      pair = trained["adapters"]
      for name in path:
        pair = pair[name]
      for layer in range(NETWORK.num_layers):
        x = tiny.random(layer, 4, kernel.shape[1])
        applied = x @ kernel[layer] + 6 / 3 * (x @ pair["a"][layer]) @ pair["b"][layer]
        np.testing.assert_allclose(x @ merged[path][layer], applied, rtol=1e-4, atol=1e-5)
        changed += 1
    else:
      np.testing.assert_array_equal(merged[path], kernel)
  assert changed == 10 * NETWORK.num_layers  # q, k, v, o of two attentions, two of the MLP


def test_the_number_of_trained_parameters():
  """rank (in + out) a matrix, and the packed projections."""
  count = sum(leaf.size for leaf in jax.tree.leaves(start()))
  d, hidden, rank = NETWORK.dim, NETWORK.ffn_dim, LORA.rank
  matrices = 8 * rank * (d + d) + 2 * rank * (d + hidden)
  packed = [math.prod(leaf.shape) for leaf in jax.tree.leaves([start()[n] for n in WHOLE])]
  assert count == NETWORK.num_layers * matrices + sum(packed)


def step_with(c: FramePackConfig, optimizer, adapters: Adapters = ADAPTERS):
  return framepack.make_step(c, NETWORK, optimizer, FRAMES, adapters=adapters)


@pytest.mark.parametrize("rule", ["adamw", *slow("muon")])
def test_adapters_alone_are_trained(rule):
  """The base, which is an argument, cannot move; state and average hold nothing of it."""
  c = config(rule=rule, ema_decay=0.5)
  optimizer = c.optimizer(ADAPTERS)
  state = first = create_state(jax.random.key(0), start(), optimizer)
  given = frozen()
  before = jax.tree.map(np.array, given.base)
  step = quick_jit(step_with(c, optimizer))
  losses = []
  for _ in range(6):
    state, metrics = step(state, make_batch(), given)
    losses.append(float(metrics["loss"]))
  assert np.isfinite(losses).all()
  assert set(apart(before, given.base).values()) == {0.0}
  assert set(state.params) == set(state.ema) == {"adapters", *WHOLE}
  assert min(apart(first.params, state.params).values()) > 0
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  assert sum(x.size for x in moments) <= 2 * sum(x.size for x in jax.tree.leaves(state.params))
  assert 0 < apart(state.ema, state.params)["adapters/layers/mlp_in/kernel/b"]


def test_muon_moves_the_pair_along_orthogonal_steps():
  """Without it AdamW would move both: A's first step has singular values of one size."""
  c = config(rule="muon", weight_decay=0.0, muon_lr=0.1, lr=1e-9, clip=1e9)
  optimizer = c.optimizer(ADAPTERS)
  params = opened()
  grads = jax.tree.map(lambda x: jnp.asarray(tiny.random(1, *x.shape)), params)
  moved, _ = quick_jit(optimizer.update)(grads, optimizer.init(params), params)
  sizes = np.linalg.svd(moved["adapters"]["layers"]["mlp_in"]["kernel"]["a"], compute_uv=False)
  assert sizes.min() > 0.4 * sizes.max() > 0.01
  assert np.abs(moved["packed_k1"]["kernel"]).max() < 1e-6


@pytest.mark.slow
def test_accumulated_parts_make_the_same_update():
  states = []
  for accumulate in (1, 2):
    c = config(accumulate=accumulate)
    optimizer = optax.sgd(0.1)
    state = create_state(jax.random.key(0), opened(), optimizer)
    states.append(quick_jit(step_with(c, optimizer))(state, make_batch(4), frozen())[0])
  one, two = (state.params for state in states)
  assert max(apart(one, opened()).values()) > 1e-3
  assert max(apart(one, two).values()) < 1e-5


@pytest.mark.slow
def test_over_devices_the_update_is_the_same():
  """The base and the adapters split over fsdp."""
  c, optimizer = config(), optax.sgd(0.1)
  create = lambda: create_state(jax.random.key(0), opened(), optimizer)
  found = []
  for mesh_config, count in ((MeshConfig(), 1), (MeshConfig(data=1, fsdp=2, min_shard=16), 2)):
    mesh = make_mesh(mesh_config, jax.devices()[:count])
    with jax.set_mesh(mesh):
      put = lambda tree, root: jax.device_put(
        tree,
        tree_shardings(tree, mesh, ADAPTERS.sharding_rules, min_shard=mesh_config.min_shard),  # noqa: B023
      )
      shardings = tree_shardings(
        jax.eval_shape(create), mesh, ADAPTERS.sharding_rules, min_shard=mesh_config.min_shard
      )
      state = jax.jit(create, out_shardings=shardings)()
      negative, base = frozen()
      given = framepack.Frozen(jax.device_put(negative, replicated(mesh)), put(base, "frozen"))
      make = lambda mean: framepack.make_step(
        c, NETWORK, optimizer, FRAMES, adapters=ADAPTERS, mean=mean
      )
      step = map_step(make, shardings, mesh)
      state, _ = step(state, put_batch(make_batch(4), mesh), given)
      found.append(jax.tree.map(np.asarray, state.params))
      if count == 2:
        a = state.params["adapters"]["layers"]["mlp_in"]["kernel"]["a"]
        assert len(a.sharding.device_set) == 2 and not a.sharding.is_fully_replicated
  assert max(apart(*found).values()) < 1e-5


def test_rules_split_the_pair_as_its_matrix():
  mesh = jax.sharding.AbstractMesh((2,), ("tensor",))
  spec = lambda path, shape: tuple(
    leaf_sharding(path, mesh, ADAPTERS.sharding_rules, shape=shape).spec
  )
  base = "state/ema/adapters/layers/self_attention"
  assert spec(f"{base}/q/kernel/a", (2, 16, 4)) == ()
  assert spec(f"{base}/q/kernel/b", (2, 4, 16)) == (None, None, "tensor")
  assert spec(f"{base}/o/kernel/a", (2, 16, 4)) == (None, "tensor")
  assert spec(f"{base}/o/kernel/b", (2, 4, 16)) == ()
  assert spec("frozen/layers/self_attention/o/kernel", (2, 16, 16)) == (None, "tensor")


def test_modules_are_chosen_by_name():
  chosen = Adapters(NETWORK, dataclasses.replace(LORA, modules=("self_attention", "mlp_in")))
  paths = {path[2:-2] for path in traverse_util.flatten_dict(start(chosen))}
  assert paths == {("self_attention", name) for name in "qkvo"} | {("mlp_in",)}
  wrong = Adapters(NETWORK, dataclasses.replace(LORA, modules=("attention",)))
  with pytest.raises(UserError, match="lora.modules: 'attention': the layers have k, mlp_in, mlp_"):
    start(wrong)
  with pytest.raises(UserError, match="rank = -1: expected at least 0"):
    LoRAConfig(rank=-1)


def test_an_experiment_trains_what_its_teacher_lacks_as_it_is():
  c = shapes_framepack.get_config("smoke")
  assert build(Experiment, c).packed_adapters is None
  with c.unlocked():
    c.framepack.lora = {"rank": 4}
  adapters = build(Experiment, c).packed_adapters
  assert adapters.whole == ("packed_k1", "packed_k2", "packed_k4") and adapters.config.rank == 4
  assert adapters.config.scale == 1.0 and LORA.scale == 2.0

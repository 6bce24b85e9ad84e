"""Mapped steps: the whole batch on any devices, the state where it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, replicated
from hiar_jax.parallel.rules import tree_shardings

P = jax.P


def make_count_step(mean):
  def step(state, batch, frozen):
    total = mean(batch["x"].astype(jnp.float32).mean())
    return {"w": state["w"] + total * frozen["scale"]}, {"loss": total}

  return step


@pytest.mark.parametrize("mapping", ["jit", "pmap"])
def test_a_mapped_step_sees_the_whole_batch_on_any_devices(mapping):
  for devices in (1, 4, 8):
    mesh = make_mesh(MeshConfig(mapping=mapping), jax.devices()[:devices])
    state = {"w": jax.device_put(jnp.zeros((16, 16)), replicated(mesh))}
    step = map_step(make_count_step, tree_shardings(state, mesh, min_shard=1), mesh, mapping)
    with jax.set_mesh(mesh):
      for _ in range(2):  # the state goes round
        state, metrics = step(
          state, put_batch({"x": np.arange(16.0)}, mesh), {"scale": jnp.float32(2)}
        )
    np.testing.assert_allclose(state["w"], np.full((16, 16), 2 * 2 * 7.5))
    assert float(metrics["loss"]) == 7.5


def test_a_mapped_step_keeps_the_state_where_it_was():
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))
  shapes = {"w": jax.ShapeDtypeStruct((16, 16), jnp.float32)}
  shardings = tree_shardings(shapes, mesh, min_shard=1)
  state = jax.jit(lambda: {"w": jnp.zeros((16, 16))}, out_shardings=shardings)()
  step = map_step(make_count_step, shardings, mesh)
  after, _ = step(state, put_batch({"x": np.arange(16.0)}, mesh), {"scale": jnp.float32(1)})
  assert after["w"].sharding.spec == P("fsdp")
  assert state["w"].is_deleted()  # its memory was used again

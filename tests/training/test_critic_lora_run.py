"""A run whose critic is adapters: what its state and its frozen weights are, what its config may
say, and that it is resumed.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import hiar_wan_1_3b
from hiar_jax import plan, train
from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.planning.stage_steps import step_of
from hiar_jax.training.experiment import Experiment
from tests.helpers import tiny_run
from tests.helpers.untrained import compiles_quickly  # noqa: F401

MESH = {"mesh__data": 4, "mesh__fsdp": 2, "mesh__min_shard": 64}


def experiment(lora: dict | None = None, **changes) -> Experiment:
  config = tiny_run.make_config(**tiny_run.EIGHT, **changes)
  with config.unlocked():
    config.distill.critic_lora = lora or {"rank": 0}
  return build(Experiment, config)


def count(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def held(tree) -> int:
  """Bytes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract(e: Experiment, name: str):
  return step_of(AbstractRun(e, pathlib.Path(), make_mesh(MeshConfig())), name)


def test_the_state_holds_adapters_in_place_of_weights():
  """rank (in + out) a matrix and two moments of AdamW, where the whole critic has three of all."""
  whole, small = (abstract(experiment(lora), "critic").state for lora in (None, {"rank": 4}))
  d, hidden = 16, 16  # tiny_run's sizes; one layer
  adapters = 4 * (8 * (d + d) + 2 * (d + hidden))
  assert count(small.critic) == adapters < count(whole.critic)
  moments = [x for x in jax.tree.leaves(small.critic_opt_state) if x.ndim]
  assert count(moments) == 2 * adapters
  assert jax.tree.map(jnp.shape, small.params) == jax.tree.map(jnp.shape, whole.params)
  assert jax.tree.structure(small.opt_state) == jax.tree.structure(whole.opt_state)


def test_the_base_is_frozen_in_the_dtype_that_computes():
  """One tree with the real score's where that is the teacher too; else its own."""
  same = experiment({"rank": 4}, model__dtype="bfloat16")
  critic, generator = (abstract(same, name).frozen for name in ("critic", "generator"))
  assert {leaf.dtype.name for leaf in jax.tree.leaves(critic)} == {"bfloat16"}
  assert critic.real_score is None and count(critic.critic) == count(generator.real_score)
  assert generator.critic is None
  assert abstract(experiment(), "critic").frozen is None
  published = hiar_wan_1_3b.get_config()
  with published.unlocked():
    published.distill.critic_lora = {"rank": 128}
  wan = abstract(build(Experiment, published), "generator").frozen
  assert count(wan.critic) < count(wan.real_score) / 9
  # 30 layers: eight attention projections and two of the MLP
  state = abstract(build(Experiment, published), "critic").state
  assert count(state.critic) == 30 * 128 * (8 * 2 * 1536 + 2 * (1536 + 8960))
  # docs/performance.md
  whole = abstract(build(Experiment, hiar_wan_1_3b.get_config()), "critic").state
  of_critic = lambda state: held((state.critic, state.critic_opt_state))
  assert round((of_critic(state) + held(wan.critic)) / 1e7) == 459
  assert round(of_critic(whole) / 1e7) == 1419


@pytest.mark.parametrize(
  ("lora", "said"),
  [
    ({"rank": -1}, "distill.critic_lora: rank = -1: expected at least 0"),
    ({"rank": 17}, "lora.rank = 17: expected at most 16, as the smallest matrix is 16 x 16"),
    ({"rank": 2, "modules": ("attention",)}, "lora.modules: 'attention': the layers have k, mlp_"),
  ],
)
def test_what_is_unsuitable_is_said_before_any_stage(lora, said):
  with pytest.raises(UserError) as caught:
    experiment(lora)
  assert str(caught.value).startswith(said)


def test_a_workdir_keeps_its_rank(tmp_path):
  tiny_run.make_run(tmp_path, distill__critic_lora={"rank": 2})
  tiny_run.pretend(tmp_path, "distill", 2)
  with pytest.raises(UserError, match=r"distill.critic_lora.rank: 2 -> 3"):
    tiny_run.make_run(tmp_path, distill__critic_lora={"rank": 3})


def test_other_weights_of_the_real_score_are_no_base():
  e = experiment({"rank": 4})
  at = lambda **weights: (
    dataclasses.replace(e, weights=dataclasses.replace(e.weights, **weights)).one_score
  )
  assert at() and at(base="a") and at(base="a", teacher="a") and not at(base="a", teacher="b")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["critic", "generator"])
def test_a_plan_shows_the_smaller_state(name):
  made = [
    plan.ENTRIES[name].make(AbstractRun(e, pathlib.Path(), make_mesh(e.mesh)))
    for e in (experiment(None, **MESH), experiment({"rank": 2}, **MESH))
  ]
  whole, small = (program.bytes_of("state") for program in made)
  assert small < 0.8 * whole
  lowered = made[1].lower().as_text()
  assert "mhlo.num_partitions = 8" in lowered
  base = made[1].arguments["frozen"]
  base = base.critic or base.real_score
  assert "fsdp" in base["layers"]["mlp_in"]["kernel"].sharding.spec
  a = made[1].arguments["state"].critic["adapters"]["layers"]["mlp_in"]["kernel"]["a"]
  assert a.shape == (1, 16, 2)


# -------------------------------------------------------------------------------------- its stages


@pytest.mark.slow
def test_it_goes_through_distillation_and_is_resumed_bit_for_bit(tmp_path):
  config = tiny_run.make_config(**tiny_run.EIGHT, **MESH, distill__critic_lora={"rank": 2})
  straight, again = tmp_path / "straight", tmp_path / "again"
  train.main(config, str(straight))
  shutil.copytree(straight, again)
  for left in ("distill/checkpoints/6", "sample"):
    shutil.rmtree(again / left)
  train.main(config, str(again))
  ends = [tiny_run.state(workdir, "distill", 6) for workdir in (straight, again)]
  tiny_run.assert_same_arrays(*ends)
  tiny_run.assert_same_arrays(tiny_run.videos(straight), tiny_run.videos(again))
  held = {name for name in ends[0] if name.startswith("critic/")}
  assert held and all(name.startswith("critic/adapters/layers/") for name in held)
  assert len({"a", "b"} & {name.rpartition("/")[2] for name in held}) == 2
  for name in held:
    if name.endswith("/b"):
      assert np.abs(ends[0][name]).max() > 0, name
  stored = json.loads((straight / "config.json").read_text())
  assert stored["distill"]["critic_lora"] == {"rank": 2}
  losses = [record["scalars"]["critic_loss"] for record in tiny_run.log(straight, "distill")]
  assert np.isfinite(losses).all() and len(set(losses)) == 6

"""The Wan experiments at their full size, without allocating any of it: configs, shapes of every
step, bytes on each device of a pod.
"""

import dataclasses
import functools
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.config.building import build
from hiar_jax.config.workdir import difference
from hiar_jax.conversion.dit_keys import dit_key_map
from hiar_jax.data import ode_pairs
from hiar_jax.errors import UserError
from hiar_jax.parallel.rules import tree_shardings
from hiar_jax.training import causal_init, distill, framepack
from hiar_jax.training import state as states
from hiar_jax.training.experiment import Experiment
from tests.helpers import tiny_run
from tests.helpers.slow_cases import few

PARAMETERS = {"1.3b": 1_418_996_800, "14b": 14_288_491_584}  # of the published checkpoints
SIZES = {  # experiment -> (student and critic, real score)
  "hiar_wan_1_3b": ("1.3b", "14b"),
  "self_forcing_wan_1_3b": ("1.3b", "14b"),
  "self_aligned_wan_1_3b": ("1.3b", "14b"),
  "hiar_wan_14b": ("14b", "14b"),
}
METHOD = {
  "history.order",
  "history.level",
  "history.gradient",
  "history.window",
  "history.sink",
  "history.sink_level",
}
RIVALS = {
  "self_forcing_wan_1_3b": {
    "history.order",
    "history.level",
    "distill.forward_kl.weight",
    "distill.critic_lr",
  },
  "self_aligned_wan_1_3b": METHOD - {"history.order"}
  | {f"distill.{x}" for x in ("forward_kl.weight", "critic_lr", "steps", "batch")}
  | {"mesh.sequence"},  # its batch is half of the devices
}


def load(name: str):
  return runpy.run_path(str(tiny_run.ROOT / "experiments" / f"{name}.py"))["get_config"]()


@functools.cache
def experiment(name: str) -> Experiment:
  return build(Experiment, load(name))


def abstract_batch(e: Experiment, size: int) -> dict:
  clip = e.latent.clip
  text = jax.ShapeDtypeStruct((size, e.text.length, e.text.dim), jnp.float32)
  points = jax.ShapeDtypeStruct((size, len(e.student.timesteps) + 1, *clip), jnp.float32)
  return {
    "text": text,
    "example_id": jax.ShapeDtypeStruct((size,), jnp.int32),
    "trajectory": points,
    "trajectories": {"text": text, "trajectory": points},
  }


def count(tree) -> int:
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_every_experiment_is_known():
  found = {path.stem for path in (tiny_run.ROOT / "experiments").glob("*wan*.py")}
  assert found == {*SIZES, "wan_framepack"}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
  e = experiment(name)
  assert e.latent.clip == (21, 60, 104, 16)
  assert e.dit.tokens(60, 104) == 1560
  for config, size in zip((e.dit, e.teacher_dit), SIZES[name], strict=True):
    shapes = jax.eval_shape(lambda config=config: config.init(jax.random.key(0)))
    assert (
      count(shapes)
      == sum(
        int(np.prod(shape))
        for shape in {rule.name: rule.shape for rule in dit_key_map(config)}.values()
      )
      == PARAMETERS[size]
    )


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_differs_in_its_own_lines_alone(name):
  differing = {line.partition(":")[0] for line in difference(load("hiar_wan_1_3b"), load(name))}
  assert differing == RIVALS[name]


def test_trajectories_lie_at_the_published_samplers_levels_or_at_the_students():
  e, published = experiment("hiar_wan_1_3b"), ode_pairs.Sampler()
  assert (e.trajectories.steps, e.trajectories.shift) == (published.steps, published.shift)
  np.testing.assert_allclose(e.trajectories.sigmas(e.student), published.sigmas, rtol=0, atol=1e-12)
  own = dataclasses.replace(e.trajectories, shift=0.0)
  np.testing.assert_array_equal(own.sigmas(e.student), e.student.sigmas)
  with pytest.raises(UserError, match="shift = -1"):
    dataclasses.replace(own, shift=-1.0)


def abstract_state(e: Experiment, key):
  init = lambda: e.dit.init(jax.random.key(0))
  config = e.distill
  return jax.eval_shape(
    lambda: states.create_state(
      key, init(), config.generator_optimizer(e.student_dit), init(), config.critic_optimizer(e.dit)
    )
  )


@pytest.mark.parametrize("name", few(SIZES, "hiar_wan_1_3b"))
def test_every_step_is_traced_at_full_size(name):
  """What is traced is what a pod would compile: 21 latent frames of 60 x 104, windows, sinks, all
  levels.
  """
  e = experiment(name)
  state = abstract_state(e, jax.random.key(0))
  networks = distill.Networks(e.student_dit, e.dit, e.teacher_dit)
  made_of = e.distill, networks, e.history.at(e.student.sigmas), e.latent
  generator = distill.make_generator_step(*made_of, e.distill.generator_optimizer(e.student_dit))
  critic = distill.make_critic_step(*made_of, e.distill.critic_optimizer(e.dit))
  teacher = jax.eval_shape(lambda: e.teacher_dit.init(jax.random.key(0)))
  negative = jax.ShapeDtypeStruct((1, e.text.length, e.text.dim), jnp.float32)
  batch = abstract_batch(e, 1)
  after, measured = jax.eval_shape(generator, state, batch, distill.Frozen(teacher, negative))
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
  assert ("forward_kl" in measured) == (e.distill.forward_kl.weight > 0)
  after, _ = jax.eval_shape(critic, state, batch)
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
  optimizer = e.causal_init.optimizer(e.dit)
  init = causal_init.make_step(e.causal_init, e.student_dit, e.history, e.student.sigmas, optimizer)
  start = jax.eval_shape(
    lambda: states.create_state(jax.random.key(0), e.dit.init(jax.random.key(0)), optimizer)
  )
  after, _ = jax.eval_shape(init, start, batch)
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, start)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("devices", [8, 64])
def test_the_state_is_spread_over_the_devices(name, devices):
  """Bytes of all weights, averages and moments on each device: an even share of every large array;
  the small ones are few.
  """
  e = experiment(name)
  mesh = jax.sharding.AbstractMesh((1, devices), ("data", "fsdp"))
  for tree in (
    abstract_state(e, jax.random.key(0)),
    jax.eval_shape(lambda: e.teacher_dit.init(jax.random.key(0))),
  ):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    large = [leaf for leaf in leaves if leaf.size >= e.mesh.min_shard]
    assert count(leaves) - count(large) < 0.005 * count(leaves)
    shardings = tree_shardings(large, mesh, min_shard=e.mesh.min_shard)
    for leaf, where in zip(large, shardings, strict=True):
      assert int(np.prod(where.shard_shape(leaf.shape))) * devices == leaf.size, leaf.shape


def test_framepack_is_the_base_and_its_projections():
  """Table 1's schedule at 480p: four sections of 14,040 tokens, each with 2,366 of history."""
  e = experiment("wan_framepack")
  assert e.latent.clip == (36, 60, 104, 16) and e.framepack.sections(36) == 4
  tokens = {1: 30 * 52, 2: 15 * 26, 4: 4 * 8 * 13}
  assert e.packed_dit.packing == tuple(tokens) and sum(tokens.values()) == 2366
  shapes = jax.eval_shape(lambda: e.packed_dit.init(jax.random.key(0)))
  # a kernel's taps, of 16 channels, and a bias
  projections = sum((4 * pool**3 * 16 + 1) * 1536 for pool in tokens)
  assert count(shapes) == PARAMETERS["1.3b"] + projections


def test_framepack_is_traced_at_full_size():
  """One program for its four sections; state in, state out."""
  e = experiment("wan_framepack")
  network, optimizer = e.packed_dit, e.framepack.optimizer(e.packed_dit)
  state = jax.eval_shape(
    lambda: states.create_state(jax.random.key(0), network.init(jax.random.key(0)), optimizer)
  )
  made = framepack.make_step(e.framepack, network, optimizer, e.latent.frames)
  assert len(e.framepack.rows(e.latent.frames)) == 1
  size = e.framepack.accumulate
  batch = abstract_batch(e, size) | {
    "latents": jax.ShapeDtypeStruct((size, *e.latent.clip), jnp.float32)
  }
  negative = jax.ShapeDtypeStruct((1, e.text.length, e.text.dim), jnp.float32)
  after, measured = jax.eval_shape(made, state, batch, framepack.Frozen(negative))
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
  assert measured["loss"].shape == ()


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"weights.base": ""}, "'videos' with codec.kind = 'wan' trains no teacher: give weights.base"),
    ({"data.frames": 17}, "data.frames = 17 is not whole blocks .* the nearest is 33"),
    ({"data.frames": 81}, "the nearest is 69"),
    ({"data.source": "prompts"}, "needs data.prompts"),
    ({"data.folder": ""}, "needs data.folder"),
    ({"data.latent_dtype": "float16"}, "latent_dtype = 'float16': expected one of float32, bfloat"),
  ],
)
def test_what_does_not_fit_framepack_is_said(change, match):
  c = load("wan_framepack")
  c.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=match):
    build(Experiment, c)


def test_what_a_stage_reads_decides_the_source():
  """Sections are of clips; distillation reads captions, and does not encode clips for them."""
  c = load("wan_framepack")
  c.data = dict(source="prompts", prompts="prompts.txt", frames=141, size=(480, 832))
  with pytest.raises(UserError, match="framepack stage reads clips, .* = 'shapes' or 'videos'"):
    build(Experiment, c)
  c = load("hiar_wan_1_3b")
  c.data = dict(source="videos", folder="clips", frames=81, size=(480, 832))
  with pytest.raises(UserError, match="distill stage reads captions alone, .* = 'prompts'"):
    build(Experiment, c)
  c = load("hiar_wan_1_3b")
  c.codec = dict(patch=8, channels=16)
  with pytest.raises(UserError, match="'patches', which is fitted on clips: .*codec.kind = 'wan'"):
    build(Experiment, c)


def test_a_group_of_another_kind_is_named():
  c = load("hiar_wan_1_3b")
  c.codec.kind = "wam"
  with pytest.raises(UserError, match=r"codec.kind = 'wam'.*wan"):
    build(Experiment, c)


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"data.frames": 80}, "the nearest is 81"),
    ({"data.size": (480, 830)}, "not a multiple of 8"),
    ({"data.size": (488, 832)}, "cannot be cut into model.patch"),
    ({"weights.base": ""}, "give weights.base"),
    ({"weights.teacher": ""}, "no weights.teacher"),
    ({"data.prompts": ""}, "data.prompts"),
    ({"codec.dtype": "float17"}, "codec.dtype"),
  ],
)
def test_what_does_not_fit_is_said(change, match):
  c = load("hiar_wan_1_3b")
  c.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=match):
    build(Experiment, c)

"""Guidance as an input of a packed model: the network's part, its training, sampling and costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import shapes_framepack
from hiar_jax import flow
from hiar_jax.config.building import build
from hiar_jax.config.workdir import to_json
from hiar_jax.conversion.dit_keys import dit_key_map
from hiar_jax.errors import UserError
from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.frames import Frames, bind, whole_clip
from hiar_jax.packing import orders
from hiar_jax.packing.rows import History, groups_of_row
from hiar_jax.packing.schedule import parse
from hiar_jax.planning import programs
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.rollout import packed
from hiar_jax.rollout.noise import example_keys
from hiar_jax.training import framepack
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.framepack import FramePackConfig
from hiar_jax.training.lora import Adapters, LoRAConfig
from hiar_jax.training.state import create_state
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.training_steps import compiled_quickly  # noqa: F401

PLAIN = tiny.CONFIG.packed((1, 2))
GUIDED = tiny.CONFIG.packed((1, 2), guided=True)
SCALES = np.asarray([1.0, 9.0], np.float32)
NEGATIVE = jnp.asarray(0.1 * tiny.text()[:1])


def groups(sigma=0.7) -> tuple[Frames, ...]:
  history = Frames(tiny.video(3, 2), sigma, np.arange(2), projection="packed_k2")
  return history, Frames(tiny.video(1, 2), sigma, np.arange(2, 4))


@functools.cache
def forward(network):
  """(params, guidance) -> velocity; compiled once for all scales."""
  run = lambda params, scale: bind(network, params, tiny.text(), guidance=scale)(groups())
  return quick_jit(lambda *given: run(*given).velocity[-1])


def velocity(network, params, guidance=None):
  return np.asarray(forward(network)(params, guidance))


def test_at_the_start_it_is_the_network_without_it_bit_for_bit():
  params = tiny.params(PLAIN)
  made = GUIDED.with_projections(params)
  assert made.keys() - params.keys() == {"guidance_in", "guidance_out"}
  expected = velocity(PLAIN, params)
  for guidance in (None, SCALES):
    np.testing.assert_array_equal(velocity(GUIDED, made, guidance), expected)
  assert PLAIN.with_projections(made).keys() == params.keys()
  shapes = [jax.eval_shape(network.init, jax.random.key(0)) for network in (GUIDED, PLAIN)]
  assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, made)
  assert shapes[1].keys() == params.keys()


def test_the_scale_is_read_by_those_who_are_given_one():
  params = tiny.params(GUIDED)  # none of them zero
  without = velocity(PLAIN, PLAIN.with_projections(params))
  np.testing.assert_array_equal(velocity(GUIDED, params), without)
  same, high = velocity(GUIDED, params, SCALES), velocity(GUIDED, params, SCALES + 1)
  # each clip its own, and each scale another
  assert np.abs(same - high).max(axis=(1, 2, 3, 4)).min() > 1e-3
  swapped = velocity(GUIDED, params, SCALES[[0, 0]])
  np.testing.assert_array_equal(swapped[0], same[0])
  assert np.abs(swapped[1] - same[1]).max() > 1e-3


def test_what_has_no_such_input_says_so():
  with pytest.raises(UserError, match="to a model without distilled guidance"):
    velocity(PLAIN, tiny.params(PLAIN), SCALES)
  with pytest.raises(UserError, match="an input of packed models alone"):
    bind(GUIDED, tiny.params(GUIDED), tiny.text(), guidance=SCALES)(
      whole_clip(tiny.video(1, 2), 0.5)
    )
  with pytest.raises(UserError, match="distilled guidance: none of the layouts has a place"):
    dit_key_map(DiTConfig(packing=(1, 2, 4), guided=True), "diffusers")
  assert "guided" not in to_json(PLAIN) and to_json(GUIDED)["guided"] is True


# ----------------------------------------------------------------------------------------- training


def config(**changes) -> FramePackConfig:
  fields = dict(steps=10, batch=2, lr=1e-3, packing="td_f2k2f1k1_g2", caption_dropout=0.0)
  return FramePackConfig(**{"distilled_guidance": (2.0, 6.0)} | fields | changes)


def batch(frames: int = 2) -> dict:
  index = np.arange(tiny.BATCH, dtype=np.int32)
  return {"latents": tiny.video(1, frames), "text": tiny.text(), "example_id": index}


def updated(c, params, ema=None, loss_alone=False):
  """(state, metrics); with loss_alone the two losses, which compile without any gradient."""
  optimizer = optax.sgd(1.0)
  state = create_state(jax.random.key(0), params, optimizer)
  state = state.replace(ema=ema or state.ema)
  step = framepack.make_step(c, GUIDED, optimizer, 2)

  def losses(*given):
    before, metrics = given[0], step(*given)[1]
    return before, {name: x for name, x in metrics.items() if name != "grad_norm"}

  run = quick_jit(losses if loss_alone else step)
  return run(state, batch(), framepack.Frozen(NEGATIVE))


@pytest.mark.slow
def test_the_loss_by_hand():
  """The plain one, and the distance to the guided velocity of the average without the scale."""
  c, params = config(), tiny.params(GUIDED)
  ema = jax.tree.map(lambda x: 0.9 * x, params)
  state, metrics = updated(c, params, ema, loss_alone=True)
  key = jax.random.fold_in(jax.random.fold_in(state.key, 0), 1)
  keys = jax.vmap(lambda k: jax.random.split(k, 4))(example_keys(key, batch()["example_id"]))
  sigma = framepack.sample_sigma(keys[:, 1], c.shift)
  x0 = tiny.video(1, 2)
  x = flow.add_noise(x0, framepack.example_normal(keys[:, 3], x0.shape[1:]), sigma)
  row = jax.tree.map(lambda part: part[0], c.rows(2)[0])
  there = groups_of_row(c.parsed, c.history, x0, row, x, sigma)
  g = np.asarray(framepack._guided(c, GUIDED, params, ema, batch(), NEGATIVE, keys[:, 0]).g)
  assert g.shape == (2,) and g[0] != g[1] and 2 <= g.min() and g.max() <= 6
  forward = quick_jit(
    lambda params, text, guidance: bind(GUIDED, params, text, guidance=guidance)(there)
  )
  run = lambda *given: np.asarray(forward(*given).velocity[-1])
  negative = np.broadcast_to(NEGATIVE, tiny.text().shape)
  with_text, without = run(ema, tiny.text(), None), run(ema, negative, None)
  target = np.stack([v + s * (v - w) for v, w, s in zip(with_text, without, g, strict=True)])
  error = np.mean((run(params, tiny.text(), 1 + g) - target) ** 2)
  np.testing.assert_allclose(metrics["distilled_guidance"], error, rtol=1e-4)
  plain = updated(config(distilled_guidance=()), params, loss_alone=True)[1]
  assert "distilled_guidance" not in plain
  np.testing.assert_allclose(metrics["loss"], plain["loss"] + error, rtol=1e-4)


@pytest.mark.slow
def test_the_teacher_gets_no_gradient():
  """The scale's layers, which the plain loss does not reach, learn from the guided velocity."""
  params = tiny.params(GUIDED)
  # numbers of NumPy: each operation on JAX's would be compiled
  after = jax.device_get(updated(config(), params)[0].params)
  moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), jax.device_get(params), after)
  assert min(moved["guidance_in"]["kernel"], moved["guidance_out"]["kernel"]) > 0
  c = config()
  grad = jax.grad(
    lambda ema: (
      framepack._guided(
        c, GUIDED, params, ema, batch(), NEGATIVE, jax.random.split(jax.random.key(1), 2)
      )
      .loss(groups())
      .sum()
    )
  )
  found = jax.device_get(quick_jit(grad)(params))
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(found))


@pytest.mark.slow
def test_the_guided_velocity_is_learnt():
  """With a teacher that stands still, by the layers of the scale and the others."""
  params = GUIDED.with_projections(tiny.params(PLAIN))
  optimizer = optax.adam(3e-3)
  state = create_state(jax.random.key(0), params, optimizer)
  step = quick_jit(framepack.make_step(config(), GUIDED, optimizer, 2))
  losses = []
  for _ in range(60):
    state, metrics = step(state.replace(ema=params), batch(), framepack.Frozen(NEGATIVE))
    losses.append(float(metrics["distilled_guidance"]))
  assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


@pytest.mark.slow
def test_with_adapters_the_embedding_is_trained_as_it_is():
  c = shapes_framepack.get_config("smoke")
  with c.unlocked():
    c.framepack.update(lora={"rank": 2}, distilled_guidance=(0.0, 3.0))
  whole = build(Experiment, c).packed_adapters.whole
  assert {"guidance_in", "guidance_out", "packed_k1"} < set(whole)
  adapters = Adapters(GUIDED, LoRAConfig(rank=2), ("guidance_in", "guidance_out"))
  full = tiny.params(GUIDED)
  optimizer = optax.sgd(0.1)
  state = create_state(jax.random.key(0), adapters.start(jax.random.key(1), full), optimizer)
  step = quick_jit(framepack.make_step(config(), GUIDED, optimizer, 2, adapters=adapters))
  _, metrics = step(state, batch(), framepack.Frozen(NEGATIVE, adapters.frozen(full)))
  # at the start the merged network is the whole one
  expected = updated(config(), full)[1]
  np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)


# ------------------------------------------------------------------------------- sampling and costs


@dataclasses.dataclass(frozen=True, eq=False)
class Told:
  """Returns the scale that it is told as velocity, and counts its forwards."""

  patch: tuple = (1, 2, 2)
  calls: list = dataclasses.field(default_factory=list)

  def apply(self, params, groups, texts, past=(), start=None, guidance=None):
    self.calls.append(guidance is not None)
    return tiny.Out(
      tuple(jnp.broadcast_to(guidance.reshape(-1, 1, 1, 1, 1), g.x.shape) for g in groups), ()
    )


@pytest.mark.parametrize("own_texts", [False, True])
def test_sampling_tells_the_scale_in_one_forward_a_step(own_texts):
  told, schedule = Told(), parse("td_f1k1_g2")
  sections = packed.SectionSampler(
    network=told,
    schedule=schedule,
    history=History(),
    sigmas=jnp.asarray([1.0, 0.5, 0.0]),
    negative=NEGATIVE,
    guidance=4.0,
    distilled=True,
    key=jax.random.key(0),
    frame=tiny.shape(1).clip[1:],
  )
  generate = packed.make_sampler(sections, orders.vanilla(2), 4)
  still = packed.section_noise(jax.random.key(0), np.asarray([1, 2]), tiny.shape(4).block(2))
  text = np.stack([tiny.text()] * 2, 1) if own_texts else tiny.text()
  video = quick_jit(generate)(None, text, np.asarray([1, 2]))
  assert all(told.calls)
  # x0 = eps - v, and v = 1 + g = 5 all the way
  for section in (0, 1):
    made = video[:, 2 * section : 2 * section + 2]
    np.testing.assert_allclose(made, still(jnp.asarray(section)) - 5.0, atol=1e-5)


def test_a_plan_counts_one_forward(tmp_path):
  found = []
  for scales in ((), (0.0, 3.0)):
    c = shapes_framepack.get_config("smoke")
    c.sample.update(steps=16, guidance=1.0)
    with c.unlocked():
      c.framepack.distilled_guidance = scales
    run = AbstractRun(build(Experiment, c), tmp_path, None)
    found.append(programs.operations(run, programs.generate))
  two, one = found
  assert one < two and one == pytest.approx(two / 2, rel=1e-3)  # and the embedding of the scale


def test_bad_settings():
  for scales in ((1.0,), (3.0, 1.0), (-1.0, 2.0)):
    with pytest.raises(UserError, match="distilled_guidance"):
      config(distilled_guidance=scales)
  c = shapes_framepack.get_config("smoke")
  c.sample.guidance = 1.0
  with c.unlocked():
    c.framepack.distilled_guidance = (2.0, 6.0)
  with pytest.raises(
    UserError, match="sample.guidance = 1.0: the model learns framepack.distilled"
  ):
    build(Experiment, c)
  assert flow.classifier_free_guidance(3.0, 1.0, 2.0) == 7.0  # g = 2 is scale 3, as the input says

"""The DiT: sizes, the uses of one parameter tree, and that ways to save memory change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.method import MethodConfig
from hiar_jax.models import dit
from hiar_jax.models.frames import Frames
from hiar_jax.planning import flops
from hiar_jax.rollout.past.clip_groups import causal_groups
from tests.helpers import masked, tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import few

FRAMES = 3
POSITIONS = np.arange(FRAMES, dtype=np.int32)
LEVELS = np.tile(np.asarray([[900.0, 500.0, 20.0]], np.float32), (tiny.BATCH, 1))
ALL = np.ones((FRAMES, FRAMES), bool)
CAUSAL = np.tri(FRAMES, dtype=bool)
VARIANTS = {
  "remat_dots": {"remat": "dots"},
  "remat_full": {"remat": "full"},
  "blockwise": {"attention": "blockwise"},
  "merged": {"merge_tokens": True},
  "merged_remat": {"merge_tokens": True, "remat": "dots"},
  "blockwise_remat": {"attention": "blockwise", "remat": "full"},
  "blockwise_kept": {"attention": "blockwise", "remat": "attention"},
  "blockwise_offload": {"attention": "blockwise", "remat": "offload"},
}


@functools.cache
def _velocity(config: dit.DiTConfig = tiny.CONFIG):
  """(x, timestep, text, positions, mask) -> velocity, compiled."""

  def apply(params, *inputs, mask):
    views = masked.views_of(mask)
    return dit.DiT(config).apply({"params": params}, *inputs, views)[0]

  return functools.partial(quick_jit(apply), tiny.params())


def velocity(
  x=None, timestep=LEVELS, text=None, positions=POSITIONS, mask=ALL, config=tiny.CONFIG
) -> np.ndarray:
  x = tiny.video(1, FRAMES) if x is None else x
  return np.asarray(
    _velocity(config)(
      x, timestep, tiny.text() if text is None else text, positions, mask=jnp.asarray(mask)
    )
  )


# -- sizes


@pytest.mark.parametrize(
  ("config", "count"),
  [
    (dit.DiTConfig(), 1_418_996_800),
    (dit.DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40), 14_288_491_584),
  ],
  ids=["1.3B", "14B"],
)
def test_published_sizes(config, count):
  shapes = jax.eval_shape(lambda: config.init(jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  assert {leaf.shape[0] for leaf in jax.tree.leaves(shapes["layers"])} == {config.num_layers}
  assert config.head_dim == 128 and config.tokens(60, 104) == 1560  # 480 x 832 pixels


def test_parameters_are_float32_in_a_bfloat16_model():
  shapes = jax.eval_shape(
    lambda: dataclasses.replace(tiny.CONFIG, dtype="bfloat16").init(jax.random.key(0))
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_a_fresh_model_predicts_nothing_and_lets_gradients_in():
  params = quick_jit(lambda: tiny.CONFIG.init(jax.random.key(0)))()
  assert not np.asarray(params["head"]["kernel"]).any()
  gates = np.asarray(params["layers"]["modulation"])[:, 0, [2, 5]]
  others = np.asarray(params["layers"]["modulation"])[:, 0, [0, 1, 3, 4]]
  assert abs(gates.mean() - 1) < 0.3 and abs(others.mean()) < 0.3
  layers = np.asarray(params["layers"]["self_attention"]["q"]["kernel"])
  assert (layers[0] != layers[1]).any()


# -- what a frame sees


def test_velocity_has_the_video_shape_and_is_float32():
  v = velocity()
  assert v.shape == tiny.video(1, FRAMES).shape and v.dtype == np.float32


def test_a_level_acts_on_its_own_frame():
  """Frames that see themselves alone: another frame's level changes nothing, bit for bit."""
  changed = LEVELS.copy()
  changed[:, 1] = 700.0
  a, b = (
    velocity(mask=np.eye(FRAMES, dtype=bool)),
    velocity(timestep=changed, mask=np.eye(FRAMES, dtype=bool)),
  )
  np.testing.assert_array_equal(a[:, [0, 2]], b[:, [0, 2]])
  assert np.abs(a[:, 1] - b[:, 1]).max() > 1e-3


def test_masks_are_obeyed_to_the_bit():
  x = tiny.video(1, FRAMES)
  changed = x.copy()
  changed[:, 2] += 1
  a, b = velocity(x, mask=CAUSAL), velocity(changed, mask=CAUSAL)
  np.testing.assert_array_equal(a[:, :2], b[:, :2])
  c, d = velocity(x), velocity(changed)
  assert np.abs(c[:, 0] - d[:, 0]).max() > 1e-3


def test_examples_do_not_mix():
  x = tiny.video(1, FRAMES)
  changed = x.copy()
  changed[1] += 1
  np.testing.assert_array_equal(velocity(x)[0], velocity(changed)[0])


def test_text_padding_is_attended():
  """Wan2.1 was trained with its zero padding in view."""
  text = tiny.text()
  text[:, 1:] = 0
  longer = np.concatenate([text, np.zeros_like(text[:, :2])], axis=1)
  assert np.abs(velocity(text=text) - velocity(text=longer)).max() > 1e-3


def test_every_text_token_matters():
  text = tiny.text()
  for i in range(text.shape[1]):
    changed = text.copy()
    changed[:, i] += 1
    assert np.abs(velocity() - velocity(text=changed)).max() > 1e-3


@pytest.mark.parametrize("start", [1023, 999_999, 2**20 - 1])
def test_positions_are_relative_and_do_not_drift(start):
  """At frame 1,000,000 as at frame 0, to float32 rounding."""
  near = velocity()
  np.testing.assert_allclose(
    velocity(positions=POSITIONS + start), near, rtol=0, atol=1e-5 * np.abs(near).max()
  )


def test_positions_matter():
  assert np.abs(velocity(positions=POSITIONS * 3) - velocity()).max() > 1e-3


def placed(places: tuple[int, int]) -> dit.DiTConfig:
  return dataclasses.replace(tiny.CONFIG, place_embedding=True, places=places)


def placed_velocity(places, x, positions=POSITIONS, level=LEVELS, start=None) -> np.ndarray:
  config = placed(places)
  forward = quick_jit(lambda params, *inputs: dit.DiT(config).apply({"params": params}, *inputs)[0])
  return np.asarray(forward(tiny.params(config), x, level, tiny.text(), positions, (), None, start))


def test_places_share_their_parameters():
  short, long = (
    jax.eval_shape(lambda n=n: placed((n, 3)).init(jax.random.key(0))) for n in (3, 1024)
  )
  assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)
  assert "place_embedding" in short and "place_embedding" not in tiny.params()


@pytest.mark.parametrize("places", [(0, 1), (1024, 1)])
def test_a_token_knows_its_place(places):
  """The same patch everywhere: rotations alone cannot tell the places apart, since all values are
  equal.
  """
  x = np.tile(tiny.video(1, 1)[:, :, :2, :2], (1, FRAMES, tiny.HEIGHT // 2, tiny.WIDTH // 2, 1))
  level = np.full_like(LEVELS, 500.0)
  by_row = lambda v: np.ptp(v.reshape(tiny.BATCH, FRAMES, tiny.HEIGHT // 2, -1), axis=2).max()
  there = placed_velocity(places, x, level=level)
  assert by_row(velocity(x, level)) < 1e-5 < 1e-2 < by_row(there)
  assert (np.ptp(there, axis=1).max() > 1e-2) == (places[0] > 0)


def test_late_frames_repeat_their_places():
  """A student trained on two blocks of three goes on for ever: frames 903 .. 905 are to it as 3 ..
  5, and not as 0 .. 2.
  """
  x, near = tiny.video(1, FRAMES), POSITIONS + 3
  later = placed_velocity((3, 3), x, POSITIONS + 903)
  np.testing.assert_allclose(later, placed_velocity((3, 3), x, near), atol=2e-5)
  assert np.abs(later - placed_velocity((3, 3), x)).max() > 1e-2
  assert (
    np.abs(
      placed_velocity((1024, 1), x, POSITIONS + 903) - placed_velocity((1024, 1), x, near)
    ).max()
    > 1e-2
  )


def test_a_clip_may_start_anywhere_in_its_video():
  """Each example at its own start: as if its frames had been counted from there."""
  x = tiny.video(1, FRAMES)
  there = placed_velocity((1024, 1), x, start=np.asarray([0, 5], np.int32))
  for example, start in enumerate((0, 5)):
    np.testing.assert_allclose(
      there[example], placed_velocity((1024, 1), x, POSITIONS + start)[example], atol=2e-5
    )
  assert np.abs(there[1] - placed_velocity((1024, 1), x)[1]).max() > 1e-2


def test_a_cache_equals_one_forward():
  """Block-causal over all frames = the last frame with the others' K/V."""

  def cached(params, x, levels, text):
    apply = functools.partial(dit.DiT(tiny.CONFIG).apply, {"params": params})
    positions, views = jnp.asarray(POSITIONS), masked.views_of(CAUSAL[:2, :2])
    _, past = apply(x[:, :2], levels[:, :2], text, positions[:2], views)
    return apply(x[:, 2:], levels[:, 2:], text, positions[2:], (), past)

  v, own = quick_jit(cached)(tiny.params(), tiny.video(1, FRAMES), LEVELS, tiny.text())
  groups = causal_groups(tiny.video(1, FRAMES), 0.0, MethodConfig(block=1, window=0))
  expected = velocity(mask=np.asarray(masked.frame_mask(groups, ())))
  np.testing.assert_allclose(v, expected[:, 2:], rtol=0, atol=1e-5 * np.abs(expected).max())
  tokens = tiny.CONFIG.tokens(tiny.HEIGHT, tiny.WIDTH)
  assert own.k.shape == own.v.shape == (2, tiny.BATCH, 1, tokens, 2, 8)


# -- memory and precision


@functools.cache
def _value_and_gradient(**changes):
  config = dataclasses.replace(tiny.CONFIG, **changes)
  x, weight = tiny.video(1, FRAMES), tiny.video(2, FRAMES)

  def loss(params):
    forward = masked.bind(config, params, tiny.text())
    v, _ = forward(x, jnp.asarray(LEVELS) / 1000, jnp.asarray(POSITIONS), jnp.asarray(CAUSAL))
    return jnp.mean(v * weight), v

  (_, v), gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))(tiny.params())
  return v, gradient


def _assert_near(actual, expected, tolerance):
  def near(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

  jax.tree.map(near, actual, expected)


@pytest.mark.parametrize("name", few(VARIANTS, "blockwise_kept"))
def test_how_it_is_computed_changes_nothing(name):
  _assert_near(_value_and_gradient(**VARIANTS[name]), _value_and_gradient(), 2e-5)


def test_merged_tokens_are_the_rows_of_one_matrix():
  """Values cannot tell; the hidden activations of the traced MLP do."""
  tokens = FRAMES * tiny.CONFIG.tokens(*tiny.video(1, FRAMES).shape[2:4])
  for merged in (False, True):
    forward = masked.bind(
      dataclasses.replace(tiny.CONFIG, merge_tokens=merged), tiny.params(), tiny.text()
    )
    traced = str(
      jax.make_jaxpr(lambda x, forward=forward: forward(x, 0.5, jnp.asarray(POSITIONS))[0])(
        tiny.video(1, FRAMES)
      )
    )
    assert (f"f32[{tiny.BATCH * tokens},{tiny.CONFIG.ffn_dim}]" in traced) == merged


def test_remat_recomputes():
  """Values cannot tell; the matrix products of the traced gradient do."""
  products = {}
  for remat in dit.REMATS:
    config = dataclasses.replace(tiny.CONFIG, remat=remat, attention="blockwise")
    forward = functools.partial(masked.bind, config, text=tiny.text())
    loss = lambda params, forward=forward: jnp.sum(
      forward(params)(tiny.video(1, FRAMES), 0.5, jnp.asarray(POSITIONS))[0]
    )
    gradient = lambda params, loss=loss: jax.grad(loss)(params)
    products[remat] = flops.count(gradient, tiny.params())
  # `dots` still recomputes attention's products, which have batch axes; `attention` all others
  assert products["none"] < products["dots"] < products["full"]
  assert products["none"] < products["attention"] == products["offload"] < products["full"]


def test_bfloat16_is_close_and_returns_float32():
  a, b = velocity(config=dataclasses.replace(tiny.CONFIG, dtype="bfloat16")), velocity()
  assert a.dtype == np.float32
  error = np.abs(a - b).max() / np.abs(b).max()
  assert 1e-5 < error < 0.05


def test_bound_levels_may_be_a_scalar_or_per_example_or_per_frame(monkeypatch):
  seen = []

  def apply(self, params, x, timestep, *rest):
    seen.append(np.asarray(timestep))
    return x, self.config.empty_kv(FRAMES, *x.shape[:1], *x.shape[2:4])

  monkeypatch.setattr(dit.DiT, "apply", apply)
  for sigma in (0.5, np.asarray([0.1, 0.2]), LEVELS / 1000):
    tiny.bind(params={})((Frames(tiny.video(1, FRAMES), sigma, POSITIONS),))
  np.testing.assert_allclose(seen[0], np.full((2, 3), 500.0))
  np.testing.assert_allclose(seen[1], np.repeat([[100.0], [200.0]], 3, axis=1), rtol=1e-6)
  np.testing.assert_allclose(seen[2], LEVELS, rtol=1e-6)


# -- bad input


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"dim": 15}, "dim = 15 must split into num_heads = 2"),
    ({"num_heads": 16}, "heads of even width"),
    ({"patch": (2, 2, 2)}, "first entry must be 1"),
    ({"remat": "some"}, "expected one of none, dots, attention, offload, full"),
    ({"places": (3, 0)}, "period = 0: expected at least 1"),
    ({"attention": "flash"}, "expected one of auto, xla, blockwise, cudnn, splash"),
    ({"num_layers": 0}, "num_layers = 0: expected at least 1"),
  ],
)
def test_a_bad_config_is_refused(change, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(tiny.CONFIG, **change)


@pytest.mark.parametrize(
  "change",
  [
    {"timestep": LEVELS[:, :2]},
    {"timestep": LEVELS[0]},
    {"positions": np.arange(4, dtype=np.int32)},
    {"positions": POSITIONS.astype(np.float32)},
    {"text": tiny.text()[:1]},
    {"x": tiny.video(1, FRAMES)[0]},
  ],
  ids=str,
)
def test_wrong_shapes_fail_where_they_enter(change):
  with pytest.raises(jaxtyping.TypeCheckError):
    velocity(**change)

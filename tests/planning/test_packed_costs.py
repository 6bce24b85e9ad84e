"""What a packed model's video would cost: against the sections as they run, and the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.models import dit_packed
from hiar_jax.models.frames import Out
from hiar_jax.packing import orders
from hiar_jax.packing.rows import History, groups_of_row, tables
from hiar_jax.packing.schedule import parse
from hiar_jax.planning import costs, packed_sizes
from hiar_jax.planning.packed_sizes import PackedJobSize, SectionCost
from hiar_jax.rollout import packed
from tests.helpers import tiny
from tests.planning.test_costs import SMALL

ROWS, COLUMNS = 4, 6  # of patches, where it does not matter
CASES = {
  "vanilla": ("td_f4k4f2k2f1k1_g2", orders.vanilla(4), 0),
  "both ends": ("td_f2k2f1k1_g2_x_f1k1", orders.both_ends(4), 0),
  "from an image": ("f1k1_x_g2_f1k1f2k2_td", orders.inverted(3), 1),
  "compressed": ("tc_f2k2f1k1_g2", orders.vanilla(4), 0),
  "appended": ("ta_f2k2f1k1_g2", orders.vanilla(4), 3),
}


def job(notation="td_f4k4f2k2f1k1_g2", steps=CASES["vanilla"][1], given=0, **changes):
  schedule = parse(notation)
  fields = {
    "network": SMALL.packed(schedule.pools),
    "schedule": schedule,
    "history": History(),
    "steps": steps,
    "levels": 3,
    "height": 2 * ROWS,
    "width": 2 * COLUMNS,
    "given": given,
    "text": 8,
    "dtype": "float32",
  }
  return PackedJobSize(**fields | changes)


@dataclasses.dataclass(frozen=True, eq=False)
class Counted:
  """Returns what it is given, and counts its forwards by (tokens, tokens of packed frames)."""

  patch: tuple = SMALL.patch
  calls: dict = dataclasses.field(default_factory=dict)

  def apply(self, params, groups, texts, past=(), start=None):
    _, ph, pw = self.patch
    lengths = []
    for group in groups:
      pool = dit_packed.pool_of(group) or 1
      kernel = pool, pool * ph, pool * pw
      lengths.append(dit_packed.cut_kernels(jnp.asarray(group.x), kernel).shape[1])
    key = lengths[-1], sum(lengths[:-1])
    self.calls[key] = self.calls.get(key, 0) + 1
    return Out((*[None] * (len(groups) - 1), groups[-1].x), (None,) * len(groups))


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_forwards_are_those_that_run(name, guidance):
  """The sections of the sampler itself, unrolled in Python around a network that counts."""
  notation, steps, given = CASES[name]
  network, request = Counted(), job(notation, steps, given, guidance=guidance)
  shape = dataclasses.replace(tiny.shape(request.frames), height=2 * ROWS, width=2 * COLUMNS)
  sections = packed.SectionSampler(
    network=network,
    schedule=request.schedule,
    history=request.history,
    sigmas=jnp.linspace(1, 0, request.levels + 1),
    negative=tiny.text()[:1],
    guidance=guidance,
    key=jax.random.key(0),
    frame=shape.clip[1:],
  )
  generate = packed.make_sampler(sections, steps, shape.frames)
  with jax.disable_jit():
    first = jnp.zeros((1, given, *shape.clip[1:])) if given else None
    # of shapes alone: each operation on numbers would be compiled
    jax.eval_shape(generate, None, jnp.asarray(tiny.text()[:1]), np.asarray([1]), first)
  expected = {}
  for call in packed_sizes.sections(request):
    key = call.tokens, call.history
    expected[key] = expected.get(key, 0) + call.count
  assert network.calls == expected


@pytest.mark.slow
@pytest.mark.parametrize("hears", [True, False])
@pytest.mark.parametrize("name", ["vanilla", "both ends", "compressed", "appended"])
def test_flops_are_the_compilers(name, hears):
  """Of one forward of the last step, with all layers written out: a loop's body counts once."""
  notation, steps, given = CASES[name]
  config = dataclasses.replace(SMALL, dim=256, ffn_dim=640, unroll=3)
  config = config.packed(parse(notation).pools)
  request = job(
    notation, steps, given, network=config, history=History(hears=hears), height=16, width=24
  )
  config, last = request.network, request.planned[-1]
  row = jax.tree.map(lambda part: part[0], tables([last])[0])
  video = np.zeros((1, given + request.frames, 16, 24, 4), np.float32)
  x = video[:, : last.generates.size]
  groups = groups_of_row(
    request.schedule, request.history, video, row, x, np.float32(0.5), patch=config.patch
  )
  shapes = jax.eval_shape(lambda: config.init(jax.random.key(0)))
  texts = jax.ShapeDtypeStruct((1, 1, request.text, 24), jnp.float32)
  run = jax.jit(lambda *arguments: config.apply(*arguments).velocity[-1])
  counted = run.lower(shapes, groups, texts).compile().cost_analysis()["flops"]
  call = packed_sizes.sections(request)[-1]
  assert call.history == sum(tokens for tokens, _ in call.packed)
  by_hand = packed_sizes.flops(request, call)
  assert by_hand == pytest.approx(counted, rel=0.05)
  assert by_hand < counted  # norms, softmax and gates are not in it


def test_flops_of_a_kernel_are_those_of_its_product():
  """Of a token by a large kernel: by the compiler, and as the difference of two kernels."""
  config = dataclasses.replace(SMALL, channels=16, num_layers=1, unroll=1).packed((1, 8))
  request = job("td_f1k8_g1", orders.vanilla(2), network=config, height=4, width=6)
  shapes = jax.eval_shape(lambda: config.init(jax.random.key(0)))
  video = np.zeros((1, 2, 4, 6, 16), np.float32)
  row = jax.tree.map(lambda part: part[1], tables(request.planned)[0])
  groups = groups_of_row(
    request.schedule, request.history, video, row, video[:, 1:], np.float32(0.5)
  )
  texts = jax.ShapeDtypeStruct((1, 1, request.text, 24), jnp.float32)
  run = jax.jit(lambda *arguments: config.apply(*arguments).velocity[-1])
  counted = run.lower(shapes, groups, texts).compile().cost_analysis()["flops"]
  (call,) = packed_sizes.sections(request)
  assert call.packed == ((1, 8),) and call.tokens == 6
  by_hand = packed_sizes.flops(request, call)
  assert by_hand == pytest.approx(counted, rel=0.05)
  product = 2 * 8**3 * 2 * 2 * 16 * config.dim
  assert product > 0.5 * by_hand
  assert by_hand - config.packed_flops(6, ((1, 1),), request.text) == product * (1 - 8**-3)


def test_a_section_costs_the_same_whatever_lies_behind_it():
  long, short = (packed_sizes.sections(job(steps=orders.vanilla(n))) for n in (40, 4))
  assert len(long) == len(short) == 1 and long[0].count == 10 * short[0].count
  assert dataclasses.replace(long[0], count=short[0].count) == short[0]
  appended = packed_sizes.sections(job("ta_f1k1_g2", orders.vanilla(4)))
  assert [call.packed for call in appended] == [
    ((24, 1),),
    ((24, 1), (1, 1)),
    ((24, 1), (3, 1)),
    ((24, 1), (5, 1)),
  ]


def test_the_published_size_is_said():
  """480 x 832 under the schedule of F1: 14,040 tokens on 3,926, as the published code has them."""
  notation = "f1k1_x_td_f16k4f2k2f1k1_g9"
  schedule = parse(notation)
  request = PackedJobSize(
    dataclasses.replace(SMALL, channels=16).packed(schedule.pools),
    schedule,
    History(),
    orders.vanilla(4),
    levels=25,
    height=60,
    width=104,
    given=1,
    published=True,
    guidance=1.0,
  )
  (call,) = packed_sizes.sections(request)
  assert call == SectionCost(200, 9, 14_040, ((1560, 1), (416, 4), (390, 2), (1560, 1)))
  found = costs.make_plan(request, compile=False)
  assert found.flops_video == pytest.approx(200 * packed_sizes.flops(request, call))
  assert found.flops_block == found.flops_video / 4 and found.cache == 0
  assert found.floor > found.weights + 17_966 * SMALL.ffn_dim * 2
  text = found.text()
  for part in (
    "sections: 4, 14040 tokens each (1560 a latent frame)",
    f"history: {notation}, 3926 packed tokens a forward "
    "(1560 by k1 + 416 by k4 + 390 by k2 + 1560 by k1)",
    "forwards: 200 (200 of 14040 + 3926 tokens)",
    " a section, ",
  ):
    assert part in text, text
  assert "KV cache" not in text


@pytest.mark.slow
def test_compiled_memory_is_that_of_the_program():
  """Arguments are weights, text, seeds and given frames; the floor lies below what is counted."""
  request = job("f1k1_x_td_f2k2f1k1_g2", orders.vanilla(3), 1)
  found = costs.make_plan(request)
  generate = found.compiled["generate"]
  given = 8 * 12 * 4 * 4
  assert found.weights == found.parts["DiT"].bytes
  assert generate.arguments == pytest.approx(found.weights + 8 * 24 * 4 + 4 + given, rel=0.01)
  assert generate.outputs == 7 * given
  assert found.floor < generate.total and "compiled for cpu, generate: " in found.text()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"height": 7}, "latents of 7x12 cannot be cut into patches of 2x2"),
    ({"levels": 0}, "levels = 0: expected at least 1"),
    ({"dtype": "float64"}, "dtype = 'float64': expected one of"),
  ],
)
def test_what_does_not_fit_together(changes, message):
  with pytest.raises(UserError, match=message):
    job(**changes)

"""What is read from compiled text: exchanges that are known beforehand, and XLA's notations."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import pytest

from hiar_jax.planning import collectives
from hiar_jax.planning.collectives import Collective

MESH = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
SIZES = dict(MESH.shape)
P = jax.P
BOTH = P("data", "fsdp")


def found(function, *arguments, turns=1.0) -> dict[tuple, tuple[float, float]]:
  """(kind, axes) -> (calls, bytes received) of a function compiled over MESH."""
  text = jax.jit(function).lower(*arguments).compile().as_text()
  return totals(text, turns)


def totals(text: str, turns: float = 1.0) -> dict[tuple, tuple[float, float]]:
  calls = {}
  for one, times in collectives.read(text, SIZES, turns).calls:
    count, moved = calls.get((one.kind, one.axes), (0, 0))
    calls[one.kind, one.axes] = (count + times, moved + times * one.moved)
  return calls


def mapped(body):
  return jax.shard_map(body, mesh=MESH, in_specs=BOTH, out_specs=BOTH, check_vma=False)


def split(shape, spec=BOTH):
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(MESH, spec))


X = split((8, 16))  # 4 x 4 numbers of a device


@pytest.mark.parametrize(
  ("body", "kind", "axes", "moved"),
  [
    # 3 of 4 parts of 64 bytes come from others; a sum is moved twice
    (lambda x: jax.lax.all_gather(x, "fsdp"), "all-gather", ("fsdp",), 3 * 64),
    (lambda x: jax.lax.psum(x, "data"), "all-reduce", ("data",), 2 * 64 / 2),
    (lambda x: jax.lax.psum(x, ("data", "fsdp")), "all-reduce", ("data", "fsdp"), 2 * 64 * 7 / 8),
    (
      lambda x: jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True),
      "all-to-all",
      ("fsdp",),
      64 * 3 / 4,
    ),
    (
      lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
      "collective-permute",
      ("data",),
      64,
    ),
  ],
  ids=["gather", "sum", "sum over both", "transpose", "shift"],
)
def test_an_exchange_is_what_it_moves(body, kind, axes, moved):
  def program(x):
    return mapped(lambda x: jnp.sum(body(jnp.sin(x))).reshape(1, 1))(x)

  calls = found(program, X)
  assert calls[kind, axes] == (1, pytest.approx(moved))


def test_a_scattered_sum():
  body = lambda x: jax.lax.psum_scatter(jnp.sin(x), "fsdp", scatter_dimension=1, tiled=True)
  assert found(mapped(body), X)["reduce-scatter", ("fsdp",)] == (1, 3 * 16)


def test_loops_are_multiplied_out():
  def once(x):
    return jnp.sin(jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]))

  def scanned(x):
    return jax.lax.scan(lambda x, _: (once(x), None), x, None, length=5)[0]

  def nested(x):
    return jax.lax.fori_loop(0, 3, lambda i, x: scanned(x), x)

  def until(x):
    return jax.lax.while_loop(lambda x: x[0, 0] < 1, once, x)

  key = "collective-permute", ("fsdp",)
  assert found(mapped(scanned), X)[key] == (5, 5 * 64)
  assert found(mapped(nested), X)[key] == (15, 15 * 64)
  assert found(mapped(until), X, turns=1.5)[key] == (1.5, 1.5 * 64)


def test_the_compilers_own_exchanges_are_seen():
  """A product over a split dimension: the partitioner adds its sum."""
  a, b = split((8, 16), P("data", "fsdp")), split((16, 32), P("fsdp"))
  calls = found(lambda a, b: jnp.sin(a @ b), a, b)
  assert calls["all-reduce", ("fsdp",)][1] == pytest.approx(2 * (4 * 32 * 4) * 3 / 4)


# ------------------------------------------------------------------------------- XLA's notations


def program(*lines: str) -> str:
  return "\n".join(["HloModule m", "", "ENTRY %main (p: f32[4]) -> f32[4] {", *lines, "}", ""])


def collective(line: str) -> Collective:
  ((one, times),) = collectives.read(program(f"  {line}"), SIZES).calls
  assert times == 1
  return one


@pytest.mark.parametrize(
  ("groups", "axes", "size"),
  [
    ("{{0,1,2,3},{4,5,6,7}}", ("fsdp",), 4),
    ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
    ("[2,4]<=[8]", ("fsdp",), 4),
    ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
    ("[1,8]<=[8]", ("data", "fsdp"), 8),
    ("{}", ("data", "fsdp"), 8),
    ("mesh['a'=2,'b'=1,'c'=4] {'c'}", ("fsdp",), 4),
    ("mesh['a'=2,'b'=4] {'a','b'}", ("data", "fsdp"), 8),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), 2),
    ("mesh['a'=8] {'a':(2)4}", ("fsdp",), 4),
    ("mesh['a'=8] {'a':(1)2}", ("data",), 2),
  ],
)
def test_groups_are_axes_of_the_mesh(groups, axes, size):
  one = collective(
    f"%a = f32[8,4]{{1,0}} all-gather(%p), replica_groups={groups}, dimensions={{0}}"
  )
  assert (one.axes, one.group) == (axes, size)
  assert one.moved == 128 * (size - 1) / size


def test_results_of_several_arrays_and_of_starts():
  groups = "replica_groups=[2,4]<=[8]"
  several = collective(
    f"%a = (f32[8,4]{{1,0:T(8,128)S(1)}}, /*index=1*/bf16[3]{{0}}) all-reduce(%p, %q), {groups}"
  )
  assert several.size == 128 + 6 and several.result == "f32[8,4] bf16[3]"
  started = collective(
    f"%a = (bf16[2,4]{{1,0}}, bf16[8,4]{{1,0}}) all-gather-start(%p), {groups}, dimensions={{0}}"
  )
  assert started.result == "bf16[8,4]" and started.moved == 64 * 3 / 4
  scattered = collective(
    "%a = ((f32[8]{0}, f32[4]{0}), (f32[2]{0}, f32[1]{0})) reduce-scatter-start(%p, %q), " + groups
  )
  assert scattered.result == "f32[2] f32[1]" and scattered.moved == 3 * 12
  summed = collective(f"%a = (f32[8]{{0}}, f32[4]{{0}}) all-reduce-start(%p, %q), {groups}")
  assert summed.result == "f32[8] f32[4]"
  shifted = collective(
    "%a = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%p), "
    "source_target_pairs={{0,1},{1,2}}"
  )
  assert shifted.size == 8 and shifted.axes == ("fsdp",)
  small = collective(f"%a = (s4[8]{{0}}, f8e4m3fn[3]{{0}}, pred[2]{{0}}) all-reduce(%p), {groups}")
  assert small.size == 4 + 3 + 2


def test_of_branches_the_one_that_moves_most():
  gather = "all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}"
  text = "\n".join(
    [
      "HloModule m",
      "%one (p: f32[4]) -> f32[8] {",
      f"  ROOT %a = f32[8]{{0}} {gather}",
      "}",
      "%two (p: f32[4]) -> f32[8] {",
      f"  ROOT %a = f32[800]{{0}} {gather}",
      "}",
      program("  %c = f32[8] conditional(%i, %p, %p), branch_computations={%one, %two}"),
    ]
  )
  assert totals(text) == {("all-gather", ("fsdp",)): (1, 2400)}


def test_a_loop_that_compares_with_a_number_turns_so_often():
  """As the TPU's compiler writes its own loops."""
  text = "\n".join(
    [
      "HloModule m",
      "%body (p: (u32[], f32[8])) -> (u32[], f32[8]) {",
      "  %a = f32[8]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}",
      "}",
      "%condition (p: (u32[], f32[8])) -> pred[] {",
      "  %n = u32[]{:T(128)} constant(7), metadata={}",
      "  ROOT %c = pred[] compare(%g, %n), direction=LT",
      "}",
      program("  %w = (u32[], f32[8]) while(%t), condition=%condition, body=%body"),
    ]
  )
  assert totals(text)["all-gather", ("fsdp",)][0] == 7


def test_kernels_are_counted():
  text = program(
    '  %a = f32[4] custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax"',
    '  %b = f32[4] custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax"',
    '  %c = f32[4] custom-call(%p), custom_call_target="tpu_custom_call"',
    '  %d = f32[4] custom-call(%p), custom_call_target="Sharding"',
  )
  assert collectives.read(text, SIZES).kernels == {"__cudnn$fmhaSoftmax": 2, "tpu_custom_call": 1}

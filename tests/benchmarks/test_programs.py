"""Every program of every experiment at full size against its recording; the digests that tell."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks.programs import digest, full_size, listing, recording
from benchmarks.programs.__main__ import main

RECORDED = pathlib.Path(__file__).parents[1] / "golden_programs" / f"{jax.__version__}.json"
QUICK = ("shapes/distill", "shapes/codec")  # parts of one experiment; all of it takes long
HOW = f"python -m benchmarks.programs --out=tests/golden_programs/{RECORDED.name}"


@pytest.fixture(scope="module")
def recorded() -> recording.Recording:
  if not RECORDED.exists():
    pytest.skip(f"nothing is recorded for JAX {jax.__version__}; on a commit to be trusted: {HOW}")
  versions, programs = recording.read(RECORDED)
  if versions != recording.versions():
    pytest.skip(f"recorded with {versions}, here are {recording.versions()}; {HOW}")
  return programs


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*QUICK, *full_size.experiments())
  ],
)
def test_programs_are_those_recorded(name, recorded):
  found = {one.name: recording.entry(one.digest) for one in recording.find(f"{name}/*")}
  differing = recording.compare(recording.matching(recorded, f"{name}/*"), found)
  advice = "python -m benchmarks.programs --help says how to see which operations"
  assert not differing, "\n".join([*differing, advice])


def test_every_experiment_is_recorded(recorded):
  assert {name.partition("/")[0] for name in recorded} == set(full_size.experiments())


# ------------------------------------------------------------------------------------ the digests


def of(function, *shapes) -> digest.Digest:
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes or [(2, 3), (2, 3)]]
  return digest.of_lowered(jax.jit(function).lower(*arguments))


def plain(x, y):
  return jnp.sin(x * 2 + 1).T @ jnp.sin(y * 2 + 1)


def test_outlining_is_no_difference():
  inner = jax.jit(lambda x: jnp.sin(x * 2 + 1))

  def outlined(a, b):
    return inner(a).T @ inner(b)

  text = jax.jit(outlined).lower(jnp.ones((2, 3)), jnp.ones((2, 3))).as_text()
  assert text.count("func.func private") == 1 and text.count("call @") == 2
  assert of(outlined) == of(plain)
  assert of(plain).counts["stablehlo.sine : (tensor<2x3xf32>) -> (tensor<2x3xf32>)"] == 2


@pytest.mark.parametrize(
  "changed, shapes",
  [
    (plain, [(2, 4), (2, 4)]),
    (lambda x, y: jnp.sin(x * 2 + 1).T @ jnp.sin(y * 2 + 1.5), None),
    (lambda x, y: jnp.sin(x * 2 + 1).T @ jnp.cos(y * 2 + 1), None),
    (lambda x, y: jnp.sin(x * 2 + 1).T.astype(jnp.bfloat16) @ jnp.sin(y * 2 + 1), None),
    (lambda x, y: jnp.einsum("ik,jk->ij", jnp.sin(x * 2 + 1), jnp.sin(y * 2 + 1)), None),
  ],
  ids=["shape", "constant", "operation", "cast", "contraction"],
)
def test_a_change_is_seen(changed, shapes):
  before, after = of(plain), of(changed, *shapes or [])
  assert before.operations != after.operations and before.dataflow != after.dataflow


@pytest.mark.parametrize(
  "one, other",
  [
    (lambda x, y: x[:, :2], lambda x, y: x[:, 1:]),
    (
      lambda x, y: jax.lax.reduce(x, jnp.float32(5), jax.lax.add, [0]),
      lambda x, y: jax.lax.reduce(x, jnp.float32(5), jax.lax.max, [0]),
    ),
    (lambda x, y: x < y, lambda x, y: x <= y),
    (lambda x, y: x.reshape(3, 2), lambda x, y: x.T),
    (
      lambda x, y: jnp.broadcast_to(x[:2, :2], (2, 2, 2)),
      lambda x, y: jnp.stack([x[:2, :2]] * 2, 2),
    ),
    (
      lambda x, y: x + jnp.asarray([1.0, 2, 3])[None],
      lambda x, y: x + jnp.asarray([1.0, 2, 4])[None],
    ),
    (
      lambda x, y: jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x),
      lambda x, y: jax.lax.fori_loop(0, 3, lambda i, x: jnp.cos(x), x),
    ),
    (
      lambda x, y: jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: y + 1),
      lambda x, y: jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: y - 1),
    ),
  ],
  ids=["bounds", "reduction", "comparison", "order", "axes", "table", "loop", "branch"],
)
def test_what_an_operation_says_is_seen(one, other):
  assert of(one).operations != of(other).operations and of(one).dataflow != of(other).dataflow


@pytest.mark.parametrize(
  "one, other",
  [
    (lambda x, y: jnp.sin(x) - y, lambda x, y: y - jnp.sin(x)),
    (lambda x, y: x - y, lambda x, y: y - x),
    (lambda x, y: (x, y + 1), lambda x, y: (y + 1, x)),
    (
      lambda x, y: jax.lax.fori_loop(0, 3, lambda i, c: (c[0] + jnp.sin(c[1]), 2 * c[1]), (x, y)),
      lambda x, y: jax.lax.fori_loop(0, 3, lambda i, c: (c[1] + jnp.sin(c[0]), 2 * c[1]), (x, y)),
    ),
    (
      lambda x, y: jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: y),
      lambda x, y: jax.lax.cond(x[0, 0] > 0, lambda: y, lambda: x),
    ),
  ],
  ids=["computed", "arguments", "results", "loop", "branches"],
)
def test_what_changes_places_is_seen_by_the_dataflow_alone(one, other):
  assert of(one).operations == of(other).operations and of(one).dataflow != of(other).dataflow


def test_what_is_repeated_or_unused_is_no_difference_of_the_dataflow():
  def repeated(x, y):
    jnp.exp(x)
    return jnp.sin(x) * y + jnp.sin(x)

  def once(x, y):
    s = jnp.sin(x)
    return s + y * s

  assert (
    of(repeated).dataflow == of(once).dataflow and of(repeated).operations != of(once).operations
  )


def test_the_order_of_what_a_loop_carries_is_no_difference():
  def one(x, y):
    a, b = jax.lax.fori_loop(0, 3, lambda i, c: (c[0] * 2, c[1] + c[0]), (x, jnp.sin(y)))
    return a - b

  def other(x, y):
    b, a = jax.lax.fori_loop(0, 3, lambda i, c: (c[0] + c[1], c[1] * 2), (jnp.sin(y), x))
    return a - b

  assert of(one) == of(other)


def test_a_difference_is_told_in_a_line_and_its_operations():
  before, after, turned = (
    {"a/b": recording.entry(of(f))}
    for f in (plain, lambda x, y: plain(x, y) + 3, lambda x, y: plain(y, x))
  )
  assert recording.compare(before, before) == []
  first, *operations = recording.compare(before, after)
  assert first.startswith("a/b: ") and "computed otherwise" in first
  assert any(line.startswith("  +1 ") and "dense<3.0" in line for line in operations)
  assert recording.compare(recording.short(before), after) == [first]
  assert "feed each other otherwise" in recording.compare(before, turned)[0]
  assert recording.compare(before, {}) == ["a/b: is gone"]


def test_the_command_keeps_and_compares(tmp_path, capsys):
  kept, only = tmp_path / "kept.json", "--only=shapes:smoke/codec/*"
  assert main([only, f"--out={kept}", "--full"]) == 0
  assert main([only, f"--compare={kept}"]) == 0 and "nothing differs" in capsys.readouterr().out
  _, programs = recording.read(kept)
  programs["shapes:smoke/codec/decode"]["counts"] = {}
  programs["shapes:smoke/codec/decode"]["digest"] = "another"
  recording.write(kept, programs)
  assert main([only, f"--compare={kept}"]) == 1
  assert "  +1 stablehlo.dot_general " in capsys.readouterr().out
  assert main(["--detail=shapes:smoke/codec/decode"]) == 0
  assert "     1 stablehlo.dot_general " in capsys.readouterr().out
  with pytest.raises(SystemExit, match="no program has a name like nothing"):
    main(["--only=nothing"])


def test_a_program_cannot_read_what_it_does_not_name():
  e = full_size.only(full_size.experiments()["shapes"], ("model", "seed"))
  assert e.model.dim == 128 and e.seed == 0
  with pytest.raises(AssertionError, match="reads 'steps' of a group that it does not name"):
    e.teacher.steps  # noqa: B018
  with pytest.raises(AssertionError, match="does not name"):
    bool(e.teacher_model)


def test_those_that_differ_in_what_they_read_have_other_keys():
  e = full_size.experiments()["shapes"]
  longer = dataclasses.replace(e, causal_init=dataclasses.replace(e.causal_init, steps=10))
  keys, others = ({name: key for name, key, _ in listing.programs(x)} for x in (e, longer))
  assert {name for name in keys if keys[name] != others[name]} == {
    "causal_init/start",
    "causal_init/step",
  }

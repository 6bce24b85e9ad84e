"""`python -m hiar_jax.plan`: programs lowered as training jits them, rows that are kept, and what
is wrong in one line; with the compilers of chips installed, programs for those.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from hiar_jax import plan
from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.parallel.mesh import make_mesh
from hiar_jax.planning import chips, compiled, programs, table, targets
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.planning.targets import Target
from hiar_jax.training.experiment import Experiment
from tests.helpers import tiny_packed, tiny_run
from tests.helpers.slow_cases import slow

ROOT = tiny_run.ROOT
SPLIT = {"mesh__data": 2, "mesh__fsdp": 4, "mesh__min_shard": 64}
AVERAGED = {f"{stage}__ema_start": 0 for stage in ("teacher", "causal_init", "distill")}
EIGHT = {**tiny_run.EIGHT, **AVERAGED, "trajectories__batch": 8}


@functools.cache
def distilled() -> Experiment:
  return build(Experiment, tiny_run.make_config(**EIGHT, **SPLIT))


def packed(**changes) -> Experiment:
  sizes = {"framepack__batch": 8, "framepack__ema_start": 0, **AVERAGED}
  return build(Experiment, tiny_packed.make_config(**sizes, **SPLIT, **changes))


def made(e: Experiment, name: str) -> programs.Program:
  mesh = make_mesh(e.mesh, jax.devices())
  return plan.ENTRIES[name].make(AbstractRun(e, pathlib.Path(), mesh))


def operations(e: Experiment) -> float:
  run = AbstractRun(e, pathlib.Path(), make_mesh(e.mesh, jax.devices()))
  return programs.operations(run, plan.ENTRIES["causal_init"].make)


def here() -> Target:
  """This machine's devices, as if something were stated of them."""
  return dataclasses.replace(targets.parse("here"), chip=chips.CHIPS["v5p"])


def test_a_plan_chooses_the_mesh_by_the_memory_of_its_chip(monkeypatch, tmp_path):
  meshes = []
  monkeypatch.setattr(compiled, "find", lambda run, *_: meshes.append(run.mesh))
  open_ones = {"mesh__data": -1, "mesh__fsdp": -1, "mesh__min_shard": 1}
  e = build(Experiment, tiny_run.make_config(**EIGHT, **open_ones))
  for memory in (2**30, 100):
    chip = dataclasses.replace(chips.CHIPS["v5p"], memory=memory)
    target = dataclasses.replace(targets.parse("here"), name="v5p:2x2x2", chip=chip)
    plan.find(e, "teacher", target, tmp_path)
  assert [mesh.devices.shape for mesh in meshes] == [(8, 1), (1, 8)]


# ------------------------------------------------------------------------------------- the programs


@pytest.mark.parametrize("name", ["teacher", "causal_init", *slow("critic", "generator")])
def test_an_update_is_lowered_as_training_does(name):
  """The state is given up, and split over the devices where it is large; the batch is split too."""
  program = made(distilled(), name)
  text = program.lower().as_text()
  assert "mhlo.num_partitions = 8" in text
  assert text.count("jax.buffer_donor") + text.count("tf.aliasing_output") > 20
  kernel = program.arguments["state"].params["layers"]["mlp_in"]["kernel"]
  assert kernel.sharding.spec == jax.P(None, "fsdp")
  assert program.arguments["batch"]["text"].sharding.spec == jax.P(("data", "fsdp"))
  assert program.clips == 8


def test_what_nobody_trains_is_split_as_it_is_loaded():
  frozen = made(distilled(), "generator").arguments["frozen"]
  assert frozen.negative.sharding.spec == jax.P()
  assert "fsdp" in frozen.real_score["layers"]["mlp_in"]["kernel"].sharding.spec


def test_bytes_of_a_part_are_those_of_one_device():
  program = made(distilled(), "critic")
  split = sum(leaf.size * 4 for leaf in jax.tree.leaves(program.arguments["batch"]))
  assert program.bytes_of("batch") == split // 8
  whole = sum(x.size * 4 for x in jax.tree.leaves(program.arguments["state"].params))
  state = program.bytes_of("state")
  assert whole < state < 6 * whole  # weights, averages and moments, a part of which is split


def test_packed_models_have_their_own_update():
  text = made(packed(), "framepack").lower().as_text()
  assert "mhlo.num_partitions = 8" in text and '"fsdp"' in text
  adapted = made(packed(framepack__lora={"rank": 2}), "framepack")
  assert "adapters" in adapted.arguments["state"].params and adapted.arguments["frozen"].base


def test_sampling_lies_on_one_device_and_a_tick_on_its_levels():
  e = distilled()
  assert made(e, "generate").mesh.size == 1
  assert made(e, "tick").mesh.shape["level"] == len(e.student.timesteps)
  assert made(e, "trajectories").mesh.size == 8


def test_an_experiment_has_its_programs():
  names = functools.partial(programs.chosen, entries=plan.ENTRIES)
  distills = ["teacher", "trajectories", "causal_init", "critic", "generator", "generate", "tick"]
  assert names(distilled(), "") == distills
  assert names(packed(), "") == ["teacher", "framepack", "generate"]
  assert names(distilled(), "critic, generator") == ["critic", "generator"]


# ----------------------------------------------------------------------------------------- the rows


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def row(cache) -> compiled.Row:
  return plan.find(distilled(), "causal_init", here(), cache)


def test_a_row_says_what_a_program_holds(row):
  assert (row["devices"], row["mesh"]) == (8, {"data": 2, "fsdp": 4})
  assert row["fits"] and row["left"] + row["temporaries"] < chips.CHIPS["v5p"].memory
  # the compiler's own sum is that of the parts, but for what no program reads and for padding
  assert sum(row["parts"].values()) == pytest.approx(row["arguments"], rel=0.1)
  assert row["outputs"] < row["parts"]["state"] / 4  # the new state takes the old one's place
  moved = sum(one["moved"] for one in row["collectives"])
  assert {one["kind"] for one in row["collectives"]} >= {"all-gather", "all-reduce"}
  assert row["seconds"]["communication"] == pytest.approx(moved / chips.CHIPS["v5p"].link)
  assert row["seconds"]["arithmetic"] == pytest.approx(row["flops"] / 8 / 459e12)
  assert json.loads(json.dumps(row)) == row


@pytest.mark.slow
def test_operations_do_not_depend_on_the_devices(row):
  """Nor on the mesh; a batch twice as large takes twice as many, but for an optimizer's own."""
  assert row["flops"] == operations(distilled())
  plain = dataclasses.replace(distilled().causal_init, rule="adamw")
  once, twice = (
    operations(
      dataclasses.replace(distilled(), causal_init=dataclasses.replace(plain, batch=batch))
    )
    for batch in (8, 16)
  )
  assert twice == 2 * once < 2 * row["flops"]


def test_operations_are_those_of_attention_in_plain_jax():
  """All networks have it; a kernel of a chip could not be counted."""
  e = programs.with_attention(distilled(), "blockwise")
  networks, program = (e.dit, e.student_dit, e.teacher_dit), made(e, "generate")
  assert {network.attention for network in networks} == {"blockwise"}
  assert "custom_vjp" in str(jax.make_jaxpr(program.function)(*program.arguments.values()))


def test_the_exit_level_counts_its_mean():
  """Of s levels (s - 1) / 2 turns come before it: one loop more for each two levels more."""
  e = distilled()
  program = made(e, "critic")
  assert program.turns == (len(e.student.timesteps) - 1) / 2
  assert made(e, "causal_init").turns == 1


@pytest.mark.slow
def test_a_row_is_made_once(row, cache, monkeypatch):
  def never(*arguments, **options):
    raise AssertionError("compiled again")

  monkeypatch.setattr(jax.stages.Lowered, "compile", never)
  assert plan.find(distilled(), "causal_init", here(), cache) == row
  changed = dataclasses.replace(
    distilled(), causal_init=dataclasses.replace(distilled().causal_init, lr=1.0)
  )
  with pytest.raises(AssertionError, match="compiled again"):
    plan.find(changed, "causal_init", here(), cache)
  another = dataclasses.replace(here(), compiler="another")
  assert plan.find(distilled(), "causal_init", another, cache, compile=False) is None


@pytest.mark.slow
def test_a_program_too_large_is_a_row(row, cache, tmp_path, monkeypatch):
  small = dataclasses.replace(here(), chip=dataclasses.replace(here().chip, memory=1000))
  found = plan.find(distilled(), "causal_init", small, tmp_path)
  assert not found["fits"] and found["left"] < 0

  def refuse(self):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory\n\nUsed 171G of 95.74G")

  monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
  refused = plan.find(distilled(), "critic", here(), tmp_path)
  assert not refused["fits"] and "Used 171G of 95.74G" in refused["refused"]
  assert "does not fit" in table.lines(refused) and refused["flops"] > 0
  assert plan.find(distilled(), "critic", here(), tmp_path) == refused
  lines = table.markdown([row, refused]).splitlines()
  assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
  assert "| no |" in lines[3] and "| yes |" in lines[2]


def test_results_that_lead_with_the_whole_batch_are_named(row):
  one = compiled.collectives.Collective("all-gather", (("f32", (8, 4, 6)),), 768, 1.0, ("fsdp",), 4)
  found = compiled.collectives.Found(((one, 2.0),), {})
  said = compiled._traffic(found, row)
  assert said["over_the_batch"] == ["all-gather f32[8,4,6]"]
  assert said["largest"]["bytes"] == 768 and said["collectives"][0]["calls"] == 2
  other = dataclasses.replace(one, shapes=(("f32", (1, 4, 6)), ("f32", (8,))))
  assert not compiled._traffic(compiled.collectives.Found(((other, 2.0),), {}), row)[
    "over_the_batch"
  ]


def test_hosts_share_their_network_cards():
  """8 x 8 GPUs: within a host by NVLink; between hosts each has its card, or all 8 share a sum."""
  chip = chips.CHIPS["h100"]
  target = Target("h100:8x8", chip, tuple(range(64)), "", 8)
  mesh = {"data": 8, "fsdp": 8}
  of = lambda axes, group: compiled._link_seconds(
    {"moved": 63e9, "axes": axes, "group": group}, mesh, target
  )
  assert of("fsdp", 8) == pytest.approx(63e9 / chip.link)
  assert of("data", 8) == pytest.approx(63e9 / chip.network)
  assert of("data+fsdp", 64) == pytest.approx(63e9 * (64 / 63) * (7 / 8) / 8 / chip.network)


# ---------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
  ("on", "said"),
  [
    ("a100:1x8", "--on=a100:1x8: unknown chip 'a100'; expected here, or one of v5p:4x4x4"),
    ("v5p", "--on=v5p: expected sizes behind the chip"),
    ("v5p:4x0x4", "--on=v5p:4x0x4: expected sizes behind the chip"),
    ("h100:8", "--on=h100:8: expected sizes behind the chip"),
    ("h100:2x2x2", "--on=h100:2x2x2: expected hosts x GPUs of each, as in h100:8x8"),
  ],
)
def test_devices_that_are_none(on, said):
  with pytest.raises(UserError) as caught:
    targets.parse(on)
  assert str(caught.value).startswith(said)


@pytest.mark.parametrize(("on", "extra"), [("v5p:2x2x1", "plan-tpu"), ("h200:1x8", "plan-gpu")])
def test_a_missing_compiler_names_its_extra(on, extra, monkeypatch):
  def missing(*arguments, **options):
    raise NotImplementedError("no such platform\nat all")

  monkeypatch.setattr(targets.topologies, "get_topology_desc", missing)
  monkeypatch.setattr(targets, "_version", lambda platform: "")
  with pytest.raises(
    UserError, match=r"no compiler for .PUs is installed \(no such platform\)"
  ) as e:
    targets.parse(on)
  assert f"pip install 'hiar_jax[{extra}]'" in str(e.value)
  assert extra in (ROOT / "setup.py").read_text()
  monkeypatch.setattr(targets, "_version", lambda platform: "libtpu 1")
  with pytest.raises(UserError, match="its compiler refuses such devices"):
    targets.parse(on)


def test_programs_that_are_none():
  with pytest.raises(UserError, match="--program=critics: unknown program 'critics'; expected te"):
    programs.chosen(distilled(), "critics", plan.ENTRIES)
  with pytest.raises(UserError, match="--program=framepack: this experiment has none .* it has te"):
    programs.chosen(distilled(), "framepack", plan.ENTRIES)
  with pytest.raises(UserError, match="--program=vae: .* decodes for next to nothing"):
    programs.chosen(distilled(), "vae", plan.ENTRIES)
  mesh = dataclasses.replace(distilled().mesh, data=-1, fsdp=1, mapping="pmap")
  with pytest.raises(UserError, match="mesh.mapping = 'pmap' cannot be planned"):
    made(dataclasses.replace(distilled(), mesh=mesh), "critic")


@pytest.mark.parametrize("stage", ["distill", "causal_init", "trajectories", "framepack"])
def test_a_batch_that_the_devices_do_not_divide(stage):
  e = packed() if stage == "framepack" else distilled()
  e = dataclasses.replace(e, **{stage: dataclasses.replace(getattr(e, stage), batch=12)})
  with pytest.raises(UserError, match=f"{stage}.batch = 12 must be a multiple of 8"):
    made(e, "critic" if stage == "distill" else stage)


def command(*arguments: str, timeout: int = 3600) -> subprocess.CompletedProcess:
  environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
  return subprocess.run(
    [sys.executable, "-m", "hiar_jax.plan", *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=timeout,
  )


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_one_line():
  done = command("--config=experiments/shapes.py", "--on=v5p:four", "--program=critic")
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: --on=v5p:four: expected")


# ------------------------------------------------------------------------- the chips' own compilers


def planned(cache: pathlib.Path, *arguments: str) -> compiled.Row:
  """The row that the command keeps; skips where the compiler is not installed."""
  done = command(f"--cache={cache}", *arguments)
  if "no compiler for" in done.stderr:
    pytest.skip(done.stderr.strip().splitlines()[-1])
  assert done.returncode == 0, done.stderr[-4000:]
  (path,) = cache.iterdir()
  assert "compiled in" in done.stdout
  return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
  ("on", "kernel", "temporaries"), [("h100:1x8", "cudnn", 12), ("v5p:2x2x2", "tpu_custom_call", 42)]
)
def test_framepack_on_wan_fits_one_chip(on, kernel, temporaries, tmp_path):
  """480 x 832, 1.3B parameters that all train, a clip at a time: half of the memory is left."""
  config = ["--config=experiments/wan_framepack.py", "--program=framepack"]
  found = planned(tmp_path, *config, f"--on={on}")
  assert found["fits"] and found["arguments"] / chips.GIB < 22
  assert found["temporaries"] / chips.GIB < temporaries
  assert any(kernel in name for name in found["kernels"])


@pytest.mark.slow
@pytest.mark.parametrize("on", ["v5p:4x4x4", "h200:8x8"])
@pytest.mark.parametrize(("program", "most"), [("generator", 6600), ("critic", 2100)])
def test_the_published_updates_fit(on, program, most, tmp_path):
  config = ["--config=experiments/hiar_wan_1_3b.py", f"--program={program}"]
  found = planned(tmp_path, *config, f"--on={on}")
  assert found["fits"] and found["temporaries"] <= 40 * chips.GIB
  assert found["flops"] / found["clips"] <= most * 1e12
  assert not found["over_the_batch"]
  assert found["seconds"]["communication"] <= 0.2 * found["seconds"]["arithmetic"]


@pytest.mark.slow
@pytest.mark.parametrize("on", ["v5p:2x2x1", "h100:1x4"])
def test_levels_of_a_tick_stay_on_their_devices(on, tmp_path):
  """What they exchange is one block's latents, though a kernel is mapped over devices by hand."""
  found = planned(tmp_path, "--config=experiments/hiar_wan_1_3b.py", "--program=tick", f"--on={on}")
  assert found["mesh"]["level"] == 4 and found["fits"] and found["kernels"]
  assert sum(one["moved"] for one in found["collectives"]) < 1e8

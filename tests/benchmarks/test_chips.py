"""Updates compiled for chips: what the report says, and wan_framepack at full size where a chip's
compiler is installed.
"""

import json
import os
import subprocess
import sys

import jax
import pytest

from benchmarks import chips
from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.parallel.mesh import MeshConfig, make_mesh, replicated
from hiar_jax.training.experiment import Experiment
from tests.helpers import tiny_packed, tiny_run


def test_an_update_is_lowered_for_devices():
  """As training jits it: the state is given up, and split over the devices where it is large."""
  e = build(Experiment, tiny_packed.make_config(mesh__fsdp=2, mesh__data=1, mesh__min_shard=1))
  text = chips.lower(e, jax.devices()[:2]).as_text()
  assert "mhlo.num_partitions = 2" in text
  assert text.count("jax.buffer_donor") + text.count("tf.aliasing_output") > 50
  assert '"fsdp"' in text


def test_what_a_program_holds():
  mesh = make_mesh(MeshConfig(), jax.devices()[:2])
  split = jax.sharding.NamedSharding(mesh, jax.P("data"))
  total = jax.jit(lambda x: (x @ x.T).sum(), out_shardings=replicated(mesh))
  lowered = total.lower(jax.ShapeDtypeStruct((4096, 4096), "float32", sharding=split))
  found = chips.compiled(lowered, memory=chips.GIB)
  assert found["fits"] and found["kernels"] == {} and found["collectives"]
  assert found["arguments"] == 0.03  # half of 64 MiB
  assert not chips.compiled(lowered, memory=2**20)["fits"]


def test_what_cannot_be_compiled_is_one_line():
  with pytest.raises(UserError, match="expected an experiment with framepack"):
    chips.lower(build(Experiment, tiny_run.make_config()), jax.devices()[:1])
  adapted = tiny_packed.make_config(framepack__lora={"rank": 2})
  with pytest.raises(UserError, match="framepack.lora: an update of adapters is not compiled"):
    chips.lower(build(Experiment, adapted), jax.devices()[:1])
  with pytest.raises(UserError, match="framepack.batch = 4 must be a multiple of 8"):
    chips.lower(build(Experiment, tiny_packed.make_config()), jax.devices())


def test_a_slice_has_its_sizes():
  with pytest.raises(UserError, match="--devices=3: expected one of 1, 4, 8, 16, 64 of v5p"):
    chips.devices_of("v5p", 3)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("chip", "options"),
  [
    ("h100", ["--config.model.attention=cudnn"]),
    ("h100", []),
    ("v5p", []),
  ],
  ids=lambda value: value if isinstance(value, str) else "cudnn" if value else "xla",
)
def test_framepack_on_wan_fits_one_chip(chip, options):
  """480 x 832, 1.3B parameters that all train, a clip at a time: half of the memory is left."""
  command = [sys.executable, "-m", "benchmarks.chips", f"--chip={chip}", *options]
  command += ["--config.framepack.batch=1", "--config.framepack.accumulate=1"]
  environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(
    command, cwd=tiny_run.ROOT, env=environment, capture_output=True, text=True, timeout=1800
  )
  if "error: no compiler for" in done.stderr:
    pytest.skip(done.stderr.strip().splitlines()[-1])
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["fits"] and found["clips"] == 1
  assert found["arguments"] < 22
  # 10 and 40 GiB on an H100, 36 on a v5p
  assert found["temporaries"] < (12 if options else 42)
  assert bool(found["kernels"]) == bool(options)

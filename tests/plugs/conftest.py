"""The parts, registered under their kinds, and a small run with all of them."""

import dataclasses
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import config_dict
import pytest

from hiar_jax import context, train
from hiar_jax.components.registry import AUTOENCODERS, TEXT_ENCODERS
from hiar_jax.models.registry import NETWORKS
from hiar_jax.parallel.mesh import make_mesh
from hiar_jax.preemption import Preemption
from hiar_jax.training import run
from hiar_jax.training.loop import Preempted
from tests.helpers import tiny_run
from tests.plugs import parts
from tests.plugs.network import GroupwiseConfig


@pytest.fixture(scope="package", autouse=True)
def plugged(tmp_path_factory):
  """The registries know the parts, and programs that run once compile quickly."""
  settings = {
    "jax_disable_most_optimizations": True,
    # a resumed stage compiles nothing again
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: jax.config.values[name] for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(NETWORKS, "groupwise", GroupwiseConfig)
    patch.setitem(AUTOENCODERS, "squash", parts.SquashConfig)
    patch.setitem(TEXT_ENCODERS, "letters", parts.LettersConfig)
    patch.setitem(context.LEVELS, "half", parts.Half)
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def make_config(**changes) -> config_dict.ConfigDict:
  """The tiny run with all parts plugged in: clips of 7 frames, which are 4 latent ones."""
  config = tiny_run.make_config()
  config.model = config_dict.ConfigDict(dataclasses.asdict(GroupwiseConfig()))
  config.codec = config_dict.ConfigDict(dict(kind="squash", patch=4))
  config.text = config_dict.ConfigDict(dict(kind="letters", length=28, dim=8))
  config.data.frames = 7
  config.history.update(level="half", window=5, sink=1)
  for stage in ("teacher", "causal_init", "distill"):
    config[stage].update(steps=3, batch=8, rule="adamw", warmup=0)
  config.teacher.update(rule="muon", schedule="constant", weight_decay=0.0)
  config.trajectories.update(count=8, batch=8)
  config.distill.guidance = 1.0  # which reads the negative prompt
  config.sample.update(count=2, measure=2, batch=1, length=2.0)
  config.log.update(keep=9, checkpoint_every=9)
  config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
  return config


def one_device(config, devices=None):
  """make_mesh, on the first device."""
  return make_mesh(config, jax.devices()[:1])


@pytest.fixture(scope="package")
def trained(plugged, tmp_path_factory) -> pathlib.Path:
  """The workdir of a run on one device, stopped after the teacher's first update and resumed."""
  workdir = tmp_path_factory.mktemp("plugs") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run, "make_mesh", one_device)
    with pytest.MonkeyPatch.context() as stop:
      stop.setattr(Preemption, "requested", lambda self, step: step == 1)
      with pytest.raises(Preempted):
        train.main(make_config(), workdir)
    train.main(make_config(), workdir)
  return workdir

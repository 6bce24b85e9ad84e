"""Which weights a video is made of: the last ones of a finished stage, others where that is said,
and never such as make it black.
"""

import pathlib

import jax
import numpy as np
import pytest

import hiar_jax
from hiar_jax import generate
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.components import patch_pca
from hiar_jax.config.workdir import save_resolved
from hiar_jax.conversion import export
from hiar_jax.errors import Damaged, UserError
from hiar_jax.training import pretrained, stages
from hiar_jax.training.run import Run, open_run
from tests.helpers import tiny_run
from tests.helpers.untrained import PROMPT, compiles_quickly, saved_run, untrained  # noqa: F401
from tests.helpers.video_reader import read_mp4


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory) -> pathlib.Path:
  """A run whose distillation is at step 6 of 9, after a finished causal init."""
  workdir = tmp_path_factory.mktemp("unfinished")
  saved_run(workdir, tiny_run.make_config(), ("teacher", "causal_init", "distill"))
  save_resolved(tiny_run.make_config(distill__steps=9), workdir)
  return workdir


def opened(workdir) -> Run:
  config = tiny_run.make_config(distill__steps=9)
  return open_run(config, workdir, save=False)


REFUSED = r"distill/checkpoints: distill is at step 6 of 9; .*, (--)?step=6 takes it as it is"


def test_weights_of_an_unfinished_stage_are_refused(unfinished):
  with pytest.raises(UserError, match=REFUSED):
    hiar_jax.load(unfinished)
  with pytest.raises(UserError, match=REFUSED):
    hiar_jax.stream(workdir=str(unfinished), prompt=PROMPT)
  with pytest.raises(UserError, match=REFUSED):
    pretrained.load_weights(opened(unfinished), "distill")
  with pytest.raises(UserError, match=REFUSED):
    stages.make_samples(opened(unfinished))
  with pytest.raises(UserError, match=r"step=7: the checkpoints in .* are of \[6\]"):
    hiar_jax.load(unfinished, step=7)


@pytest.mark.slow
def test_they_are_taken_where_that_is_said_and_the_file_says_so_too(unfinished, capfd, tmp_path):
  out = tmp_path / "a.mp4"
  options = dict(workdir=str(unfinished), prompt=PROMPT, frames=4, out=str(out))
  generate.generate(generate.GenerateOptions(**options, step=6))
  assert f"weights of {unfinished}/distill/checkpoints: step 6 of 9" in capfd.readouterr().err
  metadata = read_mp4(out)[2]
  assert (metadata["stage"], metadata["step"]) == ("distill", "6")
  # a dry run loads nothing
  generate.generate(generate.GenerateOptions(workdir=str(unfinished), dry_run=True))
  # evaluate --unfinished
  assert pretrained.step_of(opened(unfinished), "distill", unfinished=True) == 6
  assert "step 6 of 9" in capfd.readouterr().err


def test_another_stage_is_said(unfinished, capfd):
  model = hiar_jax.load(unfinished, stage="causal_init")
  assert "of causal_init, not of its last stage distill" in capfd.readouterr().err
  assert model.origin == {"workdir": unfinished.name, "stage": "causal_init", "step": "4"}


def test_an_export_of_an_unfinished_stage_says_so(unfinished, capfd):
  for stage, said in {"distill": "weights of step 6 of 9", "causal_init": ""}.items():
    assert [part.kind for part in export._parts(unfinished, {}, stage)] == ["dit"]
    err = capfd.readouterr().err
    assert said in err and (said or not err)


def test_no_earlier_checkpoint_stands_for_a_damaged_one(tmp_path):
  saved_run(tmp_path, tiny_run.make_config())
  model = untrained(tmp_path, tiny_run.make_config())
  directory = tmp_path / "distill" / "checkpoints"
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(4, {"step": np.ones(())}, model.params(), force=True)
  array = max((directory / "6" / "params").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size)
  array.write_bytes(array.read_bytes()[:-1] + b"?")
  with pytest.raises(Damaged, match="distill/checkpoints/6 is damaged .*; the training command"):
    hiar_jax.load(tmp_path).params()
  hiar_jax.load(tmp_path, step=4).params()


# ------------------------------------------------------------------------------------ not finite


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
  """A model with one number in its weights that is none."""
  workdir = saved_run(tmp_path_factory.mktemp("broken"), tiny_run.make_config())
  model = hiar_jax.load(workdir)
  params = model.params()
  leaves, tree = jax.tree.flatten(params)
  leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].set(np.nan)
  bad = tree.unflatten(leaves)
  return type(model)(model.run, "", model.stage, lambda: bad)


def test_numbers_that_are_not_finite_are_no_black_video(broken):
  with pytest.raises(UserError, match=f"^{PROMPT}: the model has made numbers that are not finite"):
    broken.generate(PROMPT, frames=4)
  with broken.stream(PROMPT) as stream, pytest.raises(UserError, match="^block 0, 'a red circle "):
    next(stream)


def test_a_codec_that_is_not_finite_is_damaged(tmp_path):
  run = untrained(tmp_path, tiny_run.make_config()).run
  path = run.directory("data") / patch_pca.FILE
  arrays = dict(np.load(path))
  arrays["mean"][0] = np.nan
  np.savez(path, **arrays)
  with pytest.raises(Damaged, match="codec.npz is damaged .numbers that are not finite"):
    run.autoencoder  # noqa: B018

"""Files of an owner without a name, as in a container that runs under another number."""

import grp
import json
import os
import pwd

from etils import epath
import numpy as np
import pytest
import tensorflow_datasets as tfds

from hiar_jax.checkpoints import checksums, owners
from hiar_jax.checkpoints.training_state import Checkpoints, load_params
from hiar_jax.data import tfds_builder
from tests.helpers.small_state import CONFIG, assert_same, make


@pytest.fixture(autouse=True)
def nameless(monkeypatch):
  def unknown(number):
    raise KeyError(f"uid not found: {number}")

  monkeypatch.setattr(pwd, "getpwuid", unknown)
  monkeypatch.setattr(grp, "getgrgid", unknown)


def test_sizes_are_told_all_the_same(tmp_path):
  (tmp_path / "numbers").write_bytes(b"123")
  for _ in range(2):
    owners.allow_nameless()
    found = epath.Path(tmp_path / "numbers").stat()
  assert (found.length, found.is_directory) == (3, False)
  assert found.owner == str(os.getuid()) and found.mtime == int(os.path.getmtime(tmp_path))
  assert epath.Path(tmp_path).stat().is_directory
  with pytest.raises(FileNotFoundError):
    epath.Path(tmp_path / "none").stat()


def test_a_checkpoint_is_written_summed_and_read(tmp_path):
  state = make()
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    checkpoints.save(1, state, state.params)
  assert json.loads((tmp_path / "1" / "checksums.json").read_text())
  checksums.check(epath.Path(tmp_path / "1"))
  assert_same(load_params(tmp_path), state.params)
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    step, restored = checkpoints.restore(state)
  assert step == 1
  assert_same(restored, state)


def test_a_data_set_is_written_and_read(tmp_path):
  features = {"number": tfds_builder.tensor((), np.int32), "caption": tfds.features.Text()}
  records = [{"number": np.int32(i), "caption": f"{i}"} for i in range(3)]
  tfds_builder.build(tmp_path, "small/one", features, records, count=3, example_bytes=8)
  assert [int(record["number"]) for record in tfds_builder.open_source(tmp_path)] == [0, 1, 2]

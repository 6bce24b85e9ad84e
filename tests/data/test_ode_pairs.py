"""A folder of published trajectories becomes ours: levels, order and layout kept, resumed where it
was stopped, misfits named.
"""

import pickle
import zipfile

import numpy as np
import pytest

from hiar_jax.data import ode_pairs, tfds_builder, trajectories
from hiar_jax.data.ode_pairs import Sampler
from hiar_jax.errors import UserError

SHAPE = (5, 3, 4, 2, 6)  # levels, frames, channels, height, width
PROMPTS = [*(f"prompt {i}" for i in range(6)), "一只猫 🐈"]
STORAGES = {
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "int64": "LongStorage",
}


def save_pt(path, content):
  """What torch.save writes of {name: array}: a pickle that names storages, and the storages, in a
  ZIP archive.
  """

  def plain(value):
    return pickle.dumps(value, 2)[2:-1]  # without the header and the end

  program = b"\x80\x02}"
  with zipfile.ZipFile(path, "w") as archive:
    for key, (name, array) in enumerate(content.items()):
      strides = tuple(int(step) // array.itemsize for step in array.strides)
      storage = (
        plain("storage")
        + f"ctorch\n{STORAGES[array.dtype.name]}\n".encode()
        + plain(str(key))
        + plain("cpu")
        + plain(array.size)
      )
      tensor = (
        b"("
        + storage
        + b"tQ"
        + plain(0)
        + plain(array.shape)
        + plain(strides)
        + plain(False)
        + b"ccollections\nOrderedDict\n)R"
      )
      program += plain(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + tensor + b"tRs"
      archive.writestr(f"archive/data/{key}", array.tobytes())
    archive.writestr("archive/data.pkl", program + b".")


def _latents(i, dtype="float32", shape=SHAPE):
  return np.random.default_rng(i).normal(size=shape).astype(np.dtype(dtype))


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "ode_pairs"
  path.mkdir()
  for i in reversed(range(len(PROMPTS))):
    save_pt(path / f"{i:05d}.pt", {PROMPTS[i]: _latents(i)[None]})
  (path / "rank_0.log").write_text("the published script leaves its logs here")
  return path


def _prepare(directory, folder, **changes):
  ode_pairs.prepare(
    directory, folder, **{"dtype": "float32", "part_size": 3, "channels": 4, **changes}
  )


def _check(directory, dtype="float32", atol=0.0):
  source = tfds_builder.open_source(directory)
  assert len(source) == len(PROMPTS)
  for i, record in enumerate(source):
    assert record["caption"].decode() == PROMPTS[i]
    assert record["trajectory"].shape == (5, 3, 2, 6, 4) and record["trajectory"].dtype == dtype
    np.testing.assert_allclose(
      record["trajectory"], np.moveaxis(_latents(i), 2, -1), rtol=0, atol=atol
    )


def test_every_trajectory_in_order(folder, tmp_path):
  _prepare(tmp_path / "out", folder)
  _check(tmp_path / "out")
  assert not (tmp_path / "out/parts").exists()


def test_the_levels_are_the_published_ones(folder, tmp_path):
  """Wan's sampler with shift 8: what the published configs call pd_teacher_save_indices of 48
  steps.
  """
  _prepare(tmp_path / "out", folder)
  expected = [8 * t / (1 + 7 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
  np.testing.assert_allclose(
    trajectories.read_sigmas(tmp_path / "out"), expected, rtol=0, atol=1e-12
  )
  np.testing.assert_allclose(expected, [1, 0.96, 0.8889, 0.7273, 0], rtol=0, atol=5e-5)
  assert Sampler(steps=4, shift=1.0, kept=(0, 1, -1)).sigmas == [1, 0.75, 0]


def test_other_levels(tmp_path):
  save_pt(tmp_path / "0.pt", {"a": _latents(0)[None, :3]})
  _prepare(tmp_path / "out", tmp_path, sampler=Sampler(steps=4, shift=5.0, kept=(0, 2, 4)))
  assert trajectories.read_sigmas(tmp_path / "out") == pytest.approx([1, 5 / 6, 0])
  assert tfds_builder.open_source(tmp_path / "out")[0]["trajectory"].shape == (3, 3, 2, 6, 4)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_any_floating_dtype_with_or_without_the_first_axis(stored, tmp_path):
  latents = _latents(0, stored)
  save_pt(tmp_path / "0.pt", {"a": latents[None]})
  save_pt(tmp_path / "1.pt", {"b": latents})
  _prepare(tmp_path / "out", tmp_path)
  for record in tfds_builder.open_source(tmp_path / "out"):
    np.testing.assert_array_equal(
      record["trajectory"], np.moveaxis(latents, 2, -1).astype(np.float32)
    )


def test_float16_is_the_default(folder, tmp_path):
  ode_pairs.prepare(tmp_path / "out", folder, channels=4)
  _check(tmp_path / "out", "float16", atol=2e-3)


def test_a_stop_resumes_at_the_first_missing_part(folder, tmp_path, monkeypatch):
  read, seen = ode_pairs.read_latents, []

  def stops(path, *args):
    if len(seen) == 4:
      raise KeyboardInterrupt
    seen.append(path.name)
    return read(path, *args)

  with monkeypatch.context() as patch:
    patch.setattr(ode_pairs, "read_latents", stops)
    with pytest.raises(KeyboardInterrupt):
      _prepare(tmp_path / "out", folder)
  assert len(list((tmp_path / "out/parts").iterdir())) == 1 and not tfds_builder.is_complete(
    tmp_path / "out"
  )
  seen.clear()
  with monkeypatch.context() as patch:
    patch.setattr(
      ode_pairs,
      "read_latents",
      lambda path, *args: seen.append(path.name) or read(path, *args),
    )
    _prepare(tmp_path / "out", folder)
    _prepare(tmp_path / "out", folder)  # done
  assert seen == [f"{i:05d}.pt" for i in range(3, 7)]
  _check(tmp_path / "out")


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (
      {"a": _latents(0, shape=(1, 4, *SHAPE[1:]))},
      "float32 [4, 3, 4, 2, 6]; expected 5 levels and 4 channels",
    ),
    ({"a": _latents(0, shape=(1, 5, 4, 3, 2, 6))}, "expected 5 levels and 4 channels"),
    (
      {"a": _latents(0, shape=(2, *SHAPE))},
      "float32 [2, 5, 3, 4, 2, 6]; expected floating numbers [1, levels",
    ),
    ({"a": _latents(0)[0]}, "float32 [3, 4, 2, 6]; expected floating numbers"),
    ({"a": np.zeros((1, *SHAPE), np.int64)}, "int64 [1, 5, 3, 4, 2, 6]; expected floating numbers"),
    ({"a": _latents(0, shape=(1, *SHAPE[:4], 8))}, "expected one size"),
    ({}, "holds a dict of 0 entries; expected a trajectory"),
    ({7: _latents(0)[None]}, "holds a dict of 1 entries; expected a trajectory"),
    ({"a": _latents(0)[None] * np.float32("inf")}, "not finite"),
  ],
)
def test_files_that_hold_something_else(content, words, folder, tmp_path):
  save_pt(folder / "00001.pt", content)
  with pytest.raises(UserError) as error:
    _prepare(tmp_path / "out", folder)
  assert words in str(error.value) and "\n" not in str(error.value)
  assert "00001.pt" in str(error.value) or words == "not finite"


def test_a_file_that_is_cut_off(folder, tmp_path):
  path = folder / "00004.pt"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match="00004.pt is cut off"):
    _prepare(tmp_path / "out", folder)


def test_other_bad_input(folder, tmp_path):
  _prepare(tmp_path / "out", folder)
  with pytest.raises(UserError, match="sigmas=.*0.96, .*sigmas=.*0.9375, "):
    _prepare(tmp_path / "out", folder, sampler=Sampler(shift=5.0, kept=(0, 12, 24, 36, 48)))
  save_pt(folder / "00000.pt", {"another prompt": _latents(0)[None]})
  with pytest.raises(UserError, match="digest="):
    _prepare(tmp_path / "out", folder)
  with pytest.raises(UserError, match="holds no .pt file"):
    _prepare(tmp_path / "other", tmp_path)
  with pytest.raises(UserError, match="is no folder"):
    _prepare(tmp_path / "other", tmp_path / "nowhere")
  for kept in ((0,), (0, 49), (0, 24, 12), (-50, -1)):
    with pytest.raises(UserError, match="expected at least two of the levels 0 to 48"):
      Sampler(kept=kept)

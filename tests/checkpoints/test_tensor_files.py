"""Named tensors from safetensors, whole or in shards, and what wrappers and training loops do to
names.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hiar_jax.checkpoints.tensor_files import open_tensors
from hiar_jax.errors import UserError
from tests.helpers import tiny
from tests.helpers.torch_archive import save

ARRAYS = {
  "a.weight": tiny.random(0, 3, 4),
  "a.bias": tiny.random(1, 3).astype(ml_dtypes.bfloat16),
  "b": np.asarray(2, np.float32),
}
STEM = "diffusion_pytorch_model"


def shards(folder, arrays=ARRAYS):
  """One tensor a shard, and the index."""
  names = {
    name: f"{STEM}-{i:05d}-of-{len(arrays):05d}.safetensors" for i, name in enumerate(arrays, 1)
  }
  for name, file in names.items():
    save_file({name: arrays[name]}, folder / file)
  (folder / f"{STEM}.safetensors.index.json").write_text(
    json.dumps({"metadata": {}, "weight_map": names})
  )
  return names


def assert_same(found, expected=ARRAYS):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert (
      found[name].dtype == array.dtype
      and found[name].shape == array.shape
      and found[name].tobytes() == array.tobytes()
    ), name


@pytest.mark.parametrize("form", ["file", "folder of one", "index", "folder of shards"])
def test_safetensors(tmp_path, form):
  if "one" in form or form == "file":
    save_file(ARRAYS, tmp_path / f"{STEM}.safetensors")
  else:
    shards(tmp_path)
  path = {
    "file": tmp_path / f"{STEM}.safetensors",
    "index": tmp_path / f"{STEM}.safetensors.index.json",
  }.get(form, tmp_path)
  found = open_tensors(path)
  assert_same(found.named)
  assert len(found.files) == (1 if form in ("file", "folder of one") else 3)
  # all are views of mapped files
  assert not any(array.flags.owndata for array in found.named.values())


def test_files_cut_off_at_any_length(tmp_path):
  path = tmp_path / "a.safetensors"
  save_file(ARRAYS, path)
  whole = path.read_bytes()
  for length in [0, 4, 8, 50, len(whole) // 2, len(whole) - 1]:
    path.write_bytes(whole[:length])
    with pytest.raises(UserError, match=rf"cut off or damaged .*{length:,} bytes.*again") as error:
      open_tensors(path)
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_named(tmp_path):
  file = shards(tmp_path)["a.bias"]
  (tmp_path / file).unlink()
  with pytest.raises(UserError, match=f"incomplete.*{file}.*download the rest"):
    open_tensors(tmp_path)


def test_an_index_that_does_not_fit_its_shards(tmp_path):
  names = shards(tmp_path)
  index = tmp_path / f"{STEM}.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {**names, "c": names["b"]}}))
  with pytest.raises(UserError, match="says that c is in"):
    open_tensors(tmp_path)
  index.write_text("{")
  with pytest.raises(UserError, match="damaged"):
    open_tensors(tmp_path)


@pytest.mark.parametrize("name", [5, None, ["a"]])
def test_an_index_of_what_is_no_text(tmp_path, name):
  index = tmp_path / f"{STEM}.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"a": name}}))
  with pytest.raises(UserError, match="is damaged .no weight_map can be read"):
    open_tensors(tmp_path)


@pytest.mark.parametrize(
  "name", ["a" * 5000, "../a.safetensors", "/a.safetensors", "a\0", "\ud800"]
)
def test_an_index_of_what_is_no_file_beside_it(tmp_path, name):
  save_file(ARRAYS, tmp_path / "a.safetensors")
  (tmp_path / "sub").mkdir()
  index = tmp_path / "sub" / f"{STEM}.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"a.weight": name}}))
  with pytest.raises(UserError, match=r"which is not the name of one beside it") as error:
    open_tensors(index)
  assert len(str(error.value)) < 1000


def test_a_very_deep_index(tmp_path):
  index = tmp_path / f"{STEM}.safetensors.index.json"
  index.write_text("[" * 100_000)
  with pytest.raises(UserError, match="is damaged"):
    open_tensors(tmp_path)


def write_header(path, header, numbers=b""):
  content = json.dumps(header).encode()
  path.write_bytes(len(content).to_bytes(8, "little") + content + numbers)
  return path


@pytest.mark.parametrize("extra", ["extra", "path", "content", "name"])
def test_a_header_with_another_key(tmp_path, extra):
  """The format's own library takes it."""
  entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], extra: 1}
  path = write_header(tmp_path / "a.safetensors", {"a": entry}, np.float32([1, 2]).tobytes())
  assert open_tensors(path).named["a"].tolist() == [1, 2]


def test_a_shape_that_no_array_has(tmp_path):
  entry = {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}
  path = write_header(tmp_path / "a.safetensors", {"a": entry})
  with pytest.raises(UserError, match=r"a has the shape \[0, 4611686018427387904\]"):
    open_tensors(path)


def test_what_the_index_forgets_is_not_lost(tmp_path):
  """It must show up as left over, not disappear."""
  names = shards(tmp_path)
  save_file({"a.bias": ARRAYS["a.bias"], "extra": ARRAYS["b"]}, tmp_path / names["a.bias"])
  assert "extra" in open_tensors(tmp_path).named


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ([], "holds no weights"),
    (
      ["a.safetensors", "b.safetensors"],
      r"several sets of weights \(a.safetensors, b.safetensors\)",
    ),
    ([f"{STEM}-00001-of-00002.safetensors"], "shards without their index"),
  ],
)
def test_folders_that_are_not_clear(tmp_path, files, message):
  for name in files:
    save_file(ARRAYS, tmp_path / name)
  with pytest.raises(UserError, match=message):
    open_tensors(tmp_path)


def test_a_mistyped_path_names_the_nearest(tmp_path):
  save_file(ARRAYS, tmp_path / "taew2_1.safetensors")
  with pytest.raises(UserError, match=r"no file .*did you mean .*taew2_1\.safetensors"):
    open_tensors(tmp_path / "taew21.safetensors")
  (tmp_path / "a.txt").write_text("hello")
  with pytest.raises(UserError, match="ends in .safetensors"):
    open_tensors(tmp_path / "a.txt")


# ------------------------------------------------------------------------ what training code leaves

F32 = {"blocks.0.a": tiny.random(0, 2), "head.modulation": tiny.random(1, 2)}
SCALED = {name: 2 * array for name, array in F32.items()}


@pytest.mark.parametrize(
  ("saved", "entry", "expected", "notes"),
  [
    (F32, None, F32, 0),
    ({"generator": F32, "step": 3}, None, F32, 0),
    ({"generator": F32, "critic": SCALED, "generator_ema": SCALED}, None, SCALED, 1),
    ({"generator": F32, "critic": SCALED}, "critic", SCALED, 0),
    ({"critic": SCALED, "model": F32}, None, F32, 1),
    ({"odd": F32}, None, F32, 0),
  ],
)
def test_entries(tmp_path, saved, entry, expected, notes):
  found = open_tensors(save(saved, tmp_path / "hiar.pt"), entry)
  assert_same(found.named, expected)
  assert len(found.notes) == notes and all(
    "generator_ema" in note or "model" in note for note in found.notes
  )


@pytest.mark.parametrize(
  ("saved", "entry", "message"),
  [
    ({"generator": F32}, "generator_em", "did you mean 'generator'"),
    ({"one": F32, "two": F32}, None, "entries one, two; choose one with --entry"),
    ({"a": 3}, None, "'a' is a int; expected nothing but tensors"),
    ({"generator": {**F32, "step": 3}}, None, "'step' is a int"),
    ([1, 2], None, "holds a list"),
    ({}, None, "holds no tensors"),
  ],
)
def test_entries_that_are_not_clear(tmp_path, saved, entry, message):
  with pytest.raises(UserError, match=message):
    open_tensors(save(saved, tmp_path / "hiar.pt"), entry)


def test_entries_are_for_torch_files(tmp_path):
  save_file(ARRAYS, tmp_path / "a.safetensors")
  with pytest.raises(UserError, match="--entry=generator is for .pt files"):
    open_tensors(tmp_path / "a.safetensors", "generator")


@pytest.mark.parametrize(
  "wrapped",
  [
    "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.a",
    "_orig_mod.model.blocks.0.a",
    "module.blocks.0._orig_mod.a",
    "model.diffusion_model.blocks.0.a",
    "blocks.0.a",
  ],
)
def test_wrappers_are_stripped(tmp_path, wrapped):
  state = {wrapped: F32["blocks.0.a"], "model.head.modulation": F32["head.modulation"]}
  assert_same(open_tensors(save({"generator": state}, tmp_path / "a.pt")).named, F32)


def test_names_that_become_one_are_refused(tmp_path):
  with pytest.raises(UserError, match="two tensors are called 'blocks.0.a'"):
    open_tensors(
      save(
        {"blocks.0.a": F32["blocks.0.a"], "model.blocks.0.a": F32["blocks.0.a"]}, tmp_path / "a.pt"
      )
    )

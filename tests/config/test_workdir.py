"""The resolved config of a workdir: differences and damage named, written whole or not at all."""

import dataclasses
import types

from ml_collections import ConfigDict
import pytest

from hiar_jax.config.workdir import difference, read_resolved, save_resolved, to_json
from hiar_jax.errors import Damaged, UserError
from hiar_jax.files import DiskFull, os, shutil, write_atomic


def test_difference_names_the_fields():
  stored = {"width": 8, "levels": (1.0,), "window": {"frames": 3}, "old": 1}
  given = {"width": 16, "levels": [1.0], "window": {"frames": None}, "new": {}}
  assert difference(stored, stored) == []
  assert difference(stored, given) == [
    "old: 1 -> (none)",
    "width: 8 -> 16",
    "window.frames: 3 -> null",
  ]
  assert difference({"a": 1}, {"a": True}) == ["a: 1 -> true"]


def test_a_workdir_remembers_its_config(tmp_path):
  c = ConfigDict({"width": 8, "levels": (1.0, 0.5), "log": {"every": 10}})
  workdir = tmp_path / "runs" / "a"
  assert read_resolved(workdir) is None
  save_resolved(c, workdir)
  assert [path.name for path in workdir.iterdir()] == ["config.json"]
  assert read_resolved(workdir) == {"width": 8, "levels": [1.0, 0.5], "log": {"every": 10}}
  c.log.every, c.width, c.levels = 20, 16, (1.0,)
  assert difference(read_resolved(workdir), c, ("log",)) == [
    "levels: [1.0, 0.5] -> [1.0]",
    "width: 8 -> 16",
  ]


def test_a_damaged_config_file_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"width": ')
  with pytest.raises(
    Damaged, match=r"config\.json is damaged \(it is not JSON: .*\); restore it, or use another"
  ):
    read_resolved(tmp_path)


@pytest.mark.parametrize(
  "content, said",
  [
    ("[1, 2]", "expected an object, got list"),
    ("null", "expected an object, got NoneType"),
    ("[" * 100_000, "it is not JSON: maximum recursion"),
    ('{"width": ' + "9" * 5000 + "}", "it is not JSON: Exceeds the limit"),
  ],
)
def test_json_that_is_no_config_is_damage_too(tmp_path, content, said):
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(Damaged, match=rf"config\.json is damaged \({said}"):
    read_resolved(tmp_path)


def test_what_json_cannot_hold_is_refused():
  with pytest.raises(UserError, match="a config holds numbers, .* got set"):
    to_json(ConfigDict({"names": {"a"}}))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch, call):
  path = tmp_path / "config.json"
  write_atomic(path, b"old")

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, call, fail)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2048))
  with pytest.raises(
    DiskFull,
    match=r"no space left on the disk of .*config.json \(3 B needed, 2 KiB free\); nothing is left "
    "half written; free some space and run the same command",
  ):
    write_atomic(path, b"new")
  assert path.read_bytes() == b"old"
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_younger_field_is_written_where_it_is_used():
  """Files of older versions lack it, and mean its default."""

  @dataclasses.dataclass
  class Sizes:
    width: int = 8
    packing: tuple[int, ...] = dataclasses.field(default=(), metadata={"since": "2026-11"})

  assert to_json(Sizes()) == {"width": 8}
  assert to_json({"model": Sizes(packing=(1, 2))}) == {"model": {"width": 8, "packing": [1, 2]}}

"""Checksums of a checkpoint's files: Orbax notices a file that is cut or lost, but not a bit that
has changed.
"""

import json
import zlib

from etils import epath

NAME = "checksums.json"  # {path of a file relative to the checkpoint: its crc32}
_LIMIT = 8 << 30  # bytes: to read back a checkpoint larger than that would take minutes


class Damaged(Exception):
  """A checkpoint is not what was written."""


def write(path: epath.Path) -> None:
  """Writes the checksums of the checkpoint in the directory `path` (of its items: files at its top
  are Orbax's log).
  """
  (path / NAME).write_text(json.dumps(_sums(path)))


def check(path: epath.Path) -> None:
  """Raises `Damaged`, naming the first file that has changed or is missing."""
  if not (path / NAME).exists():
    return  # written by other software: Orbax's own checks are all there is
  try:
    stored = json.loads((path / NAME).read_text())
  except ValueError as error:
    raise Damaged(f"{NAME} is not JSON") from error
  found = _sums(path) if stored else {}
  for name in sorted(stored):
    if stored[name] != found.get(name):
      raise Damaged(f"{name} {'has changed' if name in found else 'is missing'}")


def _sums(path: epath.Path) -> dict[str, int]:
  files = [root / name for root, _, names in path.walk() if root != path for name in names]
  if sum(file.stat().length for file in files) > _LIMIT:
    return {}
  return {str(file.relative_to(path)): zlib.crc32(file.read_bytes()) for file in files}

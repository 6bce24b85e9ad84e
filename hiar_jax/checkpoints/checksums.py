"""CRC-32 checksums of a checkpoint's files, for changed bits.

Orbax itself notices only files that are cut off or lost.
"""

import json
import zlib

from etils import epath

NAME = "checksums.json"  # {path of a file relative to the checkpoint: its crc32}
# Bytes of a whole checkpoint. Summing reads every file back, which takes minutes above this size;
# larger checkpoints get an empty table and only Orbax's own checks.
_LIMIT = 8 << 30


class Damaged(Exception):
  """Stored arrays or files that are lost, changed or unreadable."""


def write(path: epath.Path) -> None:
  """Writes the checksums of the items (subdirectories) of the checkpoint in `path`."""
  (path / NAME).write_text(json.dumps(_sums(path)))


def check(path: epath.Path) -> None:
  """Raises `Damaged`, naming the first file that has changed or is missing."""
  if not (path / NAME).exists():
    return  # written by other software: only Orbax's own checks apply
  try:
    stored = json.loads((path / NAME).read_text())
  except ValueError as error:
    raise Damaged(f"{NAME} is not JSON") from error
  # An empty table means that the checkpoint was above _LIMIT when written: do not read it here.
  found = _sums(path) if stored else {}
  for name in sorted(stored):
    if stored[name] != found.get(name):
      raise Damaged(f"{name} {'has changed' if name in found else 'is missing'}")


def _sums(path: epath.Path) -> dict[str, int]:
  """Returns {path relative to the checkpoint: CRC-32}, empty above _LIMIT bytes."""
  # Items alone: files at the top of the checkpoint are Orbax's log of the save.
  files = [root / name for root, _, names in path.walk() if root != path for name in names]
  if sum(file.stat().length for file in files) > _LIMIT:
    return {}
  return {str(file.relative_to(path)): zlib.crc32(file.read_bytes()) for file in files}

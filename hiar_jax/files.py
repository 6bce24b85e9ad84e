"""Files that are written completely or not at all."""

from collections.abc import Iterator
import contextlib
import errno
import io
import os
import pathlib
from pathlib import Path

from hiar_jax.errors import UserError


def write_atomic(path: str | os.PathLike, content: bytes) -> pathlib.Path:
  """Writes a file, making missing directories, and returns its path.

  Whenever the process dies, the file holds all of `content` or what it held before. Raises
  UserError where the disk is full or refuses.
  """
  path = pathlib.Path(path)
  # In the same directory, since a rename is atomic within one file system only. The name is fixed,
  # so the next try overwrites what a killed one left behind.
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with explained(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        # without fsync a power cut may leave the new name with no content behind it
        os.fsync(file.fileno())
      os.replace(temporary, path)
  finally:
    with contextlib.suppress(OSError):  # it is renamed, or could not be created
      temporary.unlink()
  return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[io.BufferedRandom]:
  """Opens a file for writing that gets its name when the context ends without an error.

  As write_atomic, for content that need not be in memory at once.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with explained(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      file = open(temporary, "w+b")
    with file:
      # an OSError of the caller's own code, a full disk aside, is not about this file
      with explained(path, full_disk_alone=True):
        yield file
      with explained(path):
        file.flush()
        os.fsync(file.fileno())
    with explained(path):
      os.replace(temporary, path)
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


@contextlib.contextmanager
def explained(path: Path, full_disk_alone: bool = False) -> Iterator[None]:
  """Turns an OSError while `path` is written into a UserError of one line.

  full_disk_alone: other OSErrors pass unchanged.
  """
  try:
    yield
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(
        f"no space left on the disk of {path}; free some space and run the same command"
      ) from error
    if full_disk_alone:
      raise
    raise UserError(
      f"{path}: cannot be written ({error.strerror}); choose another place"
    ) from error

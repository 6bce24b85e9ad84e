"""Files that are whole or not there."""

from collections.abc import Iterator
import contextlib
import errno
import io
import os
import pathlib
from pathlib import Path

from hiar_jax.errors import UserError


def write_atomic(path: str | os.PathLike, content: bytes) -> pathlib.Path:
  """The file holds all of `content`, or what it held before, whenever the process dies; missing
  directories are made.

  A temporary name in the same directory, fsync, rename. The name is fixed, so what a kill leaves
  behind is overwritten by the next try. Raises UserError where the disk is full or refuses.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(
        f"no space left on the disk of {path}; free some space and run the same command"
      ) from error
    raise UserError(
      f"{path}: cannot be written ({error.strerror}); choose another place"
    ) from error
  finally:
    with contextlib.suppress(OSError):  # there is nothing to remove where nothing could be written
      temporary.unlink()
  return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[io.BufferedRandom]:
  """A file to write that gets its name when it is complete; as files.write_atomic, for what need
  not be in memory at once.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with explained(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      file = open(temporary, "w+b")
    with file:
      # what else may go wrong in there is not this file's
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
  """What goes wrong while `path` is written, as a UserError of one line."""
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

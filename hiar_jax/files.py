"""Files that are whole or not there."""

import contextlib
import errno
import os
import pathlib

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

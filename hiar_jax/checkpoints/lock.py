"""One process at a time writes to a folder: a lock that says who holds it."""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket

from hiar_jax.checkpoints.on_disk import LOCK
from hiar_jax.errors import UserError
from hiar_jax.files import writing


@contextlib.contextmanager
def held(folder: str | os.PathLike, given: str) -> Iterator[None]:
  """Holds the lock of a folder, which is made where it is missing.

  The system releases it when the process ends, however it ends: the file of a process that was
  killed holds nobody up. given: the flag with its value, which the message begins with.

  Raises:
    UserError: another process holds it; names its number, its machine and since when.
  """
  folder = pathlib.Path(os.path.abspath(folder))
  made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
  path = folder / LOCK
  try:
    with writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
    file = _open_locked(path, given)
    try:
      yield
    finally:
      path.unlink(missing_ok=True)  # before it is released: the next one makes a file of its own
      os.close(file)
  finally:
    for empty in made:  # nothing was written there
      with contextlib.suppress(OSError):
        empty.rmdir()


def _open_locked(path: pathlib.Path, given: str) -> int:
  """Returns the descriptor of the locked file, in which this process is named."""
  while True:
    with writing(path):
      file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      _lock(file, path, given)
      # whoever held it until now may have removed the file that was opened here
      if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
        with writing(path):
          os.ftruncate(file, 0)
          os.pwrite(file, json.dumps(_this_process()).encode(), 0)
        return file
    except BaseException:
      os.close(file)
      raise
    os.close(file)


def _lock(file: int, path: pathlib.Path, given: str) -> None:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise UserError(
      f"{given} is in use: {_holder(path)} writes to it; wait until it ends, stop it, or give "
      "another folder"
    ) from error
  except OSError:
    pass  # a file system without locks, as some network disks


def _this_process() -> dict[str, str | int]:
  now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
  return {"pid": os.getpid(), "host": socket.gethostname(), "since": now}


def _holder(path: pathlib.Path) -> str:
  """Returns who holds the lock, in words."""
  try:
    who = json.loads(path.read_text())
    return f"process {who['pid']} on {who['host']}, since {who['since']},"
  except (OSError, ValueError, KeyError, TypeError):  # it has not written its name yet
    return "another process"

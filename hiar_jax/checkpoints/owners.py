"""Owners without a name: users that the machine's list (/etc/passwd) does not have, as in a
container that runs under another number, or on a mounted disk.

etils' stat, which Orbax, TFDS and the checksums call for the size of a file, looks the name of its
owner up and raises KeyError where there is none (google/etils, issue 790).
"""

import os
import stat

from etils.epath import backend, stat_utils


def allow_nameless() -> None:
  """Lets etils give the owner's number where there is no name; may be called again."""
  local = backend.os_backend
  if "stat" in vars(local):
    return
  named = local.stat

  def numbered(path: os.PathLike | str) -> stat_utils.StatResult:
    try:
      return named(path)
    except KeyError:
      found = os.stat(path)
      return stat_utils.StatResult(
        is_directory=stat.S_ISDIR(found.st_mode),
        length=found.st_size,
        mtime=int(found.st_mtime),
        owner=str(found.st_uid),
        group=str(found.st_gid),
        mode=found.st_mode,
      )

  local.stat = numbered

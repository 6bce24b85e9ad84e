"""Files that are written completely or not at all, and errors of the disk in one line each."""

import codecs
from collections.abc import Iterator
import contextlib
import errno
import fcntl
import io
import json
import os
import pathlib
import re
import resource
import secrets
import shutil

from hiar_jax.errors import Damaged, UserError
from hiar_jax.peak_memory import size

LONGEST_NAME = 255  # bytes, of the file systems of Linux and macOS


class DiskFull(UserError):
  """A full disk, an exhausted quota or the limit on a file's size, noticed while `path` is written,
  or just before.
  """

  def __init__(
    self,
    path: str | os.PathLike | None,
    needed: int | None = None,
    kept: str = "nothing is left half written",
    error: BaseException | None = None,
  ):
    """needed: bytes that are to be written, if known; kept: what survives; error: what told it."""
    kept = f"{kept}; " if kept else ""
    if _is_too_large(error):
      super().__init__(_too_large(path, kept))
      return
    where = ""
    if path is not None:
      figures = [f"{size(needed)} needed"] if needed is not None else []
      figures.append(f"{size(free_space(path))} free")
      where = f" of {os.fspath(path)} ({', '.join(figures)})"
    super().__init__(
      f"no space left on the disk{where}; {kept}free some space and run the same command"
    )


def _too_large(path: str | os.PathLike | None, kept: str) -> str:
  where = "" if path is None else f"{os.fspath(path)}: "
  most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
  if most == resource.RLIM_INFINITY:
    return f"{where}the disk takes no files of this size; {kept}choose another place"
  return (
    f"{where}this process may write files of at most {size(most)} (ulimit -f); {kept}raise that "
    "limit and run the same command"
  )


def is_disk_full(error: BaseException | None) -> bool:
  """Returns True if the error, or one that caused it, is a full disk, an exhausted quota, or the
  limit on a file's size.
  """
  return any(
    isinstance(one, DiskFull)
    or getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    or "No space left" in str(one)  # TensorStore and safetensors set no errno
    for one in _causes(error)
  ) or _is_too_large(error)


def _is_too_large(error: BaseException | None) -> bool:
  return any(
    getattr(one, "errno", None) == errno.EFBIG or "File too large" in str(one)
    for one in _causes(error)
  )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def free_space(path: str | os.PathLike) -> int:
  """Returns the bytes left on the disk of a path, which need not exist."""
  absolute = pathlib.Path(path).absolute()
  return shutil.disk_usage(next(p for p in (absolute, *absolute.parents) if p.exists())).free


def check_space(path: str | os.PathLike, needed: int) -> None:
  """Raises DiskFull if the disk of `path` has less than `needed` bytes left."""
  if free_space(path) < needed:
    raise DiskFull(path, needed, "nothing was written")


def expanded(path: str) -> str:
  """Returns a path that was typed with a leading ~ replaced by the home: shells leave it alone
  behind --flag=. Raises UserError for names that no file can have.
  """
  for name in path.split("/"):
    count = len(name.encode(errors="replace"))  # a byte that is no text is one letter here
    if count > LONGEST_NAME:
      raise UserError(
        f"{name[:40]}...: a name of {count} bytes; a file's has at most {LONGEST_NAME}, give a "
        "shorter one"
      )
  if "\0" in path:
    raise UserError(f"{path!r}: a zero byte, which no file's name has; leave it out")
  return os.path.expanduser(path)


def is_whole(text: str) -> bool:
  """Returns False where a text holds a lone surrogate, which UTF-8 does not: JSON may write half an
  emoji as \\ud83d, and of a command line or a file's name each byte that is not UTF-8 is one.
  """
  return not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_name(path: str | os.PathLike, given: str, *, checkpoints: bool = False) -> None:
  """Raises UserError for an address (gs://...), and a folder whose absolute path Orbax misreads.

  TensorStore takes a backslash for a slash, and UTF-8 alone. When a checkpoint is saved, Orbax
  finds its parts by a pattern, in which [...] stands for one character. given: the flag with its
  value, which the message begins with. checkpoints: True where training checkpoints will be saved
  there.
  """
  if "://" in os.fspath(path):
    raise UserError(
      f"{given}: expected a folder, not an address; mount the bucket (gcsfuse BUCKET /mnt/BUCKET) "
      "and give a folder in it, as /mnt/BUCKET/runs"
    )
  absolute = os.path.abspath(path)
  for mark, wrong in (
    ("a backslash", "\\" in absolute),
    ("a byte that is not UTF-8", not is_whole(absolute)),
    ("brackets [...]", checkpoints and re.search(r"\[[^/]*\]", absolute)),
  ):
    if wrong:
      raise UserError(
        f"{given}: {absolute} has {mark} in its name, and checkpoints there could not be read "
        "again; give a folder without"
      )


@contextlib.contextmanager
def writing(
  path: str | os.PathLike,
  needed: int | None = None,
  kept: str = "nothing is left half written",
  full_disk_alone: bool = False,
) -> Iterator[None]:
  """Turns a full disk while `path` is written into DiskFull, another OSError into a UserError.

  needed, kept: as DiskFull's. full_disk_alone: other OSErrors pass unchanged.
  """
  try:
    yield
  except UserError:
    raise  # explained already, where more was known
  except Exception as error:
    if is_disk_full(error):
      raise DiskFull(path, needed, kept, error) from error
    if full_disk_alone or not isinstance(error, OSError):
      raise
    raise UserError(
      f"{os.fspath(path)}: cannot be written ({error.strerror}); choose another place"
    ) from error


@contextlib.contextmanager
def reading(
  what: object, advice: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
  """Turns errors while `what` is read into Damaged.

  kinds: the errors that changed bytes can cause; libraries such as Orbax may raise any.
  """
  try:
    yield
  except (UserError, MemoryError):
    raise  # lack of memory says nothing about the files
  except kinds as error:
    if "RESOURCE_EXHAUSTED" in str(error):  # the same, of a device
      raise
    cause = error.__cause__ or error
    raise Damaged(what, f"{type(cause).__name__}: {str(cause).strip()}", advice) from error


def read_object(path: pathlib.Path, advice: str) -> dict:
  """Reads the object of a JSON file. Raises Damaged, with the advice, where it holds none."""
  try:
    found = json.loads(path.read_text())
  except (ValueError, RecursionError) as error:
    raise Damaged(path, f"it is not JSON: {error}", advice) from error
  if not isinstance(found, dict):
    raise Damaged(path, f"expected an object, got {type(found).__name__}", advice)
  return found


def read_text(path: str | os.PathLike, name: str = "") -> str:
  """Returns the text of a file that people write, every line end as \\n: of UTF-8, or of UTF-16
  with a byte order mark, as Windows' editors save it.

  name: what errors call it, as 'prompts file'. Raises UserError, with the line, for other text.
  """
  content = pathlib.Path(path).read_bytes()
  encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
  what = f"{name} {os.fspath(path)}".strip()
  try:
    text = content.decode(encoding)
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise UserError(
      f"{what} is not UTF-8 text (line {line}: {error.reason}); save it as UTF-8"
    ) from error
  # zero bytes are valid UTF-8, but mean a binary file
  if "\0" in text:
    line = text.count("\n", 0, text.index("\0")) + 1
    raise UserError(f"{what} is not text: line {line} holds a zero byte")
  return text.replace("\r\n", "\n").replace("\r", "\n")


def write_atomic(path: str | os.PathLike, content: bytes) -> pathlib.Path:
  """Writes a file, making missing directories, and returns its path.

  Whenever the process dies, the file holds all of `content` or what it held before. Raises DiskFull
  where the disk is full, UserError where it refuses.
  """
  with whole_file(path, len(content)) as file, writing(path, len(content)):
    file.write(content)
  return pathlib.Path(path)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, needed: int | None = None) -> Iterator[io.BufferedRandom]:
  """Opens a file for writing that gets its name when the context ends without an error.

  As write_atomic, for content that need not be in memory at once. needed: its bytes, if known.
  """
  path = pathlib.Path(path)
  temporary = None
  try:
    with writing(path, needed):
      path.parent.mkdir(parents=True, exist_ok=True)
      _remove_left(path.parent)
      temporary, file = _open_temporary(path)
    try:
      # an OSError of the caller's own code, a full disk aside, is not about this file
      with writing(path, needed, full_disk_alone=True):
        yield file
      with writing(path, needed):
        file.flush()
        # without fsync a power cut may leave the new name with no content behind it
        os.fsync(file.fileno())
        os.replace(temporary, path)  # while it is locked: nobody takes it for a dead one's
        temporary = None
    finally:
      with contextlib.suppress(OSError):  # what it still holds is of a write that failed
        file.close()
  finally:
    if temporary is not None:
      with contextlib.suppress(OSError):
        temporary.unlink()


def _open_temporary(path: pathlib.Path) -> tuple[pathlib.Path, io.BufferedRandom]:
  """Creates a hidden file beside `path`, in its file system, where a rename is atomic.

  Its name is new, so no other process writes to it and no link of that name is followed. It is
  locked while it is open.
  """
  while True:
    # names have at most 255 bytes, a letter up to four
    temporary = path.with_name(f".{secrets.token_hex(8)}.{path.name[-40:]}.tmp")
    try:
      number = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    except FileExistsError:
      continue
    try:
      fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
      mine = temporary.exists()
    except BlockingIOError:  # _remove_left of another process came first
      mine = False
    except OSError:  # a file system without locks
      mine = True
    if mine:
      return temporary, os.fdopen(number, "w+b")
    os.close(number)


_LEFT = re.compile(r"\.[0-9a-f]{16}\..*\.tmp")
_seen: set[pathlib.Path] = set()  # folders that this process has looked through


def _remove_left(folder: pathlib.Path) -> None:
  """Removes the temporary files of processes that were killed: those that nobody holds a lock of.

  Once for each folder: some have a file for each frame of a video.
  """
  folder = pathlib.Path(os.path.abspath(folder))
  if folder in _seen:
    return
  _seen.add(folder)
  for path in folder.glob(".*.tmp"):
    if not _LEFT.fullmatch(path.name):
      continue
    # It is in use, another user's, or on a file system without locks: left alone.
    with contextlib.suppress(OSError):
      number = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
      try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
      finally:
        os.close(number)

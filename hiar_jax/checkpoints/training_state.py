"""Checkpoints of a training stage: Orbax underneath, one clear line where a restore cannot work.

A checkpoint at step s is the directory `<directory>/<s>` with the items `state` (everything that
training needs), `params` (the weights that inference loads, normally the EMA), `data` (the
iterator's state, a file a process) and `config` (JSON, what the model is). Orbax writes under a
temporary name and renames, so a directory with that name is complete; the checksums in it tell
whether it still is what was written.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import json
import logging
import os
import shutil
import sys
from typing import Any

from etils import epath
import grain.checkpoint
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from hiar_jax.checkpoints import checksums
from hiar_jax.checkpoints.checksums import Damaged
from hiar_jax.config.workdir import difference, to_json
from hiar_jax.errors import UserError
from hiar_jax.types import Params, PyTree


class Checkpoints:
  """The checkpoints of one stage.

  Saves in the background; `close` (or leaving the `with`) waits for the last one.
  """

  def __init__(self, directory: str | os.PathLike, *, keep: int = 2, config: Any = None):
    """Opens or creates `directory`, keeping the newest `keep` checkpoints.

    `config` (ConfigDict, dataclass or dict) describes the model; restoring under another one raises
    `UserError`.
    """
    self.directory = _path(directory)
    self._config = to_json(config or {})
    self._saving = -1
    logging.getLogger("absl").addFilter(_is_news)
    with self._disk_errors():
      self._manager = _manager(
        self.directory,
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def latest_step(self) -> int | None:
    """The newest step that was written to its end, damaged since or not."""
    return self._manager.latest_step()

  def save(
    self, step: int, state: PyTree, params: Params, iterator: Any = None, force: bool = False
  ) -> bool:
    """Starts to save; False where this step is there already, or (without `force`) a newer one.

    The arrays and the iterator's position are taken before this returns: both may move on, or be
    donated, at once. Raises `UserError` if the disk is full, here or in the call that next waits;
    older checkpoints stay as they were.
    """
    items = {
      "state": ocp.args.StandardSave(state),
      "params": ocp.args.StandardSave(params),
      "config": ocp.args.JsonSave(self._config),
    }
    if iterator is not None:
      items["data"] = grain.checkpoint.CheckpointSave(_Iterator(iterator))
    with self._disk_errors():
      self._manager.wait_until_finished()
      if step in self._manager.all_steps():
        return False
      self._check_space(state, params)
      self._saving = step
      return self._manager.save(step, args=ocp.args.Composite(**items), force=force)

  def restore(self, abstract_state: PyTree, iterator: Any = None) -> tuple[int, PyTree] | None:
    """The newest checkpoint as (step, state), or None if there is none; sets the iterator's
    position in place.

    `abstract_state` has the leaves' shapes, dtypes and shardings (arrays, or ShapeDtypeStructs;
    without a sharding a leaf goes to the first device), so any number of devices can restore what
    any other saved. A damaged checkpoint is reported on stderr, renamed to `<step>.damaged`, and
    the one before is used. Raises `UserError` if a checkpoint does not fit (another config, tree or
    data pipeline), or if all are damaged.
    """
    self.wait()

    def read(step: int) -> PyTree:
      stored = _read(self._manager, step, config=ocp.args.JsonRestore())["config"]
      _check_config(self.directory / str(step), stored, self._config)
      tree = _check_tree(self._manager, step, "state", abstract_state)
      state = _read(self._manager, step, state=ocp.args.StandardRestore(tree))["state"]
      if iterator is not None:
        self._restore_iterator(step, iterator)
      return state

    found, damaged = _newest(self._manager, self.directory, read)
    for step in damaged:
      self._set_aside(step)
    return found

  def wait(self) -> None:
    """Returns when the last save is on disk. Raises `UserError` if the disk was full."""
    with self._disk_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets go of the directory."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def _restore_iterator(self, step: int, iterator: Any) -> None:
    items = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(_Iterator(iterator)))
    try:
      self._manager.restore(step, args=items)
    except Exception as error:  # Grain raises what its sources and samplers raise
      raise UserError(
        f"checkpoint {self.directory / str(step)}: the position in the data does not fit this "
        "data pipeline "
        f"({_first_line(error)}); use the data settings and the number of processes that it was "
        "saved with"
      ) from error

  def _check_space(self, *trees: PyTree) -> None:
    """Refuses what cannot fit before Orbax's threads try: on a full disk every one of them prints a
    traceback of its own.
    """
    path = os.fspath(self.directory)
    if jax.process_count() == 1 and "://" not in path:
      needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
      if shutil.disk_usage(path).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

  def _write_checksums(self) -> None:
    """Called by Orbax's thread when all items are written, before their directory gets its final
    name.
    """
    if jax.process_index() == 0:
      for path in self.directory.iterdir():
        if path.name == str(self._saving) or path.name.startswith(
          f"{self._saving}.orbax-checkpoint-tmp"
        ):
          checksums.write(path)

  def _set_aside(self, step: int) -> None:
    """Frees the name of a damaged step, which training reaches again; its files stay, for whoever
    can mend them.
    """
    if jax.process_index() == 0:
      (self.directory / str(step)).rename(self.directory / f"{step}.damaged")
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoint set aside")
    self._manager.reload()

  @contextlib.contextmanager
  def _disk_errors(self) -> Iterator[None]:
    """A full disk, met here or by the thread that writes, becomes one clear line."""
    try:
      yield
    except Exception as error:
      if not _is_disk_full(error):
        raise
      self._manager.reload()  # it has forgotten the checkpoints that this one was to replace
      raise UserError(
        f"no space left on the disk of {self.directory}; the last complete checkpoint is "
        f"{self.latest_step()}; "
        "free some space and run the same command"
      ) from error


def load_params(
  directory: str | os.PathLike, abstract: PyTree = None, step: int | None = None
) -> Params:
  """The inference weights of the newest checkpoint (or of `step`), as a nested dict of arrays.

  `abstract` gives shapes, dtypes (weights are cast to them) and shardings; without it the arrays
  are as saved, on the first device. Raises `UserError` if there is no checkpoint, if it does not
  fit `abstract`, or if all are damaged.
  """

  def read(manager: ocp.CheckpointManager, step: int) -> Params:
    tree = _check_tree(manager, step, "params", abstract, cast=True)
    return _read(manager, step, params=ocp.args.StandardRestore(tree))["params"]

  return _load(directory, step, read)


def load_config(directory: str | os.PathLike, step: int | None = None) -> dict:
  """What `config` the newest checkpoint (or `step`) was saved with, as plain JSON values."""
  return _load(
    directory,
    step,
    lambda manager, step: _read(manager, step, config=ocp.args.JsonRestore())["config"],
  )


def _load(
  directory: str | os.PathLike, step: int | None, read: Callable[[ocp.CheckpointManager, int], Any]
) -> Any:
  path = _path(directory)
  if not path.is_dir():
    raise UserError(
      f"there are no checkpoints in {path}: no such directory; train first, or check the path"
    )
  with contextlib.closing(_manager(path, create=False)) as manager:
    there = manager.all_steps()
    if not there or (step is not None and step not in there):
      wanted = "" if step is None else f" of step {step}"
      raise UserError(
        f"there is no checkpoint{wanted} in {path}; steps there: {sorted(there) or 'none'}"
      )
    found, _ = _newest(
      manager, path, lambda step: read(manager, step), [step] if step is not None else None
    )
    return found[1]


# ------------------------------------------------------------------------------------- behind Orbax


class _Iterator:
  """Lets Grain's handler write the state of any iterator that has get_state and set_state."""

  def __init__(self, iterator: Any):
    self._iterator = iterator

  def get_state(self) -> bytes:
    state = self._iterator.get_state()
    return state if isinstance(state, bytes) else json.dumps(state).encode()

  def set_state(self, state: bytes) -> None:
    is_bytes = isinstance(self._iterator.get_state(), bytes)
    self._iterator.set_state(state if is_bytes else json.loads(state))

  def start_prefetch(self) -> None:
    pass


def _path(directory: str | os.PathLike) -> epath.Path:
  text = os.fspath(directory)
  # Orbax wants absolute paths; buckets are
  return epath.Path(text if "://" in text else os.path.abspath(text))


def _manager(directory: epath.Path, **options: Any) -> ocp.CheckpointManager:
  handlers = {
    "state": ocp.StandardCheckpointHandler(),
    "params": ocp.StandardCheckpointHandler(),
    "config": ocp.JsonCheckpointHandler(),
    "data": grain.checkpoint.CheckpointHandler(),
  }
  return ocp.CheckpointManager(
    directory, options=ocp.CheckpointManagerOptions(**options), item_handlers=handlers
  )


def _newest(
  manager: ocp.CheckpointManager,
  directory: epath.Path,
  read: Callable[[int], Any],
  steps: list[int] | None = None,
) -> tuple[tuple[int, Any] | None, list[int]]:
  """-> (newest readable step, what was read), or None if there is no step at all; and the damaged
  steps above it.
  """
  damaged = []
  for step in sorted(steps or manager.all_steps(), reverse=True):
    try:
      checksums.check(directory / str(step))
      return (step, read(step)), damaged
    except Damaged as error:
      damaged.append(step)
      if jax.process_index() == 0:
        print(
          f"checkpoint {directory / str(step)} is damaged ({error}); trying the one before",
          file=sys.stderr,
        )
  if damaged:
    raise UserError(
      f"every checkpoint in {directory} is damaged; delete the directory to start this stage again"
    )
  return None, damaged


def _read(
  manager: ocp.CheckpointManager, step: int, **items: ocp.args.CheckpointArgs
) -> ocp.args.Composite:
  try:
    return manager.restore(step, args=ocp.args.Composite(**items))
  except Exception as error:  # what it raises depends on which file is damaged
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
      raise
    raise Damaged(f"{type(error).__name__}: {_first_line(error)}") from error


def _check_config(path: epath.Path, stored: dict, given: dict) -> None:
  lines = difference(stored, given)
  if lines:
    raise UserError(
      f"checkpoint {path} was saved with another config (stored -> given: {'; '.join(lines)}); "
      "use the stored values, or another --workdir"
    )


def _check_tree(
  manager: ocp.CheckpointManager, step: int, item: str, abstract: PyTree, cast: bool = False
) -> PyTree:
  """-> `abstract` with a sharding on every leaf; raises `UserError` at the first leaf that is
  otherwise there.
  """
  try:
    stored = manager.item_metadata(step)[item].tree
  except Exception as error:
    raise Damaged(f"{type(error).__name__}: {_first_line(error)}") from error
  tree = jax.tree.map(_with_sharding, stored if abstract is None else abstract)
  a, b = _leaves(stored), _leaves(tree)
  for path in sorted(a | b):
    if a.get(path, (None,))[0] != b.get(path, (None,))[0] or (a[path] != b[path] and not cast):
      there, here = (_describe(leaves.get(path)) for leaves in (a, b))
      raise UserError(
        f"checkpoint step {step} does not fit: {item} {path} is {there} in it, {here} here"
      )
  return tree


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  # none given, or Orbax's description of the saved one
  if not isinstance(sharding, jax.sharding.Sharding):
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaves(tree: PyTree) -> dict[str, tuple[tuple[int, ...], str]]:
  """path -> (shape, dtype) of the arrays; random keys as the integers that they are stored as."""
  leaves = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if hasattr(leaf, "shape"):
      path = jax.tree_util.keystr(keys, simple=True, separator="/")
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
      leaves[path] = (tuple(leaf.shape), str(leaf.dtype))
  return leaves


def _describe(leaf: tuple[tuple[int, ...], str] | None) -> str:
  return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _is_disk_full(error: BaseException | None) -> bool:
  """True if the error, or what caused it, says that the disk is full (TensorStore says it in words
  only).
  """
  while error is not None:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(
      error
    ):
      return True
    error = error.__cause__ or error.__context__
  return False


def _is_news(record: logging.LogRecord) -> bool:
  """False for the tracebacks that Orbax's threads log of a full disk, before it raises what we say
  in one line.
  """
  return not (record.exc_info and _is_disk_full(record.exc_info[1]))


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [""])[0][:200]

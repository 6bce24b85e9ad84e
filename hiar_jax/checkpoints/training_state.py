"""Checkpoints of a training stage, written by Orbax, with one-line errors where a restore fails.

A checkpoint at step s is the directory `<directory>/<s>` with the items `state` (everything that
training needs), `params` (the weights that inference loads, normally the EMA), `data` (the
iterator's state, one file per process) and `config` (JSON, the model's config). Orbax writes under
a temporary name and renames, so a directory of that name is complete; its checksums show later
changes.
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
from hiar_jax.checkpoints.stored_arrays import is_disk_full
from hiar_jax.config.workdir import difference, to_json
from hiar_jax.errors import UserError
from hiar_jax.types import Params, PyTree


class Checkpoints:
  """The checkpoints of one stage.

  Saves run in the background; `close` (or leaving the `with` block) waits for the last one.
  """

  def __init__(self, directory: str | os.PathLike, *, keep: int = 2, config: Any = None):
    """Opens or creates `directory`, keeping the newest `keep` checkpoints.

    `config` (ConfigDict, dataclass or dict) describes the model; restoring under a different one
    raises UserError.
    """
    self.directory = _path(directory)
    self._config = to_json(config or {})
    self._saving = -1  # the step being written, read by Orbax's thread
    logging.getLogger("absl").addFilter(_hide_disk_full)
    with self._disk_errors():
      self._manager = _manager(
        self.directory,
        max_to_keep=keep,
        cleanup_tmp_directories=True,  # left by a process that died while saving
        async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def latest_step(self) -> int | None:
    """Returns the newest step that was written completely, even if damaged since."""
    return self._manager.latest_step()

  def save(
    self, step: int, state: PyTree, params: Params, iterator: Any = None, force: bool = False
  ) -> bool:
    """Starts to save; returns False if this step exists already or, without `force`, a newer one.

    The arrays and the iterator's position are copied before this returns: both may change, or be
    donated, at once. Raises UserError if the disk is full, here or in the next call that waits;
    older checkpoints stay unchanged.
    """
    items = {
      "state": ocp.args.StandardSave(state),
      "params": ocp.args.StandardSave(params),
      "config": ocp.args.JsonSave(self._config),
    }
    if iterator is not None:
      items["data"] = grain.checkpoint.CheckpointSave(_Iterator(iterator))
    with self._disk_errors():
      # One save at a time: `_saving` names the step whose checksums are still to be written.
      self._manager.wait_until_finished()
      if step in self._manager.all_steps():
        return False
      self._check_space(state, params)
      self._saving = step
      return self._manager.save(step, args=ocp.args.Composite(**items), force=force)

  def restore(self, abstract_state: PyTree, iterator: Any = None) -> tuple[int, PyTree] | None:
    """Returns the newest checkpoint as (step, state), or None; sets the iterator in place.

    `abstract_state` has the leaves' shapes, dtypes and shardings (arrays or ShapeDtypeStructs; a
    leaf without a sharding goes to the first device), so the number of devices may differ from that
    of the save. A damaged checkpoint is reported on stderr, renamed to `<step>.damaged`, and the
    one before is used. Raises UserError if a checkpoint does not fit (different config, tree or
    data pipeline), or if all are damaged.
    """
    self.wait()

    def read(step: int) -> PyTree:
      # The config first: its differences explain more than the shapes that follow from them.
      stored = _read(self._manager, step, config=ocp.args.JsonRestore())["config"]
      differences = difference(stored, self._config)
      if differences:
        raise UserError(
          f"checkpoint {self.directory / str(step)} was saved with another config "
          f"(stored -> given: {'; '.join(differences)}); use the stored values, or another "
          "--workdir"
        )
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
    """Waits until the last save is on disk. Raises UserError if the disk was full."""
    with self._disk_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and closes Orbax's manager."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def _restore_iterator(self, step: int, iterator: Any) -> None:
    items = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(_Iterator(iterator)))
    try:
      self._manager.restore(step, args=items)
    except Exception as error:  # any class: Grain passes on what its sources and samplers raise
      raise UserError(
        f"checkpoint {self.directory / str(step)}: the position in the data does not fit this data "
        f"pipeline ({_first_line(error)}); use the data settings and the number of processes that "
        "it was saved with"
      ) from error

  def _check_space(self, *trees: PyTree) -> None:
    """Raises OSError (ENOSPC) if the trees cannot fit on the disk."""
    # Before Orbax's threads try: on a full disk each of them prints a traceback. A process of
    # several writes only its part, and buckets have no free space to ask for.
    path = os.fspath(self.directory)
    if jax.process_count() == 1 and "://" not in path:
      needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
      if shutil.disk_usage(path).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

  def _write_checksums(self) -> None:
    """Writes the checksums of the step being saved."""
    # Orbax's thread calls this when all items are written, before it renames their directory.
    if jax.process_index() == 0:
      for path in self.directory.iterdir():
        if path.name == str(self._saving) or path.name.startswith(
          f"{self._saving}.orbax-checkpoint-tmp"
        ):
          checksums.write(path)

  def _set_aside(self, step: int) -> None:
    """Renames a damaged step, since training reaches it again; its files are kept for repair."""
    if jax.process_index() == 0:
      (self.directory / str(step)).rename(self.directory / f"{step}.damaged")
    if jax.process_count() > 1:  # no process may list the directory before the rename
      multihost_utils.sync_global_devices("damaged checkpoint set aside")
    self._manager.reload()

  @contextlib.contextmanager
  def _disk_errors(self) -> Iterator[None]:
    """Turns a full disk, here or in the writing thread, into a UserError of one line."""
    try:
      yield
    except Exception as error:
      if not is_disk_full(error):
        raise
      # The manager has dropped the checkpoints that the failed one was to replace from its list.
      self._manager.reload()
      raise UserError(
        f"no space left on the disk of {self.directory}; the last complete checkpoint is "
        f"{self.latest_step()}; free some space and run the same command"
      ) from error


def load_params(
  directory: str | os.PathLike, abstract: PyTree = None, step: int | None = None
) -> Params:
  """Returns the inference weights of the newest checkpoint (or of `step`), a nested dict of arrays.

  `abstract` gives shapes, dtypes (weights are cast to them) and shardings; without it the arrays
  are as saved, on the first device. Raises UserError if there is no checkpoint, if it does not fit
  `abstract`, or if all are damaged.
  """

  def read(manager: ocp.CheckpointManager, step: int) -> Params:
    tree = _check_tree(manager, step, "params", abstract, cast=True)
    return _read(manager, step, params=ocp.args.StandardRestore(tree))["params"]

  return _load(directory, step, read)


def load_config(directory: str | os.PathLike, step: int | None = None) -> dict:
  """Returns the `config` that the newest checkpoint (or `step`) was saved with, as JSON values."""
  return _load(
    directory,
    step,
    lambda manager, step: _read(manager, step, config=ocp.args.JsonRestore())["config"],
  )


def _load(
  directory: str | os.PathLike, step: int | None, read: Callable[[ocp.CheckpointManager, int], Any]
) -> Any:
  """Returns `read(manager, step)` of the newest readable checkpoint, or of `step`."""
  path = _path(directory)
  if not path.is_dir():
    raise UserError(
      f"there are no checkpoints in {path}: no such directory; train first, or check the path"
    )
  with contextlib.closing(_manager(path, create=False)) as manager:
    steps = manager.all_steps()
    if not steps or (step is not None and step not in steps):
      wanted = "" if step is None else f" of step {step}"
      raise UserError(
        f"there is no checkpoint{wanted} in {path}; steps there: {sorted(steps) or 'none'}"
      )
    found, _ = _newest(
      manager, path, lambda step: read(manager, step), [step] if step is not None else None
    )
    return found[1]


# ------------------------------------------------------------------------------------- behind Orbax


class _Iterator:
  """Adapter to Grain's handler for any iterator that has get_state and set_state."""

  def __init__(self, iterator: Any):
    self._iterator = iterator

  def get_state(self) -> bytes:
    state = self._iterator.get_state()
    return state if isinstance(state, bytes) else json.dumps(state).encode()

  def set_state(self, state: bytes) -> None:
    # The iterator's present state shows which form it takes: bytes, or JSON values.
    is_bytes = isinstance(self._iterator.get_state(), bytes)
    self._iterator.set_state(state if is_bytes else json.loads(state))

  def start_prefetch(self) -> None:
    pass


def _path(directory: str | os.PathLike) -> epath.Path:
  text = os.fspath(directory)
  # Orbax needs absolute paths; those of buckets (gs://...) are absolute already.
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
  """Returns (newest readable step, its content), or None without any step; and the damaged steps
  above it. Raises UserError if all are damaged.
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
  """Restores items of a step. Raises Damaged."""
  try:
    return manager.restore(step, args=ocp.args.Composite(**items))
  except Exception as error:  # the class depends on which file is damaged
    # Lack of memory says nothing about the files.
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
      raise
    raise Damaged(f"{type(error).__name__}: {_first_line(error)}") from error


def _check_tree(
  manager: ocp.CheckpointManager, step: int, item: str, abstract: PyTree, cast: bool = False
) -> PyTree:
  """Returns `abstract` (default: the stored tree) with a sharding on every leaf.

  Raises UserError at the first leaf whose path, shape or (without `cast`) dtype differs, and
  Damaged.
  """
  try:
    stored = manager.item_metadata(step)[item].tree
  except Exception as error:
    raise Damaged(f"{type(error).__name__}: {_first_line(error)}") from error
  tree = jax.tree.map(_with_sharding, stored if abstract is None else abstract)
  saved, wanted = _leaves(stored), _leaves(tree)
  for path in sorted(saved | wanted):
    saved_shape, wanted_shape = (leaves.get(path, (None,))[0] for leaves in (saved, wanted))
    # Equal shapes mean that both have the path: only then may the dtypes be looked up.
    if saved_shape != wanted_shape or (saved[path] != wanted[path] and not cast):
      there, here = (
        f"{leaves[path][1]}{list(leaves[path][0])}" if path in leaves else "absent"
        for leaves in (saved, wanted)
      )
      raise UserError(
        f"checkpoint step {step} does not fit: {item} {path} is {there} in it, {here} here"
      )
  return tree


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  # Absent, or Orbax's description of the saved sharding, whose devices may not exist here.
  if not isinstance(sharding, jax.sharding.Sharding):
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaves(tree: PyTree) -> dict[str, tuple[tuple[int, ...], str]]:
  """Returns {path: (shape, dtype)} of the arrays."""
  leaves = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if hasattr(leaf, "shape"):
      path = jax.tree_util.keystr(keys, simple=True, separator="/")
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # stored as integers
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
      leaves[path] = (tuple(leaf.shape), str(leaf.dtype))
  return leaves


def _hide_disk_full(record: logging.LogRecord) -> bool:
  """Log filter against the tracebacks of a full disk, which `_disk_errors` reports in one line."""
  return not (record.exc_info and is_disk_full(record.exc_info[1]))


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [""])[0][:200]

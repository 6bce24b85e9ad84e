"""Checkpoints of a training stage, written by Orbax, with one-line errors where a restore fails.

A checkpoint at step s is the directory `<directory>/<s>` with the items `state` (everything that
training needs), `params` (the weights that inference loads, normally the EMA), `data` (the
iterator's state, one file per process) and `config` (JSON, the model's config). Orbax writes under
a temporary name and renames, so a directory of that name is complete; its checksums show later
changes (on_disk.py describes the files).
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import sys
from typing import Any

from etils import epath
import grain.checkpoint
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from hiar_jax.checkpoints import checksums, half_written
from hiar_jax.checkpoints.on_disk import DAMAGED
from hiar_jax.config.workdir import difference, to_json
from hiar_jax.errors import Damaged, UserError
from hiar_jax.files import DiskFull, check_name, check_space, is_disk_full, reading
from hiar_jax.types import Params, PyTree


class Checkpoints(contextlib.AbstractContextManager):
  """The checkpoints of one stage.

  Saves run in the background; leaving the `with` block waits for the last one.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep: int = 2,
    config: Any = None,
    free: tuple[str, ...] = (),
  ):
    """Opens or creates `directory`, keeping the newest `keep` checkpoints.

    `config` (ConfigDict, dataclass or dict) describes the model; restoring under a different one
    raises UserError, but for the fields `free`, as in workdir.difference. None compares nothing.
    """
    check_name(directory, f"checkpoints in {os.fspath(directory)}", checkpoints=True)
    self.directory = _path(directory)
    self._config, self._free = None if config is None else to_json(config), free
    self._saving = -1  # the step being written, read by Orbax's thread
    self._needed: int | None = None  # its bytes in memory, where this process writes them all
    self._failed = False
    half_written.hide_tracebacks()
    with self._disk_errors():
      self._manager = _manager(
        self.directory,
        max_to_keep=keep,
        cleanup_tmp_directories=True,  # left by a process that died while saving
        async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
      )

  def __exit__(self, *exc) -> None:
    """Waits for the last save and closes Orbax's manager."""
    try:
      self.wait()
    finally:
      with self._disk_errors():  # a save may have failed in several threads
        self._manager.close()
      if self._failed and self._needed is not None:
        half_written.remove_late(self.directory, self._saving)

  def latest_step(self) -> int | None:
    """Returns the newest step that was written completely, even if damaged since."""
    return self._manager.latest_step()

  def save(
    self, step: int, state: PyTree, params: Params, iterator: Any = None, force: bool = False
  ) -> bool:
    """Starts to save; returns False if this step exists already or, without `force`, a newer one.

    The arrays and the iterator's position are copied before this returns: both may change, or be
    donated, at once. iterator: has Grain's get_state() -> bytes, set_state and start_prefetch.
    Raises DiskFull if the disk is full, here or in the next call that waits; older checkpoints stay
    unchanged.
    """
    items = {
      "state": ocp.args.StandardSave(state),
      "params": ocp.args.StandardSave(params),
      "config": ocp.args.JsonSave(self._config or {}),
    }
    if iterator is not None:
      items["data"] = grain.checkpoint.CheckpointSave(iterator)
    with self._disk_errors():
      # One save at a time: `_saving` names the step whose checksums are still to be written.
      self._manager.wait_until_finished()
      if step in self._manager.all_steps():
        return False
      self._saving = step
      if jax.process_count() == 1:  # a process of several writes only its part
        self._needed = sum(leaf.nbytes for leaf in jax.tree.leaves((state, params)))
        # Before Orbax's threads try: on a full disk each of them prints a traceback.
        check_space(self.directory, self._needed)
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
      given = stored if self._config is None else self._config
      differences = difference(stored, given, self._free)
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

    found, damaged = _newest(self._manager, read, self._manager.all_steps())
    if damaged:
      # Renamed, since training reaches these steps again; the files are kept for repair.
      for step in damaged if jax.process_index() == 0 else ():
        (self.directory / str(step)).rename(self.directory / f"{step}{DAMAGED}")
      if jax.process_count() > 1:  # no process may list the directory before the rename
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
      self._manager.reload()
    return found

  def wait(self) -> None:
    """Waits until the last save is on disk. Raises DiskFull if the disk was full."""
    with self._disk_errors():
      self._manager.wait_until_finished()

  def _restore_iterator(self, step: int, iterator: Any) -> None:
    items = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(iterator))
    try:
      self._manager.restore(step, args=items)
    except Exception as error:  # any class: Grain passes on what its sources and samplers raise
      reason = (str(error).strip().splitlines() or [""])[0][:200]
      raise UserError(
        f"checkpoint {self.directory / str(step)}: the position in the data does not fit this data "
        f"pipeline ({reason}); use the data settings and the number of processes that "
        "it was saved with"
      ) from error

  def _write_checksums(self) -> None:
    """Writes the checksums of the step being saved."""
    # Orbax's thread calls this when all items are written, before it renames their directory.
    if jax.process_index() == 0:
      for path in self.directory.iterdir():
        if path.name == str(self._saving) or path.name.startswith(
          f"{self._saving}{half_written.TEMPORARY}"
        ):
          checksums.write(path)

  @contextlib.contextmanager
  def _disk_errors(self) -> Iterator[None]:
    """Turns a full disk, here or in the writing thread, into DiskFull."""
    try:
      yield
    except Exception as error:
      # where several writes fail, the later ones may find removed what the first one left
      if not (is_disk_full(error) or half_written.found_removed(error)):
        raise
      self._failed = True
      # The manager has dropped the checkpoints that the failed one was to replace from its list.
      self._manager.reload()
      if self._needed is not None:  # no other process is at work on it
        half_written.remove(self.directory, self._saving)
      kept = f"the last complete checkpoint is {self.latest_step()}"
      raise DiskFull(self.directory, self._needed, kept, error) from error


def load_params(
  directory: str | os.PathLike, abstract: PyTree = None, step: int | None = None
) -> Params:
  """Returns the inference weights of the newest checkpoint (or of `step`), a nested dict of arrays.

  `abstract` gives shapes, dtypes (weights are cast to them) and shardings; without it the arrays
  are as saved, on the first device. Checks these weights alone for damage, not the whole state.
  Raises UserError if there is no checkpoint, if it does not fit `abstract`, or if all are damaged;
  Damaged if the one of `step` is.
  """
  return _load(directory, "params", abstract, step)


def load_state(directory: str | os.PathLike, step: int | None = None) -> dict:
  """Returns the training state of the newest checkpoint (or of `step`) as saved, a nested dict of
  arrays on the first device: `params`, the weights in training; `ema`, their average; `critic`, of
  distillation; and the optimizers'. Raises as load_params.
  """
  return _load(directory, "state", None, step)


def _load(directory: str | os.PathLike, item: str, abstract: PyTree, step: int | None) -> PyTree:
  with _opened(directory, step) as (manager, steps):

    def read(step: int) -> PyTree:
      tree = _check_tree(manager, step, item, abstract, cast=True)
      return _read(manager, step, **{item: ocp.args.StandardRestore(tree)})[item]

    if step is not None:  # no other one will do
      try:
        checksums.check(manager.directory / str(step), item)
        return read(step)
      except Damaged as error:
        advice = "the training command sets it aside and goes on from the one before"
        raise Damaged(manager.directory / str(step), error.reason, advice) from error
    return _newest(manager, read, steps, item)[0][1]


def load_config(directory: str | os.PathLike, step: int | None = None) -> dict:
  """Returns the `config` that the newest checkpoint (or `step`) was saved with, as JSON values."""
  with _opened(directory, step) as (manager, steps):

    def read(step: int) -> dict:
      return _read(manager, step, config=ocp.args.JsonRestore())["config"]

    # All items are checked: what describes a damaged checkpoint describes none that can be used.
    return _newest(manager, read, steps)[0][1]


def steps_in(directory: str | os.PathLike) -> list[int]:
  """Returns the steps of the complete checkpoints there, in their order; [] without any."""
  path = _path(directory)
  names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


@contextlib.contextmanager
def _opened(
  directory: str | os.PathLike, step: int | None
) -> Iterator[tuple[ocp.CheckpointManager, list[int]]]:
  """Yields (manager, steps there, or `step` alone). Raises UserError if there is none."""
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
    yield manager, steps if step is None else [step]


# ------------------------------------------------------------------------------------- behind Orbax


def _path(directory: str | os.PathLike) -> epath.Path:
  text = os.fspath(directory)
  check_name(text, f"checkpoints in {text}")
  return epath.Path(os.path.abspath(text))  # Orbax needs absolute paths


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
  manager: ocp.CheckpointManager, read: Callable[[int], Any], steps: list[int], *items: str
) -> tuple[tuple[int, Any] | None, list[int]]:
  """Returns (newest readable step, its content), or None without any step; and the damaged steps
  above it. Raises UserError if all are damaged.

  items: those whose checksums are compared (default: all).
  """
  damaged = []
  for step in sorted(steps, reverse=True):
    path = manager.directory / str(step)
    try:
      checksums.check(path, *items)
      return (step, read(step)), damaged
    except Damaged as error:
      damaged.append(step)
      if jax.process_index() == 0:
        print(
          f"checkpoint {path} is damaged ({error.reason}); trying the one before",
          file=sys.stderr,
        )
  if damaged:
    raise UserError(
      f"every checkpoint in {manager.directory} is damaged; delete the directory to start this "
      "stage again"
    )
  return None, damaged


def _read(
  manager: ocp.CheckpointManager, step: int, **items: ocp.args.CheckpointArgs
) -> ocp.args.Composite:
  """Restores items of a step. Raises Damaged."""
  with reading(manager.directory / str(step), checksums.ADVICE):
    return manager.restore(step, args=ocp.args.Composite(**items))


def _check_tree(
  manager: ocp.CheckpointManager, step: int, item: str, abstract: PyTree, cast: bool = False
) -> PyTree:
  """Returns `abstract` (default: the stored tree) with a sharding on every leaf.

  Raises UserError at the first leaf whose path, shape or (without `cast`) dtype differs, and
  Damaged.
  """
  with reading(manager.directory / str(step), checksums.ADVICE):
    stored = manager.item_metadata(step)[item].tree
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

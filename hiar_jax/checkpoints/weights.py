"""Weights directories: one folder per part of the model, independent of where they came from.

    weights/dit/        model.json, params/       the diffusion transformer
            vae/        ...                       Wan2.1's autoencoder
            umt5/       ...                       the text encoder
            tiny_vae/   ...                       the small autoencoder
            tokenizer/  tokenizer.json

`params` is an Orbax checkpoint whose leaves are cut into chunks with checksums (see
stored_arrays.py). model.json describes it; params that it does not name count as absent. To replace
weights, new ones are written beside the old (`params` and `params_` alternate), then model.json is
replaced atomically: whenever a process dies, the old or the new weights are there, complete.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from hiar_jax.checkpoints import stored_arrays
from hiar_jax.checkpoints.on_disk import MODEL, PARAMS
from hiar_jax.checkpoints.tensor_files import SUFFIXES
from hiar_jax.config.building import build
from hiar_jax.config.workdir import to_json
from hiar_jax.errors import Damaged, UserError, one_of
from hiar_jax.files import check_name, check_space, write_atomic, writing
from hiar_jax.models.registry import WEIGHTS
from hiar_jax.types import Params, PyTree

KINDS = tuple(WEIGHTS)

Placement = jax.sharding.Sharding | Callable[[PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Description:
  """The content of model.json.

  source: names of the published files; tensors: how many published tensors; dtype: of the weights,
  several joined by "+"; fingerprint: an id that changes with any number, shape or dtype; params:
  the folder that holds them; entry: that they were of a .pt file, '' for a file of one set, None
  where it is not known (weights of older versions).
  """

  kind: str
  config: dict
  source: str
  tensors: int
  parameters: int
  dtype: str
  fingerprint: str
  params: str = PARAMS[0]
  entry: str | None = None


def exists(directory: str | os.PathLike, kind: str) -> bool:
  """Returns True if the directory holds complete weights of this kind."""
  return os.path.isfile(_folder(directory, kind) / MODEL)


def describe(directory: str | os.PathLike, kind: str) -> Description:
  """Reads model.json. Raises UserError if weights are missing, of another kind, or damaged."""
  folder = _folder(directory, kind)
  path = folder / MODEL
  if not os.path.isfile(path):
    raise _missing(directory, kind)
  try:
    found = build(Description, json.loads(path.read_text()))
  except (UserError, ValueError, AttributeError) as error:
    raise Damaged(path, error, f"delete {folder} and convert again") from error
  if found.kind != kind:
    raise UserError(
      f"{folder} holds weights of kind {found.kind!r}, expected {kind!r}; give a directory that "
      "hiar_jax.convert made"
    )
  if found.params not in PARAMS or not (folder / found.params).is_dir():
    raise Damaged(folder, f"there is no {found.params}", "delete it and convert again")
  return found


def _missing(directory: str | os.PathLike, kind: str) -> UserError:
  """Returns the error of a directory without weights of a kind: it may be published weights, from
  which they are made.
  """
  there = pathlib.Path(directory)
  made = pathlib.Path("weights") / (
    there.stem if there.suffix in SUFFIXES else there.absolute().name
  )
  if os.path.abspath(made) == os.path.abspath(there):
    made = made.with_name(f"{made.name}_converted")
  source, out = shlex.quote(os.fspath(directory)), shlex.quote(str(made))
  kinds = ", ".join(name for name in KINDS if exists(directory, name))
  if not kinds and _is_published(there):
    return UserError(
      f"{directory} is published weights, not converted ones; python -m hiar_jax.convert "
      f"--source={source} --out={out} makes these, then give {made}"
    )
  if there.suffix in SUFFIXES or os.path.isfile(there):  # no name of a directory
    is_there = "is no directory" if os.path.isfile(there) else "is not there"
    said = f"{directory} {is_there}; expected a directory of converted weights"
  elif os.path.isdir(there):
    said = f"{directory} holds no weights of kind {kind!r} (there is {kinds or 'nothing'})"
    out = source
  else:
    said, out = f"there is no directory {directory}, which should hold weights", source
  advice = f"convert published weights with python -m hiar_jax.convert --source=FILES --out={out}"
  return UserError(f"{said}; {advice}")


def _is_published(path: pathlib.Path) -> bool:
  """Returns True for a file of tensors, and for a folder of a download."""
  if path.is_dir():
    marks = ("model_index.json", "transformer")
    return any((path / name).exists() for name in marks) or any(
      inside.suffix in SUFFIXES for inside in path.iterdir()
    )
  return path.is_file() and path.suffix in SUFFIXES


def read_config(directory: str | os.PathLike, kind: str, default: Any = None) -> Any:
  """Returns the DiTConfig, VAEConfig, UMT5Config or TinyVAEConfig; raises as `describe` does.

  default: returned where there are no such weights, if it is given.
  """
  if default is not None and not (directory and exists(directory, kind)):
    return default
  return _open(directory, kind)[0]


def _open(directory: str | os.PathLike, kind: str) -> tuple[Any, pathlib.Path]:
  """Returns (config, path of the checkpoint that model.json names)."""
  found = describe(directory, kind)
  folder = _folder(directory, kind)
  try:
    return config_from_json(kind, found.config), folder / found.params
  except UserError as error:
    raise UserError(f"{folder / MODEL}: {error}; delete the folder and convert again") from error


def load(
  directory: str | os.PathLike, kind: str, *, dtype: Any = None, sharding: Placement | None = None
) -> tuple[Any, Params]:
  """Loads (config, params): jax arrays, floating leaves in `dtype` (default: as stored).

  sharding: one for every leaf, or a function from the tree of shapes to a tree of shardings;
  default: all on the first device. Raises UserError if the weights are missing, of another kind, or
  damaged.
  """
  config, stored = _open(directory, kind)
  shapes = stored_arrays.shapes(stored)
  if dtype is not None:
    shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, jnp.dtype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
      ),
      shapes,
    )
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shardings = sharding(shapes) if callable(sharding) else jax.tree.map(lambda _: sharding, shapes)
  abstract = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    shapes,
    shardings,
  )
  for leaf in jax.tree.leaves(abstract):
    # Raises if the sharding does not divide the shape; while reading, that would pass for damage.
    leaf.sharding.shard_shape(leaf.shape)
  return config, stored_arrays.read(stored, abstract)


def open_arrays(directory: str | os.PathLike, kind: str) -> tuple[Any, PyTree]:
  """Opens (config, tree of `stored_arrays.Stored`), whose numbers are read on use, whole or by row.

  Raises UserError as `load` does.
  """
  config, stored = _open(directory, kind)
  return config, stored_arrays.open_tree(stored)


def save(
  directory: str | os.PathLike,
  kind: str,
  config: Any,
  params: Params,
  source: str = "",
  tensors: int | None = None,
  entry: str | None = None,
) -> Description:
  """Writes or replaces `<directory>/<kind>` from a tree of arrays, or of stacks read row by row.

  Needs the memory of a few chunks beyond the tree's own. source: names of the files they came from;
  tensors: how many published tensors they were (default: the number of leaves); entry: as
  Description's. Raises DiskFull if
  they do not fit on the disk, UserError if the folder cannot be made; older weights stay.
  """
  leaves = jax.tree.leaves(params)
  folder = _folder(directory, kind)
  needed = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
  check_space(folder, needed)
  with writing(folder, needed, full_disk_alone=True), _replacing(folder) as name:
    digest = stored_arrays.write(folder / name, params)
    found = Description(
      kind=kind,
      config=config_to_json(config),
      source=source,
      tensors=len(leaves) if tensors is None else tensors,
      parameters=sum(leaf.size for leaf in leaves),
      fingerprint=digest,
      params=name,
      dtype=dtypes_of(params),
      entry=entry,
    )
    # Last, and in one step: from here on the new params are the ones that count.
    write_atomic(folder / MODEL, (json.dumps(dataclasses.asdict(found), indent=2) + "\n").encode())
  return found


def dtypes_of(params: Params) -> str:
  """Returns the names of the leaves' dtypes, joined by "+"."""
  return "+".join(sorted({jnp.dtype(leaf.dtype).name for leaf in jax.tree.leaves(params)}))


@contextlib.contextmanager
def _replacing(folder: pathlib.Path) -> Iterator[str]:
  """Yields a free name for new params; the block is to write model.json with that name.

  After the block, the params that model.json does not name are removed: the old ones, or the new
  ones if it failed.
  """
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  try:
    old = _remove_unnamed(folder)  # left by a process that was killed
    yield next(name for name in PARAMS if name != old)
  finally:
    _remove_unnamed(folder)
    with contextlib.suppress(OSError):  # it is not empty
      folder.rmdir()


def _remove_unnamed(folder: pathlib.Path) -> str | None:
  """Removes the params that model.json does not name, and returns the name of those that it does;
  None if there is no model.json, or a damaged one.
  """
  try:
    kept = json.loads((folder / MODEL).read_text()).get("params", PARAMS[0])
  except (FileNotFoundError, ValueError, AttributeError):
    kept = None
  # The pattern also matches the temporary directories of Orbax, which begin with the final name.
  for path in folder.glob(f"{PARAMS[0]}*"):
    if path.name != kept:
      shutil.rmtree(path, ignore_errors=True)
  return kept


def config_to_json(config: Any) -> dict:
  """Returns the fields of a config as JSON values; dtypes by their names."""
  fields = dataclasses.asdict(config)
  return to_json(
    {name: jnp.dtype(value).name if name == "dtype" else value for name, value in fields.items()}
  )


def config_from_json(kind: str, fields: dict) -> Any:
  """Inverts `config_to_json`. Raises UserError for fields that the kind's config does not have."""
  cls = WEIGHTS[kind]
  default = {field.name: field.default for field in dataclasses.fields(cls)}.get("dtype")
  if "dtype" in fields and not isinstance(default, str):
    # Such a config holds jax.numpy's scalar types (jnp.bfloat16), not names or numpy dtypes.
    fields = {**fields, "dtype": getattr(jnp, fields["dtype"])}
  return build(cls, fields)


def _folder(directory: str | os.PathLike, kind: str) -> pathlib.Path:
  one_of(WEIGHTS, kind=kind)
  check_name(directory, f"weights in {os.fspath(directory)}")
  return pathlib.Path(os.path.abspath(directory)) / kind

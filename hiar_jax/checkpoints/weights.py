"""Weights on disk: a directory with a folder for each part of the model, read without knowing where
they came from.

    weights/dit/        model.json, params/       the diffusion transformer
            vae/        ...                       Wan2.1's autoencoder
            umt5/       ...                       the text encoder
            tiny_vae/   ...                       the small autoencoder
            tokenizer/  tokenizer.json

`params` is an Orbax checkpoint whose leaves are cut into chunks with checksums (see
stored_arrays.py); model.json says what it holds, and what it does not name is not there. To replace
weights, new ones are written beside the old (`params`, `params_`: in turn), then model.json
changes in one step: whenever a process dies, the old ones or the new ones are there, complete.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from hiar_jax.checkpoints import stored_arrays
from hiar_jax.config.building import build
from hiar_jax.config.workdir import to_json
from hiar_jax.errors import UserError
from hiar_jax.files import write_atomic
from hiar_jax.types import Params, PyTree

# kind -> (module, class) of its config; imported when asked for, since most programs need one or
# two.
CONFIGS = {
  "dit": ("hiar_jax.models.dit", "DiTConfig"),
  "vae": ("hiar_jax.models.vae", "VAEConfig"),
  "umt5": ("hiar_jax.models.umt5", "UMT5Config"),
  "tiny_vae": ("hiar_jax.models.taehv", "TinyVAEConfig"),
}
KINDS = tuple(CONFIGS)
MODEL, PARAMS = "model.json", ("params", "params_")
ADVICE = "convert published weights with python -m hiar_jax.convert --source=FILES --out="

Placement = jax.sharding.Sharding | Callable[[PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Description:
  """What model.json says.

  dtype: of the weights, several joined by "+"; fingerprint: an id of the numbers; params: their
  folder.
  """

  kind: str
  config: dict
  source: str
  tensors: int
  parameters: int
  dtype: str
  fingerprint: str
  params: str = PARAMS[0]


def exists(directory: str | os.PathLike, kind: str) -> bool:
  """Whether the directory holds a complete folder of this kind."""
  return (_folder(directory, kind) / MODEL).is_file()


def describe(directory: str | os.PathLike, kind: str) -> Description:
  """What is known without reading the weights.

  Raises UserError where they are missing, of another kind, or damaged.
  """
  folder = _folder(directory, kind)
  path = folder / MODEL
  if not path.is_file():
    raise UserError(f"{_missing(pathlib.Path(directory), kind)}; {ADVICE}{directory}")
  try:
    found = build(Description, json.loads(path.read_text()))
  except (UserError, ValueError, AttributeError) as error:
    raise UserError(f"{path} is damaged ({error}); delete {folder} and convert again") from error
  if found.kind != kind:
    raise UserError(
      f"{folder} holds weights of kind {found.kind!r}, expected {kind!r}; give a directory that "
      "hiar_jax.convert made"
    )
  if found.params not in PARAMS or not (folder / found.params).is_dir():
    raise UserError(
      f"{folder} is damaged (there is no {found.params}); delete it and convert again"
    )
  return found


def read_config(directory: str | os.PathLike, kind: str) -> Any:
  """DiTConfig, VAEConfig, UMT5Config or TinyVAEConfig of the stored weights.

  Raises UserError as `describe`.
  """
  return _open(directory, kind)[0]


def _open(directory: str | os.PathLike, kind: str) -> tuple[Any, pathlib.Path]:
  """(config, the checkpoint that model.json names)."""
  found, folder = describe(directory, kind), _folder(directory, kind)
  try:
    return config_from_json(kind, found.config), folder / found.params
  except UserError as error:
    raise UserError(f"{folder / MODEL}: {error}; delete the folder and convert again") from error


def fingerprint(directory: str | os.PathLike, kind: str) -> str:
  """A short id that changes with any number, shape or dtype of the weights; nothing but model.json
  is read.
  """
  return describe(directory, kind).fingerprint


def load(
  directory: str | os.PathLike, kind: str, *, dtype: Any = None, sharding: Placement | None = None
) -> tuple[Any, Params]:
  """-> (config, params): jax arrays, in `dtype` (floating leaves; default: as stored).

  sharding: of every leaf, or a function from the tree of shapes to a tree of shardings; default:
  all on the first device. Raises UserError where the weights are missing, of another kind, or
  damaged.
  """
  config, stored = _open(directory, kind)
  with _one_line(stored.parent):
    shapes = stored_arrays.shapes(stored)
    if dtype is not None:
      shapes = jax.tree.map(lambda leaf: _cast(leaf, dtype), shapes)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shardings = sharding(shapes) if callable(sharding) else jax.tree.map(lambda _: sharding, shapes)
  place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
  abstract = jax.tree.map(place, shapes, shardings)
  for leaf in jax.tree.leaves(abstract):
    # raises where it does not divide: that would else pass for damage
    leaf.sharding.shard_shape(leaf.shape)
  with _one_line(stored.parent):
    return config, stored_arrays.read(stored, abstract)


def open_arrays(directory: str | os.PathLike, kind: str) -> tuple[Any, PyTree]:
  """-> (config, tree of arrays on disk): each has shape and dtype, is read by numpy.asarray, and by
  row with array[i].
  """
  config, stored = _open(directory, kind)
  with _one_line(stored.parent):
    return config, stored_arrays.open_tree(stored)


def save(
  directory: str | os.PathLike,
  kind: str,
  config: Any,
  params: Params,
  source: str = "",
  tensors: int | None = None,
) -> Description:
  """Writes `<directory>/<kind>` from a tree of arrays, or of stacks that are read row by row, and
  replaces what was there.

  The memory needed beyond the tree's own is that of a few chunks. source: names of the files they
  came from; tensors: how many published tensors they were (default: leaves). Raises UserError where
  the disk is full.
  """
  leaves, folder = jax.tree.leaves(params), _folder(directory, kind)
  with stored_arrays.disk_errors(folder), _replacing(folder) as name:
    digest = stored_arrays.write(folder / name, params)
    found = Description(
      kind=kind,
      config=config_to_json(config),
      source=source,
      tensors=len(leaves) if tensors is None else tensors,
      parameters=sum(leaf.size for leaf in leaves),
      fingerprint=digest,
      params=name,
      dtype="+".join(sorted({jnp.dtype(leaf.dtype).name for leaf in leaves})),
    )
    write_atomic(folder / MODEL, (json.dumps(dataclasses.asdict(found), indent=2) + "\n").encode())
  return found


@contextlib.contextmanager
def _replacing(folder: pathlib.Path) -> Iterator[str]:
  """A name in the folder for new params. What is there goes only after the block, in which
  model.json changes to that name.

  What a kill leaves behind is cleared by the next try.
  """
  _make(folder)
  new = next(name for name in PARAMS if name != _named(folder))
  try:
    _clear(folder)
    yield new
  finally:
    _clear(folder)
    with contextlib.suppress(OSError):  # it is not empty
      folder.rmdir()


def _clear(folder: pathlib.Path) -> None:
  """Removes the params that model.json does not name, also what Orbax has not finished."""
  kept = _named(folder)
  for path in folder.glob(f"{PARAMS[0]}*"):
    if path.name != kept:
      shutil.rmtree(path, ignore_errors=True)


def _make(folder: pathlib.Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{folder} cannot be made ({error.strerror}); choose another place") from error


def _named(folder: pathlib.Path) -> str | None:
  """The params that model.json names; None where it does not exist or is damaged."""
  try:
    return json.loads((folder / MODEL).read_text()).get("params", PARAMS[0])
  except (FileNotFoundError, ValueError, AttributeError):
    return None


def config_to_json(config: Any) -> dict:
  """The fields of a config; dtypes by their names."""
  fields = dataclasses.asdict(config)
  return to_json(
    {name: jnp.dtype(value).name if name == "dtype" else value for name, value in fields.items()}
  )


def config_from_json(kind: str, fields: dict) -> Any:
  """The inverse. Raises UserError for fields that the kind's config does not have."""
  cls = config_class(kind)
  default = {field.name: field.default for field in dataclasses.fields(cls)}.get("dtype")
  if "dtype" in fields and not isinstance(default, str):
    # these configs hold jax.numpy's own types
    fields = {**fields, "dtype": getattr(jnp, fields["dtype"])}
  return build(cls, fields)


def config_class(kind: str) -> type:
  if kind not in CONFIGS:
    raise UserError(f"kind = {kind!r}: expected one of {', '.join(KINDS)}")
  module, name = CONFIGS[kind]
  return getattr(importlib.import_module(module), name)


def _folder(directory: str | os.PathLike, kind: str) -> pathlib.Path:
  if kind not in CONFIGS:
    raise UserError(f"kind = {kind!r}: expected one of {', '.join(KINDS)}")
  return pathlib.Path(os.path.abspath(directory)) / kind


def _missing(directory: pathlib.Path, kind: str) -> str:
  if not directory.is_dir():
    return f"there is no directory {directory}, which should hold weights"
  there = [name for name in KINDS if exists(directory, name)]
  return f"{directory} holds no weights of kind {kind!r} (there is {', '.join(there) or 'nothing'})"


def _cast(leaf: jax.ShapeDtypeStruct, dtype: Any) -> jax.ShapeDtypeStruct:
  floating = jnp.issubdtype(leaf.dtype, jnp.floating)
  return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if floating else leaf.dtype)


@contextlib.contextmanager
def _one_line(folder: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except stored_arrays.Damaged as error:
    raise UserError(f"{folder} is damaged ({error}); delete it and convert again") from error

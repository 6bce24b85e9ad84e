"""Named tensors of published files: .safetensors, whole or in shards, and PyTorch's .pt and .pth.

Tensors are views of memory-mapped files: opening reads headers only, and the pages of a tensor are
read when its numbers are used.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from hiar_jax.checkpoints.torch_files import read_torch
from hiar_jax.config.building import nearest
from hiar_jax.errors import UserError

# The dtype tags of the safetensors format.
_DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "I64": "int64",
  "I32": "int32",
  "I16": "int16",
  "I8": "int8",
  "U8": "uint8",
  "BOOL": "bool",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
}
TORCH = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH)
# Parts that wrappers add to a name: FSDP, activation checkpointing, torch.compile, DDP, the
# training code's own, ComfyUI's.
WRAPPERS = {
  "_fsdp_wrapped_module",
  "_checkpoint_wrapped_module",
  "_orig_mod",
  "module",
  "model",
  "diffusion_model",
}
# How names begin in ComfyUI's file of a whole pipeline: kind -> prefix.
PIPELINE = {
  "dit": "model.diffusion_model.",
  "vae": "first_stage_model.",
  "umt5": "text_encoders.umt5xxl.transformer.",
}
# Those that a file of one model alone has too; the DiT's are wrappers' parts.
ALONE = ("vae", "umt5")
# What ComfyUI keeps among the tensors and is none: the bytes of a tokenizer's file.
NO_WEIGHT = "spiece_model"
# State dicts of a file with several, the preferred (those for inference) first.
ENTRIES = ("generator_ema", "generator", "model_ema", "ema", "model", "state_dict", "module")

assert ml_dtypes.bfloat16  # imported for its effect: numpy knows these dtypes by name


@dataclasses.dataclass(frozen=True)
class TensorSet:
  """Tensors by name, the files that hold them, remarks for the user on how they were chosen, and
  the entry of a .pt file that they were ('' where the file is a state dict itself).
  """

  named: Mapping[str, np.ndarray]
  files: tuple[pathlib.Path, ...]
  notes: tuple[str, ...] = ()
  entry: str = ""


def open_tensors(
  path: str | os.PathLike, entry: str | None = None, kind: str | None = None
) -> TensorSet:
  """Opens a file, an index of shards, or a folder; tensor names come without wrappers' parts.

  entry: the state dict to take from a .pt file with several. kind: of the model to take from
  ComfyUI's file of a whole pipeline. Raises UserError for what is missing, cut off, damaged or
  ambiguous.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return open_tensors(only_set(path), entry, kind)
  if not path.is_file():
    there = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
    raise UserError(f"there is no file {path}; {nearest(str(path), there)}")
  files, notes, chosen = (path,), (), ""
  if path.name.endswith(".index.json"):
    named, files = _open_index(path)
  elif path.suffix == ".safetensors":
    named = open_safetensors(path)
  elif path.suffix in TORCH:
    named, notes, chosen = pick_entry(read_torch(path), entry, path)
  else:
    raise UserError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
  if entry is not None and path.suffix not in TORCH:
    raise UserError(
      f"--entry={entry} is for .pt files, which may hold several sets of weights; {path.name} "
      "holds one: leave it out"
    )
  together = kinds_together(named)
  if kind is None and len(together) == 1:
    (kind,) = together
  if kind in together:
    prefix = PIPELINE[kind]
    notes += _other_parts(named, path)
    named = {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}
  if NO_WEIGHT in named:
    named = {name: x for name, x in named.items() if name != NO_WEIGHT}
    notes += (f"{path.name}: {NO_WEIGHT}, a tokenizer's file among the tensors, is left out",)
  return TensorSet(unwrap(named, path), files, notes, chosen)


def kinds_together(names: Iterable[str]) -> list[str]:
  """Returns the kinds of the models in ComfyUI's file of a whole pipeline, or of one part under its
  prefix; [] for other names.
  """
  names = list(names)
  kinds = [
    kind for kind, prefix in PIPELINE.items() if any(name.startswith(prefix) for name in names)
  ]
  return kinds if len(kinds) > 1 or (kinds and kinds[0] in ALONE) else []


def _other_parts(names: Iterable[str], path: pathlib.Path) -> tuple[str, ...]:
  """Returns a remark on the tensors of a pipeline that are under no prefix known here, if any."""
  others = sorted(name for name in names if not name.startswith(tuple(PIPELINE.values())))
  if not others:
    return ()
  first = others[0] + (", ..." if len(others) > 1 else "")
  return (f"{path.name}: {len(others)} tensors of no model known here ({first}) are left out",)


def open_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of one file as read-only views. Raises UserError if it is damaged."""
  try:
    # The library checks that header and file size agree; the views below are our own, since its
    # numpy tensors are copies.
    with safetensors.safe_open(path, "np"):
      pass
  except safetensors.SafetensorError as error:
    size = path.stat().st_size
    raise UserError(
      f"{path} is cut off or damaged ({error}; it has {size:,} bytes); download or copy it again"
    ) from error
  # Layout of the file: 8 bytes with the header's length, the header (JSON), the numbers.
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
  header.pop("__metadata__", None)
  content = np.asarray(np.memmap(path, np.uint8, mode="r"))[8 + length :]
  # the library takes keys beside these three, so they are left out here
  return {
    name: _view(path, name, content, entry["dtype"], entry["shape"], entry["data_offsets"])
    for name, entry in header.items()
  }


def _view(
  path: pathlib.Path,
  name: str,
  content: np.ndarray,
  dtype: str,
  shape: list[int],
  data_offsets: list[int],
) -> np.ndarray:
  if dtype not in _DTYPES:
    raise UserError(f"{path}: {name} has the dtype {dtype}; expected one of {', '.join(_DTYPES)}")
  if not math.prod(shape):  # an empty slice of the file cannot be viewed in another dtype
    try:
      return np.empty(shape, _DTYPES[dtype])
    except ValueError as error:  # of (0, 2**62), which holds nothing and is too large all the same
      raise UserError(
        f"{path}: {name} has the shape {shape}, which no array has; download it again"
      ) from error
  return content[slice(*data_offsets)].view(_DTYPES[dtype]).reshape(shape)


def _open_index(path: pathlib.Path) -> tuple[dict[str, np.ndarray], tuple[pathlib.Path, ...]]:
  try:
    shard_of = json.loads(path.read_text())["weight_map"]  # {name of a tensor: file name}
    if not all(isinstance(shard, str) for shard in shard_of.values()):
      raise TypeError("a file name that is no text")
    shards = sorted(set(shard_of.values()))
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(
      f"{path} is damaged (no weight_map can be read from it); download it again"
    ) from error
  for name in shards:
    # a name of a file beside the index, and one that a file may have
    if pathlib.PurePath(name).name != name or not name.isprintable() or len(name.encode()) > 255:
      raise UserError(
        f"{path} names the file {name[:60]!r}, which is not the name of one beside it; download it "
        "again"
      )
  missing = [name for name in shards if not (path.parent / name).is_file()]
  if missing:
    raise UserError(
      f"{path.parent} is incomplete: {path.name} also names {', '.join(missing)}; download the rest"
    )
  named: dict[str, np.ndarray] = {}
  for shard in shards:
    tensors = open_safetensors(path.parent / shard)
    absent = [name for name, file in shard_of.items() if file == shard and name not in tensors]
    if absent:
      raise UserError(
        f"{path} says that {absent[0]} is in {shard}, but it is not; download both again"
      )
    # Tensors that the index does not list are kept, so that converting reports them as left over.
    named |= tensors
  return named, tuple(path.parent / shard for shard in shards)


def only_set(folder: pathlib.Path, stem: str = "") -> pathlib.Path:
  """Returns the file that stands for a folder's weights: the index, or the only file.

  stem: start of the file names, if the folder holds other weights too. Raises UserError if there is
  no such file, or several.
  """
  indices = sorted(folder.glob(f"{stem}*.safetensors.index.json"))
  files = sorted(folder.glob(f"{stem}*.safetensors")) or [
    p for p in sorted(folder.glob(f"{stem}*")) if p.suffix in TORCH
  ]
  shards = [path for path in files if re.search(r"-\d+-of-\d+\.", path.name)]
  if len(indices) == 1:
    return indices[0]
  if not indices and len(files) == 1 and not shards:
    return files[0]
  if not indices and not files:
    raise UserError(
      f"{folder} holds no weights ({stem}*.safetensors, or a .pt or .pth file); check the path"
    )
  if not indices and shards:
    raise UserError(
      f"{folder} holds shards without their index ({stem}*.safetensors.index.json); download it too"
    )
  names = ", ".join(path.name for path in indices or files)
  raise UserError(
    f"{folder} holds several sets of weights ({names}); give the file instead of the folder"
  )


# ----------------------------------------------------------------------- state dicts of torch files


def pick_entry(
  saved: Any, entry: str | None, path: pathlib.Path
) -> tuple[dict[str, np.ndarray], tuple[str, ...], str]:
  """Picks the state dict from an object of torch.save; returns (tensors by name, remarks, the name
  of the entry, '' where the object is a state dict itself).

  Raises UserError if there is none, or no such entry, or several without a preferred one.
  """
  if not isinstance(saved, dict):
    raise UserError(
      f"{path} holds a {type(saved).__name__}; expected tensors by name, or entries such as "
      "'generator_ema'"
    )
  found = {
    key: value
    for key, value in saved.items()
    if isinstance(value, dict) and any(isinstance(item, np.ndarray) for item in value.values())
  }
  if entry is not None:
    if entry not in found:
      raise UserError(
        f"--entry={entry}: {path} has no such entry; {nearest(entry, map(str, found))}"
      )
    return _only_arrays(found[entry], path), (), entry
  if not found:  # `saved` is a state dict itself
    return _only_arrays(saved, path), (), ""
  known = [name for name in ENTRIES if name in found]
  if not known and len(found) > 1:
    raise UserError(f"{path} has the entries {', '.join(map(str, found))}; choose one with --entry")
  chosen = known[0] if known else next(iter(found))
  note = (
    f"{path.name} has the entries {', '.join(map(str, found))}; taking {chosen} (--entry "
    "chooses another)"
  )
  return _only_arrays(found[chosen], path), (note,) if len(found) > 1 else (), str(chosen)


def _only_arrays(state: dict, path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns `state`; raises UserError if it is empty or holds anything but arrays by name."""
  for name, value in state.items():
    if not isinstance(value, np.ndarray) or not isinstance(name, str):
      raise UserError(
        f"{path}: {name!r} is a {type(value).__name__}; expected nothing but tensors by name"
      )
  if not state:
    raise UserError(f"{path} holds no tensors")
  return state


def unwrap(named: Mapping[str, np.ndarray], path: pathlib.Path) -> dict[str, np.ndarray]:
  """Removes the parts of names that wrappers add. Raises UserError if two names become one."""
  plain: dict[str, np.ndarray] = {}
  for name, array in named.items():
    bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    if bare in plain:
      raise UserError(
        f"{path}: two tensors are called {bare!r} (one of them {name!r}); give a file that holds "
        "one model"
      )
    plain[bare] = array
  return plain

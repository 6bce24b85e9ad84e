"""Published weights <-> parameter trees."""

import re

import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.models.dit import DiTConfig
from hiar_jax.types import Params

# Published module name -> path here. Layers are stacked on a leading axis under "layers".
_OUTER = {
  "patch_embedding": "patch_embedding",
  "text_embedding.0": "text_embedding_in",
  "text_embedding.2": "text_embedding_out",
  "time_embedding.0": "time_embedding_in",
  "time_embedding.2": "time_embedding_out",
  "time_projection.1": "time_projection",
  "head.head": "head",
}
_ATTENTION = {"self_attn": "self_attention", "cross_attn": "text_attention"}
_LAYER = {
  **{f"{theirs}.{p}": f"{ours}/{p}" for theirs, ours in _ATTENTION.items() for p in "qkvo"},
  "ffn.0": "mlp_in",
  "ffn.2": "mlp_out",
}
_NORMS = {f"{theirs}.norm_{p}": f"{ours}/norm_{p}" for theirs, ours in _ATTENTION.items() for p in "qk"}


def published_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
  """Every tensor of the published checkpoint of this size: name -> shape."""
  d, patch = config.dim, config.patch
  out_features = int(np.prod(patch)) * config.channels

  def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

  shapes = {"patch_embedding.weight": (d, config.channels, *patch), "patch_embedding.bias": (d,)}
  shapes |= linear("text_embedding.0", d, config.text_dim) | linear("text_embedding.2", d, d)
  shapes |= linear("time_embedding.0", d, config.freq_dim) | linear("time_embedding.2", d, d)
  shapes |= linear("time_projection.1", 6 * d, d)
  for i in range(config.num_layers):
    layer = {"modulation": (1, 6, d), "norm3.weight": (d,), "norm3.bias": (d,)}
    for attention in _ATTENTION:
      for p in "qkvo":
        layer |= linear(f"{attention}.{p}", d, d)
      layer |= {f"{attention}.norm_q.weight": (d,), f"{attention}.norm_k.weight": (d,)}
    layer |= linear("ffn.0", config.ffn_dim, d) | linear("ffn.2", d, config.ffn_dim)
    shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
  shapes |= {"head.modulation": (1, 2, d)} | linear("head.head", out_features, d)
  return shapes


def _place(name: str) -> tuple[str, int | None, bool]:
  """Published name -> (path here, layer index or None, whether a linear weight to transpose)."""
  match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
  layer, rest = (int(match[1]), match[2]) if match else (None, name)
  if rest in ("modulation", "head.modulation"):
    return ("layers/modulation" if match else "head_modulation"), layer, False
  module, kind = rest.rsplit(".", 1)
  if module == "norm3":
    return f"layers/norm_text/{'scale' if kind == 'weight' else 'bias'}", layer, False
  if module in _NORMS:
    return f"layers/{_NORMS[module]}/scale", layer, False
  path = f"layers/{_LAYER[module]}" if match else _OUTER[module]
  return (f"{path}/kernel", layer, True) if kind == "weight" else (f"{path}/bias", layer, False)


def _to_here(name: str, array: np.ndarray) -> np.ndarray:
  """Published layout -> ours: [out, in] -> [in, out]; a patch convolution becomes a linear layer over (row, column, channel)."""
  if name == "patch_embedding.weight":
    return array.transpose(2, 3, 4, 1, 0).reshape(-1, array.shape[0])
  return array.T if _place(name)[2] else array


def params_from_torch(named_arrays: dict[str, np.ndarray], config: DiTConfig) -> Params:
  """Arrays under Wan2.1's published names -> parameters of `DiT(config)`.

  Raises UserError listing what is missing, left over, or of another shape.
  """
  shapes = published_shapes(config)
  missing, extra = sorted(shapes.keys() - named_arrays.keys()), sorted(named_arrays.keys() - shapes.keys())
  wrong = [
    f"{name} is {tuple(named_arrays[name].shape)}, expected {shape}"
    for name, shape in shapes.items() if name in named_arrays and tuple(named_arrays[name].shape) != shape
  ]  # fmt: skip
  if missing or extra or wrong:
    raise UserError(f"weights do not fit this DiT: missing {missing}; left over {extra}; wrong shape: {'; '.join(wrong)}")

  flat: dict[str, np.ndarray] = {}
  stacked: dict[str, list] = {}
  for name in shapes:
    path, layer, _ = _place(name)
    array = _to_here(name, np.asarray(named_arrays[name]))
    if layer is None:
      flat[path] = array
    else:
      stacked.setdefault(path, []).append(array)
  flat |= {path: np.stack(arrays) for path, arrays in stacked.items()}
  return _nest(flat)


def params_to_torch(params: Params, config: DiTConfig) -> dict[str, np.ndarray]:
  """The inverse of `params_from_torch`."""
  named = {}
  for name, shape in published_shapes(config).items():
    path, layer, transpose = _place(name)
    array = params
    for part in path.split("/"):
      array = array[part]
    array = np.asarray(array if layer is None else array[layer])
    if name == "patch_embedding.weight":
      array = array.reshape(*config.patch, config.channels, config.dim).transpose(4, 3, 0, 1, 2)
    elif transpose:
      array = array.T
    named[name] = np.ascontiguousarray(array).reshape(shape)
  return named


def _nest(flat: dict[str, np.ndarray]) -> Params:
  tree: Params = {}
  for path, array in flat.items():
    *parents, leaf = path.split("/")
    node = tree
    for part in parents:
      node = node.setdefault(part, {})
    node[leaf] = array
  return tree

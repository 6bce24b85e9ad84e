"""Configs of published models, from the shapes of their tensors and from their config.json."""

from collections.abc import Callable, Mapping
import itertools
import math
import re
import reprlib
from typing import Any

from hiar_jax.conversion.dit_keys import HELIOS
from hiar_jax.errors import UserError
from hiar_jax.models.registry import WEIGHTS
from hiar_jax.models.rope import THETA, split_pairs

HEAD_DIM = 128  # of every published Wan2.1 DiT (1.3B: 1536 / 12 heads, 14B: 5120 / 40)
Shape = tuple[int, ...]

# Field here -> names in a config.json (original, diffusers, transformers); the first one found
# counts.
_STATED = {
  "dit": {
    "dim": ("dim",),
    "ffn_dim": ("ffn_dim",),
    "freq_dim": ("freq_dim",),
    "text_dim": ("text_dim",),
    "eps": ("eps",),
    "num_layers": ("num_layers",),
    "num_heads": ("num_heads", "num_attention_heads"),
    "patch": ("patch_size",),
    "channels": ("in_dim", "in_channels"),
  },
  "vae": {
    "dim": ("base_dim",),
    "z_dim": ("z_dim",),
    "dim_mult": ("dim_mult",),
    "num_res_blocks": ("num_res_blocks",),
    "temporal_downsample": ("temperal_downsample",),
    "latents_mean": ("latents_mean",),
    "latents_std": ("latents_std",),
  },
  "umt5": {
    "vocab": ("vocab_size",),
    "dim": ("d_model",),
    "dim_ffn": ("d_ff",),
    "num_heads": ("num_heads",),
    "num_layers": ("num_layers",),
    "num_buckets": ("relative_attention_num_buckets",),
  },
}


# What a value in a config.json must be, by its field here; a whole number above 0 where not named.
_KINDS = {
  "eps": "a number above 0",
  "patch": "three whole numbers above 0",
  "dim_mult": "a list of whole numbers above 0",
  "temporal_downsample": "a list of true and false",
  "latents_mean": "a list of finite numbers",
  "latents_std": "a list of numbers above 0",
}
# Names in a config.json that no field has, and the values with which the models here compute.
_FIXED = {
  "dit": {"qk_norm": (True, "rms_norm_across_heads"), "cross_attn_norm": (True,)},
  "vae": {"is_residual": (False,)},
  "umt5": {
    "layer_norm_epsilon": (1e-6,),
    "relative_attention_max_distance": (128,),
    "feed_forward_proj": ("gated-gelu",),
  },
}


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_number(value: Any) -> bool:
  return (
    isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
  )  # NaN is not below infinity either


def _fits(field: str, value: Any) -> bool:
  """Returns True for a value of the kind that _KINDS names."""
  match field:
    case "eps":
      return _is_number(value) and value > 0
    case "patch" | "dim_mult":
      whole = isinstance(value, list) and bool(value) and all(map(_is_whole, value))
      return whole and (field != "patch" or len(value) == 3)
    case "temporal_downsample":
      return isinstance(value, list) and all(isinstance(item, bool) for item in value)
    case "latents_mean" | "latents_std":
      numbers = isinstance(value, list) and all(map(_is_number, value))
      return numbers and (field == "latents_mean" or all(item > 0 for item in value))
  return _is_whole(value)


class _Shapes:
  """Shapes by name. Raises UserError for one that is absent or has another rank.

  what: the source, as error messages name it.
  """

  def __init__(self, shapes: Mapping[str, Shape], what: str):
    self.shapes = shapes
    self.what = what

  def __contains__(self, name: str) -> bool:
    return name in self.shapes

  def __call__(self, name: str, rank: int) -> Shape:
    if name not in self.shapes:
      raise UserError(
        f"{self.what}: the tensor {name} is missing; give the complete weights of one model"
      )
    if len(self.shapes[name]) != rank:
      raise UserError(
        f"{self.what}: {name} has shape {self.shapes[name]}, expected {rank} axes; give the "
        "weights of Wan2.1 models"
      )
    return self.shapes[name]

  def layers(self, stem: str) -> int:
    """Returns the number of layers, which are numbered from 0 behind `stem.`.

    Raises UserError for a gap: one tensor of a layer 999999999 makes no model of a billion.
    """
    parts = {
      name.removeprefix(f"{stem}.").split(".")[0]
      for name in self.shapes
      if name.startswith(f"{stem}.")
    }
    numbers = sorted(int(part) for part in parts if re.fullmatch(r"[0-9]{1,18}", part))
    for layer, number in enumerate(numbers):
      if layer != number:
        raise UserError(
          f"{self.what}: there are tensors of {stem}.{number}, but none of {stem}.{layer}; give "
          "the complete weights of one model"
        )
    return len(numbers)


def infer(kind: str, layout: str, shapes: Mapping[str, Shape], what: str) -> dict[str, Any]:
  """Returns the config fields that follow from shapes.

  what: the source, as error messages name it. Raises UserError if a tensor that decides a field is
  missing or has another rank.
  """
  rule: Callable = {"dit": _dit, "vae": _vae, "umt5": _umt5, "tiny_vae": _tiny_vae}[kind]
  return rule(_Shapes(shapes, what), layout == "original")


def stated(kind: str, config: Mapping[str, Any], what: str, tensors: int) -> dict[str, Any]:
  """Returns the config fields that a config.json states.

  tensors: how many there are, which bounds the number of layers. Raises UserError for a value of
  another kind or out of range, one with which the models here do not compute, and a DiT whose input
  and output channels differ.
  """

  def checked(name: str, field: str = "") -> Any:
    if not _fits(field, config[name]):
      raise _wrong(what, name, config[name], _KINDS.get(field, "a whole number above 0"))
    return config[name]

  fields = {}
  for field, names in _STATED.get(kind, {}).items():
    found = [checked(name, field) for name in names if config.get(name) is not None]
    if found:
      fields[field] = tuple(found[0]) if isinstance(found[0], list) else found[0]
  for field in ("num_layers", "num_res_blocks"):
    if fields.get(field, 0) > tensors:
      raise UserError(
        f"{what}: its config.json says {field} = {fields[field]}, and there are {tensors} tensors; "
        "give the complete weights with their own config.json"
      )
  for name, values in _FIXED.get(kind, {}).items():
    if config.get(name) is not None and config[name] not in values:
      raise _wrong(what, name, config[name], f"{values[-1]}, as Wan2.1 has")
  # diffusers and transformers state the width per head.
  if config.get("attention_head_dim") is not None and "num_heads" in fields:
    fields["dim"] = checked("attention_head_dim") * fields["num_heads"]
  if kind == "umt5" and config.get("d_kv") is not None and "num_heads" in fields:
    fields["dim_attn"] = checked("d_kv") * fields["num_heads"]
  if kind == "dit":
    _check_channels(config, what)
    _check_rope(config, what)
  return fields


def _wrong(what: str, name: str, value: Any, expected: str) -> UserError:
  return UserError(
    f"{what}: its config.json says {name} = {reprlib.repr(value)}; expected {expected}"
  )


def _check_channels(config: Mapping[str, Any], what: str) -> None:
  for in_name, out_name in (("in_dim", "out_dim"), ("in_channels", "out_channels")):
    channels_in, channels_out = config.get(in_name), config.get(out_name)
    if channels_out is not None and channels_in != channels_out:
      raise UserError(
        f"{what}: its config.json says {in_name} = {reprlib.repr(channels_in)}, {out_name} = "
        f"{reprlib.repr(channels_out)}; expected the same (a text-to-video model, image-to-video "
        "models have more in)"
      )


def _check_rope(config: Mapping[str, Any], what: str) -> None:
  """Raises UserError where Helios states other positions than those that Wan2.1 fixes."""
  if not config.get("rope_dim"):
    return
  width = config.get("attention_head_dim")
  if not _is_whole(width):
    raise _wrong(what, "attention_head_dim", width, "a whole number above 0")
  found = [config["rope_dim"], config.get("rope_theta", THETA)]
  expected = [[2 * pairs for pairs in split_pairs(width)], THETA]
  if [list(found[0]) if isinstance(found[0], list | tuple) else found[0], found[1]] != expected:
    raise UserError(
      f"{what}: its config.json says rope_dim and rope_theta = {reprlib.repr(found)}; expected "
      f"those of Wan2.1, {expected}"
    )


def build(kind: str, fields: Mapping[str, Any], what: str) -> Any:
  """Builds the config of a kind from its fields.

  Raises UserError if the sizes do not fit each other, or the number of heads of a DiT is unknown.
  """
  if kind == "dit" and "num_heads" not in fields:
    if fields["dim"] % HEAD_DIM:
      raise UserError(
        f"{what}: a width of {fields['dim']} is not whole heads of {HEAD_DIM}, as Wan2.1 has; say "
        "how many with --heads"
      )
    fields = {**fields, "num_heads": fields["dim"] // HEAD_DIM}
  try:
    return WEIGHTS[kind](**fields)
  except UserError as error:
    raise UserError(f"{what}: {error}") from error


def _dit(shape: _Shapes, original: bool) -> dict[str, Any]:
  def pick(original_name: str, diffusers_name: str) -> str:
    return f"{original_name if original else diffusers_name}.weight"

  dim, channels, *patch = shape("patch_embedding.weight", 5)  # [out, in, frames, height, width]
  head = shape(pick("head.head", "proj_out"), 2)[0]
  pixels = patch[0] * patch[1] * patch[2]
  if head != pixels * channels:
    raise UserError(
      f"{shape.what}: takes {channels} channels in and gives {head // pixels}; expected the same "
      "(a text-to-video model, image-to-video models have more in)"
    )
  helios = all(f"{name}.weight" in shape for name in HELIOS.values())
  return {
    "dim": dim,
    "channels": channels,
    "packing": tuple(HELIOS) if helios else (),
    "patch": tuple(patch),
    "num_layers": shape.layers("blocks"),
    "ffn_dim": shape(pick("blocks.0.ffn.0", "blocks.0.ffn.net.0.proj"), 2)[0],
    "text_dim": shape(pick("text_embedding.0", "condition_embedder.text_embedder.linear_1"), 2)[1],
    "freq_dim": shape(pick("time_embedding.0", "condition_embedder.time_embedder.linear_1"), 2)[1],
  }


def _vae(shape: _Shapes, original: bool) -> dict[str, Any]:
  stem, conv = (
    ("encoder.downsamples", "residual.2") if original else ("encoder.down_blocks", "conv1")
  )
  dim, channels = shape("encoder.conv1.weight" if original else "encoder.conv_in.weight", 5)[:2]
  if channels != 3:  # Wan2.2's sees 2 x 2 pixels of three colours
    raise UserError(
      f"{shape.what}: an autoencoder of {channels} channels in, as Wan2.2's (of TI2V-5B), which is "
      "not supported; expected Wan2.1's, of 3 (--kind converts another part alone)"
    )
  # The encoder is one list of residual blocks and resamplings; each resampling ends a stage. One
  # that has a time_conv halves the frames too.
  stages: list[list[int]] = [[]]  # output widths of the residual blocks, by stage
  temporal: list[bool] = []
  for i in itertools.count():
    if f"{stem}.{i}.{conv}.weight" in shape:
      stages[-1].append(shape(f"{stem}.{i}.{conv}.weight", 5)[0])
    elif f"{stem}.{i}.resample.1.weight" in shape:
      stages.append([])
      temporal.append(f"{stem}.{i}.time_conv.weight" in shape)
    else:
      break
  if not all(stages):
    raise UserError(
      f"{shape.what}: {stem}.* has stages without residual blocks; give the complete weights of "
      "one model"
    )
  return {
    "dim": dim,
    "z_dim": shape("conv2.weight" if original else "post_quant_conv.weight", 5)[0],
    "dim_mult": tuple(stage[-1] // dim for stage in stages),
    "num_res_blocks": len(stages[0]),
    "temporal_downsample": tuple(temporal),
  }


def _umt5(shape: _Shapes, original: bool) -> dict[str, Any]:
  stem = "blocks" if original else "encoder.block"

  def part(original_name: str, diffusers_name: str) -> str:
    return f"{stem}.0.{original_name if original else diffusers_name}.weight"

  vocab, dim = shape("token_embedding.weight" if original else "shared.weight", 2)
  buckets, heads = shape(
    part("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"), 2
  )
  return {
    "vocab": vocab,
    "dim": dim,
    "num_buckets": buckets,
    "num_heads": heads,
    "num_layers": shape.layers(stem),
    "dim_attn": shape(part("attn.q", "layer.0.SelfAttention.q"), 2)[0],
    "dim_ffn": shape(part("ffn.fc1", "layer.1.DenseReluDense.wi_1"), 2)[0],
  }


def _tiny_vae(shape: _Shapes, original: bool) -> dict[str, Any]:
  del original  # there is only one layout
  width = shape("encoder.0.weight", 4)[0]
  # Tensors are named by their layer's index in a list, so the strides of the indices below are the
  # layers of a stage; see taehv_keys.py for their order.
  blocks = 0
  while f"decoder.{3 + blocks}.conv.0.weight" in shape:
    blocks += 1
  widths = [shape("decoder.1.weight", 4)[0]]
  down: list[bool] = []
  while f"encoder.{2 + len(down) * (2 + blocks)}.conv.weight" in shape:
    # A stage that halves the frames takes two of them, side by side in the channels.
    down.append(shape(f"encoder.{2 + len(down) * (2 + blocks)}.conv.weight", 4)[1] > width)
  up: list[bool] = []
  while f"decoder.{4 + blocks + len(up) * (3 + blocks)}.conv.weight" in shape:
    index = 4 + blocks + len(up) * (3 + blocks)
    # A stage that doubles the frames gives two of them, side by side in the channels.
    up.append(shape(f"decoder.{index}.conv.weight", 4)[0] > widths[-1])
    widths.append(shape(f"decoder.{index + 1}.weight", 4)[0])
  return {
    "z_dim": shape("decoder.1.weight", 4)[1],
    "encoder_width": width,
    "decoder_widths": tuple(widths),
    "blocks": blocks,
    "temporal_downsample": tuple(down),
    "temporal_upsample": tuple(up),
  }

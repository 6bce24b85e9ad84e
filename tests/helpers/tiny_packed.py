"""Configs of packed models (FramePack) as small as those of tiny_run: sections of two frames."""

import runpy

from tests.helpers import tiny_run

# the packings of experiments/, with sections and groups of a few frames
PACKINGS = {
  "shapes_framepack": "td_f2k2f1k1_g2",
  "shapes_framepack_both_ends": "td_f2k2f1k1_g2_x_f1k1",
  "shapes_framepack_inverted": "f1k1_x_g2_f1k1f2k2_td",
}
SIZES = {name: size for name, size in tiny_run.TINY.items() if not name.startswith("history.")}


def load(name: str):
  """The smoke config of an experiment."""
  return runpy.run_path(str(tiny_run.ROOT / "experiments" / f"{name}.py"))["get_config"]("smoke")


def make_config(name: str = "shapes_framepack", **changes):
  """The config of an experiment, its clips three sections long; changes as tiny_run.make_config."""
  config = load(name)
  sizes = {
    "data.frames": config.framepack.given + 6,
    "history.block": 2,
    "teacher.frames": 2,
    "framepack.packing": PACKINGS[name],
    "framepack.steps": 4,
    "framepack.batch": 4,
    "sample.steps": 2,
    "sample.guidance": 0.0,
  }
  renamed = {path.replace("__", "."): value for path, value in changes.items()}
  config.update_from_flattened_dict({**SIZES, **sizes, **renamed})
  return config

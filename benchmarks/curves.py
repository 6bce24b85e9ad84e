"""Draws what a run has logged, a panel a stage and a line a metric:

    python -m benchmarks.curves runs/shapes --out=curves.png

Thick lines are means over a tenth of the stage.
"""

import argparse
from collections import defaultdict
import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
import numpy as np

from hiar_jax.training.log import read_log


def scalars(workdir: pathlib.Path) -> dict[str, dict[str, tuple[list, list]]]:
  """Returns stage -> metric -> (steps, values), in the order of the log."""
  found = defaultdict(lambda: defaultdict(lambda: ([], [])))
  for record in read_log(workdir / "logs" / "metrics.jsonl"):
    for name, value in record.get("scalars", {}).items():
      steps, values = found[record["stage"]][name]
      steps.append(record["step"])
      values.append(value)
  return found


def draw(workdir: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the picture."""
  stages = scalars(workdir)
  figure, axes = pyplot.subplots(1, len(stages), figsize=(5 * len(stages), 4), squeeze=False)
  for axis, (stage, metrics) in zip(axes[0], stages.items(), strict=True):
    for name, (steps, values) in metrics.items():
      width = max(1, len(values) // 10)
      means = np.convolve(values, np.full(width, 1 / width), "valid")
      (line,) = axis.plot(steps[width - 1 :], means, linewidth=2, label=name)
      axis.plot(steps, values, linewidth=0.5, alpha=0.5, color=line.get_color())
    axis.set(title=stage, xlabel="update", ylim=(0, None))
    axis.legend(fontsize="small")
  figure.tight_layout()
  figure.savefig(out, dpi=70)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("workdir", type=pathlib.Path)
  parser.add_argument("--out", type=pathlib.Path, required=True, help="the picture, .png")
  arguments = parser.parse_args()
  draw(arguments.workdir, arguments.out)
  print(arguments.out)

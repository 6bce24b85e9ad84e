"""What the patch code loses of a folder of films, plain and lapped, by its channels:

    python -m benchmarks.patch_code clips --size=48,64 --channels=16,32,48,64

PSNR of the pixels, in dB, and seams: the mean step between neighbouring pixels across the
boundaries of patches over that inside them, as a share of the same in the film. 1 is none; above,
squares are seen. Fitted and measured on the same clips, end to end windows of 9 frames.
"""

import argparse
import pathlib

import numpy as np

from hiar_jax.components import patch_pca
from hiar_jax.components.patch_pca import PatchPCAConfig
from hiar_jax.data import video_folder
from hiar_jax.video.frames import to_float
from hiar_jax.video.video_file import Sampling

FRAMES = 9


def read(folder: pathlib.Path, height: int, width: int, fps: float) -> np.ndarray:
  """Returns the clips of a folder, uint8 [n F H W 3]."""
  cut = video_folder.Cut(Sampling(FRAMES, height, width, fps, FRAMES), pieces=False)
  films = video_folder.scan(folder, cut)
  return np.stack([clip["video"] for clip in video_folder.records(films, cut)])


def seams(pixels: np.ndarray, patch: int) -> float:
  """Returns the steps across boundaries over those inside patches, of pixels [n F H W 3]."""
  shares = []
  for axis in (2, 3):
    steps = np.abs(np.diff(pixels, axis=axis))
    steps = steps.mean(tuple(i for i in range(5) if i != axis))
    across = np.arange(1, pixels.shape[axis]) % patch == 0
    shares.append(steps[across].mean() / steps[~across].mean())
  return float(np.mean(shares))


def measure(clips: np.ndarray, config: PatchPCAConfig) -> tuple[float, float]:
  """Returns (PSNR in dB, seams as a share of the film's) of a code that is fitted on the clips."""
  codec, x = patch_pca.fit(clips, config), to_float(clips)
  shown = np.concatenate(
    [np.asarray(patch_pca.decode(codec, patch_pca.encode(codec, clip[None]))) for clip in x]
  ).clip(-1, 1)
  error = np.square(shown - x).mean() / 4  # of pixels in [0, 1]
  return -10 * float(np.log10(error)), seams(shown, config.patch) / seams(x, config.patch)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.patch_code",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  numbers = lambda text: [int(part) for part in text.split(",")]
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--size", type=numbers, default=[48, 64], help="height,width")
  parser.add_argument("--fps", type=float, default=8.0)
  parser.add_argument("--patch", type=int, default=8)
  parser.add_argument("--channels", type=numbers, default=[16, 32, 48, 64])
  told = parser.parse_args(argv)
  clips = read(told.folder, *told.size, told.fps)
  print(f"{len(clips)} clips of {FRAMES} frames, {told.size[0]}x{told.size[1]}")
  print("| channels | PSNR plain | lapped | seams plain | lapped |")
  print("| --- | --- | --- | --- | --- |")
  for channels in told.channels:
    plain, lapped = (
      measure(clips, PatchPCAConfig(patch=told.patch, channels=channels, lapped=lapped))
      for lapped in (False, True)
    )
    print(
      f"| {channels} | {plain[0]:.1f} | {lapped[0]:.1f} | {plain[1]:.2f} | {lapped[1]:.2f} |",
      flush=True,
    )


if __name__ == "__main__":
  main()

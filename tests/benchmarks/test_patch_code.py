"""The table of the patch code: of films without seams the plain code makes some."""

import av
import numpy as np

from benchmarks import patch_code
from tests.components.test_lapped_transform import waves


def test_the_table(tmp_path, capsys):
  with av.open(str(tmp_path / "a.mkv"), "w") as container:
    stream = container.add_stream("ffv1", rate=8)
    stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
    for picture in np.concatenate(waves(10)):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())
  (tmp_path / "a.txt").write_text("waves")
  patch_code.main([str(tmp_path), "--size=32,48", "--channels=4,8"])
  head, *_, few, more = capsys.readouterr().out.splitlines()
  assert head == "4 clips of 9 frames, 32x48"
  rows = [[float(cell) for cell in line.strip("| ").split("|")] for line in (few, more)]
  assert [row[0] for row in rows] == [4, 8]
  for _, plain, lapped, seams, smooth in rows:
    assert lapped > plain and seams > 2 and smooth < 0.5 * seams
  assert rows[1][1] > rows[0][1]

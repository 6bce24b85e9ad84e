"""The table of the patch code: of films without seams the plain code makes some."""

import av
import numpy as np
import pytest

from benchmarks import patch_code


def test_the_table(tmp_path, capsys):
  y, x = np.mgrid[:32, :32]
  with av.open(str(tmp_path / "a.mkv"), "w") as container:
    stream = container.add_stream("ffv1", rate=8)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
    for i in range(40):
      wave = np.sin(x / 2.3 + i / 5) * np.cos(y / 3.1 - i / 7) + np.sin((x + 2 * y) / 4 + i)
      picture = np.rint(128 + 50 * wave[..., None] * [1, 0.8, 0.6]).astype(np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())
  (tmp_path / "a.txt").write_text("waves")
  patch_code.main([str(tmp_path), "--size=32,32", "--channels=3,6"])
  head, *_, few, more = capsys.readouterr().out.splitlines()
  assert head == "4 clips of 9 frames, 32x32"
  rows = [[float(cell) for cell in line.strip("| ").split("|")] for line in (few, more)]
  assert [row[0] for row in rows] == [3, 6]
  for _, plain, lapped, seams, smooth in rows:
    assert lapped > plain and seams > 1.05 and smooth == pytest.approx(1, abs=0.1)
  assert rows[1][1] > rows[0][1]

"""A run's log becomes a picture with a panel for each stage."""

import json

from PIL import Image

from benchmarks import curves


def test_a_panel_a_stage(tmp_path):
  records = [
    {"stage": stage, "step": step, "scalars": {"loss": 1 / step, "grad_norm": step}}
    for stage in ("teacher", "distill")
    for step in range(1, 31)
  ]
  records.append({"stage": "teacher", "step": 30, "images": ["samples"]})
  (tmp_path / "logs").mkdir()
  (tmp_path / "logs" / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
  found = curves.scalars(tmp_path)
  assert list(found) == ["teacher", "distill"] and list(found["distill"]) == ["loss", "grad_norm"]
  assert found["distill"]["loss"][0] == list(range(1, 31))
  curves.draw(tmp_path, tmp_path / "curves.png")
  with Image.open(tmp_path / "curves.png") as picture:
    assert picture.size == (700, 280)  # two panels

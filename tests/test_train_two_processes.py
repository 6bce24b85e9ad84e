"""A job of two processes, as two hosts would be, goes through every stage to its samples."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.helpers import tiny_run

# Each process has two devices of its own; the four make one mesh.
PROCESS = """
import runpy, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:{port}", num_processes=2, process_id=int(sys.argv[1]))
sys.argv = ["train", "--config={root}/experiments/{name}.py:smoke", "--workdir={workdir}", *{mesh}]
runpy.run_module("hiar_jax.train", run_name="__main__")
"""


CHOSEN = ["--config.mesh.data=-1", "--config.mesh.fsdp=-1"]  # each counts its memory; one decides


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "trained_last", "mesh"),
  [("shapes", "distill", CHOSEN), ("shapes_framepack_discrete", "framepack", [])],
)
def test_every_stage_on_two_processes(tmp_path, name, trained_last, mesh):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  workdir = tmp_path / "run"
  code = PROCESS.format(root=tiny_run.ROOT, name=name, port=port, workdir=workdir, mesh=mesh)
  processes = []
  for i in range(2):
    with open(tmp_path / f"{i}.txt", "w") as err:
      command = [sys.executable, "-c", code, str(i)]
      environment = {**os.environ, "PYTHONPATH": str(tiny_run.ROOT)}
      processes.append(subprocess.Popen(command, stderr=err, cwd=tmp_path, env=environment))
  statuses = [process.wait(timeout=900) for process in processes]
  said = [(tmp_path / f"{i}.txt").read_text() for i in range(2)]
  assert statuses == [0, 0], said[0][-3000:]
  sample = workdir / "sample"
  assert len(list(sample.glob("*.mp4"))) == 2 and (sample / "contact_sheet.png").exists()
  assert json.loads((sample / "metrics.json").read_text())
  # one of them writes the log and speaks
  log = (workdir / "logs" / "metrics.jsonl").read_text()
  records = [json.loads(line) for line in log.splitlines()]
  steps = [r["step"] for r in records if r["stage"] == trained_last and "scalars" in r]
  assert steps and steps == sorted(set(steps))
  assert "videos and contact_sheet.png" in said[0] and "videos and" not in said[1]

"""The scripts that start a run on several machines, with two machines that are both this one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_torchrun_on_two_machines_trains_one_model(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (ROOT / "configs/launch/torchrun.sh").read_text().replace("29500", str(port))
    (tmp_path / "torchrun.sh").write_text(script)
    path = tiny.config_file(tmp_path, train={"max_steps": 3})
    places = f"{ROOT}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"NNODES": "2", "GPUS": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PATH": places}
    start = ["bash", str(tmp_path / "torchrun.sh"), str(path)]
    machines = [
        subprocess.Popen(start, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0]
    assert any("2 processes on cpu" in output for output in outputs)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in lines] == [8, 16, 24]


def test_scripts_are_sound_and_name_configs_that_are_there():
    for script in (ROOT / "configs" / "launch").glob("*.sh"):
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        named = [
            word for word in script.read_text().split() if word.startswith("configs/") and word.endswith((".yaml", ".sh"))
        ]
        assert named and all((ROOT / name).is_file() for name in named)

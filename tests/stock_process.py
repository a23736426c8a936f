"""Code that runs where sfumato cannot be imported: in forks of a process that has torch, transformers and diffusers loaded.

Loading them takes a process seven seconds; the one that is kept for a test session, and trains nothing, does it once.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

NO_SFUMATO = """
import sys
sys.meta_path.insert(0, type("No", (), {"find_spec": staticmethod(
    lambda name, *a: (_ for _ in ()).throw(ImportError(name)) if name.split(".")[0] == "sfumato" else None)}))
"""
SERVER = """
import json, os, traceback
import numpy, torch
torch.set_num_threads(1)
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(order["folder"] + "/" + name, os.O_WRONLY | os.O_CREAT, 0o600), stream)
        os.chdir(order["folder"])
        code = 1
        try:
            sys.argv = ["-c", *order["arguments"]]
            exec(compile(order["code"], "<stock>", "exec"), {"__name__": "__main__"})
            code = 0
        except SystemExit as end:
            code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
            print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_server: list[subprocess.Popen] = []


def run_stock(code: str, *arguments, check: bool = True) -> subprocess.CompletedProcess:
    """Run code that finds `arguments` in `sys.argv[1:]`; the working folder is an empty one.

    Raises:
        AssertionError: it failed, and `check`.
    """
    if not _server:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        _server.append(subprocess.Popen([sys.executable, "-c", NO_SFUMATO + SERVER], env=env, text=True, **pipes))
        atexit.register(_server[0].kill)
    (server,) = _server
    with tempfile.TemporaryDirectory() as folder:
        order = {"folder": folder, "code": textwrap.dedent(code), "arguments": [str(item) for item in arguments]}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        returned = int(server.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    assert not check or returned == 0, err
    return subprocess.CompletedProcess("stock", returned, out, err)

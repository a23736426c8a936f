"""Kill training at chosen moments and see whether it recovers; `python tests/crashes.py` sweeps them all.

Children are forked from this process, which has everything imported and has not trained, so that one costs a second.
A moment is a touch of the disk that Python can see: opening a file for writing, making, renaming and removing files and
folders (by audit hook), and every safetensors file (by its own function). `before`: killed by SIGKILL before the touch.
`cut`: killed after the file was written, with half of it cut off.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import safetensors.torch
import tiny
import torch
import yaml

from sfumato.training.engine import checkpoints
from sfumato.training.train import main

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "safetensors"}


class Moments:
    """Counts the disk touches of the `nth` save and kills this process at one of them."""

    def __init__(self, nth: int, kill_at: int | None = None, cut: bool = False):
        self.nth, self.kill_at, self.cut = nth, kill_at, cut
        self.seen, self.saves, self.inside = [], 0, False
        real_save, real_write = checkpoints.save, safetensors.torch.serialize_file

        def save(*arguments, **named):
            self.saves += 1
            self.inside = self.saves == self.nth
            result = real_save(*arguments, **named)
            if self.inside:
                self._touch("end", None)
            self.inside = False
            return result

        def serialize_file(tensors, path, *rest, **named):
            sys.audit("safetensors", str(path))
            return real_write(tensors, path, *rest, **named)

        checkpoints.save, safetensors.torch.serialize_file = save, serialize_file
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if not self.inside:
            return
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._touch("write", arguments[0])
        elif event in CHANGES:
            self._touch("write" if event == "safetensors" else event, str(arguments[0]))

    def _touch(self, what, path):
        now = len(self.seen)
        if self.kill_at is not None:
            if self.cut and now == self.kill_at + 1:
                self.inside = False
                written = self.seen[-1][1]
                if os.path.isfile(written):
                    os.truncate(written, os.path.getsize(written) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            if not self.cut and now == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append((what, path))


def fork(task, rank: int = 0, world: int = 1, port: int = 0, quiet: bool = True) -> int:
    """Run `task()` in a forked child as one rank of `world`; returns its process id. The exit code is the task's."""
    child = os.fork()
    if child:
        return child
    if quiet:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
        )  # fmt: skip
    code = 1
    try:
        code = task() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(children: list[int], patience: float = 90) -> list[int]:
    """Exit codes, negative for a signal; once one child has died the others have `patience` seconds."""
    codes, deadline = {}, None
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                deadline = deadline or time.monotonic() + patience
        if deadline and time.monotonic() > deadline:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def train(path, *overrides, world: int = 1, moments: tuple | None = None, before=lambda rank: None) -> list[int]:
    """Run the trainer in `world` forked processes, the first of them killed as `moments` (arguments of Moments) says.

    `before(rank)` is called in each of them at first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def task(rank):
        before(rank)
        if moments and rank == 0:
            Moments(*moments)
        return main([str(path), *overrides])

    return wait([fork(lambda rank=rank: task(rank), rank, world, port) for rank in range(world)])


def list_moments(path, nth: int, world: int = 1) -> list[tuple[str, str]]:
    """The touches of the `nth` save of an uninterrupted run."""
    read, write = os.pipe()

    def task():
        moments = Moments(nth)
        code = main([str(path)])
        with os.fdopen(write, "w") as out:
            json.dump(moments.seen, out)
        return code

    child = fork(task)
    os.close(write)
    with os.fdopen(read) as lines:
        text = lines.read()
    assert wait([child]) == [0]
    return [tuple(pair) for pair in json.loads(text)]


def result(run: Path, ended_before: bool = False) -> str:
    """A hash of all that a finished run leaves, but for wall-clock times and the share done, which follow the budget.

    Of a run that had `ended_before` and was made longer, without the grids and figures, since it has those of both ends.
    """
    digest = hashlib.sha256()
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    weights = [path for name in ("pipeline", "best") for path in sorted((run / name).rglob("*.safetensors"))]
    best = [path for path in [run / "best" / "best.json"] if path.is_file()]
    grids = [] if ended_before else sorted((run / "samples").glob("*.png"))
    for path in [last / "state.safetensors", *weights, *best, *grids]:
        digest.update(path.name.encode() + path.read_bytes())
    for table in ("metrics.jsonl", "validation.jsonl")[: 1 if ended_before else 2]:
        for line in (run / table).read_text().splitlines():
            digest.update(json.dumps({k: v for k, v in json.loads(line).items() if k not in ("seconds", "done")}).encode())
    return digest.hexdigest()


def cases(moments: list[tuple[str, str]]) -> list[tuple[int, bool]]:
    """(moment, cut) of every kill that `moments` allow."""
    return [(i, cut) for i, (what, _) in enumerate(moments) for cut in ((False, True) if what == "write" else (False,))]


def recovers(folder: Path, make_config, kill_at: int, cut: bool, nth: int, world: int) -> str:
    """Kill one run at a moment, resume it, and return the hash of what it leaves; or what went wrong."""
    folder.mkdir()
    path = make_config(folder)
    codes = train(path, world=world, moments=(nth, kill_at, cut))
    if codes[0] != -signal.SIGKILL:
        return f"was not killed: exit codes {codes}"
    codes = train(path, "checkpoint.resume=auto", world=world)
    return result(folder / "run") if codes == [0] * world else f"resume ended with {codes}"


def random_kills(path, run: Path, kills: int, rng, longest: float) -> int:
    """Kill one run at random times until it has been killed `kills` times, then let it end; returns how often it began."""
    starts = 0
    while True:
        starts += 1
        child = fork(lambda: main([str(path), "checkpoint.resume=auto"]))
        if starts > kills:
            assert wait([child]) == [0]
            return starts
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        wait([child])


VAE = {
    "block_out_channels": [8, 16],
    "latent_channels": 4,
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
GROWN = {"unet": {}, "scheduler": {}}


def prepare_tasks(root: Path) -> dict[str, dict]:
    """Task -> its settings; trains in `root` what some of them start from."""
    base, vae = root / "base", root / "vae"
    for folder, settings in (
        (base, {}),
        (vae, {"task": "autoencoder", "autoencoder": {"model": VAE}}),
    ):
        folder.mkdir()
        assert train(tiny.config_file(folder, train={"max_steps": 2}, data={"num_pictures": 30}, **settings)) == [0]
    start = {"init_from": str(base / "run"), **GROWN}
    return {
        "text_to_image": {},
        "latents": {"vae": {"pretrained": str(vae / "run")}, "data": {"cache_latents": True}},
        "lora": {"lora": {"rank": 2}, **start},
        "control": {"task": "control", **start},
        "upscaling": {"task": "upscaling"},
        "inpainting": {"task": "inpainting"},
        "autoencoder": {"task": "autoencoder", "autoencoder": {"model": VAE}},
    }


def sweep(root: Path, settings: dict, world: int, stride: int) -> dict:
    """Kill one run at every `stride`-th moment of its second save, resume it, and compare with the uninterrupted one."""
    root.mkdir()

    def make_config(folder):
        sections = {
            "train": {"max_steps": 8, "gradient_accumulation_steps": 2, "batch_size": 4 // world},
            "checkpoint": {"every_steps": 3, "best_by": "held_out_loss"},
            "validation": {"num_judged": 1, "every_steps": 3},
            **settings,
        }
        sections["data"] = {"num_pictures": 30, **sections.get("data", {})}
        if sections.get("unet") == {}:  # of a model to start from
            path = tiny.config_file(folder, **{k: v for k, v in sections.items() if k not in GROWN})
            content = yaml.safe_load(path.read_text())
            path.write_text(yaml.safe_dump({**content, **GROWN}, allow_unicode=True))
            return path
        return tiny.config_file(folder, **sections)

    whole, count = root / "whole", root / "count"
    for folder in (whole, count):
        folder.mkdir()
    assert train(make_config(whole), world=world) == [0] * world
    expected, outcomes = result(whole / "run"), {}
    moments = list_moments(make_config(count), nth=2)
    chosen = cases(moments)[::stride]
    for number, (kill_at, cut) in enumerate(chosen):
        what, where = moments[kill_at]
        name = f"{kill_at} {'after half of' if cut else 'before'} {what} {Path(where or '').name}"
        folder = root / f"case-{number}"
        found = recovers(folder, make_config, kill_at, cut, 2, world)
        outcomes[name] = "exact" if found == expected else found
        shutil.rmtree(folder)
        print(root.name, number, len(chosen), name, outcomes[name], flush=True)
    return {"moments": len(outcomes), "exact": sum(o == "exact" for o in outcomes.values()), "outcomes": outcomes}


def sweep_random(root: Path, kills: int) -> dict:
    """Kill one long run at random times, again and again, and compare with the uninterrupted one."""
    hashes = []
    for count in (0, kills):
        folder = root / f"random-{count}"
        folder.mkdir()
        path = tiny.config_file(
            folder,
            train={"max_steps": 150, "gradient_accumulation_steps": 2},
            checkpoint={"every_steps": 1},
            validation={"num_judged": 1},
            data={"num_pictures": 30},
        )
        random_kills(path, folder / "run", count, random.Random(0), longest=4.0)
        hashes.append(result(folder / "run"))
    return {"kills": kills, "exact": hashes[0] == hashes[1]}


def main_sweep() -> None:
    """Sweep what the options name and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/crash_sweep.json")
    parser.add_argument("--kills", type=int, default=100, help="at random times, over one run")
    parser.add_argument("--tasks", nargs="*", help="default: all")
    parser.add_argument("--stride", type=int, default=1, help="of the other tasks, each so many-th moment")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root, report = Path(tempfile.mkdtemp()), {}
    for task, settings in prepare_tasks(root).items():
        if options.tasks and task not in options.tasks:
            continue
        for world in (1, 2):
            name = f"{task}, {world} process{'es' if world > 1 else ''}"
            stride = 1 if task == "text_to_image" else options.stride
            report[name] = sweep(root / name.replace(", ", "-").replace(" ", "-"), settings, world, stride)
            Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
    if options.kills:
        report["random kills"] = sweep_random(root, options.kills)
    Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
    print({name: {k: v for k, v in entry.items() if k != "outcomes"} for name, entry in report.items()})


if __name__ == "__main__":
    main_sweep()

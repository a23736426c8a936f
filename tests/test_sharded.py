"""Sharded weights (FSDP2): checkpoints, averages and images are those of whole weights, on two processes of a CPU.

Accelerate shards on GPUs only; here torch's own `fully_shard` does what Accelerate would have done to the model.
"""

import os
import re
import signal
import socket
import threading
from pathlib import Path

import crashes
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sfumato.files import CannotSave
from sfumato.pipelines import export_pipeline
from sfumato.training.config.schema import OptimConfig
from sfumato.training.engine import checkpoints
from sfumato.training.engine.ema import EMA, averaged_weights
from sfumato.training.engine.optimizers import build_optimizer, orthogonal, orthogonal_by_all
from sfumato.training.models import state_files
from sfumato.training.models.denoiser import Denoiser
from sfumato.training.models.parameters import is_sharded, plain_pipeline, trained_parameters

KIND = "muon"  # which has AdamW inside, for what is no matrix


def build(folder, sharded: bool, kind: str):
    pipe = tiny.pipeline(folder)
    denoiser = Denoiser(pipe.unet, pipe.text_encoder)
    if sharded:
        fully_shard(pipe.unet.mid_block)
        fully_shard(denoiser)
    parameters = trained_parameters(denoiser)
    return pipe, denoiser, build_optimizer(OptimConfig(name=kind, lr=1e-2), parameters), EMA(parameters, 0.9)


def steps(denoiser, optimizer, ema, count: int, done: int = 0) -> None:
    generator = torch.Generator().manual_seed(0)
    for step in range(done + count):
        x = torch.randn(2, 3, 16, 16, generator=generator)
        text = torch.randint(0, 99, (2, 20), generator=generator)
        if step < done:
            continue
        denoiser(x, torch.tensor([3, 700]), text).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trained_parameters(denoiser))


def whole(tensors: dict) -> dict:
    """The tensors, gathered where they are sharded; all ranks must call."""
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def close(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4) for k in a)


def run_ranks(task, world: int) -> list[int]:
    """Exit codes of `task(rank)` on so many forked processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank_task(rank):
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        task(rank)
        torch.distributed.destroy_process_group()
        return 0

    return crashes.wait([crashes.fork(lambda r=r: rank_task(r), r, world, port, quiet=False) for r in range(world)], 30)


def test_sharded_state_equals_whole_state(tmp_path):
    def task(rank):
        matrices = torch.randn(5, 6, 11, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(orthogonal_by_all(matrices), orthogonal(matrices))  # 3 by one, 2 by the other
        folder = tmp_path / str(rank)
        folder.mkdir()
        _, plain, optimizer, ema = build(folder, False, KIND)
        steps(plain, optimizer, ema, 3)
        expected = whole(checkpoints.collect(plain, optimizer, ema))

        pipe, denoiser, optimizer, ema = build(folder, True, KIND)
        assert is_sharded(denoiser) and not is_sharded(plain)
        steps(denoiser, optimizer, ema, 3)
        tensors = whole(checkpoints.collect(denoiser, optimizer, ema))
        assert close(tensors, expected)
        with averaged_weights(ema, denoiser):
            shared = plain_pipeline(pipe, denoiser)
        name = "conv_in.weight"
        assert torch.equal(dict(shared.unet.named_parameters())[name], tensors[f"ema.unet.{name}"])
        image = shared("a red circle", num_inference_steps=2, output_type="pt").images
        assert image.shape == (1, 3, 16, 16) and image.isfinite().all()

    assert run_ranks(task, 2) == [0, 0]


def test_four_processes_are_killed_while_saving_and_two_go_on(tmp_path, monkeypatch):
    """As one process that was never killed; none writes more than it holds, and stock diffusers opens the end."""
    monkeypatch.setattr(state_files, "PIECE", 20_000)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: False)
        (tmp_path / "one").mkdir()
        _, plain, optimizer, ema = build(tmp_path / "one", False, KIND)
        steps(plain, optimizer, ema, 6)
        expected = whole(checkpoints.collect(plain, optimizer, ema))

    def save(denoiser, optimizer, ema, rank, world, step):
        return checkpoints.save(
            tmp_path / "run",
            checkpoints.collect(denoiser, optimizer, ema),
            lambda new, folder: None,
            {"step": step, "ema_step": ema.optimization_step},
            keep=2,
            rank=rank,
            world=world,
        )

    def first(rank):
        folder = tmp_path / f"four-{rank}"
        folder.mkdir()
        _, denoiser, optimizer, ema = build(folder, True, KIND)
        steps(denoiser, optimizer, ema, 3)
        save(denoiser, optimizer, ema, rank, 4, 3)
        steps(denoiser, optimizer, ema, 1, done=3)
        if rank == 1:
            real = state_files.save_file

            def killed(tensors, path, metadata):
                real(tensors, path, metadata)
                os.kill(os.getpid(), signal.SIGKILL)

            state_files.save_file = killed
        save(denoiser, optimizer, ema, rank, 4, 4)

    codes = run_ranks(first, 4)
    assert codes[1] == -signal.SIGKILL and 0 not in codes
    saved = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert checkpoints.list_checkpoints(tmp_path / "run") == [saved] and checkpoints.find_damage(saved) is None
    sizes = [sum(f.stat().st_size for f in saved.glob(f"state-{rank:05d}-of-00004-*")) for rank in range(4)]
    assert max(sizes) < 0.4 * sum(sizes) and len(list(saved.glob("state-00000-*"))) > 2

    def second(rank):
        folder = tmp_path / f"two-{rank}"
        folder.mkdir()
        pipe, denoiser, optimizer, ema = build(folder, True, KIND)
        checkpoints.restore(saved, denoiser, optimizer, ema)
        ema.optimization_step = checkpoints.read_state(saved)["ema_step"]
        steps(denoiser, optimizer, ema, 3, done=3)
        assert close(whole(checkpoints.collect(denoiser, optimizer, ema)), expected)
        save(denoiser, optimizer, ema, rank, 2, 6)
        with averaged_weights(ema, denoiser):
            shared = plain_pipeline(pipe, denoiser)
        if rank == 0:
            export_pipeline(shared, tmp_path / "pipeline")

    assert run_ranks(second, 2) == [0, 0]
    stock = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(stock.unet.conv_in.weight, expected["ema.unet.conv_in.weight"], rtol=1e-3, atol=1e-4)
    pipe, denoiser, optimizer, ema = build(tmp_path / "one", False, KIND)  # and one process alone goes on as well
    checkpoints.restore(tmp_path / "run" / "checkpoints" / "step-00000006", denoiser, optimizer, ema)
    assert close(whole(checkpoints.collect(denoiser, optimizer, ema)), expected)
    assert set(state_files.raw_weights(saved)) == {name.removeprefix("raw.") for name in expected if name.startswith("raw.")}


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path, monkeypatch):
    """Of the weights as they were; a full disk is reported where the next one would begin."""

    def task(rank):
        folder = tmp_path / str(rank)
        folder.mkdir()
        _, denoiser, optimizer, ema = build(folder, True, KIND)
        saver = checkpoints.BackgroundSaver()
        may_write = threading.Event()
        real = checkpoints.write_state
        monkeypatch.setattr(checkpoints, "write_state", lambda *a, **named: (may_write.wait(), real(*a, **named)))

        def save(step):
            tensors = checkpoints.collect(denoiser, optimizer, ema)
            arguments = (lambda new, folder: None, {"step": step}, 2)
            return checkpoints.save(tmp_path / "run", tensors, *arguments, rank=rank, world=2, saver=saver)

        steps(denoiser, optimizer, ema, 1)
        expected = whole(checkpoints.collect(denoiser, optimizer, ema))
        saved = save(1)
        steps(denoiser, optimizer, ema, 1, done=1)
        assert not saved.exists()
        may_write.set()
        saver.wait()
        assert checkpoints.find_damage(saved) is None
        with state_files.StateFiles(saved) as files:
            assert all(torch.equal(files.read(name), value.reshape(files.shapes[name])) for name, value in expected.items())

        def full(*arguments, **named):
            if rank == 1:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints, "write_state", full)
        save(2)
        with pytest.raises(CannotSave, match="No space left"):
            save(3)
        assert checkpoints.list_checkpoints(tmp_path / "run") == [saved]

    assert run_ranks(task, 2) == [0, 0]


def peak_memory() -> int:
    """Bytes that this process had in memory at the most since it was last asked."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell the peak of memory")
def test_saving_takes_little_more_memory_than_the_shard(tmp_path, monkeypatch):
    """Of 137 million numbers of weights, averages and moments on each of four processes: 1.2 times the shard at the most."""
    monkeypatch.setattr(state_files, "PIECE", 32_000_000)

    def task(rank):
        module = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(8)])
        for layer in module:
            fully_shard(layer)
        fully_shard(module)
        parameters = trained_parameters(module)
        optimizer, ema = build_optimizer(OptimConfig(), parameters), EMA(parameters, 0.9)
        module(torch.randn(2, 2048)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        tensors = checkpoints.collect(module, optimizer, ema)
        shard = sum(t.to_local().nbytes for t in tensors.values() if isinstance(t, DTensor))
        assert shard == 4 * 4 * 8 * 2048 * 2048 // 4
        peak_memory()
        before = peak_memory()
        checkpoints.save(tmp_path / "run", tensors, lambda new, folder: None, {"step": 1}, 1, rank=rank, world=4)
        grown = peak_memory() - before
        print(f"rank {rank}: {shard / 1e6:.0f} MB of state, {grown / 1e6:.0f} MB more while saving")
        assert grown < 0.2 * shard + 30e6  # and what the interpreter takes for the hashes

    assert run_ranks(task, 4) == [0] * 4

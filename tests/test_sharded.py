"""Sharded weights (FSDP2): checkpoints, averages and images are those of whole weights, on two processes of a CPU.

Accelerate shards on GPUs only; here torch's own `fully_shard` does what Accelerate would have done to the model.
"""

import socket

import crashes
import tiny
import torch
from torch.distributed.fsdp import fully_shard

from sfumato.pipelines import export_pipeline
from sfumato.training.config.schema import OptimConfig
from sfumato.training.engine import checkpoints
from sfumato.training.engine.ema import EMA, averaged_weights
from sfumato.training.engine.optimizers import build_optimizer, orthogonal, orthogonal_by_all
from sfumato.training.models.denoiser import Denoiser
from sfumato.training.models.parameters import is_sharded, plain_pipeline, trained_parameters


def build(folder, sharded: bool, kind: str):
    pipe = tiny.pipeline(folder)
    denoiser = Denoiser(pipe.unet, pipe.text_encoder)
    if sharded:
        fully_shard(pipe.unet.mid_block)
        fully_shard(denoiser)
    parameters = trained_parameters(denoiser)
    return pipe, denoiser, build_optimizer(OptimConfig(name=kind, lr=1e-2), parameters), EMA(parameters, 0.9)


def steps(denoiser, optimizer, ema, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(2, 3, 16, 16, generator=generator)
        denoiser(x, torch.tensor([3, 700]), torch.randint(0, 99, (2, 20), generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trained_parameters(denoiser))


def close(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4) for k in a)


def test_sharded_state_equals_whole_state(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def task(rank):
        torch.distributed.init_process_group("gloo")
        matrices = torch.randn(5, 6, 11, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(orthogonal_by_all(matrices), orthogonal(matrices))  # 3 by one, 2 by the other
        for kind in ("muon",):  # which has AdamW inside, for what is no matrix
            check(tmp_path / kind, rank, kind)
        torch.distributed.destroy_process_group()
        return 0

    children = [crashes.fork(lambda rank=rank: task(rank), rank, 2, port, quiet=False) for rank in range(2)]
    assert crashes.wait(children) == [0, 0]


def check(root, rank: int, kind: str) -> None:
    """One rank's part, with one optimizer."""
    folder = root / str(rank)
    folder.mkdir(parents=True)
    _, whole, optimizer, ema = build(folder, False, kind)
    steps(whole, optimizer, ema, 3)
    expected = checkpoints.collect(whole, optimizer, ema)

    pipe, denoiser, optimizer, ema = build(folder, True, kind)
    assert is_sharded(denoiser) and not is_sharded(whole)
    steps(denoiser, optimizer, ema, 3)
    tensors = checkpoints.collect(denoiser, optimizer, ema)
    assert close(tensors, expected), kind
    with averaged_weights(ema, denoiser):
        shared = plain_pipeline(pipe, denoiser)
    name = "conv_in.weight"
    assert torch.equal(dict(shared.unet.named_parameters())[name], tensors[f"ema.unet.{name}"])
    image = shared("a red circle", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 16, 16) and image.isfinite().all()
    if rank == 0:
        checkpoints.save(folder, tensors, lambda new, _: export_pipeline(shared, new / "pipeline"), {"step": 3}, keep=1)
    torch.distributed.barrier()

    saved = root / "0" / "checkpoints" / "step-00000003"
    _, again, optimizer, ema = build(folder, True, kind)
    checkpoints.restore(saved, again, optimizer, ema)
    restored = checkpoints.collect(again, optimizer, ema)
    assert restored.keys() == tensors.keys() and all(torch.equal(restored[k], tensors[k]) for k in tensors), kind

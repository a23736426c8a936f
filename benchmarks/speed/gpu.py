"""Training steps on an accelerator: images/s, share of its peak, waits, and the gain from bfloat16 and compiling.

    python -m benchmarks.speed.gpu [--config folder --steps 50 --out benchmarks/results/gpu.json] data.name=... [SETTING ...]

The steps are those of the trainer, without its log and checkpoints, over the config's own data. On a GPU each step is taken
under `torch.cuda.set_sync_debug_mode("error")`, so one that waits for the device fails. Peak and predicted seconds are the
planner's. **No figures from a GPU are committed: none was available when this was written**, and it was run only on a CPU.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from sfumato.training import planner
from sfumato.training.config.load import load_config
from sfumato.training.data.loader import batches
from sfumato.training.data.prepare import prepare
from sfumato.training.doctor import build_task
from sfumato.training.engine.ema import EMA
from sfumato.training.engine.optimizers import build_optimizer, take_step
from sfumato.training.models.parameters import trained_parameters

VARIANTS = (("no", "no"), ("bf16", "no"), ("bf16", "unet"), ("bf16", "loss"), ("bf16", "graphs"))


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_of(device: torch.device) -> planner.Device | None:
    """What the planner knows about this device; on a CPU, what it measures."""
    if device.type == "cpu":
        return planner.measure_cpu()
    name = torch.cuda.get_device_name().lower().replace(" ", "") if device.type == "cuda" else device.type
    return next((known for key, known in planner.DEVICES.items() if key in name), None)


def measure(config, images, steps: int) -> dict:
    """Seconds per step, their share of the peak, memory, and the mean loss."""
    cpu = not torch.accelerator.is_available()
    task = build_task(config, images, cpu=cpu)
    accelerator, parameters = task.accelerator, trained_parameters(task.module)
    model, optimizer = accelerator.prepare(task.module, build_optimizer(config.optim, parameters))
    ema = EMA(parameters, config.ema.decay)
    loader = batches(task.data, config)
    losses = []
    device = accelerator.device

    def step() -> None:
        batch = next(loader)
        loss = task.loss(model, batch)
        accelerator.backward(loss)
        _, is_finite = take_step(accelerator, optimizer, parameters, config.optim.max_grad_norm)
        optimizer.zero_grad()
        ema.step(parameters, is_finite)
        losses.append(loss.detach())

    begun = time.perf_counter()
    for _ in range(max(3, steps // 5)):
        step()
    wait_for(device)
    warm_up = time.perf_counter() - begun
    losses.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
    begun = time.perf_counter()
    try:
        for _ in range(steps):
            step()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    wait_for(device)
    seconds = (time.perf_counter() - begun) / steps
    row = {
        "images_per_second": config.train.batch_size / seconds,
        "seconds_a_step": seconds,
        "seconds_to_warm_up": warm_up,
        "mean_loss": float(torch.stack(losses).mean()),
    }
    known = peak_of(device)
    if known is not None:
        counts = planner.count_step(build_task(config, images, cpu=True), config)
        peak = known.flops[config.train.mixed_precision != "no"]
        # The optimizer's products are left out: they are in float32, which has another peak.
        row |= {"share_of_peak": counts.flops / seconds / peak, "predicted": planner.plan(counts, config, known, 1).step}
    if device.type == "cuda":
        row["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    return {key: round(value, 5) for key, value in row.items()}


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="folder")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--variants", nargs="*", help="such as bf16-loss: precision and compiling; default: all")
    parser.add_argument("--out", default="benchmarks/results/gpu.json")
    options, settings = parser.parse_known_args()
    available = torch.accelerator.is_available()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else str(torch.accelerator.current_accelerator())
    result: dict = {
        "device": name if available else "cpu",
        "torch": torch.__version__,
        "config": options.config,
        "settings": settings,
    }
    rows = result["steps"] = {}
    for precision, compiling in VARIANTS:
        variant = f"{precision}-{compiling}"
        if options.variants and variant not in options.variants:
            continue
        changes = [f"train.mixed_precision={precision}", f"train.compile={compiling}"]
        config = load_config(options.config, [*settings, *changes])
        torch.compiler.reset()
        if available:
            torch.accelerator.empty_cache()
        rows[variant] = measure(config, prepare(config.data), options.steps)
        print(variant, rows[variant], flush=True)
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

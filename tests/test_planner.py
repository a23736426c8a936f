"""The planner's counts against those of a real step, at a batch that it has not seen."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sfumato import api, cli
from sfumato.training import planner
from sfumato.training.config.load import load_config
from sfumato.training.data.loader import batches
from sfumato.training.data.prepare import prepare
from sfumato.training.doctor import build_task
from sfumato.training.engine.ema import EMA
from sfumato.training.engine.optimizers import build_optimizer
from sfumato.training.models.parameters import trained_parameters

# At widths at which the network's own storages are more than what a step makes beside.
WIDE = {"block_out_channels": [32, 64], "norm_num_groups": 8}
KINDS = {
    "adamw": {},
    "muon": {"optim": {"name": "muon"}},
    "checkpointing": {"train": {"gradient_checkpointing": True}},
    "averages": {"ema": {"snapshot_steps": 100}},
    "long captions": {"text_encoder": {"max_length": 64, "num_hidden_layers": 3}},
    "two layers": {"unet": {"layers_per_block": 2}},
    "larger": {"data": {"resolution": 32}},
    "hybrid loss": {"scheduler": {"variance_type": "learned_range", "prediction_type": "epsilon"}},
    "inpainting": {"task": "inpainting"},
    "upscaling": {"task": "upscaling"},
    "autoencoder": {"task": "autoencoder"},
}
BATCH = 16


def measure(task, config, batch_size: int) -> tuple[float, float, float]:
    """Operations of the loss with its gradients and of the optimizer, and bytes in use at the most beyond those before the
    step, by torch's own counters.
    """
    parameters = trained_parameters(task.module)
    optimizer, ema = build_optimizer(config.optim, parameters), EMA(parameters, 0.9, post_hoc=bool(config.ema.snapshot_steps))
    loader = batches(task.data, replace(config, train=replace(config.train, batch_size=batch_size)))

    def learn(batch):
        task.loss(task.module, batch).backward()

    def step():
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)

    learn(next(loader))
    step()
    with FlopCounterMode(display=False) as flops:
        learn(next(loader))
    with FlopCounterMode(display=False) as optimizer_flops:
        step()
    batch = next(loader)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        learn(batch)
        step()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    in_use = torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"]).cumsum(0)
    return flops.get_total_flops(), optimizer_flops.get_total_flops(), float(in_use.max())


QUICK = ("adamw", "checkpointing")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_counts_are_those_of_a_real_step(tmp_path, kind):
    sections = {"unet": WIDE, **KINDS[kind]}
    sections["unet"] = {**WIDE, **sections["unet"]}
    config = load_config(tiny.config_file(tmp_path, **sections))
    images = prepare(config.data)
    config.train.batch_size = BATCH
    expected = planner.count_step(build_task(config, images, cpu=True), config)
    flops, optimizer_flops, in_use = measure(build_task(config, images, cpu=True), config, BATCH)
    assert expected.flops == pytest.approx(flops, rel=0.02)
    assert expected.optimizer_flops == pytest.approx(optimizer_flops, rel=0.02)
    assert bool(optimizer_flops) == (config.optim.name == "muon") and expected.optimizer_traffic > 9 * expected.gradients
    assert 100 < expected.launches < 10_000 and 2 < expected.optimizer_launches < expected.launches
    assert expected.peak == pytest.approx(expected.lasting + in_use, rel=0.1)


def test_only_what_moves_bytes_is_counted():
    """Sums, changes in place and fused lists; not views or questions about a tensor. 1,000 numbers are 4,000 bytes."""
    a, b = torch.ones(1000), torch.ones(1000)
    with planner.Meter() as meter:
        a + b  # two read, one written
        a.view(10, 100).T, a.device, a.shape
        a.add_(1)  # read and written
        torch._foreach_lerp_([a], [b], 0.5)  # two read, one written
    assert (meter.traffic, meter.launches) == (4000 * (3 + 2 + 3), 3)


def test_what_stays_is_counted_by_its_parts(tmp_path):
    config = load_config(tiny.config_file(tmp_path, ema={"snapshot_steps": 100}))
    task = build_task(config, prepare(config.data), cpu=True)
    counts = planner.count_step(task, config)
    trained = 4 * sum(p.numel() for p in trained_parameters(task.module))
    assert counts.gradients == trained and counts.averages == 3 * trained
    assert counts.moments == pytest.approx(2 * trained, rel=0.01)  # and the numbers of steps


@pytest.mark.slow
def test_averages_on_the_cpu_take_nothing_of_a_gpu(tmp_path):
    config = load_config(tiny.config_file(tmp_path, ema={"offload": True}))
    task = build_task(config, prepare(config.data), cpu=True)
    assert planner.count_step(task, config).averages == 0


def counts(**more) -> planner.Counts:
    """Of a batch of 10."""
    stays = {"weights": 1e9, "gradients": 1e9, "averages": 1e9, "moments": 2e9}
    work = {"flops": 8e12, "traffic": 8e9, "launches": 1000, "optimizer_flops": 2e12, "optimizer_traffic": 2e9}
    work |= {"optimizer_launches": 100}
    return planner.Counts(**{**stays, **work, "learning": 11e9, "stepping": 5e9, "batch_size": 10, **more})


def test_a_plan_is_arithmetic(tmp_path):
    """On 100 TFLOP/s, 8 TFLOP for each of two batches take 160 ms at the peak. 2 for the optimizer take
    20 ms, of which each of four devices does a quarter. 1 GB of gradients go round twice.
    """
    device = planner.Device(flops=(1e14, 2e14), bandwidth=1e15, memory=10e9 / planner.SPARE, link=1e10, dollars=3.0)
    train = {"batch_size": 10, "max_steps": 1000, "gradient_accumulation_steps": 2}
    config = load_config(tiny.config_file(tmp_path, train=train))
    p = planner.plan(counts(), config, device, 4)
    assert p.roofline == pytest.approx(0.165)
    assert p.largest_batch == 8  # 5 GB stay, an image takes 0.6
    assert planner.largest_batch(counts(stepping=11e9), 10e9) == 0
    assert p.exchange == pytest.approx(2 * 3 / 4 * 1e9 / 1e10)
    step = 0.165 / planner.SHARE + p.exchange - 2 / 3 * 0.08 / planner.SHARE  # not quite hidden by one backward pass
    assert p.step == pytest.approx(step)
    assert p.images_a_step == 80
    assert p.hours(80e3) == pytest.approx(1000 * step / 3600)
    assert p.dollars(80e3) == pytest.approx(p.hours(80e3) * 4 * 3.0)
    half = planner.plan(counts(), replace(config, train=replace(config.train, mixed_precision="bf16")), device, 1)
    assert half.roofline == pytest.approx(0.08 + 0.02) and half.exchange == 0
    slow = planner.plan(counts(), config, replace(device, bandwidth=1e10), 1)
    assert slow.roofline == pytest.approx(1.8)
    assert (p.bound_by, half.bound_by, slow.bound_by) == ("operations", "operations", "memory")
    small = {"flops": 1e6, "traffic": 1e6, "optimizer_flops": 1e6, "optimizer_traffic": 1e6, "gradients": 1.0}
    for how, launches in (("no", 2 * 1000 + 100), ("loss", 2 * 1000 / 3 + 100), ("graphs", 100)):
        compiled = replace(config, train=replace(config.train, compile=how))
        planned = planner.plan(counts(**small), compiled, device, 4)
        assert planned.step == pytest.approx(launches * planner.LAUNCH, rel=1e-3)
        assert "the host needs to start" in str(planner._speed(planned, "toy"))


def test_what_does_not_fit_is_told_with_what_would(tmp_path):
    config = load_config(tiny.config_file(tmp_path, train={"batch_size": 16}))
    device = planner.Device(flops=(1e14, 2e14), bandwidth=1e15, memory=10e9 / planner.SPARE, link=1e10, dollars=3.0)
    said = str(planner._memory(planner.plan(counts(learning=13e9, batch_size=16), config, device, 1), config, "toy"))
    assert said.startswith("error") and "train.batch_size=8 train.gradient_accumulation_steps=2" in said
    said = str(planner._memory(planner.plan(counts(weights=9e9), config, device, 1), config, "toy"))
    assert said.startswith("error") and "Not even one image" in said and "fsdp2.yaml" in said


def test_the_command_plans(tmp_path, capsys):
    path = tiny.config_file(tmp_path)
    assert cli.main(["doctor", str(path), "--gpu", "h100", "--gpus", "8", "--images", "1e6"]) == 0
    out = capsys.readouterr().out
    for said in (
        "GB on each h100",
        "loss and gradients of a batch: ",
        "optimizer, once a step: ",
        "a step takes at least",
        "images/s on 8 h100",
        "1,000,000 images",
        "dollars",
        "gradients are exchanged",
    ):
        assert said in out
    assert cli.main(["doctor", str(path), "--gpu", "voodoo"]) == 2
    assert "known are h200, h100" in capsys.readouterr().err
    assert cli.main(["doctor", str(path), "--gpu", "h100", "--gpus", "0"]) == 2
    said = str(api.plan(load_config(path), gpu="cpu")[0])
    assert "GB on each cpu" in said


def test_this_machine_is_measured():
    device = planner.measure_cpu(0.01)
    assert all(1e7 < rate < 1e14 for rate in device.flops) and 1e8 < device.bandwidth < 1e13
    assert device.memory > 1e9

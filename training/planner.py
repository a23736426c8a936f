"""`sfumato doctor CONFIG --gpu NAME`: what a run needs on a device that is not here: memory, time, data, money.

One step is run here on tensors with shapes but no content; its operations and its storages are counted.
"""

import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sfumato.training.config.schema import Config
from sfumato.training.data.loader import batches
from sfumato.training.data.prepare import prepare
from sfumato.training.doctor import Finding, build_task
from sfumato.training.engine.ema import EMA
from sfumato.training.engine.optimizers import build_optimizer
from sfumato.training.models.parameters import trained_parameters
from sfumato.training.tasks.protocol import Task

SHARE = 0.4  # fraction of the peak that a well-fed UNet usually reaches
LAUNCH = 1e-5  # seconds that the host needs to start an operation
FUSED = 1 / 3  # fraction of the operations that are left to start once the loss is compiled
SPARE = 0.9  # fraction of the memory that can be filled; the rest goes to the driver, the libraries and fragmentation


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device can do, according to its maker's data sheet (dense, without sparsity).

    Attributes:
        flops: operations a second in float32 and in bfloat16.
        bandwidth: bytes a second from its memory.
        memory: bytes.
        link: bytes a second to each of its neighbours in a machine.
        dollars: rough price per hour to rent it, in 2026; 0 if nobody rents it out.
    """

    flops: tuple[float, float]
    bandwidth: float
    memory: float
    link: float
    dollars: float


DEVICES = {
    "h200": Device(flops=(67e12, 989e12), bandwidth=4.8e12, memory=141e9, link=450e9, dollars=3.5),
    "h100": Device(flops=(67e12, 989e12), bandwidth=3.35e12, memory=80e9, link=450e9, dollars=2.5),
    "a100": Device(flops=(19.5e12, 312e12), bandwidth=2.04e12, memory=80e9, link=300e9, dollars=1.5),
    "rtx4090": Device(flops=(82.6e12, 165e12), bandwidth=1.008e12, memory=24e9, link=32e9, dollars=0.4),
    "l4": Device(flops=(30.3e12, 121e12), bandwidth=0.3e12, memory=24e9, link=32e9, dollars=0.7),
    "mps": Device(flops=(14e12, 14e12), bandwidth=0.4e12, memory=36e9, link=math.inf, dollars=0.0),  # an M3 Max
}
HERE = "cpu"  # this machine, which is measured


def measure_cpu(seconds: float = 0.2) -> Device:
    """This machine: products of large matrices and copies larger than its caches, the fastest of those made in `seconds`."""

    def fastest(work: Callable[[], object]) -> float:
        work()
        times = []
        while sum(times) < seconds:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    side, count = 512, 2**25
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(side, side, dtype=dtype)
        rates.append(2 * side**3 / fastest(lambda a=a: a @ a))
    source, target = torch.zeros(2, count)
    bandwidth = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(flops=(rates[0], rates[1]), bandwidth=bandwidth, memory=memory, link=bandwidth, dollars=0.0)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a batch and an optimizer step of one process take.

    Attributes:
        flops: operations in matrix products and convolutions for the loss and the gradients of a batch; an addition and a
            multiplication count as two.
        traffic: bytes that all tensor operations of a batch read and write, each counted by itself.
        launches: the number of these tensor operations; the host has to start each one.
        optimizer_flops, optimizer_traffic, optimizer_launches: the same for the optimizer and the averages, once for all
            accumulated batches.
        weights, gradients, averages, moments: bytes that stay, of all weights and of what is kept for the trained ones.
        learning: peak bytes in use while the loss and its gradients are computed, including those.
        stepping: the same while the optimizer takes its step.
        batch_size: images in the batch.
    """

    flops: float
    traffic: float
    launches: int
    optimizer_flops: float
    optimizer_traffic: float
    optimizer_launches: int
    weights: float
    gradients: float
    averages: float
    moments: float
    learning: float
    stepping: float
    batch_size: int

    @property
    def peak(self) -> float:
        """Peak bytes in use."""
        return max(self.learning, self.stepping)

    @property
    def lasting(self) -> float:
        """Bytes that stay from step to step."""
        return self.weights + self.averages + self.moments


class Meter(TorchDispatchMode):
    """Counts operations, the bytes that they read and write, and the peak bytes in use by the storages that they make."""

    def __init__(self):
        super().__init__()
        self.launches = 0
        self.traffic = 0
        self.in_use = 0
        self.peak = 0
        self._known: set[int] = set()

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage as in use until nothing holds it any more."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.in_use += size
        self.peak = max(self.peak, self.in_use)
        weakref.finalize(storage, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.in_use -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            self.hold(tensor)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in read}
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        changed = _changed(func, args, kwargs or {})
        if new or changed:  # otherwise it only looks at the same storage in another way
            self.traffic += nbytes(read) + nbytes(new) + nbytes(changed)
            self.launches += 1
        return result


def _changed(func, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The arguments that an operation writes to, by its schema; fused optimizers, for example, return nothing."""
    given = {**{argument.name: value for argument, value in zip(func._schema.arguments, args)}, **kwargs}
    marked = [argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return [leaf for name in marked for leaf in tree_leaves(given.get(name)) if isinstance(leaf, torch.Tensor)]


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Total bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def tensors_of(states: Iterable[dict]) -> list[torch.Tensor]:
    """The tensors of an optimizer's states."""
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def count_step(task: Task, config: Config) -> Counts:
    """What one step takes. Loss and gradients are computed on tensors without content; the optimizer takes a step of zeros.

    This is possible because nothing in a step asks for a value. It moves the averages and, by weight decay, the weights.
    """
    parameters = trained_parameters(task.module)
    modules = {task.module, *task.frozen_parts}
    weights = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    optimizer = build_optimizer(config.optim, parameters)
    ema = EMA(parameters, config.ema.decay, post_hoc=bool(config.ema.snapshot_steps))
    averages = [] if config.ema.offload else [*ema.shadow_params, *chain.from_iterable(ema.tracks.values())]
    batch = next(batches(task.data, replace(config, train=replace(config.train, num_workers=0))))

    def compute_gradients() -> None:
        with task.accelerator.autocast(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about the batch's keys, from which dropout layers are seeded
            loss = task.loss(task.module, batch)
        torch.autograd.grad(loss, parameters, allow_unused=True)

    meter = Meter()
    flops = FlopCounterMode(display=False)
    stepping_flops = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), flops:  # not with the meter: it would keep alive what the meter counts
        compute_gradients()
    with FakeTensorMode(allow_non_fake_inputs=True), meter:
        compute_gradients()
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # the first one creates the moments
    stepping = Meter()
    for tensor in (*weights.values(), *averages, *tensors_of(optimizer.state.values()), *(p.grad for p in parameters)):
        stepping.hold(cast(torch.Tensor, tensor))
    with stepping_flops, stepping:
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
    moments = nbytes(tensors_of(optimizer.state.values()))
    lasting = nbytes(weights.values()) + nbytes(averages) + moments
    return Counts(
        flops=flops.get_total_flops(),
        traffic=meter.traffic,
        launches=meter.launches,
        optimizer_flops=stepping_flops.get_total_flops(),
        optimizer_traffic=stepping.traffic,
        optimizer_launches=stepping.launches,
        weights=nbytes(weights.values()),
        gradients=nbytes(parameters),
        averages=nbytes(averages),
        moments=moments,
        learning=lasting + meter.peak,
        stepping=stepping.peak,
        batch_size=config.train.batch_size,
    )


def largest_batch(counts: Counts, memory: float) -> int:
    """About how many images fit into `memory` bytes; 0 if not even one does."""
    fixed = counts.lasting + counts.gradients
    an_image = (counts.learning - fixed) / counts.batch_size
    if memory < counts.stepping or memory < fixed + an_image:
        return 0
    return int((memory - fixed) / an_image)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run of a config on several devices of one kind.

    Attributes:
        counts: those of one device.
        device, count: the device, and how many there are.
        largest_batch: the largest batch that fits on one device.
        roofline: minimum seconds for a step with all accumulated batches: those of its operations at the peak rate, or
            those of its bytes.
        bound_by: which of the two, `operations` or `memory`.
        starting: seconds that the host needs to start all operations of a step.
        exchange: seconds to exchange the gradients if none of it is hidden behind the backward pass.
        step: seconds that such a step is likely to take, including the exchange.
        images_a_step: images per step on all devices.
        steps: those of the run; 0 if the config gives only minutes.
    """

    counts: Counts
    device: Device
    count: int
    largest_batch: int
    roofline: float
    bound_by: str
    starting: float
    exchange: float
    step: float
    images_a_step: int
    steps: int

    @property
    def images_a_second(self) -> float:
        """Images per second on all devices."""
        return self.images_a_step / self.step

    def hours(self, images: float) -> float:
        """Hours to train on so many images."""
        return images / self.images_a_second / 3600

    def dollars(self, images: float) -> float:
        """Price of all devices to train on so many images."""
        return self.hours(images) * self.count * self.device.dollars


def plan(counts: Counts, config: Config, device: Device, count: int) -> Plan:
    """The plan of a run with these counts per batch and per optimizer step."""
    accumulated = config.train.gradient_accumulation_steps
    half = config.train.mixed_precision in ("bf16", "fp16")
    compiled = config.train.compile != "no"  # elementwise work is then fused into its neighbours
    batch_operations = counts.flops / device.flops[1 if half else 0]
    batch_bytes = counts.traffic * (0.5 if compiled else 1.0) / device.bandwidth
    # The optimizer works in float32, is not compiled, and shares its matrix products among the devices.
    optimizer_operations = counts.optimizer_flops / count / device.flops[0]
    optimizer_bytes = counts.optimizer_traffic / device.bandwidth
    by_operations = accumulated * batch_operations + optimizer_operations
    by_bytes = accumulated * batch_bytes + optimizer_bytes
    batch = max(batch_operations / SHARE, batch_bytes)
    optimizer = max(optimizer_operations / SHARE, optimizer_bytes)
    # Nothing in a step waits for the device, so the host starts operations while earlier ones run.
    left = {"no": 1.0, "graphs": 0.0}.get(config.train.compile, FUSED)  # a CUDA graph is started as a whole
    starting = (accumulated * left * counts.launches + counts.optimizer_launches) * LAUNCH
    exchange = 2 * (count - 1) / count * counts.gradients / device.link
    exposed = max(0.0, exchange - 2 / 3 * batch)  # the backward pass hides the rest
    return Plan(
        counts=counts,
        device=device,
        count=count,
        largest_batch=largest_batch(counts, SPARE * device.memory),
        roofline=max(by_operations, by_bytes),
        bound_by="operations" if by_operations > by_bytes else "memory",
        starting=starting,
        exchange=exchange,
        step=max(accumulated * batch + optimizer, starting) + exposed,
        images_a_step=config.train.batch_size * accumulated * count,
        steps=config.train.max_steps or 0,
    )


def examine(config: Config, *, gpu: str, gpus: int = 1, images: float | None = None) -> list[Finding]:
    """What a run of `config` needs on `gpus` devices of the kind `gpu`, which is in `DEVICES` or `HERE`.

    Args:
        images: how many images the run trains on, for its hours and its price; by default those of `train.max_steps`.

    Raises:
        ValueError: the data or the settings cannot be used at all, or nothing is known about the device.
    """
    if gpu not in (*DEVICES, HERE):
        raise ValueError(f"nothing is known about {gpu!r}; known are {', '.join(DEVICES)}, and {HERE}: this machine, measured")
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: there must be at least one")
    task = build_task(config, prepare(config.data), cpu=True)
    device = measure_cpu() if gpu == HERE else DEVICES[gpu]
    p = plan(count_step(task, config), config, device, gpus)
    return [_memory(p, config, gpu), *_speed(p, gpu), *_run(p, images)]


def _memory(p: Plan, config: Config, gpu: str) -> Finding:
    """Whether the batch fits, and what to do if it does not."""
    c = p.counts
    kept = f"weights {c.weights / 1e9:.2f}, gradients {c.gradients / 1e9:.2f}, optimizer {c.moments / 1e9:.2f}"
    rest = c.peak - c.lasting - c.gradients
    kept += f", averages {c.averages / 1e9:.2f}, activations and the rest {rest / 1e9:.2f}"
    what = f"{c.peak / 1e9:.2f} GB on each {gpu}: {kept}"
    batch_size = config.train.batch_size
    if p.largest_batch >= batch_size:
        return Finding("fine", f"{what}; train.batch_size={p.largest_batch} would just fit")
    if p.largest_batch > 0:
        times = -(-batch_size // p.largest_batch)
        while batch_size % times:
            times += 1
        cure = f"Set train.batch_size={batch_size // times} train.gradient_accumulation_steps="
        cure += f"{times * config.train.gradient_accumulation_steps}, which trains the same."
        other = "" if config.train.gradient_checkpointing else " Or train.gradient_checkpointing=true, for a third more time."
        return Finding("error", what, f"It has {p.device.memory / 1e9:.0f} GB.", cure + other)
    cure = "Shard the weights (configs/accelerate/fsdp2.yaml), set ema.offload=true or optim.name=adamw_8bit."
    return Finding("error", what, f"Not even one image fits into {p.device.memory / 1e9:.0f} GB.", cure)


def _speed(p: Plan, gpu: str) -> list[Finding]:
    c = p.counts

    def work(flops: float, traffic: float) -> str:
        moved = f"{traffic / 1e9:.2f} GB read and written"
        return f"{flops / 1e12:.2f} TFLOP, {moved} ({flops / traffic:.0f} operations per byte)" if flops else moved

    likely = f"{1000 * p.step:.3g} ms"
    if p.starting >= p.step:
        likely += ", which is how long the host needs to start the operations"
    findings = [
        Finding("fine", f"loss and gradients of a batch: {work(c.flops, c.traffic)}"),
        Finding("fine", f"optimizer, once a step: {work(c.optimizer_flops, c.optimizer_traffic)}"),
        Finding(
            "fine",
            f"a step takes at least {1000 * p.roofline:.3g} ms, bound by {p.bound_by}, and likely {likely}: "
            f"{p.images_a_second:,.0f} images/s on {p.count} {gpu}",
        ),
        Finding("fine", f"the loader has to prepare {p.images_a_second / p.count:,.0f} images/s for each device"),
    ]
    if p.count > 1:
        findings.append(
            Finding("fine", f"gradients are exchanged in {1000 * p.exchange:.1f} ms, most of it during the backward pass")
        )
    return findings


def _run(p: Plan, images: float | None) -> list[Finding]:
    total = images or p.steps * p.images_a_step
    if not total:
        return [Finding("note", "no price without train.max_steps or --images")]
    price = f", {p.dollars(total):,.2f} dollars" if p.device.dollars else ""
    return [Finding("fine", f"{total:,.0f} images are seen in {p.hours(total):,.1f} hours{price}")]

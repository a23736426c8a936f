"""Run the network in another engine, for speed on a CPU: bfloat16, ONNX Runtime or OpenVINO.

The text encoder, the VAE and the sampler stay as they are: they take a hundredth of the time. An engine is built for each
input shape of the network, at the first call with it.
"""

import copy
import hashlib
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.guiders.guider_utils import BaseGuidance

from sfumato.pipelines.choices import RUNTIMES, replace_components
from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline

ENGINES = "~/.cache/sfumato/engines"
MAX_ENGINES = 16  # the oldest are deleted
INPUTS = ["x_t", "t", "context", "guidance"]


class _Network(torch.nn.Module):
    """The UNet with tensors in and one tensor out, which is what the engines convert."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x_t, t, context, guidance=None):
        return self.unet(x_t, t, context, timestep_cond=guidance, return_dict=False)[0]


def _bf16(unet, inputs: tuple) -> Callable:
    half = copy.deepcopy(unet).to(torch.bfloat16, memory_format=torch.channels_last)

    def run(x_t, t, context, guidance=None):
        guidance = None if guidance is None else guidance.bfloat16()
        return half(x_t.bfloat16(), t, context.bfloat16(), timestep_cond=guidance, return_dict=False)[0].float()

    return run


def engine_file(unet, inputs: tuple) -> Path:
    """The file that keeps the network in ONNX format, after a hash of it; named by weights, config, shapes and versions."""
    digest = hashlib.sha256(repr((torch.__version__, diffusers.__version__, [x.shape for x in inputs])).encode())
    digest.update(json.dumps(dict(unet.config), sort_keys=True, default=str).encode())
    digest.update(WeightsWatch(unet).state()[1].encode())
    for name, tensor in unet.state_dict().items():
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return Path(ENGINES).expanduser() / f"{digest.hexdigest()[:24]}.engine"


def _as_onnx(unet, inputs: tuple) -> bytes:
    """The network in ONNX format, converted once and kept, since converting takes seconds and loading does not."""
    path = engine_file(unet, inputs)
    with suppress(OSError):  # no file yet, or an unreadable one
        stored = path.read_bytes()
        if hashlib.sha256(stored[32:]).digest() == stored[:32]:
            return stored[32:]
    content = _to_onnx(unet, inputs)
    with suppress(OSError):  # no space, or a read-only cache: it is made again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_bytes(hashlib.sha256(content).digest() + content)
        new.replace(path)
        for old in sorted(path.parent.glob("*.engine"), key=lambda file: file.stat().st_mtime)[:-MAX_ENGINES]:
            old.unlink(missing_ok=True)
    return content


def _to_onnx(unet, inputs: tuple) -> bytes:
    file: Any = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # from tracing: every shape is fixed here
        torch.onnx.export(_Network(copy.deepcopy(unet).float()), inputs, file, input_names=INPUTS[: len(inputs)], dynamo=False)
    return file.getvalue()


def _onnx(unet, inputs: tuple) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(_as_onnx(unet, inputs), options, providers=["CPUExecutionProvider"])

    def run(*values):
        feeds = {name: value.numpy() for name, value in zip(INPUTS, values)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return run


def _openvino(unet, inputs: tuple) -> Callable:
    import openvino

    core = openvino.Core()
    # On processors with bfloat16, OpenVINO would use it by default.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(core.read_model(_as_onnx(unet, inputs)), "CPU", settings)
    return lambda *inputs: torch.from_numpy(compiled([x.numpy() for x in inputs])[0].copy())


BUILDERS = {"bf16": _bf16, "onnx": _onnx, "openvino": _openvino}


class WeightsWatch:
    """Tells whether a network's weights, or the LoRA layers beside them, have changed, without reading any weight.

    It is asked at every pass, so the module tree is walked only after something in it was added, removed or replaced.
    """

    def __init__(self, network: torch.nn.Module):
        self.network = network
        self.parts: tuple[int, ...] = ()

    def state(self) -> tuple:
        """A value that differs whenever anything has changed."""
        if not self.parts or self.parts != self._ids():
            # Keep references, or a new object could get the id of a deleted one.
            self.modules = modules = list(self.network.modules())
            self.tables: list[dict] = [table for m in modules for table in (m._modules, m._parameters, m._buffers)]
            self.tensors = [*self.network.parameters(), *self.network.buffers()]
            self.layers: list[Any] = [m for m in modules if hasattr(m, "active_adapters") and hasattr(m, "scaling")]
            self.parts = self._ids()
        return tuple((t.data_ptr(), t._version) for t in self.tensors), self.adapters()

    def _ids(self) -> tuple[int, ...]:
        return tuple(id(part) for table in self.tables for part in table.values())

    def adapters(self) -> str:
        """The LoRA layers and their strengths, as of the last `state`."""
        return str([(m.active_adapters, m.disable_adapters, m.merged_adapters, m.scaling) for m in self.layers])


class EngineNetwork(torch.nn.Module):
    """A UNet whose forward pass runs in another engine. Everything else comes from the UNet itself.

    Engines are rebuilt after copying or unpickling, since they belong to one process, and when the weights have changed: a
    LoRA was added, a file loaded, or a training step taken.

    Args:
        unet: a stock `UNet2DConditionModel` on the CPU.
        runtime: a name of `BUILDERS`.
    """

    runs_elsewhere = True

    def __init__(self, unet: torch.nn.Module, runtime: str):
        super().__init__()
        self.unet = unet
        self.runtime = runtime
        self.engines: dict[tuple, Callable] = {}
        self.weights: tuple = ()
        self.watch = WeightsWatch(unet)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "engines": {}, "weights": (), "watch": None}

    def forward(self, x_t, t, encoder_hidden_states, timestep_cond=None, return_dict: bool = False) -> tuple[torch.Tensor]:
        """As for the UNet, in float32 internally."""
        inputs = (x_t.float().contiguous(), t.reshape(1).float(), encoder_hidden_states.float().contiguous())
        inputs += () if timestep_cond is None else (timestep_cond.float().contiguous(),)
        shapes = tuple(x.shape for x in inputs)
        if self.watch is None or self.watch.network is not self.unet:  # a copy, or unpickled
            self.watch = WeightsWatch(self.unet)
        if (weights := self.watch.state()) != self.weights:
            self.engines, self.weights = {}, weights
        if shapes not in self.engines:
            self.engines[shapes] = BUILDERS[self.runtime](self.unet, inputs)
        return (self.engines[shapes](*inputs).to(x_t.dtype),)


def find_device(name: str | None = None) -> torch.device:
    """The torch device to draw on: the one named, such as `cuda:1`, `mps`, `xpu` or `cpu`; without a name the accelerator that
    torch finds, or the CPU if there is none.

    Raises:
        ValueError: there is no such device, or this torch cannot use it.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.ones(1, device=name).item()  # a device that cannot be read from, such as meta, draws nothing
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # unknown, or not in this torch
        raise ValueError(f"device {name!r} cannot be used here; torch finds {find_device()}") from error
    return torch.device(name)


def with_runtime(pipe: SfumatoPipeline, name: str) -> SfumatoPipeline:
    """The same model with its UNet run by another engine on the CPU: `bf16`, `onnx` or `openvino`; `torch` changes nothing.

    Use OpenVINO 2026.4 only in processes that draw and exit: long-lived ones that did much else have crashed after it.
    `onnx` and `openvino` compute in float32 and draw the same images to within 1e-4; `bf16` differs by the rounding of
    eight bits of mantissa, and is fast on processors with AVX512-BF16 or AMX.

    Raises:
        ValueError: no such runtime, a model that is not on the CPU, or a guider that reaches into the network.
        ModuleNotFoundError: the engine is not installed.
    """
    if name not in RUNTIMES:
        raise ValueError(f"unknown runtime {name!r}; choose one of {', '.join(RUNTIMES)}")
    if name == "torch":
        return pipe
    if pipe.reads == "low_res" or pipe.controlnet is not None:
        raise ValueError("the other runtimes are for networks of noise, time and text, not for upscaling or ControlNets")
    if pipe.device.type != "cpu":
        raise ValueError(f"the other runtimes are for the CPU, and this model is on {pipe.device}")
    if pipe.guider is not None and type(pipe.guider).prepare_models is not BaseGuidance.prepare_models:
        raise ValueError(f"{type(pipe.guider).__name__} reaches into the network, which it cannot under another runtime")
    if RUNTIMES[name] and importlib.util.find_spec(RUNTIMES[name]) is None:
        raise ModuleNotFoundError(f"this runtime needs a package: pip install 'sfumato[{name}]'")
    return replace_components(pipe, unet=EngineNetwork(pipe.unet, name))

"""The trained parameters of a module by name, gathered if they are sharded over processes (FSDP2)."""

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.distributed.tensor import DTensor
from transformers import CLIPTextModel

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import replace_components


def trained_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that training changes, in a fixed order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def trained_names(module: torch.nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, gathered if it is sharded (all processes must call this)."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds; writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether the module's weights are sharded over the processes (FSDP2), so that all must take part in reading them."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def plain_pipeline(pipe: SfumatoPipeline, denoiser: torch.nn.Module) -> SfumatoPipeline:
    """The pipeline with plain, whole modules, as export and drawing need them; itself if they are so already.

    A copy if the weights are sharded (all processes must call this) or if the UNet has a LoRA adapter, which is then merged
    into the copy's weights.
    """
    if is_sharded(denoiser):
        state = {name: whole_tensor(tensor) for name, tensor in denoiser.state_dict().items()}
        unet: Any = UNet2DConditionModel.from_config(pipe.unet.config)
        text_encoder = CLIPTextModel(pipe.text_encoder.config)
        for name, module in (("unet.", unet), ("text_encoder.", text_encoder)):
            module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
        parts = {"unet": unet, "text_encoder": text_encoder}
        parts = {name: module.to(pipe.vae.device).eval() for name, module in parts.items()}
    elif getattr(pipe.unet, "peft_config", None):
        unet = copy.deepcopy(pipe.unet)
        unet.fuse_lora()
        unet.unload_lora()
        parts = {"unet": unet}
    else:
        return pipe
    return replace_components(pipe, **parts)

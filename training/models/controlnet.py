"""Stock ControlNets for a UNet."""

from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel


def build_controlnet(unet: UNet2DConditionModel, factor: int) -> ControlNetModel:
    """A stock ControlNet for this UNet that reads maps of `factor` times its size; changes nothing until it is trained.

    It starts with all weights of the UNet that fit: diffusers has no ControlNet with a `time_embedding_dim` of its own.
    """
    widths = (16, 32, 96, 256, 256)[: factor.bit_length()]
    new: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths, load_weights_from_unet=False)
    if unet.config["addition_embed_type"]:  # whose number of heads from_unet forgets
        heads = {"addition_embed_type_num_heads": unet.config["addition_embed_type_num_heads"], "_use_default_values": []}
        new = ControlNetModel.from_config({**new.config, **heads})
    own = new.state_dict()
    fits = {name: value for name, value in unet.state_dict().items() if name in own and own[name].shape == value.shape}
    new.load_state_dict(fits, strict=False)
    return new

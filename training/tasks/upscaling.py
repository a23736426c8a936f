"""Upscaling: a UNet that also reads a smaller image."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from PIL import Image

from sfumato.figures import to_arrays, to_pil
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.conditions import UPSCALERS_SCALE
from sfumato.pipelines.guided import NetworkInputs
from sfumato.training.config.schema import Config
from sfumato.training.data.streams import Stream, Streams
from sfumato.training.models.autoencoder import set_scaling_factor
from sfumato.training.models.denoiser import ModelNeeds
from sfumato.training.models.latent_space import to_pixel_values
from sfumato.training.quality.drawing import sample_indices
from sfumato.training.quality.fidelity import feature_distances, image_quality
from sfumato.training.tasks.protocol import captioned_images
from sfumato.training.tasks.settings import UpscalingConfig
from sfumato.training.tasks.text_to_image import TextToImage


class Upscaling(TextToImage):
    """A UNet that also gets a smaller image with a little noise, as Stable Diffusion's upscaling models do."""

    @classmethod
    def model_needs(cls, config: Config) -> ModelNeeds:
        """Channels for the small image, its noise level as class labels, and a VAE in the stock pipeline's scale."""
        settings = config.section(UpscalingConfig)

        def prepare_vae(vae: AutoencoderKL, factor: int) -> None:
            if settings.factor < factor:
                raise ValueError(
                    f"upscaling.factor={settings.factor}: latents are {factor} times smaller than images, and the small "
                    f"image is stacked with them; set it to {factor} or more"
                )
            if vae.quant_conv is None or vae.post_quant_conv is None:
                raise ValueError("vae.pretrained: stock upscaling needs a VAE with quant_conv and post_quant_conv")
            set_scaling_factor(vae, UPSCALERS_SCALE)

        low_res = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        if settings.max_noise_level >= low_res.config["num_train_timesteps"]:
            raise ValueError(f"upscaling.max_noise_level must be below {low_res.config['num_train_timesteps']}")
        return ModelNeeds(
            num_extra_inputs=lambda vae: vae.config["in_channels"],
            use_quant_conv=True,
            prepare_vae=prepare_vae,
            unet={"class_embed_type": "timestep"},
            components={"low_res_scheduler": low_res, "max_noise_level": settings.max_noise_level},
        )

    def shrink(self, pixels: torch.Tensor, size: torch.Size | list[int]) -> torch.Tensor:
        """Images `(B, C, H, W)` reduced by `upscaling.factor`, then resized to the latents' `size`; still in [-1, 1]."""
        factor = self.config.section(UpscalingConfig).factor
        small = F.interpolate(pixels, scale_factor=1 / factor, mode="area")
        return F.interpolate(small, size, mode="bicubic", antialias=True).clamp(-1, 1)

    def network_input(
        self, x_t: torch.Tensor, batch: dict[str, torch.Tensor], streams: Streams
    ) -> tuple[torch.Tensor, NetworkInputs]:
        """The noisy latents, stacked with the noised smaller image, whose noise level goes to the network too."""
        small, keys = self.shrink(batch["pixel_values"], x_t.shape[-2:]), batch["sample_key"]
        level = streams.integers(keys, Stream.LOW_RES_LEVEL, self.pipe.config.max_noise_level + 1)
        noise = streams.normal(keys, Stream.LOW_RES_NOISE, tuple(small.shape[1:]))
        small = self.pipe.low_res_scheduler.add_noise(small, noise, level)
        return torch.cat([x_t, small], dim=1), NetworkInputs(class_labels=level)

    def enlarge(self, count: int, pipe: SfumatoPipeline) -> tuple[list[str], np.ndarray, np.ndarray, list[Image.Image]]:
        """Captions, held-out images, and these reduced and enlarged again, by bicubic interpolation and by the model."""
        captions, images = captioned_images(self.images, sample_indices(self.images, count))
        pixels = to_pixel_values(np.stack(images))
        grid = [side // pipe.vae_scale_factor for side in pixels.shape[-2:]]
        small = list(self.shrink(pixels, grid).permute(0, 2, 3, 1).div(2).add(0.5).numpy())
        plain = self.shrink(pixels, pixels.shape[-2:]).permute(0, 2, 3, 1).add(1).mul(127.5).round().byte().numpy()
        return captions, np.stack(images), plain, self.draw(pipe, captions, image=small)

    def samples(self) -> tuple[list[str], list[Image.Image]]:
        """Held-out images: enlarged by bicubic interpolation, enlarged by the model, and the true ones."""
        titles, images = [], []
        for caption, real, plain, drawing in zip(*self.enlarge(4, self.export_pipe())):
            titles += [f"{caption}: bicubic", "drawn", "true"]
            images += [to_pil(plain), drawing, to_pil(real)]
        return titles, images

    def scores(self) -> tuple[dict[str, float], str]:
        """How close the results are to the true images, compared with bicubic enlarging."""
        _, real, plain, drawings = self.enlarge(self.config.validation.num_judged, self.export_pipe())
        scores = {}
        for name, images in (("model", to_arrays(drawings)), ("bicubic", plain)):
            figures = image_quality(real, images) | feature_distances(real, images)
            scores |= {f"{key} of {name}": value for key, value in figures.items()}
        factor = self.config.section(UpscalingConfig).factor
        return scores, f"{len(real)} {self.judged_split} images, enlarged {factor} times"

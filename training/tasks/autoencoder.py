"""A VAE, trained by the same loop as everything else; latent models work in its latents."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sfumato.figures import to_pil
from sfumato.files import replace_folder
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import evenly_spaced
from sfumato.training.data.loader import SampleData, to_device
from sfumato.training.data.streams import Stream
from sfumato.training.engine.ema import EMA
from sfumato.training.models.autoencoder import (
    VariationalAutoencoder,
    build_autoencoder,
    downsampling_factor,
    normalise_channels,
    quant_convs,
)
from sfumato.training.models.denoiser import ModelNeeds
from sfumato.training.models.latent_space import to_pixel_values
from sfumato.training.objectives import autoencoder_loss
from sfumato.training.quality.drawing import sample_indices
from sfumato.training.quality.fidelity import image_quality
from sfumato.training.tasks.protocol import Outcome, TaskContext, check_not_sharded
from sfumato.training.tasks.settings import AutoencoderConfig


class Autoencoder:
    """A VAE that compresses images for latent models, whose `vae.pretrained` names this run's folder.

    It has the attributes of `protocol.Task`.
    """

    @classmethod
    def model_needs(cls, config: Config) -> ModelNeeds:
        """There is no UNet."""
        return ModelNeeds(has_unet=False)

    def __init__(self, context: TaskContext):
        self.config = config = context.config
        self.images = context.images
        self.accelerator = context.accelerator
        self.streams = context.streams
        check_not_sharded(context)
        self.settings = config.section(AutoencoderConfig)
        vae = build_autoencoder(config, self.settings.model).to(self.accelerator.device)
        if self.settings.thumbnail_weight:
            quant_convs(vae)
            if vae.config["latent_channels"] < config.data.channels:
                raise ValueError(f"autoencoder.thumbnail_weight: needs at least {config.data.channels} latent channels")
        if not self.settings.train_encoder:
            vae.encoder.requires_grad_(False)
            if vae.quant_conv is not None:
                vae.quant_conv.requires_grad_(False)
        self.module = VariationalAutoencoder(vae, self.settings.latent_noise)
        self.frozen_parts = (self.module.vae,)
        no_texts = np.zeros((len(self.images.captions) + 1, 1), np.int64)  # captions are not read
        self.data = SampleData(images=self.images, texts=no_texts, streams=self.streams)
        if config.train.gradient_checkpointing:
            self.module.vae.enable_gradient_checkpointing()
        if config.train.compile == "unet":
            self.module.compile()

    def begin_step(self, done: float, ema: EMA) -> None:
        """Nothing to do."""

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Reconstruction and Kullback-Leibler divergence; see `objectives.autoencoder_loss`."""
        device, vae = self.accelerator.device, self.module.vae
        batch = to_device(batch, device)
        pixels = batch["pixel_values"]
        size = [side // downsampling_factor(vae) for side in pixels.shape[-2:]]
        shape = (vae.config["latent_channels"], *size)
        noise = self.streams.normal(batch["sample_key"], Stream.NOISE, shape)
        rebuilt, mean, logvar = model(pixels, noise)
        s = self.settings
        weights = {"kl_weight": s.kl_weight, "sharpness": s.sharpness_weight, "thumbnail": s.thumbnail_weight}
        return autoencoder_loss(rebuilt, mean, logvar, pixels, **weights)

    def check(self) -> None:
        """Nothing to check."""

    def state(self) -> dict[str, Any]:
        """Nothing besides the weights."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def _reconstruct(self, numbers: list[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images `(N, H, W, C)` uint8, their reconstructions, and the means of their latents `(N, c, h, w)`."""
        vae, images = self.module.vae, np.stack([self.images.image(int(i)) for i in numbers])
        rebuilt, means = [], []
        for start in range(0, len(images), 32):
            mean: Any = vae.encode(to_pixel_values(images[start : start + 32]).to(vae.device), return_dict=False)[0].mode()
            pixels = vae.decode(mean, return_dict=False)[0].add(1).mul(127.5).round().clamp(0, 255)
            rebuilt.append(pixels.permute(0, 2, 3, 1).byte().cpu().numpy())
            means.append(mean.float().cpu().numpy())
        return images, np.concatenate(rebuilt), np.concatenate(means)

    def samples(self) -> tuple[list[str], list[Image.Image]]:
        """Held-out images, each next to its reconstruction from the latents."""
        numbers = sample_indices(self.images, 6)
        images, rebuilt, _ = self._reconstruct(numbers)
        titles, cells = [], []
        for i, image, other in zip(numbers, images, rebuilt):
            titles += [self.images[i]["captions"][0], "from its latents"]
            cells += [to_pil(image), to_pil(other)]
        return titles, cells

    def held_out(self) -> dict[str, float]:
        """Mean squared error of held-out images, in [-1, 1], reconstructed from the means of their latents."""
        images, rebuilt, _ = self._reconstruct(sample_indices(self.images, self.config.validation.num_held_out))
        error = (images.astype(np.float64) - rebuilt) / 127.5
        name = "held_out_loss" if len(self.images.select("held_out")) else "training_loss"
        return {name: float(np.square(error).mean())}

    def checkpoint_writer(self, state: dict[str, Any]) -> Callable[[Path, Path], object]:
        """See `protocol.ResultsHalf`: a checkpoint holds the stock folder `vae/`."""
        self._set_scale(self._train_latents(64))
        return lambda new, folder: self.module.vae.save_pretrained(new / "vae")

    def write_what_is_whole(self, folder: Path) -> None:
        """Nothing to do: it is never sharded."""

    def _train_latents(self, count: int) -> np.ndarray:
        """The latents of `count` training images, `(count, C, h, w)`."""
        train = self.images.select("train")
        return self._reconstruct(train[evenly_spaced(len(train), count)])[2]

    def _set_scale(self, latents: np.ndarray) -> None:
        """Set the scaling factor so that these have variance 1, or are on the image's scale if they hold a thumbnail."""
        if self.settings.train_encoder:
            factor = 1.0 if self.settings.thumbnail_weight else float(1 / latents.std())  # an image stays in [-1, 1]
            self.module.vae.register_to_config(scaling_factor=factor)

    def _normalise_details(self, latents: np.ndarray) -> np.ndarray:
        """Make the latent channels after the thumbnail vary as much as it does; returns the latents changed in this way."""
        colours = self.config.data.channels
        image, details = latents[:, :colours], latents[:, colours:]
        mean = torch.from_numpy(details.mean((0, 2, 3)))
        std = torch.from_numpy(details.std((0, 2, 3)))
        by = normalise_channels(self.module.vae, colours, mean, std, float(image.std())).cpu()
        level = (details - mean.numpy()[:, None, None]) * by.numpy()[:, None, None]
        return np.concatenate([image, level], axis=1)

    def scores(self) -> tuple[dict[str, float], str]:
        """How close reconstructions are: PSNR and, if its package is installed, SSIM."""
        images, rebuilt, _ = self._reconstruct(sample_indices(self.images, self.config.validation.num_judged))
        return image_quality(images, rebuilt), "held-out images"

    def finish(self, state: dict[str, Any], outcome: Outcome) -> list[str]:
        """Set the scale of the latents, and write `vae/` and the figures."""
        folder, vae = Path(self.config.output_dir), self.module.vae
        latents = self._train_latents(512)
        self._set_scale(latents)
        if self.settings.thumbnail_weight and self.settings.train_encoder and latents.shape[1] > self.config.data.channels:
            latents = self._normalise_details(latents)
        figures: dict[str, Any] = dict(outcome.scores)
        figures["latent mean"] = [float(v) for v in latents.mean((0, 2, 3))]
        figures["latent standard deviation"] = [float(v) for v in latents.std((0, 2, 3))]
        figures["scaling factor"] = vae.config["scaling_factor"]
        if self.accelerator.is_main_process:
            vae.save_pretrained(folder / ".vae.new")
            replace_folder(folder / ".vae.new", folder / "vae")
            (folder / "evaluation.json").write_text(json.dumps(figures, indent=2))
        line = ", ".join(f"{name} {figures[name]:.4g}" for name in ("PSNR", "SSIM", "scaling factor") if name in figures)
        return [f"{outcome.scores_label}: {line}", f"wrote {folder / 'vae'}. Train on it with:  vae.pretrained={folder}"]

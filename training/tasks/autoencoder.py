"""The task that makes latents: a VAE, trained by the same loop as everything else."""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image

from sfumato import figures
from sfumato.files import put
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import PictureSet
from sfumato.training.data.sources.shapes import evenly_spaced
from sfumato.training.data.streams import noise_for
from sfumato.training.models.autoencoder import build_autoencoder
from sfumato.training.models.latent_space import to_pixel_values
from sfumato.training.objectives import autoencoder_loss
from sfumato.training.quality import drawing
from sfumato.training.quality.fidelity import picture_quality


class Autoencoder:
    """A VAE that makes pictures smaller, for latent models: `vae.pretrained` of their config names this run's folder.

    Attributes as of `TextToImage`.
    """

    beside = None

    def __init__(self, config: Config, pictures: PictureSet, checkpoint: Path | None, accelerator: Accelerator):
        self.config, self.pictures, self.accelerator = config, pictures, accelerator
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("task=autoencoder is not spread over GPUs; use configs/accelerate/multi_gpu.yaml")
        self.module = build_autoencoder(config).to(accelerator.device)
        self.parts, self.latents = (self.module.vae,), None
        self.texts = np.zeros((len(pictures.captions) + 1, 1), np.int64)  # captions are not read
        if config.train.gradient_checkpointing:
            self.module.vae.enable_gradient_checkpointing()
        if config.train.compile == "unet":
            self.module.compile()

    def loss(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        """Reconstruction and Kullback-Leibler divergence; see `objectives.autoencoder_loss`."""
        a, pixels = self.config.autoencoder, batch["pixel_values"].to(self.accelerator.device)
        vae = self.module.vae
        size = [side // 2 ** (len(vae.config.block_out_channels) - 1) for side in pixels.shape[-2:]]
        noise = noise_for(batch["noise_seed"], (vae.config.latent_channels, *size), pixels.device)
        return autoencoder_loss(*model(pixels, noise), pixels, a.kl_weight, a.sharpness_weight)

    def state(self) -> dict:
        """Nothing beside the weights."""
        return {}

    def restore(self, state: dict) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def _rebuilt(self, numbers: list[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures `(N, H, W, C)` uint8, the same from their latents, and the latents' means `(N, c, h, w)`."""
        vae, shown = self.module.vae, np.stack([self.pictures.picture(int(i)) for i in numbers])
        rebuilt, means = [], []
        for start in range(0, len(shown), 32):
            mean = vae.encode(to_pixel_values(shown[start : start + 32]).to(vae.device)).latent_dist.mode()
            drawn = vae.decode(mean).sample.add(1).mul(127.5).round().clamp(0, 255)
            rebuilt.append(drawn.permute(0, 2, 3, 1).byte().cpu().numpy())
            means.append(mean.float().cpu().numpy())
        return shown, np.concatenate(rebuilt), np.concatenate(means)

    def show(self) -> tuple[list[str], list[Image.Image]]:
        """Held-out pictures, each beside what comes back from its latents."""
        numbers = drawing.sample_indices(self.pictures, 6)
        pairs = [picture for both in zip(*self._rebuilt(numbers)[:2]) for picture in both]
        names = [name for i in numbers for name in (self.pictures[i]["captions"][0], "from its latents")]
        return names, [figures.to_pil(picture) for picture in pairs]

    def held_out(self) -> dict[str, float]:
        """Mean squared error, in [-1, 1], of held-out pictures as they come back from the means of their latents."""
        shown, rebuilt, _ = self._rebuilt(drawing.sample_indices(self.pictures, self.config.validation.num_held_out))
        apart = (shown.astype(np.float64) - rebuilt) / 127.5
        name = "held_out_loss" if len(self.pictures.select("held_out")) else "training_loss"
        return {name: float(np.square(apart).mean())}

    def writer(self, state: dict):
        """As of `TextToImage`: a checkpoint holds the stock folder `vae/`."""
        self._set_scale(64)
        return lambda new, folder: self.module.vae.save_pretrained(new / "vae")

    def _set_scale(self, count: int) -> np.ndarray:
        """Set the scaling factor, so that latents have variance 1; returns those of `count` training pictures."""
        train = self.pictures.select("train")
        latents = self._rebuilt(train[evenly_spaced(len(train), count)])[2]
        self.module.vae.register_to_config(scaling_factor=float(1 / latents.std()))
        return latents

    def scores(self, pipe) -> tuple[dict[str, float], str]:
        """How near pictures come back: PSNR and, where it can be had, SSIM."""
        count = self.config.validation.num_judged
        return picture_quality(*self._rebuilt(drawing.sample_indices(self.pictures, count))[:2]), "held-out pictures"

    def shareable(self) -> None:
        """There is no pipeline."""

    def finish(
        self, state: dict, saved: Path, prompts: list[str], pictures: list[Image.Image], scores: dict[str, float], what: str
    ) -> list[str]:
        """Sets the scaling factor, so that latents have variance 1, and writes `vae/` and the figures."""
        folder, vae = Path(self.config.output_dir), self.module.vae
        latents, scores = self._set_scale(512), dict(scores)
        scores["latent mean"] = [float(v) for v in latents.mean((0, 2, 3))]
        scores["latent standard deviation"] = [float(v) for v in latents.std((0, 2, 3))]
        scores["scaling factor"] = vae.config.scaling_factor
        if self.accelerator.is_main_process:
            vae.save_pretrained(folder / ".vae.new")
            put(folder / ".vae.new", folder / "vae")
            (folder / "evaluation.json").write_text(json.dumps(scores, indent=2))
        shown = ", ".join(f"{name} {scores[name]:.4g}" for name in ("PSNR", "SSIM", "scaling factor") if name in scores)
        return [f"{what}: {shown}", f"wrote {folder / 'vae'}. Train on it with:  vae.pretrained={folder}"]

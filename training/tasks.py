"""What can be trained: each task has its network, its loss, what it shows and what it hands over. The loop is the same."""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from transformers import CLIPTokenizer

from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.pipelines.export import put
from sfumato.training import checkpoints, evaluation, facts
from sfumato.training.build import Denoiser, build_autoencoder, build_pipeline, warn_of_long_captions
from sfumato.training.config import Config
from sfumato.training.data import noise_for
from sfumato.training.latents import cached_latents, cached_texts, encode, is_identity, to_pixel_values
from sfumato.training.masks import random_mask
from sfumato.training.metrics import picture_quality
from sfumato.training.objectives import autoencoder_loss, loss_weight, sample_timesteps, weighted_mse
from sfumato.training.pictures import PictureSet
from sfumato.training.shapes import NUM_HELD_OUT, evenly


class TextToImage:
    """A text encoder and a UNet that predicts eps, x_0 or v from a noisy picture and its caption.

    Attributes:
        module: what is trained, as one module.
        parts: the models whose frozen weights the result depends on.
        texts: token ids or embeddings of every caption.
        latents: x_0 of every picture, where kept.

    Raises:
        ValueError: settings that contradict one another, or that the model does not go with.
    """

    def __init__(self, config: Config, pictures: PictureSet, checkpoint: Path | None, accelerator: Accelerator):
        self.config, self.pictures, self.accelerator = config, pictures, accelerator
        if checkpoint and not (checkpoint / "pipeline" / "tokenizer").is_dir():
            raise ValueError(f"{checkpoint} is of another task than {config.task}")
        captions = pictures.training_captions()
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "pipeline" / "tokenizer") if checkpoint else None
        self.pipe = pipe = build_pipeline(config, captions, tokenizer)
        warn_of_long_captions(pipe, captions)
        steps = pipe.scheduler.config.num_train_timesteps
        if config.validation.num_inference_steps > steps:
            raise ValueError(
                f"validation.num_inference_steps={config.validation.num_inference_steps}: the model has {steps} steps"
            )
        evaluation.as_drawn(pipe, config.validation)
        pipe.vae.to(accelerator.device)
        self.module = Denoiser(pipe.unet, pipe.text_encoder).to(accelerator.device)
        self.parts = (pipe.unet, pipe.text_encoder, pipe.vae)
        if config.train.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        if config.train.compile == "unet":
            pipe.unet.compile()
        elif config.train.compile == "regional":
            pipe.unet.compile_repeated_blocks()
        self.texts, self.latents = self._cached()
        self.snr = pipe.scheduler.snr(torch.arange(steps)).to(accelerator.device)
        self.prompts = list(config.validation.prompts) or evaluation.captions_to_show(pictures)

    def _cached(self) -> tuple[np.ndarray, np.ndarray | None]:
        data, pipe, latents = self.config.data, self.pipe, None
        if data.cache_latents and is_identity(pipe.vae):
            raise ValueError("data.cache_latents=true: a pixel model has no latents to keep; leave it out")
        if data.cache_embeddings and any(parameter.requires_grad for parameter in pipe.text_encoder.parameters()):
            raise ValueError("data.cache_embeddings=true needs a frozen text encoder: text_encoder.train=false")
        if data.cache_latents:
            latents = cached_latents(self.pictures, pipe.vae, data.cache_dir)
        encoder = pipe.text_encoder if data.cache_embeddings else None
        return cached_texts(self.pictures, pipe.tokenizer, encoder, data.cache_dir), latents

    def loss(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        """Draw x_0, eps and t, noise, predict, compare (Ho et al. 2020, equation 14, weighted)."""
        device, scheduler, o = self.accelerator.device, self.pipe.scheduler, self.config.objective
        x_0 = batch["x_0"].to(device) if "x_0" in batch else encode(self.pipe.vae, batch["pixel_values"].to(device))
        torch.manual_seed(int(batch["noise_seed"][0]))  # for dropout layers, if the model has any
        noise = noise_for(batch["noise_seed"], x_0.shape[1:], device)
        t = sample_timesteps(batch["u"].to(device), self.snr, o.timesteps, o.log_snr_mean, o.log_snr_std)
        x_t = self.network_input(scheduler.add_noise(x_0, noise, t), batch)
        prediction = model(x_t, t, batch["text"].to(device))
        target = scheduler.training_target(x_0, noise, t)
        weight = loss_weight(self.snr[t], scheduler.config.prediction_type, o.weight, o.min_snr_gamma, o.min_snr_floor)
        return weighted_mse(prediction, target, weight)

    def network_input(self, x_t: torch.Tensor, batch: dict) -> torch.Tensor:
        """What the UNet gets: the noisy latents."""
        return x_t

    def shareable(self) -> SfumatoPipeline:
        """The pipeline as it is drawn and exported: whole modules, the sampler and the guider of `validation`."""
        return evaluation.as_drawn(checkpoints.shareable(self.pipe, self.module), self.config.validation)

    def show(self) -> tuple[list[str], list[Image.Image]]:
        """The fixed prompts, drawn with the fixed seeds."""
        return self.prompts, evaluation.draw_pictures(self.shareable(), self.prompts, self.config.validation, self.accelerator)

    def told(self, state: dict) -> dict:
        """What an exported folder says of the run."""
        return {
            "facts": facts.facts(self.config, self.accelerator, self.pictures, state),
            "metadata": facts.metadata(self.config, self.pictures, state),
            "settings": facts.public_settings(self.config),
        }

    def writer(self, state: dict):
        """A function that writes the model into a checkpoint, given its folder now and its name later."""
        pipe, told = self.shareable(), self.told(state)
        return lambda new, folder: export_pipeline(pipe, new / "pipeline", where=str(folder / "pipeline"), **told)

    def finish(self, state: dict, saved: Path, prompts: list[str], pictures: list[Image.Image]) -> list[str]:
        """Scores where they can be had, and the exported folder; returns what to say."""
        config, main, known, said = self.config, self.accelerator.is_main_process, self.told(state), []
        output_dir, pipe = Path(config.output_dir), self.shareable()
        if config.data.name == "shapes":
            scores = evaluation.evaluate_shapes(pipe, config, self.accelerator)
            line = ", ".join(f"{name} {share:.1%}" for name, share in scores.items())
            count = min(config.validation.num_shapes, NUM_HELD_OUT)
            known["facts"]["obedience to held-out captions"] = f"{line}; {count} captions, judged by a program"
            said.append(f"right on held-out captions: {line}")
            if main:
                (output_dir / "evaluation.json").write_text(json.dumps(scores, indent=2))
        folder = output_dir / "pipeline"
        if main:
            if config.lora.rank:
                checkpoints.save_lora(self.pipe, output_dir / "lora")
            h, curve = config.hub, facts.loss_curve(output_dir / "metrics.jsonl")
            raw = checkpoints.raw_weights(saved) if "raw" in h.variants else None
            export_pipeline(
                pipe, folder, samples=list(zip(prompts, pictures)), curve=curve, variants=h.variants, raw=raw,
                max_shard_size=h.max_shard_size, **known,
            )  # fmt: skip
        return [*said, f"wrote {folder}. Open it with:  DiffusionPipeline.from_pretrained({str(folder)!r})"]


class Inpainting(TextToImage):
    """A UNet that also gets a mask and the picture outside of it, as Stable Diffusion's inpainting models do.

    From random weights, or grown from the text-to-image model of `init_from`, whose UNet gets new channels of zero weight.
    """

    def network_input(self, x_t: torch.Tensor, batch: dict) -> torch.Tensor:
        """The noisy latents, and beside them what is given: a random mask, and the picture outside of it."""
        pixels = batch["pixel_values"].to(x_t.device)
        masks = np.stack([random_mask(np.random.default_rng(int(s)), *pixels.shape[-2:]) for s in batch["noise_seed"]])
        mask = torch.from_numpy(masks)[:, None].to(x_t)
        return torch.cat([x_t, self.pipe.prepare_seen(pixels, mask, x_t)], dim=1)

    def show(self) -> tuple[list[str], list[Image.Image]]:
        """Held-out pictures, their middle drawn anew."""
        chosen = evaluation.to_show(self.pictures, 12)
        given = [self.pictures.picture(i) for i in chosen]
        masks = [np.zeros(picture.shape[:2], bool) for picture in given]
        for mask in masks:
            height, width = mask.shape
            mask[height // 4 : -height // 4, width // 4 : -width // 4] = True
        captions = evaluation.captions_to_show(self.pictures)
        return captions, evaluation.draw_pictures(
            self.shareable(), captions, self.config.validation, self.accelerator, given=given, masks=masks
        )


class Autoencoder:
    """A VAE that makes pictures smaller, for latent models: `vae.pretrained` of their config names this run's folder.

    Attributes as of `TextToImage`.
    """

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
        numbers = evaluation.to_show(self.pictures, 6)
        pairs = [picture for both in zip(*self._rebuilt(numbers)[:2]) for picture in both]
        names = [name for i in numbers for name in (self.pictures[i]["captions"][0], "from its latents")]
        return names, [Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p) for p in pairs]

    def writer(self, state: dict):
        """As of `TextToImage`: a checkpoint holds the stock folder `vae/`."""
        self._set_scale(64)
        return lambda new, folder: self.module.vae.save_pretrained(new / "vae")

    def _set_scale(self, count: int) -> np.ndarray:
        """Set the scaling factor, so that latents have variance 1; returns those of `count` training pictures."""
        train = self.pictures.select("train")
        latents = self._rebuilt(train[evenly(len(train), count)])[2]
        self.module.vae.register_to_config(scaling_factor=float(1 / latents.std()))
        return latents

    def finish(self, state: dict, saved: Path, prompts: list[str], pictures: list[Image.Image]) -> list[str]:
        """Sets the scaling factor, so that latents have variance 1, and writes `vae/` and the figures."""
        folder, vae = Path(self.config.output_dir), self.module.vae
        latents = self._set_scale(512)
        scores = picture_quality(*self._rebuilt(evaluation.to_show(self.pictures, 512))[:2])
        scores["latent mean"] = [float(v) for v in latents.mean((0, 2, 3))]
        scores["latent standard deviation"] = [float(v) for v in latents.std((0, 2, 3))]
        scores["scaling factor"] = vae.config.scaling_factor
        if self.accelerator.is_main_process:
            vae.save_pretrained(folder / ".vae.new")
            put(folder / ".vae.new", folder / "vae")
            (folder / "evaluation.json").write_text(json.dumps(scores, indent=2))
        shown = ", ".join(f"{name} {scores[name]:.4g}" for name in ("PSNR", "SSIM", "scaling factor") if name in scores)
        return [f"held-out pictures: {shown}", f"wrote {folder / 'vae'}. Train on it with:  vae.pretrained={folder}"]


TASKS = {"text_to_image": TextToImage, "inpainting": Inpainting, "autoencoder": Autoencoder}

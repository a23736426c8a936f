"""What can be trained: each task has its network, its loss, what it shows and what it hands over. The loop is the same."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import CLIPTokenizer

from sfumato import figures
from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.pipelines.conditions import x0_estimator
from sfumato.training.config.rules import DISTANCES
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import PictureSet
from sfumato.training.data.cached import cached_latents, cached_texts
from sfumato.training.data.sources.shapes import NUM_HELD_OUT, evenly_spaced
from sfumato.training.data.streams import noise_for
from sfumato.training.engine import checkpoints
from sfumato.training.models import finetune
from sfumato.training.models.build import build_pipeline
from sfumato.training.models.denoiser import Denoiser
from sfumato.training.models.latent_space import encode, is_identity
from sfumato.training.models.parameters import plain_pipeline
from sfumato.training.models.text import warn_of_long_captions
from sfumato.training.objectives import (
    LossMoments,
    loss_weight,
    nearest_noise,
    offset,
    sample_timesteps,
    weighted_mse,
)
from sfumato.training.publish import facts
from sfumato.training.quality import drawing, obedience
from sfumato.training.quality.held_out import held_out_loss
from sfumato.training.quality.report import set_distances


class TextToImage:
    """A text encoder and a UNet that predicts eps, x_0, v or a flow's velocity from a noisy picture and its caption.

    Attributes:
        module: what is trained, as one module.
        parts: the models whose frozen weights the result depends on.
        texts: token ids or embeddings of every caption.
        latents: x_0 of every picture, where kept.
        beside: what the loader makes of a picture beside, or None; see `data.batches`.

    Raises:
        ValueError: settings that contradict one another, or that the model does not go with.
    """

    beside = None

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
        sampler = copy.deepcopy(drawing.sampling_pipeline(pipe, config.validation).scheduler)
        sampler.set_timesteps(config.validation.num_inference_steps)  # fails now, not when the first grid is drawn
        pipe.vae.to(accelerator.device)
        self.module = Denoiser(pipe.unet, pipe.text_encoder, pipe.controlnet).to(accelerator.device)
        self.parts = (pipe.unet, pipe.text_encoder, pipe.vae)
        if config.train.gradient_checkpointing:
            for network in filter(None, (pipe.unet, pipe.controlnet)):
                network.enable_gradient_checkpointing()
        if config.train.compile == "unet":
            pipe.unet.compile()
        elif config.train.compile == "regional":
            pipe.unet.compile_repeated_blocks()
        self.texts, self.latents = self._cached()
        self.moments = LossMoments() if config.objective.importance else None
        self.levels = pipe.scheduler.snr(pipe.scheduler.training_levels()).cpu()
        self.snr = self.levels.to(accelerator.device)
        self.prompts = list(config.validation.prompts) or drawing.sample_captions(pictures)

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
        o, scheduler = self.config.objective, self.pipe.scheduler
        u, share = (batch["u"], torch.ones(())) if self.moments is None else self.moments.warp(batch["u"])
        t = sample_timesteps(u, self.levels, o.timesteps, o.log_snr_mean, o.log_snr_std)  # on the CPU: MPS has no quantiles
        batch = {name: value.to(self.accelerator.device) for name, value in batch.items()}
        u, share, t = (value.to(self.accelerator.device) for value in (u, share, t))
        torch.manual_seed(int(batch["noise_seed"][0]))  # for dropout layers, if the model has any
        x_0 = self.x_0(batch)
        noise = self.noise(batch["noise_seed"], x_0)
        x_t = scheduler.add_noise(x_0, noise, t)
        output = self.predict(model, x_t, t, batch)
        prediction, target = output[:, : x_0.shape[1]], scheduler.training_target(x_0, noise, t)
        weight = loss_weight(
            self.snr[t], scheduler.prediction_type, o.weight, o.min_snr_gamma, o.min_snr_floor, o.p2_gamma, o.edm_sigma_data
        )
        losses = weighted_mse(prediction, target, weight)
        if output.shape[1] > x_0.shape[1]:  # the hybrid loss: the bound teaches the variance and leaves the mean alone
            halves = torch.cat([prediction.detach(), output[:, x_0.shape[1] :]], dim=1).float()
            losses = losses + o.vlb_weight * len(self.snr) * scheduler.bound_term(halves, x_0, x_t, t)
        if self.moments is not None:
            self.moments.update(*self.accelerator.gather(torch.stack([u.float(), losses.detach()], dim=1)).T.cpu())
        return (share * losses).mean()

    def x_0(self, batch: dict) -> torch.Tensor:
        """Clean latents or pixels, `(B, C, h, w)`."""
        return batch["x_0"] if "x_0" in batch else encode(self.pipe.vae, batch["pixel_values"])

    def noise(self, seeds: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        """The noise to train with, `(B, C, h, w)`; of each sample by its own seed."""
        o, shape, device = self.config.objective, x_0.shape[1:], x_0.device
        if o.noise_candidates > 1:
            noise = nearest_noise(x_0, noise_for(seeds, (o.noise_candidates, *shape), device))
        else:
            noise = noise_for(seeds, shape, device)
        if o.offset_noise:
            noise = offset(noise, o.offset_noise, noise_for(seeds ^ 1, shape[:1], device))
        return noise

    def predict(
        self, model: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, batch: dict, all_first: bool = False
    ) -> torch.Tensor:
        """What the network makes of noisy latents, with all that the task gives it beside.

        With self-conditioning, half of the samples by their seeds, or all, are given what the network first made of them.
        """
        if self.config.objective.self_conditioning:
            with torch.no_grad():
                first = model(torch.cat([x_t, torch.zeros_like(x_t)], dim=1), t, batch["text"], None)
                first = x0_estimator(self.pipe.scheduler)(first.float(), x_t, t)
            chosen = ((batch["noise_seed"] & 4 > 0) | all_first).reshape(-1, 1, 1, 1)
            return model(torch.cat([x_t, torch.where(chosen, first, 0)], dim=1), t, batch["text"], None)
        x_t, given = self.network_input(x_t, batch)
        return model(x_t, t, batch["text"], given)

    def network_input(self, x_t: torch.Tensor, batch: dict) -> tuple[torch.Tensor, dict | None]:
        """What the UNet gets: the noisy latents, with more beside where a task says so; and what `run_network` takes."""
        return x_t, None

    def state(self) -> dict:
        """What the task learned of the data beside the weights, as JSON, for a checkpoint."""
        return {} if self.moments is None else {"moments": self.moments.state()}

    def restore(self, state: dict) -> None:
        """Go on from `state` of a checkpoint."""
        if self.moments is not None and "moments" in state:
            self.moments.restore(state["moments"])

    def shareable(self) -> SfumatoPipeline:
        """The pipeline as it is drawn and exported: whole modules, the sampler and the guider of `validation`."""
        return drawing.sampling_pipeline(plain_pipeline(self.pipe, self.module), self.config.validation)

    def show(self) -> tuple[list[str], list[Image.Image]]:
        """The fixed prompts, drawn with the fixed seeds."""
        return self.prompts, self.drawn(self.shareable(), self.prompts)

    def drawn(self, pipe: SfumatoPipeline, captions: list[str], **given) -> list[Image.Image]:
        """One picture a caption, as `validation` says; see `drawing.draw_pictures`."""
        return drawing.draw_images(pipe, captions, self.config.validation, self.accelerator, **given)

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

    def held_out(self) -> dict[str, float]:
        """The loss on held-out pictures; see `held_out.held_out_loss`."""
        return held_out_loss(self)

    @property
    def split(self) -> str:
        """What `drawing.to_show` takes pictures of."""
        return "held-out" if len(self.pictures.select("held_out")) else "training"

    def scores(self, pipe: SfumatoPipeline) -> tuple[dict[str, float], str]:
        """What can be measured on held-out data, and what it is; nothing where nothing can."""
        count, scores, what = min(self.config.validation.num_judged, NUM_HELD_OUT), {}, ""
        if self.config.data.name == "shapes":
            right = obedience.evaluate_shapes(pipe, self.config, self.accelerator)
            scores = {name: float(np.mean(values)) for name, values in right.items()}
            what = f"obedience to {count} held-out captions, judged by a program"
        if self.config.checkpoint.best_by in DISTANCES:
            train = self.pictures.select("train")
            chosen = train[evenly_spaced(len(train), self.config.validation.num_judged)]
            made = figures.to_arrays(self.drawn(pipe, [self.pictures[int(i)]["captions"][0] for i in chosen]))
            scores |= set_distances(self.pictures, made, self.config.data.cache_dir)
            what = what or f"{len(made)} training captions drawn"
        return scores, what

    def finish(
        self, state: dict, saved: Path, prompts: list[str], pictures: list[Image.Image], scores: dict[str, float], what: str
    ) -> list[str]:
        """Writes down `scores`, which are `what`, and the exported folder; returns what to say."""
        config, main, known, said = self.config, self.accelerator.is_main_process, self.told(state), []
        output_dir, pipe = Path(config.output_dir), self.shareable()
        if scores:
            line = ", ".join(f"{k} {v:.1%}" if k.islower() else f"{k} {v:.4g}" for k, v in scores.items())
            known["facts"][what] = line
            said.append(f"{what}: {line}")
            if main:
                (output_dir / "evaluation.json").write_text(json.dumps(scores, indent=2))
        folder = output_dir / "pipeline"
        if main:
            if config.lora.rank:
                finetune.save_lora(self.pipe, output_dir / "lora")
            h, curve = config.hub, figures.loss_curve(output_dir / "metrics.jsonl")
            raw = checkpoints.raw_weights(saved) if "raw" in h.variants else None
            export_pipeline(
                pipe, folder, samples=list(zip(prompts, pictures)), curve=curve, variants=h.variants, raw=raw,
                max_shard_size=h.max_shard_size, **known,
            )  # fmt: skip
        return [*said, f"wrote {folder}. Open it with:  DiffusionPipeline.from_pretrained({str(folder)!r})"]


def captioned(pictures: PictureSet, count: int) -> tuple[list[str], list[np.ndarray]]:
    """Captions and pictures `(H, W, C)` uint8 that `drawing.to_show` chooses."""
    chosen = drawing.sample_indices(pictures, count)
    return [pictures[i]["captions"][0] for i in chosen], [pictures.picture(i) for i in chosen]

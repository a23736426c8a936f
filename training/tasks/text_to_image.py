"""Text to image: a text encoder and a UNet that predicts the noise, the image or a velocity. The base of other tasks."""

import copy
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer

from sfumato.figures import loss_curve
from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.pipelines.codecs import set_codec, to_pictures
from sfumato.pipelines.conditions import x0_estimator
from sfumato.pipelines.export import RunRecord, WeightFiles
from sfumato.pipelines.guided import NetworkInputs
from sfumato.registries import Metric, figures_of, metrics_for
from sfumato.training.config.rules import named_source
from sfumato.training.config.schema import Config
from sfumato.training.data.cached import cached_latents, cached_texts
from sfumato.training.data.loader import SampleData, seed_layers, to_device
from sfumato.training.data.streams import Stream, Streams
from sfumato.training.engine.ema import EMA
from sfumato.training.models.build import build_pipeline
from sfumato.training.models.denoiser import Denoiser, ModelNeeds
from sfumato.training.models.finetune import save_lora
from sfumato.training.models.latent_space import encode, is_identity
from sfumato.training.models.parameters import plain_pipeline
from sfumato.training.models.state_files import raw_weights
from sfumato.training.models.text import warn_of_long_captions
from sfumato.training.objectives import (
    LossMoments,
    add_offset,
    loss_weight,
    nearest_noise,
    sample_timesteps,
    weighted_mse,
)
from sfumato.training.publish import facts
from sfumato.training.quality.drawing import draw_images, sample_captions, sampling_pipeline
from sfumato.training.quality.evaluation import Evaluation, Plan
from sfumato.training.quality.held_out import held_out_loss
from sfumato.training.tasks.protocol import Outcome, TaskContext


class TextToImage:
    """A text encoder and a UNet that predicts eps, x_0, v or a flow's velocity from a noisy image and its caption.

    It has the attributes of `protocol.Task`, and more.

    Attributes:
        pipe: the model.
        levels: the signal-to-noise ratio of every timestep, on the CPU; `snr`, the same on the device; `drawn_levels`, where
            timesteps are drawn: on the CPU, since MPS has no quantiles, or where the losses' moments are.
        prompts: those of the sample grids.
    """

    # What else the loader makes of an image; see `SampleData`.
    extra_arrays: Callable[[np.ndarray, int, Streams], dict[str, np.ndarray]] | None = None

    @classmethod
    def model_needs(cls, config: Config) -> ModelNeeds:
        """Nothing further."""
        return ModelNeeds()

    def __init__(self, context: TaskContext):
        self.config = config = context.config
        self.images = context.images
        self.accelerator = context.accelerator
        self.streams = context.streams
        device = self.accelerator.device
        self.pipe = pipe = self._build(context.checkpoint)
        set_codec(pipe.unet, self.images.codec)
        pipe.vae.to(device)
        self.is_pixel_model = is_identity(pipe.vae)
        self.module: torch.nn.Module = Denoiser(pipe.unet, pipe.text_encoder, pipe.controlnet).to(device)
        self.frozen_parts = (pipe.unet, pipe.text_encoder, pipe.vae)
        self._speed_up()
        texts, latents = self._cached()
        self.data = SampleData(
            images=self.images,
            texts=texts,
            latents=latents,
            streams=self.streams,
            extra_arrays=self.extra_arrays,
            tokenizer=pipe.tokenizer,
            as_stored=self.is_pixel_model and self.images.repeat > 1,
        )
        self.moments = LossMoments(device="cpu" if device.type == "mps" else device) if config.objective.importance else None
        self.levels = pipe.scheduler.snr(pipe.scheduler.training_levels()).cpu()
        self.snr = self.levels.to(device)
        self.drawn_levels = self.levels if self.moments is None else self.levels.to(self.moments.device)
        o = config.objective
        self.weight = partial(
            loss_weight,
            prediction_type=pipe.scheduler.prediction_type,
            kind=o.weight,
            gamma=o.min_snr_gamma,
            floor=o.min_snr_floor,
            p2_gamma=o.p2_gamma,
            sigma_data=o.edm_sigma_data,
        )
        self.prompts = list(config.validation.prompts) or sample_captions(self.images)

    def _build(self, checkpoint: Path | None) -> SfumatoPipeline:
        """The model, with the tokenizer of the run that it resumes; its sampler and guider are tried out."""
        config, tokenizer = self.config, None
        if checkpoint is not None:
            if not (checkpoint / "pipeline" / "tokenizer").is_dir():
                raise ValueError(f"{checkpoint} belongs to a task other than {config.task}")
            tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "pipeline" / "tokenizer")
        captions = self.images.training_captions()
        pipe = build_pipeline(config, captions, tokenizer)
        warn_of_long_captions(pipe, captions)
        if is_identity(pipe.vae) and self.images.repeat != pipe.vae_scale_factor:
            raise ValueError(
                f"this model reads one value per {pipe.vae_scale_factor} x {pipe.vae_scale_factor} pixels, but"
                f" {config.data.name} has one per {self.images.repeat} x {self.images.repeat}; see vae.repeat"
            )
        steps, num_steps = pipe.scheduler.config.num_train_timesteps, config.validation.num_inference_steps
        if num_steps > steps:
            raise ValueError(f"validation.num_inference_steps={num_steps}: the model has {steps} steps")
        sampler = copy.deepcopy(sampling_pipeline(pipe, config.validation).scheduler)
        sampler.set_timesteps(num_steps)  # fails now, not when the first grid is drawn
        return pipe

    def _speed_up(self) -> None:
        """Gradient checkpointing and `torch.compile`, as the config says."""
        self.losses = self._losses
        if self.config.train.gradient_checkpointing:
            for network in filter(None, (self.pipe.unet, self.pipe.controlnet)):
                network.enable_gradient_checkpointing()
        if self.config.train.compile == "unet":
            self.pipe.unet.compile()
        elif self.config.train.compile == "regional":
            self.pipe.unet.compile_repeated_blocks()
        elif self.config.train.compile == "loss":
            self.losses = torch.compile(self._losses)
        elif self.config.train.compile == "graphs":
            self.losses = torch.compile(self._losses, mode="reduce-overhead")

    def _cached(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Token ids or embeddings of every caption, and latents of every image if they are cached."""
        data = self.config.data
        pipe = self.pipe
        latents = None
        if data.cache_latents and self.is_pixel_model:
            raise ValueError("data.cache_latents=true: a pixel model has no latents to cache; leave it out")
        if data.cache_embeddings and any(parameter.requires_grad for parameter in pipe.text_encoder.parameters()):
            raise ValueError("data.cache_embeddings=true needs a frozen text encoder: text_encoder.train=false")
        if data.cache_latents:
            latents = cached_latents(self.images, pipe.vae, data.cache_dir)
        encoder = pipe.text_encoder if data.cache_embeddings else None
        return cached_texts(self.images, pipe.tokenizer, encoder, data.cache_dir), latents

    def begin_step(self, done: float, ema: EMA) -> None:
        """Nothing to do."""

    def check(self) -> None:
        """Nothing to check."""

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Draw t on the host, or where the losses' moments are, and everything else on the device."""
        o = self.config.objective
        seed_layers(self.streams, batch)
        u, share = batch["timestep_u"], None
        if self.moments is not None:
            u, share = self.moments.warp(u.to(self.moments.device, non_blocking=True))
        t = sample_timesteps(u, self.drawn_levels, o.timesteps, o.log_snr_mean, o.log_snr_std)
        losses = self.losses(model, to_device({**batch, "t": t}, self.accelerator.device))
        if self.moments is not None:
            pairs = cast(torch.Tensor, self.accelerator.gather(torch.stack([u.float(), losses.detach()], dim=1)))
            self.moments.update(*pairs.T)
            losses = cast(torch.Tensor, share).to(losses.device) * losses
        return losses.mean()

    def _losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Draw x_0 and eps, noise, predict, compare (Ho et al. 2020, equation 14, weighted): `(B,)`, at timesteps `t`."""
        o, scheduler = self.config.objective, self.pipe.scheduler
        t = batch["t"]
        x_0 = self.x_0(batch)
        noise = self.noise(batch["sample_key"], x_0)
        if o.empty_caption == "noise":
            x_0, noise = self.with_noise_alone(x_0, noise, batch)
        x_t = scheduler.add_noise(x_0, noise, t)
        output = self.predict(model, x_t, t, batch)
        prediction, target = output[:, : x_0.shape[1]], scheduler.training_target(x_0, noise, t)
        losses = weighted_mse(prediction, target, self.weight(self.snr[t]))
        if output.shape[1] > x_0.shape[1]:  # the hybrid loss: the bound teaches the variance and leaves the mean alone
            halves = torch.cat([prediction.detach(), output[:, x_0.shape[1] :]], dim=1).float()
            losses = losses + o.vlb_weight * len(self.snr) * scheduler.bound_term(halves, x_0, x_t, t)
        return losses

    def with_noise_alone(
        self, x_0: torch.Tensor, noise: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_0 and eps for pure noise where captions were dropped: x_t is N(0, 1), and they are their expectations given x_t.

        For x_0 from N(0, 1), E[x_0 | x_t] = sqrt(abar) x_t and E[eps | x_t] = sqrt(1 - abar) x_t, so v is zero.
        """
        signal, deviation = self.pipe.scheduler.signal_and_noise(batch["t"], x_0)
        x_t = self.streams.normal(batch["sample_key"], Stream.EMPTY, tuple(x_0.shape[1:]))
        is_empty = batch["is_empty"].reshape(-1, 1, 1, 1)
        return torch.where(is_empty, signal * x_t, x_0), torch.where(is_empty, deviation * x_t, noise)

    def x_0(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Clean latents or pixels, `(B, C, h, w)`."""
        if "x_0" in batch:
            return batch["x_0"]
        return encode(self.pipe.vae, batch["pixel_values"], is_pixel_model=self.is_pixel_model)

    def noise(self, keys: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        """The noise to train with, `(B, C, h, w)`; for each sample by its own key."""
        o, shape = self.config.objective, tuple(x_0.shape[1:])
        if o.noise_candidates > 1:
            noise = nearest_noise(x_0, self.streams.normal(keys, Stream.NOISE, (o.noise_candidates, *shape)))
        else:
            noise = self.streams.normal(keys, Stream.NOISE, shape)
        if o.offset_noise:
            noise = add_offset(noise, o.offset_noise, self.streams.normal(keys, Stream.OFFSET, shape[:1]))
        return noise

    def predict(
        self,
        model: torch.nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        batch: dict[str, torch.Tensor],
        *,
        streams: Streams | None = None,
        always_estimate: bool = False,
    ) -> torch.Tensor:
        """The network's output for noisy latents and whatever else the task gives it.

        With self-conditioning, half of the samples, by their streams, or all are also given the network's first estimate.
        """
        streams = streams or self.streams
        if self.config.objective.self_conditioning:
            with torch.no_grad():
                first = model(torch.cat([x_t, torch.zeros_like(x_t)], dim=1), t, batch["text"], None)
                first = x0_estimator(self.pipe.scheduler)(first.float(), x_t, t)
            chosen = (streams.uniform(batch["sample_key"], Stream.ESTIMATE) < 0.5) | always_estimate
            estimate = torch.where(chosen.reshape(-1, 1, 1, 1), first, 0)
            return model(torch.cat([x_t, estimate], dim=1), t, batch["text"], None)
        x_t, inputs = self.network_input(x_t, batch, streams)
        return model(x_t, t, batch["text"], inputs)

    def network_input(
        self, x_t: torch.Tensor, batch: dict[str, torch.Tensor], streams: Streams
    ) -> tuple[torch.Tensor, NetworkInputs | None]:
        """The UNet's input: the noisy latents, with more channels if a task adds them; and the network's other inputs."""
        return x_t, None

    def state(self) -> dict[str, Any]:
        """The moments of the losses, if noise levels are importance sampled."""
        return {} if self.moments is None else {"moments": self.moments.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the `state` of a checkpoint."""
        if self.moments is not None and "moments" in state:
            self.moments.restore(state["moments"])

    def export_pipe(self) -> SfumatoPipeline:
        """The pipeline as it draws and is exported: whole modules, with the sampler and the guider of `validation`."""
        return sampling_pipeline(plain_pipeline(self.pipe, self.module), self.config.validation)

    def samples(self) -> tuple[list[str], list[Image.Image]]:
        """The fixed prompts, drawn with the fixed seeds."""
        pipe = self.export_pipe()
        return self.prompts, to_pictures(pipe.codec, self.draw(pipe, self.prompts))

    def draw(self, pipe: SfumatoPipeline, captions: list[str], **inputs) -> list[Image.Image]:
        """One image per caption, as `validation` says; see `drawing.draw_images`."""
        return draw_images(pipe, captions, self.config.validation, self.accelerator, **inputs)

    def held_out(self) -> dict[str, float]:
        """The loss on held-out images; see `held_out.held_out_loss`."""
        return held_out_loss(self)

    @property
    def judged_split(self) -> str:
        """The split that `drawing.sample_indices` takes images from, in words."""
        return "held-out" if len(self.images.select("held_out")) else "training"

    def scores(self) -> tuple[dict[str, float], str]:
        """The metrics of drawings that are measured at the end of every run, and those that `checkpoint.best_by` names."""
        count = self.config.validation.num_judged
        plan = Plan(count=count, parts=("train",), intervals=False)
        evaluation = Evaluation(self.export_pipe(), self.config, self.images, self.accelerator, plan)
        scores: dict[str, float] = {}
        labels = []
        for name, metric in metrics_for(
            named_source(self.config), self.config.task, objects=self.images.codec is not None
        ).items():
            if self._is_wanted(name, metric):
                figures = metric.compute(evaluation)
                if not figures:
                    continue
                scores |= {figure: score.value for figure, score in figures.items()}
                held_out = min(count, len(self.images.select("held_out")))
                labels.append(
                    (metric.at_end or f"{min(count, len(self.images.select('train')))} training captions drawn").format(
                        count=held_out
                    )
                )
        return scores, "; ".join(dict.fromkeys(labels))

    def _is_wanted(self, name: str, metric: Metric) -> bool:
        return bool(metric.at_end) or self.config.checkpoint.best_by in figures_of(name)

    def _export_record(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Facts for the card, metadata and settings of an exported folder."""
        return (
            facts.facts(self.config, self.accelerator, self.images, state),
            facts.metadata(self.config, self.images, state, self._settings),
            self._settings,
        )

    @cached_property
    def _settings(self) -> str:
        return facts.public_settings(self.config)

    def checkpoint_writer(self, state: dict[str, Any]) -> Callable[[Path, Path], object]:
        """See `protocol.ResultsHalf`: a checkpoint holds the whole `pipeline/`."""
        pipe, (card_facts, metadata, settings) = self.export_pipe(), self._export_record(state)
        run = RunRecord(metadata=metadata, settings=settings)

        def write(new: Path, folder: Path) -> None:
            export_pipeline(pipe, new / "pipeline", card_facts, run=run, where=str(folder / "pipeline"))

        return write

    def write_what_is_whole(self, folder: Path) -> None:
        """The tokenizer, whose vocabulary stays."""
        self.pipe.tokenizer.save_pretrained(folder / "pipeline" / "tokenizer")

    def finish(self, state: dict[str, Any], outcome: Outcome) -> list[str]:
        """Write the scores, the exported folder and, with LoRA, the adapter by itself."""
        config, messages = self.config, []
        card_facts, metadata, settings = self._export_record(state)
        output_dir, pipe = Path(config.output_dir), self.export_pipe()
        folder = output_dir / "pipeline"
        if outcome.scores:
            parts = [f"{k} {v:.1%}" if k.islower() else f"{k} {v:.4g}" for k, v in outcome.scores.items()]
            card_facts[outcome.scores_label] = ", ".join(parts)
            messages.append(f"{outcome.scores_label}: {card_facts[outcome.scores_label]}")
        if self.accelerator.is_main_process:
            if outcome.scores:
                (output_dir / "evaluation.json").write_text(json.dumps(outcome.scores, indent=2))
            if config.lora.rank:
                save_lora(self.pipe, output_dir / "lora")
            raw = None
            if "raw" in config.hub.variants and outcome.checkpoint is not None:
                raw = raw_weights(outcome.checkpoint)
            run = RunRecord(
                samples=list(zip(outcome.captions, outcome.images)),
                metadata=metadata,
                settings=settings,
                curve=loss_curve(output_dir / "metrics.jsonl"),
            )
            weights = WeightFiles(variants=config.hub.variants, raw=raw, max_shard_size=config.hub.max_shard_size)
            export_pipeline(pipe, folder, card_facts, run=run, weights=weights)
        return [*messages, f"wrote {folder}. Open it with:  DiffusionPipeline.from_pretrained({str(folder)!r})"]

"""Text to image, image to image, inpainting, upscaling, control; any guider and scheduler of diffusers, over stock parts.

Self-contained on purpose (torch, diffusers, transformers, and those of our modules that `export.joined_source` joins): this
file travels inside shared model folders.
"""

import copy
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from sfumato.pipelines.conditions import (
    codec_facts,
    default_size,
    encode_image,
    extra_input_kind,
    image_channels,
    inpainting_condition,
    low_res_condition,
    renoise,
    x0_estimator,
)
from sfumato.pipelines.guided import (
    CallState,
    Embeds,
    NetworkInputs,
    build_guider,
    guidance_embedding,
    guidance_width,
    guided_prediction,
    one_at_a_time,
    weak_embeds,
)
from sfumato.pipelines.inputs import CallInputs, check_inputs, to_mask, to_pixels, tokenize, warn_of_unknown_words, warn_once
from sfumato.pipelines.stock import REMOTE_CLASS, check_no_lora, quiet_transformers, stock_parts, stock_pipeline, write_class
from sfumato.pipelines.trust import check_folder
from sfumato.schedulers.scheduling_sfumato_ddpm import SfumatoDDPMScheduler
from sfumato.schedulers.scheduling_sfumato_flow import SfumatoFlowScheduler

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """The image that a call changes, and where it is changed.

    Attributes:
        pixels: `(B, C, H, W)` in [-1, 1]; None if the call starts from noise alone.
        mask: `(B, 1, H, W)` in [0, 1], 1 where to redraw; None means everywhere.
        x_0, latent_mask: the same in latent space.
    """

    pixels: Any = None
    mask: torch.Tensor | None = None
    x_0: Any = None
    latent_mask: torch.Tensor | None = None


def _located(source: str) -> str:
    """The folder of the model that `source` names if sfumato is installed, otherwise `source` itself."""
    try:
        return importlib.import_module("sfumato.pipelines.locate").locate_pipeline(source)
    except (ModuleNotFoundError, ValueError):  # diffusers reports what is wrong, or the Hub has it
        return source


class SfumatoPipeline(DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin):
    """Draws images from text with a UNet, a CLIP text encoder, a VAE and any diffusers scheduler and guider.

    `SfumatoPipeline.from_pretrained(folder)` opens any folder in Stable Diffusion's format, whoever made it, and
    `save_pretrained` writes that format: stock classes only, so that loading it does not need `sfumato`.

    Args:
        vae: turns latents into images; the identity in pixel models.
        text_encoder, tokenizer: turn prompts into `(B, L, D)` embeddings.
        unet: predicts the quantity that the scheduler's `prediction_type` names.
        scheduler: stock `DDPMScheduler` and `FlowMatchEulerDiscreteScheduler` are converted to ours; others stay as they are.
        guider: how conditional and unconditional predictions are combined; `ClassifierFreeGuidance` if None.
        low_res_scheduler, max_noise_level: for upscaling models, how noise is added to the small image, and how much at most.
        controlnet: makes the network follow a map, such as an edge map (Zhang et al. 2023, arXiv 2302.05543).
        safety_checker, feature_extractor, image_encoder, requires_safety_checker: not used, but kept for the Stable Diffusion
            folders that have them, so that saving loses nothing.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]
    _optional_components += ["guider", "low_res_scheduler", "controlnet"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(  # noqa: PLR0913 - the signature is that of diffusers
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: Union[UNet2DConditionModel, UNetMotionModel],  # noqa: UP007  (the form that diffusers 0.35 understands)
        scheduler: KarrasDiffusionSchedulers,
        guider: Optional[BaseGuidance] = None,  # noqa: UP045  (the same)
        safety_checker: Optional[object] = None,  # noqa: UP045
        feature_extractor: Optional[object] = None,  # noqa: UP045
        image_encoder: Optional[object] = None,  # noqa: UP045
        requires_safety_checker: bool = False,
        low_res_scheduler: Optional[object] = None,  # noqa: UP045
        controlnet: Optional[object] = None,  # noqa: UP045
        max_noise_level: int = 350,
        self_conditioning: bool = False,
    ):
        super().__init__()
        if type(unet).__name__ == "UNetMotionModel":  # clips
            unet, vae = importlib.import_module("sfumato.pipelines.motion").as_clips(unet, vae)
        if safety_checker is not None:
            logger.warning("SfumatoPipeline does not run the safety checker that comes with this model.")
        ours = {DDPMScheduler: SfumatoDDPMScheduler, FlowMatchEulerDiscreteScheduler: SfumatoFlowScheduler}
        stock: Any = scheduler
        if type(stock) in ours:
            scheduler = ours[type(stock)].from_config(stock.config)
        # StableDiffusionPipeline sets this on every scheduler; without it a saved model would not draw the same images.
        given: Any = scheduler
        if given is not None and given.config.get("steps_offset", 1) != 1:
            scheduler = type(given).from_config(given.config, steps_offset=1)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            guider=guider,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            low_res_scheduler=low_res_scheduler,
            controlnet=controlnet,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker, max_noise_level=max_noise_level,
            self_conditioning=self_conditioning,
        )  # fmt: skip
        self._call = CallState()
        self._interrupt = False
        if controlnet is not None and self.reads:
            raise ValueError(f"a ControlNet cannot be combined with a UNet that reads {self.reads}")
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Open a folder or Hub repository in Stable Diffusion's format, the newest model of a run folder, or a
        packaged model such as `openmoji_128`. Arguments as for `DiffusionPipeline`.

        Only safetensors files are opened, and no code from the folder is run.

        Raises:
            ValueError: see `trust.check_folder`.
        """
        folder: str = _located(str(pretrained_model_name_or_path))
        kwargs.setdefault("use_safetensors", True)
        if not os.path.isdir(folder):
            folder = str(cls.download(folder, **kwargs))
            for name in ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision"):
                kwargs.pop(name, None)
        check_folder(folder, skip=set(kwargs))
        try:
            with quiet_transformers():
                return super().from_pretrained(folder, **kwargs)
        except (OSError, torch.OutOfMemoryError):  # missing files or memory: diffusers' own error, not a fault of the folder
            raise
        except Exception as error:  # an odd config can raise nearly anything
            raise ValueError(f"{folder} cannot be opened: {type(error).__name__}: {error}") from error

    def save_pretrained(self, save_directory, **kwargs):
        """Save in Stable Diffusion's format: stock classes only, so that plain diffusers opens it. (A model with
        self-conditioning is opened by this class only; `export_pipeline` puts its code into the folder.)

        The guider is not saved, since it belongs to the call and not to the weights. Arguments as for `DiffusionPipeline`.

        Raises:
            ValueError: a LoRA is loaded beside the weights.
        """
        check_no_lora(self)
        with quiet_transformers():
            stock_parts(self).save_pretrained(save_directory, **kwargs)
        write_class(self, save_directory)

    def to_stock(self) -> DiffusionPipeline:
        """The same model as the stock pipeline of its kind, sharing all weights; see `stock.stock_pipeline`."""
        return stock_pipeline(self)

    @classmethod
    def _dict_from_json_file(cls, *args, **kwargs):
        """As in diffusers, but a folder that names its own `pipeline.py` is opened by this class; that code does not run."""
        config = super()._dict_from_json_file(*args, **kwargs)
        if config.get("_class_name") == REMOTE_CLASS:
            config["_class_name"] = cls.__name__
        if config.get("_class_name") == "AnimateDiffPipeline":  # its UNet already contains the whole adapter
            config.pop("motion_adapter", None)
        return config

    def _embed(self, text: list[str], device) -> torch.Tensor:
        """Encode prompts as embeddings `(len(text), L, D)`; warns of text that is cut off and of unknown words."""
        warn_of_unknown_words(self.tokenizer, text)
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        ids = tokenize(
            self.tokenizer, text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        for prompt, full in zip(text, tokenize(self.tokenizer, text, verbose=False).input_ids):
            if len(full) > length:
                cut = self.tokenizer.decode(full[length - 1 : -1])
                warn_once(f"The prompt {prompt[:60]!r} is longer than {length - 2} tokens; this part was cut off: {cut}")
        return self.text_encoder(ids.to(device))[0]

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode prompts and negative prompts.

        Returns:
            Two tensors `(B * num_images_per_prompt, L, D)`; the second is None without classifier-free guidance.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self._embed([prompt] if isinstance(prompt, str) else list(prompt or ()), device)
        batch_size = prompt_embeds.shape[0]
        dtype = self.unet.dtype if self.text_encoder is None else self.text_encoder.dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = None
        else:
            if negative_prompt_embeds is None:
                negative = [negative_prompt or ""] if not isinstance(negative_prompt, list) else negative_prompt
                negative_prompt_embeds = self._embed(negative, device)
            if negative_prompt_embeds.shape[0] == 1:
                negative_prompt_embeds = negative_prompt_embeds.expand(batch_size, -1, -1)
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    def prepare_noise(self, num_images, height, width, dtype, device, generator, latents=None) -> torch.Tensor:
        """Standard normal noise `(num_images, C, h, w)`, or `latents` if given."""
        factor = self.vae_scale_factor
        shape = (num_images, self.vae.config.latent_channels, height // factor, width // factor)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            if hasattr(self.vae, "frames"):  # AnimateDiff's noise has the frames inside the channels
                latents = latents.unflatten(1, (-1, self.vae.frames)).transpose(1, 2).flatten(1, 2)
        return latents.to(device, dtype)

    def prepare_image(self, image, mask_image, size: tuple[int, int], batch: tuple[int, int], dtype) -> "SourceImage":
        """The image and the mask passed to a call, in pixels and in latent space.

        `size` is (height, width); `batch` is the number of prompts and the number of images for each.
        """
        device = self._execution_device
        pixels = to_pixels(image, image_channels(self.vae), *size, *batch).to(device, dtype)
        channels = 1 if self.codec is None else image_channels(self.vae)
        mask = None if mask_image is None else to_mask(mask_image, *size, *batch, channels=channels).to(device, dtype)
        x_0 = encode_image(self.vae, pixels) * self.vae.config.scaling_factor
        latent_mask = None if mask is None else F.interpolate(mask, x_0.shape[-2:], mode="area")
        return SourceImage(pixels=pixels, mask=mask, x_0=x_0, latent_mask=latent_mask)

    @property
    def trained_size(self) -> tuple[int, int]:
        """Height and width of the training images, in pixels."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def reads(self) -> str | None:
        """What the UNet reads besides the noisy latents: `masks`, `low_res`, `estimate` or None; see `conditions`."""
        return "estimate" if self.config["self_conditioning"] else extra_input_kind(self.unet, self.vae)

    @property
    def codec(self) -> Any:
        """The codec that turns the arrays that the model draws into objects, such as molecules; None if it draws images or if
        sfumato is not installed.
        """
        facts = codec_facts(self.unet)
        try:
            return importlib.import_module("sfumato.pipelines.codecs").open_codec(facts) if facts else None
        except ModuleNotFoundError:
            return None

    def prepare_guider(self, guidance_scale: float | None) -> tuple[BaseGuidance, object | None]:
        """A fresh guider for a call, so that no state (step, momentum) leaks into the next, and its weaker model."""
        weak = getattr(self.guider, "weak", None)
        guider = copy.deepcopy(self.guider, {id(weak): weak}) or build_guider(ClassifierFreeGuidance)
        if guidance_width(self.unet) is not None:  # distilled: the scale is an input of the network
            if self.guider is not None and not isinstance(self.guider, ClassifierFreeGuidance):
                raise ValueError(f"the guidance scale is an input of this model, which takes no {type(self.guider).__name__}")
            guider._enabled = False
        if guidance_scale is not None:
            setattr(guider, "guidance_scale", float(guidance_scale))  # noqa: B010  (a field of most guiders)
        return guider, weak

    def prepare_low_res(
        self, image, noise_level: int | None, size, batch, generator, dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For upscaling: the smaller image with noise added, `(B, C, h, w)`, and the level of that noise, `(B,)`."""
        level = min(20, self.config["max_noise_level"]) if noise_level is None else noise_level
        height, width = (side // self.vae_scale_factor for side in size)
        channels, device = image_channels(self.vae), self._execution_device
        small = to_pixels(image, channels, height, width, *batch, resample=Image.Resampling.BICUBIC).to(device, dtype)
        noisy = low_res_condition(self.low_res_scheduler, small, level, generator)
        return noisy, torch.full((len(small),), level, device=device)

    def prepare_control(self, control_image, size, batch, dtype) -> torch.Tensor:
        """The map that the ControlNet follows, `(B, C, H, W)` in [0, 1]."""
        channels = self.controlnet.config.conditioning_channels
        hint = to_pixels(control_image, channels, *size, *batch, name="control_image")
        return (hint / 2 + 0.5).to(self._execution_device, dtype)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents `(B, C, h, w)` to images `(B, C, H, W)`, roughly in [-1, 1]."""
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

    def add_noise(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Add `noise` to `x_0` at the level of timestep `t`, in the scheduler's own scale."""
        return self.scheduler.add_noise(x_0, noise, t.reshape(1).expand(len(x_0)))

    def predict(
        self,
        guider: BaseGuidance,
        latents: torch.Tensor,
        t: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        inputs: NetworkInputs | None = None,
    ) -> torch.Tensor:
        """One guided prediction, `(B, C, h, w)`; see `guided.guided_prediction`.

        Only DDPM can use a learned variance, the second half of the output; other samplers get the first half.
        """
        embeds = Embeds(positive=prompt_embeds, negative=negative_prompt_embeds)
        output = guided_prediction(self, guider, latents, t, embeds=embeds, inputs=inputs or NetworkInputs(), state=self._call)
        return output if isinstance(self.scheduler, DDPMScheduler) else output[:, : self.vae.config.latent_channels]

    @property
    def num_passes(self) -> int:
        """Network passes for each image of the last call: two per step with guidance, one outside its interval."""
        return self._call.num_passes

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current call; 1 if the guider has none."""
        return self._call.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        """Set by diffusers' callbacks to end guidance: at 1 or below, the rest of the call runs without it."""
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._call.guidance_scale = value
        self._call.guidance_ended = value <= 1

    @property
    def cross_attention_kwargs(self) -> dict | None:
        """Those of the current call, such as `{"scale": 0.5}` for the strength of a LoRA."""
        return self._call.cross_attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt`, after which the call takes no further step."""
        return self._interrupt

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current call needs an unconditional prediction."""
        return self._call.guided

    @property
    def num_timesteps(self) -> int:
        """Number of scheduler steps of the current call."""
        return self._call.num_timesteps

    @torch.no_grad()
    @one_at_a_time
    def __call__(  # noqa: C901, PLR0913 - the signature is that of diffusers
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: object | None = None,
        mask_image: object | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        num_resamples: int = 1,
        noise_level: int | None = None,
        control_image: object | None = None,
        controlnet_conditioning_scale: float = 1.0,
        cross_attention_kwargs: dict | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw images from text; with `image`, change an image; with `mask_image`, redraw a part of it; or upscale `image`.

        Args:
            prompt, negative_prompt: one string or a list; the empty string means no condition.
            image: the image to start from or to redraw in part; for an upscaling model, the smaller image. See
                `inputs.to_pixels`.
            mask_image: where to redraw `image`: 1 is redrawn, 0 is kept bit for bit; see `inputs.to_mask`.
            strength: how far `image` is taken back towards noise, above 0 and at most 1; 0.8 by default, 1 with a mask.
            height, width: in pixels; the size that the model was trained at by default.
            num_inference_steps: network evaluations (times two with guidance).
            guidance_scale: overrides the guider's own for this call (Ho and Salimans 2022, arXiv 2207.12598, in the form
                uncond + scale * (cond - uncond)); 1 means no guidance.
            num_images_per_prompt: images for each prompt.
            generator: one for the batch, or one for each image, which then does not depend on the others in the batch.
            latents: starting noise `(B * num_images_per_prompt, C, h, w)`, standard normal.
            prompt_embeds, negative_prompt_embeds: `(B, L, D)`, in place of text.
            output_type: `pil`; `np` `(B, H, W, 3)` in [0, 1]; `pt` `(B, 3, H, W)` in [0, 1]; `latent`; for a model with a
                codec, `decoded`: a list of the objects that its arrays stand for.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, t, tensors)` after each step; may return replacements.
            callback_on_step_end_tensor_inputs: which tensors it is passed.
            num_resamples: with a mask, how many times each step is taken; all but the last are undone by noise, so that the
                redrawn part fits the rest (RePaint with jumps of one step; Lugmayr et al. 2022, arXiv 2201.09865).
            noise_level: timestep whose noise an upscaling model adds to `image` (default 20); more invents more detail.
            control_image, controlnet_conditioning_scale: the map that the ControlNet follows, given like `image`; its weight.
            cross_attention_kwargs: passed to the UNet; `{"scale": 0.5}` sets the strength of a LoRA.

        A callback may set `pipe._interrupt = True`, after which no further step is taken. Calls from several threads that
        share a scheduler or a network wait for each other.

        Raises:
            TypeError, ValueError: see `inputs.check_inputs`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        trained = default_size(self, image)
        height = trained[0] if height is None else height
        width = trained[1] if width is None else width
        size = (height, width)
        check_inputs(
            self,
            CallInputs(
                prompt=prompt,
                negative_prompt=negative_prompt,
                image=image,
                mask_image=mask_image,
                strength=strength,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                output_type=output_type,
                callback_tensors=callback_on_step_end_tensor_inputs,
                num_resamples=num_resamples,
                noise_level=noise_level,
                control_image=control_image,
                control_scale=controlnet_conditioning_scale,
                callback=callback_on_step_end,
                cross_attention_kwargs=cross_attention_kwargs,
            ),
        )

        guider, weak = self.prepare_guider(guidance_scale)
        self._call = state = CallState(
            guidance_scale=getattr(guider, "guidance_scale", 1.0),
            guided=guider._enabled and guider.num_conditions > 1,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        self._interrupt = False
        device = self._execution_device
        if weak is not None:
            negative_prompt_embeds = weak_embeds(self, weak, prompt, prompt_embeds, device)
        positive, negative_prompt_embeds = self.encode_prompt(
            prompt, device, num_images_per_prompt, state.guided, negative_prompt, prompt_embeds, negative_prompt_embeds
        )
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps, dtype = self.scheduler.timesteps, positive.dtype
        batch = (len(positive) // num_images_per_prompt, num_images_per_prompt)

        # What the network reads besides noise and text. Its noise is drawn before the starting noise, as in stock pipelines.
        condition = None
        labels = None
        control = None
        if self.reads == "low_res":
            condition, labels = self.prepare_low_res(image, noise_level, size, batch, generator, dtype)
        if control_image is not None:
            control = self.prepare_control(control_image, size, batch, dtype)
        told = None
        if (width_told := guidance_width(self.unet)) is not None:
            told = guidance_embedding(torch.full((len(positive),), state.guidance_scale, device=device), width_told)
            if negative_prompt and any([negative_prompt] if isinstance(negative_prompt, str) else negative_prompt):
                warn_once("A negative prompt has no effect on this model: its guidance scale is an input of the network.")
        inputs = NetworkInputs(
            class_labels=labels,
            control=control,
            control_scale=controlnet_conditioning_scale,
            attention=cross_attention_kwargs,
            guidance=told,
        )

        noise = self.prepare_noise(len(positive), height, width, dtype, device, generator, latents)
        x: torch.Tensor = noise * self.scheduler.init_noise_sigma
        source = SourceImage()
        if image is not None and self.reads != "low_res":
            source = self.prepare_image(image, mask_image, size, batch, dtype)
            strength = (0.8 if source.mask is None else 1.0) if strength is None else strength
            if strength < 1:
                begin = (num_inference_steps - round(strength * num_inference_steps)) * self.scheduler.order
                timesteps = timesteps[begin:]
                if hasattr(self.scheduler, "set_begin_index"):
                    self.scheduler.set_begin_index(begin)
                x = self.add_noise(source.x_0, noise, timesteps[0])
        estimate = None
        if self.reads == "masks":
            condition = inpainting_condition(self.vae, source.pixels, source.mask, noise)
        elif self.reads == "estimate":
            condition, estimate = torch.zeros_like(noise), x0_estimator(self.scheduler)
        state.num_timesteps = len(timesteps)
        # Deterministic samplers take no generator.
        taken = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in taken}

        progress: Any = self.progress_bar
        with progress(total=len(timesteps) // self.scheduler.order) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                last = i == len(timesteps) - 1
                for again in reversed(range(1 if last else num_resamples)):
                    guider.set_state(step=i, num_inference_steps=len(timesteps), timestep=t)
                    x_t = self.scheduler.scale_model_input(x, t)
                    model_input = x_t if condition is None else torch.cat([x_t, condition], dim=1)
                    output = self.predict(guider, model_input, t, positive, negative_prompt_embeds, inputs)
                    condition = estimate(output, x_t, t) if estimate else condition
                    x = self.scheduler.step(output, t, x, **step_kwargs, return_dict=False)[0]
                    if source.latent_mask is not None and self.reads != "masks":
                        original = source.x_0 if last else self.add_noise(source.x_0, noise, timesteps[i + 1])
                        x = source.latent_mask * x + (1 - source.latent_mask) * original
                    if again:
                        x = renoise(self.scheduler, x, timesteps[i + 1], t, generator)
                if callback_on_step_end is not None:
                    tensors: dict[str, Any] = {
                        "latents": x,
                        "prompt_embeds": positive,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    requested = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, requested) or {}
                    x, positive = tensors["latents"], tensors["prompt_embeds"]
                    negative_prompt_embeds = tensors["negative_prompt_embeds"]
                    if len(positive) != len(x):
                        raise ValueError(f"the callback returned {len(positive)} `prompt_embeds` for {len(x)} images")
                    guider._enabled = guider._enabled and not state.guidance_ended
                if (i + 1) % self.scheduler.order == 0 or last:
                    progress_bar.update()

        if not x.isfinite().all():
            logger.warning("The result is not finite: the weights are damaged, or half precision has overflowed.")
        images: Any = x
        if output_type != "latent":
            images = self.decode_latents(x)
            if source.mask is not None:
                images = source.mask * images + (1 - source.mask) * source.pixels
            if self.codec is not None and output_type in ("pil", "decoded"):
                arrays: Any = self.image_processor.postprocess(images, output_type="np")
                images = [self.codec.decode(array) for array in arrays]
                if output_type == "pil":
                    images = [Image.fromarray(self.codec.picture(thing)) for thing in images]
            else:
                images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

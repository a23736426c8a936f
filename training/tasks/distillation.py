"""A model that draws in a few steps, taught by one that needs many: consistency distillation, guidance included."""

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from PIL import Image

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.guided import NetworkInputs, guidance_embedding, guidance_width
from sfumato.pipelines.locate import locate_pipeline
from sfumato.schedulers import SfumatoDDPMScheduler
from sfumato.training.config.schema import Config
from sfumato.training.data.loader import seed_layers, to_device
from sfumato.training.data.streams import Stream, Streams
from sfumato.training.engine.ema import EMA
from sfumato.training.models.denoiser import ModelNeeds
from sfumato.training.models.finetune import add_guidance_input
from sfumato.training.quality.drawing import sampling_pipeline
from sfumato.training.tasks.inpainting import Inpainting
from sfumato.training.tasks.protocol import Collapsed, TaskContext, check_not_sharded
from sfumato.training.tasks.settings import DistilConfig
from sfumato.training.tasks.text_to_image import TextToImage

HUBER = 0.03  # errors below this count quadratically, errors above it linearly
CLEAN = 0.1  # with one segment, times below this fraction of all times count as clean
JUMPS = (4, 8, 16)  # how many the teacher's path from noise to image is divided into; each for a third of the run
OWN_STEPS = 0.35  # fraction of the samples at exactly the times at which the student will be called
LARGE = 0.15  # fraction told a larger scale than the teacher draws with, so that a careless one does no harm
WATCHED = 64  # outputs from pure noise over which their spread is measured


class Distillation(TextToImage):
    """A student of the model of `init_from`, which learns to predict the end of the teacher's path from anywhere on it.

    Consistency distillation (Song et al. 2023, arXiv 2303.01469) in segments (Heek et al. 2024, arXiv 2403.06807), of guided
    predictions whose scale is an input of the network, as in latent consistency models (Luo et al. 2023, arXiv 2310.04378).
    The folder is a stock one, sampled with `LCMScheduler`; it needs one pass per step at any scale.
    """

    @classmethod
    def model_needs(cls, config: Config) -> ModelNeeds:
        """The further channels of a teacher that inpaints."""
        needs = Inpainting.model_needs(config)
        return replace(needs, widens=False) if config.section(DistilConfig).masks else ModelNeeds()

    def __init__(self, context: TaskContext):
        check_not_sharded(context)
        self.settings = context.config.section(DistilConfig)
        if self.settings.masks:
            self.extra_arrays = Inpainting.extra_arrays
        super().__init__(context)
        device = self.accelerator.device
        self.teacher.to(device)
        self.target = copy.deepcopy(self.pipe.unet).requires_grad_(False).eval().to(device)
        self.frozen_parts = (*self.frozen_parts, self.teacher)
        ids = self.pipe.tokenizer([""], padding="max_length", max_length=self.pipe.tokenizer.model_max_length)
        self.no_text = torch.tensor(ids["input_ids"], device=device)
        self.jumps = JUMPS[0]
        self.num_levels = len(self.levels)
        self.own_steps = torch.tensor(self._own_steps(), device=device)
        self.spread = Spread()

    def _build(self, checkpoint) -> SfumatoPipeline:
        """The teacher's pipeline with the student as its UNet."""
        pipe = super()._build(checkpoint)
        if guidance_width(pipe.unet) is not None:
            raise ValueError(f"init_from={self.config.init_from!r} already draws in few steps; name its teacher")
        if pipe.reads != ("masks" if self.settings.masks else None):
            raise ValueError(f"init_from={self.config.init_from!r} reads {pipe.reads or 'no mask'} besides noise and text")
        pipe.text_encoder.requires_grad_(False).eval()
        self.teacher: Any = copy.deepcopy(pipe.unet).requires_grad_(False).eval()
        self.teacher_scheduler = pipe.scheduler
        student = add_guidance_input(pipe.unet, self.settings.guidance_width, self.config.seed)
        if self.settings.student is not None and checkpoint is None:
            self._begin_from(student, self.settings.student)
        pipe.register_modules(unet=student.requires_grad_(True).train())
        if isinstance(pipe.scheduler, SfumatoDDPMScheduler) and pipe.scheduler.prediction_type == "epsilon":
            # eps says nothing about the image where there is only noise, which is where the student begins.
            scheduler = SfumatoDDPMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
            pipe.register_modules(scheduler=scheduler)
        return pipe

    @staticmethod
    def _begin_from(student: torch.nn.Module, source: str) -> None:
        """Give a student the weights of an earlier one."""
        try:
            earlier = SfumatoPipeline.from_pretrained(locate_pipeline(source)).unet
            student.load_state_dict(earlier.state_dict())
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"distil.student={source!r} is not a student of this teacher: {error}") from error

    def _own_steps(self) -> list[int]:
        """The times at which the student is called when it draws in one to four steps, or as `validation` says."""
        sampler, times = copy.deepcopy(sampling_pipeline(self.pipe, self.config.validation).scheduler), set()
        for count in {1, 2, 3, 4, self.config.validation.num_inference_steps}:
            sampler.set_timesteps(count)
            times |= {min(round(float(t)), self.num_levels - 1) for t in sampler.timesteps}
        return sorted(times - {0})

    def begin_step(self, done: float, ema: EMA) -> None:
        """Take longer jumps first, and copy the averaged weights into the network that gives the targets."""
        self.jumps = JUMPS[min(int(len(JUMPS) * done), len(JUMPS) - 1)]
        with torch.no_grad():
            for parameter, average in zip(self.target.parameters(), ema.shadow_params, strict=True):
                parameter.copy_(average)

    def network_input(self, x_t: torch.Tensor, batch: dict[str, torch.Tensor], streams: Streams) -> Any:
        """Besides noise and text, the guidance scale of `validation`; for a model that inpaints, mask and image too."""
        scale = torch.full((len(x_t),), self.config.validation.guidance_scale, device=x_t.device)
        return self._seen(x_t, batch), NetworkInputs(guidance=guidance_embedding(scale, self.settings.guidance_width))

    def _seen(self, x_t: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The networks' input: noisy latents, and for a model that inpaints also the mask and the image around it."""
        return Inpainting.network_input(cast(Inpainting, self), x_t, batch, self.streams)[0] if self.settings.masks else x_t

    def samples(self) -> tuple[list[str], list[Image.Image]]:
        """As for the teacher's task."""
        return Inpainting.samples(cast(Inpainting, self)) if self.settings.masks else super().samples()

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Distance of the student's end of the path at x_t from its average's, one jump of the teacher later."""
        seed_layers(self.streams, batch)
        batch = to_device(batch, self.accelerator.device)
        keys, scheduler = batch["sample_key"], self.pipe.scheduler
        t = self._times(batch["timestep_u"], keys)
        x_0 = self.x_0(batch)
        x_t = scheduler.add_noise(x_0, self.noise(keys, x_0), t)
        scale, told = self._scales(keys)
        inputs = NetworkInputs(guidance=guidance_embedding(told, self.settings.guidance_width))
        with torch.no_grad(), self.accelerator.autocast():
            text = batch["text"]
            text = text if text.is_floating_point() else self.pipe.text_encoder(text)[0]
            target = self._target(x_t, t, text, inputs, scale, batch)
        estimate = scheduler.denoised(model(self._seen(x_t, batch), t, text, inputs).float(), x_t, t)
        self.spread.add(estimate.detach(), x_0, t == self.num_levels - 1)
        return ((estimate - target).square() + HUBER**2).sqrt().sub(HUBER).mean()

    def _times(self, u: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Timesteps `(B,)`: spread evenly, some of them replaced by those that the sampler uses."""
        own = self.own_steps
        picked = own[(self.streams.uniform(keys, Stream.OWN_STEP) * len(own)).long()]
        even = (u * self.num_levels).long().clamp(1, self.num_levels - 1)
        return torch.where(self.streams.uniform(keys, Stream.STEP_KIND) < OWN_STEPS, picked, even)

    def _scales(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The guidance scales `(B,)` that the teacher draws with, and those that the student is given."""
        most = self.settings.max_guidance_scale
        u = self.streams.uniform(keys, Stream.GUIDANCE)
        scale = 1 + (most - 1) * u
        large = self.streams.uniform(keys, Stream.LARGE_GUIDANCE) < LARGE
        return torch.where(large, most, scale), torch.where(large, most + max(10 - most, 0) * u, scale)

    def _guided(
        self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """x_0 as the guided teacher predicts it."""
        nothing = self.pipe.text_encoder(self.no_text)[0].expand_as(text)
        output = self.teacher(
            self._seen(x_t, batch).repeat(2, 1, 1, 1), t.repeat(2), torch.cat([text, nothing]), return_dict=False
        )[0]
        with_text, without = output.float().chunk(2)
        output = without + scale.reshape(-1, 1, 1, 1) * (with_text - without)
        return self._clip(self.teacher_scheduler.denoised(output, x_t, t))

    def _target(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        inputs: NetworkInputs,
        scale: torch.Tensor,
        batch: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """What the student should predict at x_t: the end of the segment as predicted from one jump further down."""
        count, segments = self.num_levels, self.settings.segments
        guided = self._guided(x_t, t, text, scale, batch)
        end = (t * segments // count) * count // segments  # where the segment of t ends; 0: at the image
        r = torch.maximum(t - count // self.jumps, end)
        arrived = torch.where(end == 0, r < CLEAN * count if segments == 1 else r <= 0, r == end)
        a_t, s_t = self._signal_and_noise(t, x_t)
        a_r, s_r = self._signal_and_noise(r, x_t)
        x_r = a_r * guided + s_r * (x_t - a_t * guided) / s_t
        seen = self.target(self._seen(x_r, batch), r, text, timestep_cond=inputs.guidance, return_dict=False)[0]
        seen = self._clip(self.pipe.scheduler.denoised(seen.float(), x_r, r))
        if segments > 1:  # go on to the segment's end, and find the x_0 whose one step from x_t leads there too
            a_e, s_e = self._signal_and_noise(end, x_t)
            z = a_e * seen + s_e * (x_r - a_r * seen) / s_r.clamp(min=1e-6)
            ratio = s_e / s_t
            direct = (z - ratio * x_t) / (a_e - ratio * a_t).clamp(min=1e-6)
            seen = torch.where((end == 0).reshape(-1, 1, 1, 1), seen, direct)
        return torch.where(arrived.reshape(-1, 1, 1, 1), guided, seen)

    def _signal_and_noise(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The coefficients of image and noise in x_t, shaped to multiply `like`; at t = 0, the image itself."""
        signal, noise = self.pipe.scheduler.signal_and_noise(t, like)
        clean = (t == 0).reshape(-1, *[1] * (like.ndim - 1))
        return torch.where(clean, 1.0, signal), torch.where(clean, 0.0, noise)

    def _clip(self, x_0: torch.Tensor) -> torch.Tensor:
        config = self.teacher_scheduler.config
        return x_0.clamp(-1, 1) if config.get("thresholding") or config.get("clip_sample") else x_0

    def check(self) -> None:
        """Stop if all images have become alike, which the loss mistakes for success.

        Raises:
            Collapsed: the images that the student predicts from pure noise differ by less than `distil.min_spread` of what
                training images do.
        """
        spread = self.spread.read(self.accelerator)
        if spread is not None and spread < self.settings.min_spread:
            raise Collapsed(
                f"all images have become alike: from pure noise they differ by {spread:.0%} of what training "
                "images do. Earlier checkpoints may be good. "
                f"Lower optim.lr (now {self.config.optim.lr}), or check that the teacher draws well"
            )


class Spread:
    """How much images differ from one another, relative to how much others do; accumulated on the device."""

    def __init__(self):
        self.sums: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, estimate: torch.Tensor, x_0: torch.Tensor, chosen: torch.Tensor) -> None:
        """Add the images `(B, C, h, w)` of both kinds that are `chosen` `(B,)`."""
        weight = chosen.float()
        columns = [torch.ones_like(estimate), estimate, estimate.square(), x_0, x_0.square()]
        sums = torch.stack([torch.einsum("b,bchw->chw", weight, column.float()) for column in columns])
        self.sums = sums if self.sums is None or self.sums.shape != sums.shape else self.sums + sums

    def read(self, accelerator: Accelerator) -> float | None:
        """The ratio of the mean standard deviations, once `WATCHED` images were counted, after which counting restarts."""
        if self.sums is None:
            return None
        count, seen, seen_squares, true, true_squares = cast(torch.Tensor, accelerator.reduce(self.sums)).double()
        if float(count.max()) < WATCHED:
            return None
        self.sums = None
        spreads = [
            ((squares - total.square() / count).clamp(min=0) / (count - 1)).sqrt().mean()
            for total, squares in ((seen, seen_squares), (true, true_squares))
        ]
        return float(spreads[0] / spreads[1])

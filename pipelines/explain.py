"""Why an image looks as it does: where each word was read, what changes without it, what was expected at each step.

Works with every `SfumatoPipeline`, including Stable Diffusion folders made elsewhere, and does not change how it draws.
"""

import re
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from PIL import Image, ImageDraw

from sfumato.figures import caption_font
from sfumato.pipelines.inputs import tokenize
from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline
from sfumato.schedulers import training_scheduler


@dataclass
class Explanation:
    """What `explain` found.

    Attributes:
        image: the image.
        words: the prompt's words, as far as the text encoder reads them.
        heat: `(words, H, W)`: the share of cross-attention that each position gives to each word, averaged over layers,
            heads and steps (DAAM; Tang et al. 2022, arXiv 2210.04885). Together with the shares of the tokens that mark the
            start and end of the text it adds up to 1 at each position.
        ablation: `(words, H, W)` in [0, 1]: how much each position changes, averaged over the colour channels, if the word
            is left out and the noise stays the same; None unless requested.
        expected: `(steps, H, W, C)` in [0, 1]: the image that the network expected at each step, x_0 of its prediction.
    """

    image: Image.Image
    words: list[str]
    heat: np.ndarray
    ablation: np.ndarray | None
    expected: np.ndarray

    def figure(self, min_side: int = 128) -> Image.Image:
        """One image: the result, then each word's heat over it, then, if computed, what changes without the word."""
        scale = max(1, min_side // self.image.width)
        rows = [self.heat] + ([self.ablation] if self.ablation is not None else [])
        width = self.image.width * scale + 6
        height = self.image.height * scale + 22
        text = 16
        sheet = Image.new("RGB", (width * (1 + len(self.words)) + 6, height * len(rows) + 6), "white")
        pen = ImageDraw.Draw(sheet)
        for row, maps in enumerate(rows):
            cells = [("", np.zeros_like(maps[0]))] + list(zip(self.words, maps))
            for column, (word, heat) in enumerate(cells):
                tile = heat_image(self.image, heat) if column else self.image.convert("RGB")
                x, y = 6 + column * width, 6 + row * height
                sheet.paste(tile.resize((width - 6, height - 22), Image.Resampling.NEAREST), (x, y))
                title = word if row == 0 else f"without {word}" if column else ""
                pen.text((x, y + height - 22 + 2), title, "black", caption_font(title))
        return sheet.crop((0, 0, sheet.width, sheet.height - (22 - text) + 6))


def heat_image(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """A map `(H, W)` in red over the image in grey. How red follows the value minus the minimum, as a share of the maximum,
    so a constant map stays grey.
    """
    pixels = np.asarray(image.convert("RGB"), float)
    share = ((heat - heat.min()) / max(float(heat.max()), 1e-9))[..., None] * 0.8
    mixed = pixels.mean(-1, keepdims=True) * (1 - share) + np.array([255.0, 0.0, 0.0]) * share
    return Image.fromarray(mixed.astype(np.uint8))


class Recorder(SfumatoPipeline):
    """The same pipeline, which also records the image that the network expected at each step."""

    expected: list[np.ndarray]

    @classmethod
    def of(cls, pipe: SfumatoPipeline) -> "Recorder":
        """A recorder that shares all parts of `pipe`."""
        settings = {name: pipe.config[name] for name in ("requires_safety_checker", "max_noise_level", "self_conditioning")}
        recorder = cls(**pipe.components, **settings)
        recorder.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        recorder.expected = []
        return recorder

    def predict(self, guider, latents, t, prompt_embeds, negative_prompt_embeds, inputs=None):
        """As in `SfumatoPipeline`."""
        output = super().predict(guider, latents, t, prompt_embeds, negative_prompt_embeds, inputs)
        self.expected.append(_expected(self, output[:1], latents[:1, : self.vae.config.latent_channels], t))
        return output


@torch.no_grad()
def explain(pipe: SfumatoPipeline, prompt: str, ablate: bool = False, **call) -> Explanation:
    """Draw one image and record what shows why it looks the way it does.

    Args:
        pipe: the model.
        prompt: one text.
        ablate: also draw without each word, which takes one more image per word.
        call: arguments of the pipeline's call. With `ablate`, `generator` must be a fresh one: its state is used again.

    Raises:
        ValueError: several prompts or images, a model without cross-attention, or an empty prompt.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"`prompt` must be one text with words, got {prompt!r}")
    if call.get("num_images_per_prompt", 1) != 1:
        raise ValueError("explain draws one image; leave `num_images_per_prompt` out")
    generator = call.pop("generator", None) or torch.Generator().manual_seed(0)
    state, _ = generator.get_state(), call.pop("output_type", None)
    if getattr(pipe.unet, "runs_elsewhere", False):
        raise ValueError("other runtimes do not show what happens inside the network; explain with the plain pipeline")
    layers = [m for name, m in pipe.unet.named_modules() if isinstance(m, Attention) and m.is_cross_attention]
    if not layers:
        raise ValueError("this model has no cross-attention, so there is nothing to show")
    maps: list[torch.Tensor] = []
    me = threading.get_ident()

    def keep(*seen):
        if threading.get_ident() == me:  # another thread may draw with this network between our steps
            maps.append(_attention(*seen))

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    recorder = Recorder.of(pipe)
    kind = "pil" if pipe.codec is None else "np"
    try:
        image = _flat(recorder(prompt, generator=generator, output_type=kind, return_dict=False, **call)[0][0])
    finally:
        for hook in hooks:
            hook.remove()
    tokens = _gather(maps, image.height, image.width)
    spans = [match.span() for match in re.finditer(r"\S+", prompt)]
    offsets = tokenize(
        pipe.tokenizer, prompt, return_offsets_mapping=True, truncation=True, max_length=pipe.tokenizer.model_max_length
    )["offset_mapping"]  # fmt: skip
    belongs = [[k for k, (a, b) in enumerate(offsets) if start <= a < b <= end] for start, end in spans]
    read = [(span, numbers) for span, numbers in zip(spans, belongs) if numbers]
    heat = np.stack([tokens[numbers].sum(0) for _, numbers in read])
    without = None
    if ablate:
        without = []
        for (start, end), _ in read:
            generator.set_state(state)
            rest = f"{prompt[:start]}{prompt[end:]}".strip()
            other = _flat(pipe(rest, generator=generator, output_type=kind, return_dict=False, **call)[0][0])
            without.append(
                np.abs(np.asarray(image, float) - np.asarray(other, float)).reshape(*heat.shape[1:], -1).mean(-1) / 255
            )
        without = np.stack(without)
    words = [prompt[start:end] for (start, end), _ in read]
    return Explanation(image, words, heat, without, np.stack(recorder.expected))


def _attention(layer: Attention, inputs: tuple, keywords: dict, output) -> torch.Tensor:
    """The layer's cross-attention from image to prompt, `(positions, tokens)`, averaged over heads."""
    hidden = inputs[0] if inputs else keywords["hidden_states"]
    text = keywords["encoder_hidden_states"] if "encoder_hidden_states" in keywords else inputs[1]
    to_q: Any = layer.to_q
    to_k: Any = layer.to_k
    query = layer.head_to_batch_dim(to_q(hidden[:1]))  # the conditional pass comes first
    key = layer.head_to_batch_dim(to_k(text[:1]))
    return layer.get_attention_scores(query, key).float().mean(0).cpu()


def _flat(drawn) -> Image.Image:
    """An image as it is; for an array of many channels, their mean in grey."""
    return drawn if isinstance(drawn, Image.Image) else Image.fromarray(np.round(drawn.mean(-1) * 255).astype(np.uint8))


def _gather(maps: list[torch.Tensor], height: int, width: int) -> np.ndarray:
    """The mean of the maps of all layers and steps, `(tokens, height, width)`."""
    total = torch.zeros(maps[0].shape[1], height, width)
    for scores in maps:
        h = max(1, round((len(scores) * height / width) ** 0.5))
        grid = scores.T.reshape(1, scores.shape[1], h, len(scores) // h)
        total = total + F.interpolate(grid, (height, width), mode="bilinear")[0]
    return (total / len(maps)).numpy()


def _expected(pipe: SfumatoPipeline, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> np.ndarray:
    """x_0 of a prediction, as an image `(H, W, C)` in [0, 1]. Every scheduler's `scale_model_input` gives x_t as trained."""
    x_0 = training_scheduler(pipe.scheduler).denoised(output, x_t, t)
    images: Any = pipe.image_processor.postprocess(pipe.decode_latents(x_0), output_type="np")
    return images[0]

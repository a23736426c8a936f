"""Other recipes for the same network, data and minutes as `configs/demo.yaml`, implemented by us from their descriptions.

    python -m benchmarks.quality.baseline_diffusers_recipe [--recipe diffusers] [--minutes 60] [--seed 0] [--out FILE.jsonl]

- `diffusers`: as its text-to-image example trains by default: eps, linear betas, uniform timesteps, no caption
  dropout, AdamW at a constant 1e-4, batch 16, EMAModel (`--use_ema`). There is no pretrained text encoder here, so it is
  trained too. Its rate first rises for 500 steps, about two minutes; the example's default would begin at the full rate.
- `diffusers-fast`: the same with a rate of 1e-3, which was the best for AdamW in our recipe.
- `lucidrains`: as denoising-diffusion-pytorch does by default: v weighted by SNR / (SNR + 1), sigmoid schedule, Adam
  (0.9, 0.99) at 1e-4, EMA 0.995 every 10 steps; one caption in ten is dropped, as in imagen-pytorch.
- `edm`: Karras et al. 2022 (arXiv 2206.00364): preconditioned, sigma_data 0.5, ln sigma from N(-1.2, 1.2), their weight, Adam
  at 1e-3 after a warm-up of 500 steps, an average over at most 5% of what was seen, one caption in ten dropped.

UNet and text encoder keep the initialisation of their libraries, which for the text encoder is a handicap: CLIP's embeddings
of 0.02 are drowned out at first (`models/build.py`). `--embedding-std 0.5` gives it ours, in rows like "edm, our embeddings".
Gradients are clipped to a norm of 1, as in diffusers' example. At each mark the training captions are drawn with the raw and
the averaged weights, without guidance and, if captions were dropped, with a scale of 1.5; the best by FD is kept. Minutes
are CPU minutes of training in one thread, so other programs on the machine do not count.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.common.measure import Yardstick
from sfumato.figures import grid
from sfumato.training.config.load import load_config
from sfumato.training.data.array_set import evenly_spaced
from sfumato.training.data.prepare import prepare
from sfumato.training.models.autoencoder import identity_vae
from sfumato.training.models.latent_space import to_pixel_values
from sfumato.training.models.stock_classes import lists_to_tuples
from sfumato.training.models.text import train_tokenizer

# x_0 is clipped to [-1, 1] at each step, as in ours.
SAMPLING = {"timestep_spacing": "trailing", "thresholding": True, "sample_max_value": 1.0}
RECIPES = ("diffusers", "diffusers-fast", "lucidrains", "edm")
MARKS = (2, 4, 6, 10, 20, 30, 45, 60)


class Edm:
    """The preconditioned network D(x; sigma) of Karras et al. 2022, table 1, and their sampler, algorithm 1 without churn."""

    data = 0.5

    def __init__(self, unet):
        self.unet = unet

    def denoised(self, x, sigma, context):
        s = sigma.reshape(-1, 1, 1, 1)
        skip, out = self.data**2 / (s**2 + self.data**2), s * self.data / (s**2 + self.data**2).sqrt()
        return skip * x + out * self.unet(x / (s**2 + self.data**2).sqrt(), sigma.log() / 4, context).sample

    def loss(self, x_0, context):
        sigma = (torch.randn(len(x_0)) * 1.2 - 1.2).exp()
        s = sigma.reshape(-1, 1, 1, 1)
        weight = (s**2 + self.data**2) / (s * self.data) ** 2
        return (weight * (self.denoised(x_0 + s * torch.randn_like(x_0), sigma, context) - x_0) ** 2).mean()

    @torch.no_grad()
    def draw(self, noise, context, empty, scale, steps=12):
        ramp = torch.linspace(0, 1, steps)
        sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7

        def slope(x, sigma):
            many = sigma.expand(len(x))
            guess = self.denoised(x, many, context)
            if scale != 1:
                without = self.denoised(x, many, empty)
                guess = without + scale * (guess - without)
            return (x - guess.clamp(-1, 1)) / sigma

        x = noise * sigmas[0]
        for here, after in zip(sigmas, [*sigmas[1:], torch.tensor(0.0)]):
            d = slope(x, here)
            moved = x + (after - here) * d
            x = moved if after == 0 else x + (after - here) * (d + slope(moved, after)) / 2
        return x


class Run:
    """One recipe on the network and the data of a config."""

    def __init__(self, recipe: str, config, image_set, seed: int, embedding_std: float = 0.02):
        torch.manual_seed(seed)
        self.recipe, self.config, self.image_set = recipe, config, image_set
        self.train, self.generator = image_set.select("train"), torch.Generator().manual_seed(seed)
        text = config.text_encoder
        self.tokenizer = train_tokenizer(image_set.training_captions(), text.vocab_size, text.max_length)
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer), hidden_size=text.hidden_size, intermediate_size=4 * text.hidden_size,
                num_hidden_layers=text.num_hidden_layers, num_attention_heads=text.num_attention_heads,
                max_position_embeddings=text.max_length, bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id,
            )
        )  # fmt: skip
        for module in self.text_encoder.modules():
            if isinstance(module, torch.nn.Embedding) and embedding_std != 0.02:
                torch.nn.init.normal_(module.weight, std=embedding_std)
        self.unet = UNet2DConditionModel(
            sample_size=config.data.resolution, in_channels=3, out_channels=3,
            cross_attention_dim=text.hidden_size, **lists_to_tuples(config.unet),
        )  # fmt: skip
        self.parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.dropout, betas = 0.1, (0.9, 0.999)
        settings = {"beta_schedule": "linear", "prediction_type": "epsilon", "clip_sample": False}
        if recipe == "lucidrains":
            self.rate, self.warmup, self.ema_every, betas = 1e-4, 0, 10, (0.9, 0.99)
            t = torch.linspace(0, 1, 1001, dtype=torch.float64)
            abar = torch.sigmoid(-(t * 6 - 3)) - torch.sigmoid(torch.tensor(-3.0, dtype=torch.float64))
            abar = abar / abar[0]
            settings = {
                "trained_betas": (1 - abar[1:] / abar[:-1]).clamp(0, 0.999).tolist(),
                "prediction_type": "v_prediction",
            }
            self.optimizer = torch.optim.Adam(self.parameters, lr=self.rate, betas=betas, fused=True)
            self.ema = EMAModel(self.parameters, decay=0.995)
        elif recipe == "edm":
            self.rate, self.warmup, self.ema_every = 1e-3, 500, 1
            self.optimizer = torch.optim.Adam(self.parameters, lr=self.rate, betas=betas, fused=True)
            self.ema = EMAModel(self.parameters, decay=0.9999)
        else:
            self.rate, self.warmup, self.ema_every = (1e-3 if recipe == "diffusers-fast" else 1e-4), 500, 1
            self.dropout = 0.0
            self.optimizer = torch.optim.AdamW(self.parameters, lr=self.rate, betas=betas, weight_decay=1e-2, fused=True)
            self.ema = EMAModel(self.parameters, decay=0.9999)
        self.edm, self.scheduler = Edm(self.unet), DDPMScheduler(**settings)
        self.step, self.seen = 0, 0

    def batch(self, size: int = 16):
        """Images and token ids, drawn with replacement, each with one of its captions."""
        numbers = self.train[torch.randint(len(self.train), (size,), generator=self.generator).numpy()]
        captions = []
        for i in numbers:
            own = self.image_set[int(i)]["captions"]
            drop, which = torch.rand(2, generator=self.generator).tolist()
            captions.append("" if drop < self.dropout else own[int(which * len(own))])
        return to_pixel_values([self.image_set.image(int(i)) for i in numbers]), self.ids(captions)

    def ids(self, captions):
        return self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def train_step(self):
        """One step of the optimizer."""
        x_0, ids = self.batch()
        context = self.text_encoder(ids)[0]
        if self.recipe == "edm":
            loss = self.edm.loss(x_0, context)
        else:
            noise = torch.randn_like(x_0)
            t = torch.randint(self.scheduler.config.num_train_timesteps, (len(x_0),))
            x_t = self.scheduler.add_noise(x_0, noise, t)
            target = noise if self.recipe != "lucidrains" else self.scheduler.get_velocity(x_0, noise, t)
            error = (self.unet(x_t, t, context).sample - target).square().mean((1, 2, 3))
            share = self.scheduler.alphas_cumprod[t] if self.recipe == "lucidrains" else 1.0
            loss = (share * error).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.step + 1) / (self.warmup + 1))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.seen = self.step + 1, self.seen + len(x_0)
        if self.recipe == "edm":  # a half-life of 5% of what was seen
            self.ema.decay = 0.5 ** (1 / max(1, 0.05 * self.step))
        if self.step % self.ema_every == 0:
            self.ema.step(self.parameters)

    @torch.no_grad()
    def draw(self, captions, scale: float):
        """An image for each caption."""
        images = []
        vae = identity_vae(self.config.data.resolution, 3)
        pipe = StableDiffusionPipeline(
            vae, self.text_encoder, self.tokenizer, self.unet,
            DPMSolverMultistepScheduler.from_config(self.scheduler.config, **SAMPLING), None, None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        for start in range(0, len(captions), 32):
            part = captions[start : start + 32]
            generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
            if self.recipe == "edm":
                side = self.config.data.resolution
                noise = torch.cat([torch.randn(1, 3, side, side, generator=g) for g in generators])
                context, empty = (self.text_encoder(self.ids(texts))[0] for texts in (part, [""] * len(part)))
                x = self.edm.draw(noise, context, empty, scale)
                images += pipe.image_processor.postprocess(x)
            else:
                images += pipe(part, num_inference_steps=12, guidance_scale=scale, generator=generators).images
        return images

    def judged(self, yardstick: Yardstick) -> tuple[dict, list]:
        """The best figures by FD over raw and averaged weights and two scales, and the images."""
        kept, found = copy.deepcopy([p.data for p in self.parameters]), []
        for weights in ("raw", "ema"):
            if weights == "ema":
                self.ema.copy_to(self.parameters)
            for scale in (1.0, 1.5) if self.dropout else (1.0,):
                images = self.draw(yardstick.captions, scale)
                found.append(({**yardstick.figures(images), "weights": weights, "scale": scale}, images))
        for parameter, value in zip(self.parameters, kept):
            parameter.data.copy_(value)
        return min(found, key=lambda pair: pair[0]["FD"])


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="diffusers")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--embedding-std", type=float, default=0.02)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/rivals.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(options.config)
    image_set = prepare(config.data)
    yardstick = Yardstick(image_set, config.data.cache_dir)
    run = Run(options.recipe, config, image_set, options.seed, options.embedding_std)
    name = options.recipe if options.embedding_std == 0.02 else f"{options.recipe}, our embeddings"
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    spent, marks = 0.0, sorted({options.minutes, *(mark for mark in MARKS if mark <= options.minutes)})
    while marks:
        began = time.process_time()
        run.train_step()
        spent += time.process_time() - began
        if spent / 60 >= marks[0]:
            row = {"recipe": name, "seed": options.seed, "minutes": marks.pop(0), "pictures": run.seen}
            figures, images = run.judged(yardstick)
            row |= figures
            print(row, flush=True)
            with open(options.out, "a") as file:
                file.write(json.dumps(row) + "\n")
    chosen = evenly_spaced(len(yardstick.captions), 12)
    sheet = grid([images[i] for i in chosen], [yardstick.captions[i] for i in chosen])
    sheet.save(Path(options.out).with_name(f"{options.recipe}-{options.seed}.png"))


if __name__ == "__main__":
    main()

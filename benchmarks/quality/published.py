"""Other trainers as published, on images that nothing here was tuned on: same images, one thread each.

    python -m benchmarks.quality.published iconify:FOLDER --python RIVALS/bin/python --script train_text_to_image.py
        --k-diffusion CHECKOUT [--minutes 15] [--seed 0] [--count 300] [--only sfumato diffusers ...] [--out FILE.json]

- `sfumato`: `configs/folder_cpu.yaml`, without validation on the way.
- `diffusers`: its example `train_text_to_image.py`, unchanged, on the same network with random weights, an identity VAE and
  the noise of Stable Diffusion; batch 16, a rate of 1e-3 (ten times its default), `--use_ema`. It trains only the UNet, so
  its text encoder stays random: it tells words apart and does no more.
- `denoising-diffusion-pytorch`: its `Trainer` and its `Unet` of about our size, with all defaults. It takes no captions.
- `smalldiffusion`: the loop, schedules, rate and sampler of its example `cifar_unet.py`, its `Unet` of our size, batch 16
  (the example's 256 would mean three steps a minute). It takes classes at most.
- `k-diffusion`: its `train.py` and `configs/config_32x32_small.json`, channels [32, 64, 128] in place of [128, 256, 512] and
  batch 16; drawn in the same way as its demos. It takes classes at most. It gives torch's schedulers an argument that current
  torch no longer takes; its environment has to ignore it.

The rivals run in an environment of their own, `--python`, with what they need; their code is not in this repository.
All draw the training captions: ours as its card says, the rivals in 50 steps (smalldiffusion in its example's 10) with raw and
with averaged weights, of which the better by FD counts. One thread each; k-diffusion's script has one more process that loads
images. FD and the other figures use the features of EfficientNet-Lite0, against the training images.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from sfumato.figures import grid
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.card import recommended_settings
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.models.build import build_pipeline
from sfumato.training.quality.distances import frechet_distance, gaussian, kernel_distance
from sfumato.training.quality.features import compute_features, reference_features

NOISE = ["beta_schedule: scaled_linear", "beta_start: 0.00085", "beta_end: 0.012", "prediction_type: epsilon"]
SHOWN = 8
LUCIDRAINS = """
import sys
import time

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

folder, out = sys.argv[1:3]
minutes, seed, size, count = map(float, sys.argv[3:])
torch.set_num_threads(1)
torch.manual_seed(int(seed))
model = Unet(dim=24)
print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
diffusion = GaussianDiffusion(model, image_size=int(size), sampling_timesteps=50)
first = 30
quiet = {"calculate_fid": False, "save_and_sample_every": 10**9}
trainer = Trainer(diffusion, folder, train_num_steps=first, results_folder=out, **quiet)
start = time.time()
trainer.train()
trainer.train_num_steps = int(minutes * 60 * first / (time.time() - start))
trainer.train()
spent = time.time() - start
for name, network in (("raw", diffusion), ("ema", trainer.ema.ema_model)):
    network.eval()
    drawn = torch.cat([network.sample(batch_size=min(50, int(count) - i)) for i in range(0, int(count), 50)])
    torch.save({"images": drawn, "steps": trainer.step, "seconds": spent}, f"{out}/{name}.pt")
"""

SMALLDIFFUSION = """
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from smalldiffusion import ScheduleLogLinear, ScheduleSigmoid, Scaled, Unet, img_train_transform, samples, training_loop
from torch.utils.data import DataLoader
from torch_ema import ExponentialMovingAverage

folder, out = sys.argv[1:3]
minutes, seed, size, count = map(float, sys.argv[3:])
torch.set_num_threads(1)
torch.manual_seed(int(seed))
paths = sorted(Path(folder).glob("*.png"))


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return len(paths)

    def __getitem__(self, i):
        return img_train_transform(Image.open(paths[i]).convert("RGB"))


accelerator = Accelerator(cpu=True)
loader = DataLoader(Images(), batch_size=16, shuffle=True)
model = Scaled(Unet)(int(size), 3, 3, ch=32, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,))
print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
ema = ExponentialMovingAverage(model.parameters(), decay=0.9999)
start, steps = time.time(), 0
for _ in training_loop(loader, model, ScheduleSigmoid(N=1000), epochs=10**6, lr=2e-4, accelerator=accelerator):
    ema.update()
    steps += 1
    if time.time() - start > 60 * minutes:
        break
spent = time.time() - start
sigmas = ScheduleLogLinear(sigma_min=0.01, sigma_max=35, N=1000).sample_sigmas(10)


def draw():
    parts = []
    for i in range(0, int(count), 50):
        parts.append(list(samples(model, sigmas, gam=2.1, batchsize=min(50, int(count) - i), accelerator=accelerator))[-1])
    return torch.cat(parts) / 2 + 0.5


facts = {"steps": steps, "seconds": spent}
torch.save({"images": draw(), **facts}, f"{out}/raw.pt")
with ema.average_parameters():
    torch.save({"images": draw(), **facts}, f"{out}/ema.pt")
"""
K_DIFFUSION = """
import sys

import k_diffusion as K
import torch

config, weights, out = sys.argv[1:4]
count, steps, seconds = map(float, sys.argv[4:])
torch.set_num_threads(1)
torch.manual_seed(0)
config = K.config.load_config(config)
settings = config["model"]
kept = torch.load(weights, map_location="cpu", weights_only=False)
sigmas = K.sampling.get_sigmas_karras(50, settings["sigma_min"], settings["sigma_max"], rho=7.0, device="cpu")
for name, key in (("raw", "model"), ("ema", "model_ema")):
    inner = K.config.make_model(config).eval()
    inner.load_state_dict(kept[key])
    model = K.config.make_denoiser_wrapper(config)(inner)
    parts = []
    for i in range(0, int(count), 50):
        noise = torch.randn([min(50, int(count) - i), 3, *settings["input_size"]]) * settings["sigma_max"]
        with torch.no_grad():
            parts.append(K.sampling.sample_dpmpp_2m_sde(model, noise, sigmas, eta=0.0, solver_type="heun", disable=True))
    torch.save({"images": torch.cat(parts) / 2 + 0.5, "steps": int(steps), "seconds": seconds}, f"{out}/{name}.pt")
"""


class Set:
    """The images, the folder where rivals find them, and how close drawings come to them."""

    def __init__(self, folder: Path, *overrides: str):
        self.overrides = [*overrides, "train.num_threads=1"]
        self.config = load_config("folder_cpu", self.overrides)
        self.images = prepare(self.config.data)
        self.numbers = self.images.select("train")
        self.captions = [self.images[int(i)]["captions"][0] for i in self.numbers]
        self.true = reference_features(self.images, "efficientnet-lite0", self.config.data.cache_dir)[self.numbers]
        self.folder = folder / "images"
        if self.folder.exists():
            raise SystemExit(f"{folder} holds an earlier run; remove it, or give another --folder")
        self.folder.mkdir(parents=True)
        rows = []
        for k, (i, caption) in enumerate(zip(self.numbers, self.captions)):
            Image.fromarray(self.images.image(int(i))).save(self.folder / f"{k:04d}.png")
            rows.append(json.dumps({"file_name": f"{k:04d}.png", "text": caption}))
        (self.folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")

    def figures(self, drawn: np.ndarray, *, captioned: bool = True) -> dict[str, float]:
        """`drawn`: `(N, H, W, 3)` uint8, one for each caption in order."""
        seen = compute_features(drawn)
        scores = {
            "FD": frechet_distance(gaussian(self.true), seen),
            "KID": kernel_distance(self.true, seen),
        }
        if captioned:
            apart = np.linalg.norm(seen[:, None] - self.true[None], axis=2)
            scores["nearest true image is its own"] = float((apart.argmin(1) == np.arange(len(apart))).mean())
        return {name: round(float(value), 4) for name, value in scores.items()}


def draw(pipe, captions: list[str], **call) -> np.ndarray:
    """An image for each caption, `(N, H, W, 3)` uint8."""
    return np.stack([np.asarray(image) for image in draw_in_batches(pipe, captions, **call)])


def best(candidates: list[tuple[dict, np.ndarray]]) -> tuple[dict, np.ndarray]:
    """The row and drawings with the lowest FD."""
    return min(candidates, key=lambda pair: pair[0]["FD"])


def trained(data: Set, run: Path, minutes: float, seed: int, *overrides: str) -> tuple[dict, np.ndarray]:
    """Train one of our runs with `configs/folder_cpu.yaml`."""
    settings = [f"train.max_minutes={minutes}", f"seed={seed}", f"output_dir={run}", "train.trackers=[]", *overrides]
    settings += ["validation.every_steps=null", "checkpoint.every_steps=null"]
    subprocess.run([sys.executable, "training/train.py", "configs/folder_cpu.yaml", *data.overrides, *settings], check=True)
    pipe = SfumatoPipeline.from_pretrained(run / "pipeline")
    drawn = draw(pipe, data.captions, **recommended_settings(run / "pipeline"))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {**data.figures(drawn), "images_seen": last["images_seen"], "minutes": round(last["seconds"] / 60, 2)}, drawn


def sfumato(data: Set, options, folder: Path) -> tuple[dict, np.ndarray]:
    """Our run."""
    return trained(data, folder / "sfumato", options.minutes, options.seed)


def diffusers(data: Set, options, folder: Path) -> tuple[dict, np.ndarray]:
    """Run the example and end it by a signal when its minutes are over; its newest checkpoint counts."""
    start_at, out = folder / "random", folder / "diffusers"
    noise = f"scheduler={{{', '.join(NOISE)}}}"
    config = load_config("folder_cpu", [*data.overrides, f"seed={options.seed}", noise, "objective.min_snr_floor=0"])
    build_pipeline(config, data.images.training_captions()).to_stock().save_pretrained(start_at)
    every = 100
    command = [options.python, options.script, "--pretrained_model_name_or_path", start_at, "--train_data_dir", data.folder]
    command += ["--resolution", config.data.resolution, "--train_batch_size", 16, "--learning_rate", 1e-3, "--use_ema"]
    command += ["--max_train_steps", 10**6, "--checkpointing_steps", every, "--checkpoints_total_limit", 1]
    command += ["--output_dir", out, "--seed", options.seed]
    log = open(folder / "diffusers.log", "w+")
    process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)
    while "Running training" not in Path(log.name).read_text(errors="replace"):
        if process.poll() is not None:
            raise RuntimeError(f"the example ended: {Path(log.name).read_text()[-2000:]}")
        time.sleep(0.5)
    time.sleep(60 * options.minutes)
    process.send_signal(signal.SIGTERM)
    process.wait()
    newest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    candidates = []
    for weights in ("unet", "unet_ema"):
        unet = UNet2DConditionModel.from_pretrained(newest / weights)
        pipe = StableDiffusionPipeline.from_pretrained(start_at, unet=unet)
        drawn = draw(pipe, data.captions, num_inference_steps=50, guidance_scale=1.0)
        candidates.append(({**data.figures(drawn), "weights": weights}, drawn))
    row, drawn = best(candidates)
    return {**row, "images_seen": 16 * int(newest.name.split("-")[1]), "minutes": options.minutes}, drawn


def lucidrains(data: Set, options, folder: Path) -> tuple[dict, np.ndarray]:
    """The package's trainer."""
    return run_script(LUCIDRAINS, data, options, folder / "lucidrains")


def smalldiffusion(data: Set, options, folder: Path) -> tuple[dict, np.ndarray]:
    """The package's loop, as in its example for CIFAR-10."""
    return run_script(SMALLDIFFUSION, data, options, folder / "smalldiffusion")


def run_script(script: str, data: Set, options, out: Path) -> tuple[dict, np.ndarray]:
    """Run a script in the rivals' environment that trains, draws, and leaves `raw.pt` and `ema.pt`."""
    out.mkdir(exist_ok=True)
    arguments = [data.folder, out, options.minutes, options.seed, data.config.data.resolution, len(data.captions)]
    run_apart(options, out.with_suffix(".log"), "-c", script, *arguments)
    return best(read_drawings(data, out))


def k_diffusion(data: Set, options, folder: Path) -> tuple[dict, np.ndarray]:
    """Run its script for some steps to measure its speed, then from the start for as many steps as there is time for."""
    out, checkout = folder / "k-diffusion", Path(options.k_diffusion).resolve()
    out.mkdir(exist_ok=True)
    config = json.loads((checkout / "configs" / "config_32x32_small.json").read_text())
    config["model"]["channels"] = [32, 64, 128]
    config["dataset"]["location"] = str(data.folder.resolve())
    (out / "config.json").write_text(json.dumps(config))
    quiet = ["--evaluate-every", 0, "--demo-every", 10**9, "--save-every", 10**9, "--num-workers", 1, "--seed", options.seed]
    first, spent = 40, []

    def train(name: str, steps: int) -> None:
        start = time.time()
        own = ["--config", (out / "config.json").resolve(), "--name", name, "--batch-size", 16, "--end-step", steps, *quiet]
        run_apart(options, out / f"{name}.log", checkout / "train.py", *own, cwd=out)
        spent.append(time.time() - start)

    train("try-1", first)
    train("try-2", 2 * first)
    rate = first / (spent[1] - spent[0])  # without the time to start
    steps = int(60 * options.minutes * rate)
    train("whole", steps)
    weights = out / f"whole_{steps:08}.pth"
    facts = [len(data.captions), steps, spent[2] - (spent[0] - first / rate)]
    run_apart(options, out / "draw.log", "-c", K_DIFFUSION, (out / "config.json").resolve(), weights, out, *facts)
    return best(read_drawings(data, out))


def run_apart(options, log: Path, *command, cwd: Path | None = None) -> None:
    """Run a command in the rivals' environment; its output goes into a file."""
    with open(log, "w") as file:
        whole = [str(Path(options.python).absolute()), *map(str, command)]
        subprocess.run(whole, check=True, stdout=file, stderr=subprocess.STDOUT, cwd=cwd)


def read_drawings(data: Set, out: Path) -> list[tuple[dict, np.ndarray]]:
    """What a rival drew with raw and with averaged weights, and how close it comes."""
    candidates = []
    for weights in ("raw", "ema"):
        left = torch.load(out / f"{weights}.pt", weights_only=True)
        drawn = (left["images"].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        facts = {"weights": weights, "images_seen": 16 * left["steps"], "minutes": round(left["seconds"] / 60, 2)}
        candidates.append(({**data.figures(drawn, captioned=False), **facts}, drawn))
    return candidates


TRAINERS = {
    "sfumato": sfumato,
    "diffusers": diffusers,
    "denoising-diffusion-pytorch": lucidrains,
    "smalldiffusion": smalldiffusion,
    "k-diffusion": k_diffusion,
}


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a value for data.name")
    parser.add_argument("--python", help="the Python of the rivals' environment")
    parser.add_argument("--script", help="diffusers' train_text_to_image.py")
    parser.add_argument("--k-diffusion", help="a checkout of k-diffusion, for its train.py")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300, help="number of records to read (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--folder", default="runs/published")
    parser.add_argument("--out", default="benchmarks/results/published.json")
    options = parser.parse_args()
    needed = {"diffusers": ("python", "script"), "k-diffusion": ("python", "k_diffusion")}
    for name in options.only:
        for option in needed.get(name, () if name == "sfumato" else ("python",)):
            if getattr(options, option) is None:
                parser.error(f"{name} needs --{option.replace('_', '-')}")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder, out = Path(options.folder) / f"seed-{options.seed}", Path(options.out)
    data = Set(folder, f"data.name={options.name}", f"data.max_records={options.count}", "data.skin_tones=false")
    shown = np.linspace(0, len(data.captions) - 1, SHOWN).astype(int)
    for name in options.only:
        row, drawn = TRAINERS[name](data, options, folder)
        np.save(folder / f"{name}.npy", drawn[shown])
        result = json.loads(out.read_text()) if out.exists() else {"rows": []}
        row = {
            "trainer": name,
            "seed": options.seed,
            "set": data.images.fingerprint[-8:],
            "training images": len(data.captions),
            **row,
        }
        result["rows"].append(row)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(row, flush=True)
    titles = [data.captions[i] for i in shown]
    cells = [Image.fromarray(data.images.image(int(data.numbers[i]))) for i in shown]
    for name in TRAINERS:
        if (folder / f"{name}.npy").exists():
            titles += [name] + [""] * (SHOWN - 1)
            cells += [Image.fromarray(image) for image in np.load(folder / f"{name}.npy")]
    cells = [cell.resize((96, 96), Image.Resampling.NEAREST) for cell in cells]
    grid(cells, titles, columns=SHOWN).save(out.with_suffix(".png"))


if __name__ == "__main__":
    main()

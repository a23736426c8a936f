"""Pictures to the space the UNet works in, and what frozen models make of the data, computed once and kept on disk."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from filelock import FileLock
from numpy.lib.format import open_memmap
from tqdm.auto import tqdm

from sfumato.pipelines.export import sync
from sfumato.training.data.prepare import PictureSet


def is_identity(vae: AutoencoderKL) -> bool:
    """Whether this VAE passes pixels through unchanged (a single level as narrow as `identity_vae` builds it)."""
    channels = vae.config.in_channels
    alike = tuple(vae.config.block_out_channels) == (2 * channels + 2,) and vae.config.latent_channels in (channels, 4)
    return alike and vae.encoder.conv_out.bias[-1].item() == -30.0  # the log-variance of no noise


def to_pixel_values(pictures: np.ndarray) -> torch.Tensor:
    """`(B, H, W, C)` uint8 to `(B, C, H, W)` float32 in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


@torch.no_grad()
def encode(vae: AutoencoderKL, pixel_values: torch.Tensor) -> torch.Tensor:
    """`(B, C, H, W)` in [-1, 1] to x_0: the pixels themselves for an identity VAE, else scaled latents `(B, C, h, w)`."""
    if is_identity(vae):
        return F.pad(pixel_values, (0, 0, 0, 0, 0, vae.config.latent_channels - pixel_values.shape[1]))
    return vae.encode(pixel_values).latent_dist.mode() * vae.config.scaling_factor


def content_hash(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def stored(path: Path, count: int, compute: Callable[[range], np.ndarray], what: str, batch: int = 64) -> np.ndarray:
    """The array at `path`, memory-mapped; computed batch by batch into it where it does not exist yet.

    Several processes may call at once: one computes, the others wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            new, array = path.with_name(f".{path.name}.new"), None
            for start in tqdm(range(0, count, batch), desc=what, unit="batch"):
                rows = compute(range(start, min(start + batch, count)))
                if array is None:
                    array = open_memmap(new, "w+", rows.dtype, (count, *rows.shape[1:]))
                array[start : start + len(rows)] = rows
            array.flush()
            sync(new)
            os.replace(new, path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def cached_latents(pictures: PictureSet, vae: AutoencoderKL, cache_dir: str) -> np.ndarray:
    """x_0 of every record, `(N, C, h, w)` float32; keyed by the content of data and VAE."""
    device = next(vae.parameters()).device
    key = content_hash(pictures.fingerprint, vae, vae.config.scaling_factor)

    def compute(numbers):
        batch = to_pixel_values(np.stack([pictures.picture(i) for i in numbers])).to(device)
        return encode(vae, batch).float().cpu().numpy()

    return stored(Path(cache_dir).expanduser() / f"latents-{key}.npy", len(pictures), compute, "encoding pictures")


@torch.no_grad()
def cached_texts(pictures: PictureSet, tokenizer, text_encoder, cache_dir: str) -> np.ndarray:
    """What the text encoder reads of every caption and, last, of the empty one: token ids, `(N + 1, L)` int64.

    With a `text_encoder`, what it says: embeddings, `(N + 1, L, D)` float32. Keyed by content as above.
    """
    count = len(pictures.captions)
    key = content_hash(pictures.fingerprint, text_encoder, sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length)

    def compute(numbers):
        texts = [pictures.captions[i] if i < count else "" for i in numbers]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        if text_encoder is None:
            return ids.numpy()
        return text_encoder(ids.to(next(text_encoder.parameters()).device))[0].float().cpu().numpy()

    name, batch = ("tokens", 4096) if text_encoder is None else ("embeddings", 64)
    return stored(Path(cache_dir).expanduser() / f"{name}-{key}.npy", count + 1, compute, "reading captions", batch)

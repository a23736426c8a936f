"""The outputs of frozen models on the data, computed once and kept on disk."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from filelock import AcquireReturnProxy, FileLock, Timeout
from numpy.lib.format import open_memmap
from tqdm.auto import tqdm

from sfumato.files import sync
from sfumato.training.data.array_set import ArraySet
from sfumato.training.models.latent_space import encode, to_pixel_values

BATCHES_A_PART = 16  # a part is the unit of work that processes share out


def content_hash(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def cached_array(path: Path, count: int, compute: Callable[[range], np.ndarray], what: str, batch: int = 64) -> np.ndarray:
    """The array at `path`, memory-mapped; computed batch by batch and saved there if it does not exist yet.

    Several processes, even on several machines, may call this at once and then share the work.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():  # an existing one may be in a read-only folder
        _compute_together(path, count, compute, what, batch)
    try:
        found = np.load(path, mmap_mode="r")
        if len(found) != count:
            raise ValueError(f"it has {len(found)} rows instead of {count}")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"the cached file {path} is damaged ({error}); remove it, and it will be computed again") from error
    return found


def _compute_together(path: Path, count: int, compute: Callable[[range], np.ndarray], what: str, batch: int) -> None:
    """Compute in parts, each in its own file: a process takes parts that no other works on, then those of a killed process.

    Parts that were computed before a crash are kept.
    """
    folder = path.with_name(f".{path.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    length = BATCHES_A_PART * batch
    parts = [range(start, min(start + length, count)) for start in range(0, count, length)]
    progress = tqdm(total=count, desc=what, unit="record")
    for patience in (0, -1):  # seconds to wait for a part of another process; the second time, as long as it takes
        for part in parts:
            place = folder / f"{part.start}.npy"
            claim = _claim(place, patience)
            if claim is None:
                continue
            with claim:
                if not place.exists() and not path.is_file():
                    starts = range(part.start, part.stop, batch)
                    rows = [compute(range(start, min(start + batch, part.stop))) for start in starts]
                    new = place.with_suffix(".new")
                    with open(new, "wb") as file:
                        np.save(file, np.concatenate(rows))
                    os.replace(new, place)
                    progress.update(len(part))
    progress.close()
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            _join(path, [folder / f"{part.start}.npy" for part in parts], count)
        shutil.rmtree(folder, ignore_errors=True)


def _join(path: Path, parts: list[Path], count: int) -> None:
    """Write the rows of several files into one, which is moved into place atomically."""
    new = path.with_name(f".{path.name}.new")
    array, filled = None, 0
    for part in parts:
        rows = np.load(part)
        if array is None:
            array = open_memmap(new, "w+", rows.dtype, (count, *rows.shape[1:]))
        array[filled : filled + len(rows)] = rows
        filled += len(rows)
    if array is not None:
        array.flush()
    sync(new)
    os.replace(new, path)


def _claim(place: Path, patience: float) -> AcquireReturnProxy | None:
    """The lock for computing a part; None if another process holds it, or if all parts are done and removed."""
    try:
        return FileLock(f"{place}.lock").acquire(timeout=patience)
    except (Timeout, FileNotFoundError):
        return None


@torch.no_grad()
def cached_latents(images: ArraySet, vae: AutoencoderKL, cache_dir: str) -> np.ndarray:
    """x_0 of every record, `(N, C, h, w)` float32; keyed by the content of the data and the VAE."""
    device = next(vae.parameters()).device
    key = content_hash(images.fingerprint, vae, vae.config["scaling_factor"])

    def compute(numbers):
        batch = to_pixel_values(np.stack([images.image(i) for i in numbers])).to(device)
        return encode(vae, batch).float().cpu().numpy()

    return cached_array(Path(cache_dir).expanduser() / f"latents-{key}.npy", len(images), compute, "encoding images")


@torch.no_grad()
def cached_texts(images: ArraySet, tokenizer, text_encoder, cache_dir: str) -> np.ndarray:
    """The text encoder's input for every caption and, last, for the empty one: token ids, `(N + 1, L)` int64.

    With a `text_encoder`, its output: embeddings, `(N + 1, L, D)` float32. Keyed by content, as in `cached_latents`.
    """
    count = len(images.captions)
    key = content_hash(images.fingerprint, text_encoder, sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length)

    def compute(numbers):
        texts = [images.captions[i] if i < count else "" for i in numbers]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        if text_encoder is None:
            return ids.numpy()
        return text_encoder(ids.to(next(text_encoder.parameters()).device))[0].float().cpu().numpy()

    name, batch = ("tokens", 4096) if text_encoder is None else ("embeddings", 64)
    return cached_array(Path(cache_dir).expanduser() / f"{name}-{key}.npy", count + 1, compute, "reading captions", batch)

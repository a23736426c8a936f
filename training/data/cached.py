"""What frozen models make of the data, computed once and kept on disk."""

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

BATCHES_A_PART = 16  # of what several processes compute together


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
    """The array at `path`, memory-mapped; computed batch by batch into it where it does not exist yet.

    Several processes may call at once, on several machines too, and then share the work.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():  # a ready one may lie where nobody may write
        _compute_together(path, count, compute, what, batch)
    try:
        found = np.load(path, mmap_mode="r")
        if len(found) != count:
            raise ValueError(f"it has {len(found)} rows of {count}")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"the cached file {path} is damaged ({error}); remove it, and it is prepared again") from error
    return found


def _compute_together(path: Path, count: int, compute: Callable[[range], np.ndarray], what: str, batch: int) -> None:
    """Part by part: each process takes what no other is at, then what one that was killed has left.

    A part that is done has a mark, so what was computed before a crash stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, marks = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.parts")
    parts = [range(start, min(start + BATCHES_A_PART * batch, count)) for start in range(0, count, BATCHES_A_PART * batch)]
    with FileLock(f"{path}.lock"):
        if path.is_file():
            return
        if not (marks.is_dir() and new.is_file()):
            shutil.rmtree(marks, ignore_errors=True)
            first = compute(range(1))
            open_memmap(new, "w+", first.dtype, (count, *first.shape[1:])).flush()
            marks.mkdir()
    array = np.load(new, mmap_mode="r+")
    progress = tqdm(total=count, desc=what, unit="record")
    for patience in (0, -1):  # seconds to wait for a part that another process is at; at last, as long as it takes
        for part in parts:
            mark = marks / str(part.start)
            claim = _claim(mark, patience)
            if claim is None:
                continue
            with claim:
                if not mark.exists() and not path.is_file():
                    for start in range(part.start, part.stop, batch):
                        array[start : min(start + batch, part.stop)] = compute(range(start, min(start + batch, part.stop)))
                        progress.update(min(batch, part.stop - start))
                    array.flush()
                    mark.touch()
    progress.close()
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            sync(new)
            os.replace(new, path)
        shutil.rmtree(marks, ignore_errors=True)


def _claim(mark: Path, patience: float) -> AcquireReturnProxy | None:
    """The right to compute a part; None where another process has it, or where all is done and tidied up."""
    try:
        return FileLock(f"{mark}.lock").acquire(timeout=patience)
    except (Timeout, FileNotFoundError):
        return None


@torch.no_grad()
def cached_latents(images: ArraySet, vae: AutoencoderKL, cache_dir: str) -> np.ndarray:
    """x_0 of every record, `(N, C, h, w)` float32; keyed by the content of data and VAE."""
    device = next(vae.parameters()).device
    key = content_hash(images.fingerprint, vae, vae.config["scaling_factor"])

    def compute(numbers):
        batch = to_pixel_values(np.stack([images.image(i) for i in numbers])).to(device)
        return encode(vae, batch).float().cpu().numpy()

    return cached_array(Path(cache_dir).expanduser() / f"latents-{key}.npy", len(images), compute, "encoding images")


@torch.no_grad()
def cached_texts(images: ArraySet, tokenizer, text_encoder, cache_dir: str) -> np.ndarray:
    """What the text encoder reads of every caption and, last, of the empty one: token ids, `(N + 1, L)` int64.

    With a `text_encoder`, what it says: embeddings, `(N + 1, L, D)` float32. Keyed by content as above.
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

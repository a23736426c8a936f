"""What people reported of comparable trainers, tried here; each case stands for a kind. `python tests/test_field.py` remakes
the table `field_reports.md`, whose last column the tests make.
"""

# ruff: noqa: B023  (each case runs before the next one is made)
import gzip
import io
import json
import os
import signal
import sys
import tarfile
import tempfile
import threading
import warnings
from operator import attrgetter
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image, ImageCms

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import with_sampler
from sfumato.pipelines.inputs import to_mask, to_pixels
from sfumato.registries import SAMPLERS
from sfumato.schedulers import SfumatoDDPMScheduler
from sfumato.training.config.load import load_config
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.images import read_image
from sfumato.training.data.prepare import prepare

TABLE = Path(__file__).parent / "field_reports.md"
BEFORE = Path(__file__).parent / "fixtures" / "field_before.json"


def png(colour="red", size=(20, 20), kind="PNG", **save):
    body = io.BytesIO()
    Image.new("RGB", size, colour).save(body, kind, **save)
    return body.getvalue()


def pack(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name in members:
            body = b"\0\5\26\7" if "._" in name else png() if name.endswith("png") else b"a thing"
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def outcome(name, **more):
    """What preparing a source gives, in a line: counts, faults and what was left out."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as cache:
        warnings.simplefilter("ignore", UserWarning)
        images = prepare(DataConfig(name=str(name), resolution=16, cache_dir=cache, **{"max_bad_share": 0.9, **more}))
        parts = [f"{len(images)} used"]
        others = {**images.skipped, **getattr(images, "left_out", {})}
        parts += [f"{len(names)} {reason}" for reason, names in others.items()]
        return "; ".join(parts)


def captions(name, **more):
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as cache:
        warnings.simplefilter("ignore", UserWarning)
        images = prepare(DataConfig(name=str(name), resolution=16, cache_dir=cache, max_bad_share=0.9, **more))
        return sorted({record["captions"][0] for record in images})


def folder_of(folder, names, table=None, text=None):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    if table:
        (folder / table).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def archives(folder):
    """Tar archives."""
    dotted = [f"{stem}.{end}" for stem in ("a", "photo.v1", "2024.05.01") for end in ("png", "txt")]
    yield "members with dots in their names", lambda: outcome(pack(folder / "1.tar", dotted))
    fields = ["c.input.png", "c.caption.txt"]
    yield "field names before the ending", lambda: outcome(pack(folder / "2.tar", fields))
    pair = ["d.input.png", "d.target.png", "d.caption.txt"]
    yield "two images in a record, one chosen", lambda: outcome(pack(folder / "3.tar", pair), image_column="target")
    extra = ["e.png", "e.seg.png", "e.txt"]
    yield "a mask beside the image", lambda: outcome(pack(folder / "4.tar", extra))
    apart = [f"{i}.png" for i in range(3)] + [f"{i}.txt" for i in range(3)]
    yield "images first, captions after", lambda: outcome(pack(folder / "5.tar", apart))
    yield "the same, compressed", lambda: outcome(pack(folder / "6.tar.gz", apart, "w:gz"))
    mac = [f"{p}{i}.{k}" for i in range(3) for k in ("png", "txt") for p in ("._", "")]
    yield "files of macOS beside each member", lambda: outcome(pack(folder / "7.tar", mac))
    two = folder / "8.tar"
    two.write_bytes(pack(folder / "x.tar", apart[:1] + apart[3:4]).read_bytes() + pack(folder / "y.tar", dotted).read_bytes())
    yield "two archives, one after the other", lambda: outcome(two)
    huge = folder / "9.tar"
    info = tarfile.TarInfo("z.png")
    info.size = 2**40
    huge.write_bytes(pack(folder / "w.tar", dotted).read_bytes()[: 512 * 4 * 6] + info.tobuf() + b"x" * 512)
    yield "a header that claims 2^40 bytes", lambda: outcome(huge)
    bomb = folder / "10.tar.gz"
    with gzip.open(bomb, "wb", 9) as file, tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("z.png")
        info.size = 300_000_000
        archive.addfile(info, _Zeros(300_000_000))
    yield "a gz of 300 KB that unpacks to 300 MB", lambda: outcome(bomb)


class _Zeros(io.RawIOBase):
    def __init__(self, size):
        self.left = size

    def read(self, size=-1):
        size = min(size if size >= 0 else self.left, self.left)
        self.left -= size
        return bytes(size)


def tables(folder):
    """Tables."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    (folder / "splits").mkdir()
    for split in ("train", "validation", "test"):
        rows = pa.table({"image": [png()] * 3, "text": [f"{split} row"] * 3})
        parquet.write_table(rows, folder / "splits" / f"{split}-00000-of-00001.parquet")
    yield "a parquet file for each split", lambda: outcome(folder / "splits")
    yield "data.split=test", lambda: str(captions(folder / "splits", split="test"))
    (folder / "clone" / "data").mkdir(parents=True)
    parquet.write_table(pa.table({"image": [png()] * 3, "text": ["a"] * 3}), folder / "clone" / "data" / "train-0.parquet")
    yield "a data set as the Hub lays it out, data/*.parquet", lambda: outcome(folder / "clone")
    cells = {"image": [[{"bytes": png(), "path": None}] * 2, [{"bytes": png(), "path": None}]], "text": ["a", "b"]}
    parquet.write_table(pa.table(cells), folder / "several.parquet")
    yield "lists of images in cells", lambda: outcome(folder / "several.parquet")
    parquet.write_table(pa.table({"image": [[[1, 2], [3, 4]]] * 2, "text": ["a", "b"]}), folder / "nested.parquet")
    yield "nested lists of numbers as images", lambda: outcome(folder / "nested.parquet")
    names = [f"{i}.png" for i in range(6)]
    rows = "".join(f"{i}.png,{chr(34) if i == 3 else ''}caption {i}\n" for i in range(6))
    quoted = folder_of(folder / "quote", names, "metadata.csv", "file_name,text\n" + rows)
    yield "a quotation mark that is never closed", lambda: outcome(quoted)
    rows = 'file_name,text\n0.png,"say\n1.png,more"\n2.png,c\n'
    yield "one that is closed rows later", lambda: outcome(folder_of(folder / "later", names[:3], "metadata.csv", rows))
    for label, mark in (("semicolons", ";"), ("tabs", "\t")):
        text = f"file_name{mark}text\n" + "".join(f"{name}{mark}a, b\n" for name in names)
        yield f"a CSV with {label}", lambda: outcome(folder_of(folder / label, names, "metadata.csv", text))
    text = ("file_name,text\n" + "".join(f"{name},Bär\n" for name in names)).encode("utf-16")
    yield "a CSV in UTF-16, as Excel writes it", lambda: outcome(folder_of(folder / "utf16", names, "metadata.csv", text))
    lines = ['{"file_name": "0.png"}'] + [json.dumps({"file_name": name, "text": "a"}) for name in names[1:]]
    first = folder_of(folder / "first", names, "metadata.jsonl", "\n".join(lines))
    yield "a first line without a caption", lambda: outcome(first)
    some = folder_of(folder / "some", names, "metadata.csv", "file_name,text\n0.png,a\n1.png,b\n")
    yield "images that the table does not name", lambda: outcome(some)


def folders(folder):
    """Folders."""
    mixed = folder / "endings"
    mixed.mkdir()
    for name, kind in (("a.png", "PNG"), ("b.jfif", "JPEG"), ("c.jpe", "JPEG"), ("d.avif", "AVIF"), ("e.heic", "PNG")):
        (mixed / name).write_bytes(png(kind=kind))
        (mixed / name).with_suffix(".txt").write_text("a thing")
    yield ".jfif, .jpe, .avif, .heic", lambda: outcome(mixed)
    svg = folder_of(folder / "svg", ["cat/a.png"])
    (svg / "cat" / "b.svg").write_text("<svg/>")
    (svg / "cat" / "c.jpg_large").write_bytes(png())
    yield ".svg, and .jpg_large", lambda: outcome(svg)
    heif = folder / "heif"
    heif.mkdir()
    (heif / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (heif / "a.txt").write_text("a")
    yield "a damaged HEIC alone", lambda: outcome(heif)
    saved = folder / "saved"
    saved.mkdir()
    (saved / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    (saved / "state.json").write_text("{}")
    yield "what save_to_disk writes", lambda: outcome(saved)
    zips = folder / "zips"
    zips.mkdir()
    (zips / "images.zip").write_bytes(b"PK")
    yield "a .zip", lambda: outcome(zips)
    split = folder_of(folder / "split", ["train/a.png", "test/b.png"])
    for name in ("train/a", "test/b"):
        (split / f"{name}.txt").write_text(name)
    yield "train/ and test/ with .txt captions", lambda: outcome(split)
    blobs, links = folder_of(folder / "blobs", ["h0", "h1"]), folder / "links"
    links.mkdir()
    for i in range(2):
        os.symlink(blobs / f"h{i}", links / f"{i}.png")
    (links / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n")
    yield "links to files elsewhere", lambda: outcome(links)
    yield "the same, data.links_into named", lambda: outcome(links, links_into=str(blobs))
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    yield "a named pipe", lambda: outcome(pipe)


def images(folder):
    """Image files."""
    deep = folder / "deep.png"
    Image.fromarray(np.full((16, 16), 20000, np.uint16)).save(deep)
    for label, read in {
        "trained": lambda: read_image(deep, (16, 16))[0, 0, 0] / 255,
        "image": lambda: to_pixels(Image.open(deep), 3, 16, 16)[0, 0, 0, 0] / 2 + 0.5,
        "mask": lambda: to_mask(Image.open(deep), 16, 16)[0, 0, 0, 0],
        "array": lambda: to_pixels(np.full((16, 16, 3), 20000, np.uint16), 3, 16, 16)[0, 0, 0, 0] / 2 + 0.5,
    }.items():
        yield f"20000 of 65535 ({label})", lambda: f"{float(read()):.2f}"
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    swapped = plain.tobytes().replace(b"rXYZ", b"tmp!", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmp!", b"bXYZ", 1)
    body = png(icc_profile=swapped)
    yield "red by numbers, blue by its profile (trained)", lambda: read_image(body, (16, 16))[8, 8].tolist()
    yield "red by numbers, blue by its profile (image)", lambda: _pixel(Image.open(io.BytesIO(body)))
    turned = Image.new("RGB", (20, 10), "red")
    turned.paste("blue", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(folder / "turned.png", exif=exif)
    yield "red at the left once it is turned by EXIF (image)", lambda: _pixel(Image.open(folder / "turned.png"), 2)
    for label, value in {
        "float TIFF from 0 to 1": np.float32(0.5),
        "float TIFF beyond 1": np.float32(7),
        "TIFF of 32-bit integers": np.int32(70000),
    }.items():
        path = folder / f"{label}.tiff"
        Image.fromarray(np.full((16, 16), value)).save(path)
        yield label, lambda: read_image(path, (16, 16))[0, 0, 0]


def _pixel(image, place=8):
    return [round(float(v)) for v in (to_pixels(image, 3, 16, 16)[0, :, 8, place] / 2 + 0.5) * 255]


def calls(folder):
    """The pipeline's call."""
    pipe = tiny.pipeline(folder)
    stock = pipe.to_stock()
    stock.set_progress_bar_config(disable=True)
    yield "pipe._interrupt in a callback", lambda: f"{_steps_until_stopped(pipe)} of 6 steps"

    def drawn(p, **more):
        generator = torch.Generator().manual_seed(0)
        more = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np", "generator": generator, **more}
        return p("a red circle", **more).images

    def differ(one, other, **more):
        return f"differs by {np.abs(drawn(one, **more) - drawn(other, **more)).max():.4f}"

    cut = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    label = "an official callback that ends guidance, against stock"
    yield label, lambda: differ(pipe, stock, callback_on_step_end=cut)
    tiny_vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=3,
    )  # fmt: skip
    latent = SfumatoPipeline(**{**pipe.components, "vae": tiny_vae})
    latent.set_progress_bar_config(disable=True)
    picture = {"image": Image.new("RGB", (32, 32), "red"), "height": 32, "width": 32, "strength": 0.5}
    yield "AutoencoderTiny, image to image", lambda: f"drew {drawn(latent, **picture).shape}"
    pipe.guider = None
    yield "guider=None", lambda: f"drew {drawn(pipe).shape}"
    text_alone = {**dict.fromkeys(pipe.components), "text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    yield "a pipeline of the text encoder alone", lambda: SfumatoPipeline(**text_alone).encode_prompt("a red circle")[0].shape
    embeds, _ = pipe.encode_prompt("a red circle")

    def long(embeds):
        return pipe(prompt_embeds=embeds, num_inference_steps=1, guidance_scale=3.0, output_type="np").images

    yield "embeddings of twice the length alone", lambda: long(torch.cat([embeds, embeds], 1)).shape
    for label, more in {
        "latents that are a list": {"latents": [1.0]},
        "latents of NaN": {"latents": torch.full((1, 3, 16, 16), float("nan"))},
        "a callback that is a text": {"callback_on_step_end": "x"},
        "guidance_scale=1e308": {"guidance_scale": 1e308},
        "an empty image": {"image": np.zeros((0, 16, 3), np.uint8)},
        "integers as an image": {"image": np.zeros((16, 16, 3), np.int64)},
    }.items():
        yield label, lambda: f"drew, finite: {np.isfinite(drawn(pipe, **more)).all()}"
    yield "two threads, two step counts", lambda: _threads(pipe)
    scheduler = SfumatoDDPMScheduler.from_config(pipe.scheduler.config, steps_offset=0, timestep_spacing="leading")
    other = SfumatoPipeline(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    other.save_pretrained(folder / "saved")
    again = SfumatoPipeline.from_pretrained(folder / "saved")
    again.set_progress_bar_config(disable=True)
    yield "steps_offset=0, after a save", lambda: differ(other, again)


def _steps_until_stopped(pipe):
    steps = []

    def stop(pipe, step, t, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    pipe("a red circle", num_inference_steps=6, callback_on_step_end=stop, output_type="np")
    return len(steps)


def _threads(pipe):
    embeds, negative = pipe.encode_prompt("a red circle")
    pipe = with_sampler(pipe, "dpm++")

    def draw(seed, steps):
        generator = torch.Generator().manual_seed(seed)
        more = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "num_inference_steps": steps}
        return pipe(**more, output_type="np", generator=generator).images

    work, got = ((0, 12), (1, 7)), {}
    alone = [draw(*each) for each in work]
    threads = [threading.Thread(target=lambda i=i, each=each: got.update({i: draw(*each)})) for i, each in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return "as alone" if all(i in got and np.array_equal(got[i], alone[i]) for i in range(2)) else "another image"


def settings(folder):
    """Settings."""
    path = tiny.config_file(folder)
    for key, item in (
        ("data.name", "data.name=007"),
        ("data.revision", "data.revision=12e4567"),
        ("validation.prompts", "validation.prompts=[yes, 1e3, 007]"),
        ("title", "title=Birds: a model"),
    ):
        yield item, lambda: repr(attrgetter(key)(_loaded(path, item)))
    for item in (
        *("validation.prompts=[[]]", "optim.lr=inf", "optim.weight_decay=-1", "text_encoder.hidden_size=0"),
        *("train.max_minutes=inf", "checkpoint.keep=1000000000000", "data.resolution=33", "train.batch_sise=4"),
        "validation.num_inference_steps=1001",
    ):
        yield item, lambda: f"taken: {type(_loaded(path, item)).__name__}"
    more = ["scheduler.timestep_spacing=leading", "scheduler.num_train_timesteps=50", "validation.num_inference_steps=50"]
    yield "leading spacing, as many steps as trained", lambda: f"taken: {type(_loaded(path, *more)).__name__}"


def _loaded(path, *items):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_config(path, items)


KINDS = (archives, tables, folders, images, calls, settings)


def evaluate(case, folder: Path) -> str:
    """What a case gives, or the error, in a line; what takes over 20 seconds is ended."""

    def too_long(number, frame):
        raise TimeoutError("over 20 seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        said = str(case())
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    said = "".join(c if c.isprintable() else " " for c in said)
    return " ".join(said.replace(str(folder), "").split())[:250]


def results(folder: Path) -> dict[str, dict[str, str]]:
    """Kind -> case -> what it gives."""
    found = {}
    for kind in KINDS:
        (place := folder / kind.__name__).mkdir()
        found[str(kind.__doc__).rstrip(".")] = {label: evaluate(case, place) for label, case in kind(place)}
    return found


def as_markdown(now) -> str:
    before = json.loads(BEFORE.read_text(encoding="utf-8"))
    table = "| kind | case | before | now |\n|---|---|---|---|\n"
    for kind, cases in now.items():
        for label, said in cases.items():
            cells = (kind, label, before[kind].get(label, "(new)"), said)
            table += "".join(f"| {cell} " for cell in (cell.replace("|", "\\|") for cell in cells)) + "|\n"
    return table


def test_reports_get_what_the_table_says(tmp_path):
    assert as_markdown(results(tmp_path)) == TABLE.read_text(encoding="utf-8")


SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "cosine", "chen_sigmoid", "hang_laplace")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_draws_a_number_that_is_not_finite(tmp_path, sampler):
    """All schedules, predictions, and steps: ours in memory and the stock class of the config that a folder holds."""
    pipe = tiny.pipeline(tmp_path)
    cls = {"ddpm": diffusers.DDPMScheduler}
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for schedule in SCHEDULES:
        for prediction in ("epsilon", "sample", "v_prediction"):
            for zero_snr in (False, True) if prediction != "epsilon" else (False,):
                if sampler == "euler-a" and prediction == "sample":
                    continue
                pipe.register_modules(
                    scheduler=SfumatoDDPMScheduler(
                        beta_schedule=schedule, prediction_type=prediction, rescale_betas_zero_snr=zero_snr,
                        timestep_spacing="trailing", steps_offset=1, clip_sample=False,
                    )
                )  # fmt: skip
                chosen = with_sampler(pipe, sampler).scheduler
                stock = cls.get(sampler, type(chosen)).from_config(chosen.config)
                for steps in (1, 2, 3, 5, 10, 50):
                    assert walk(stock, x, steps).isfinite().all(), (schedule, prediction, zero_snr, steps)


def walk(scheduler, x, steps):
    """Draw with what a network would say of x_0 = 0: exact and cheap."""
    scheduler.set_timesteps(steps)
    x, random = x * scheduler.init_noise_sigma, {}
    if "generator" in scheduler.step.__code__.co_varnames:
        random = {"generator": torch.Generator().manual_seed(0)}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        abar = scheduler.alphas_cumprod[int(t)]
        if scheduler.config.prediction_type == "epsilon":
            output = scaled / (1 - abar).sqrt()
        elif scheduler.config.prediction_type == "sample":
            output = torch.zeros_like(scaled)
        else:
            output = abar.sqrt() / (1 - abar).sqrt() * scaled
        x = scheduler.step(output, t, x, **random).prev_sample
    return x


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = results(Path(place))
    if sys.argv[1:] == ["--before"]:  # with the code of before, to whose file the table compares
        BEFORE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        TABLE.write_text(as_markdown(found), encoding="utf-8")

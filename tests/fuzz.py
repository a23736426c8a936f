# ruff: noqa: B023, E501  (each case runs before the next one is made; tables of odd values)
"""Random input at every door: `python tests/fuzz.py [--seed 0] [--scale 1.0]` (slow; `tests/fuzz.json` has the last figures).

Right is: it works, or it is refused by a clear error (ValueError, TypeError; exit code 2). Wrong is any other exception, a hang of more
than 20 seconds, or memory that grows without bound. Every wrong case is printed with what makes it again.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import tarfile
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import tiny
import torch
from PIL import Image

from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.training.config.load import _leaves, config_class, load_config
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.prepare import prepare
from sfumato.training.models.build import check_network

CLEAR = (ValueError, ModuleNotFoundError)
LIMIT = 20  # seconds
VALUES = [
    *(
        "null",
        "true",
        "no",
        "0",
        "1",
        "-1",
        "2",
        "3",
        "7",
        "8",
        "16",
        "64",
        "1000",
        "1000000000000",
        "0.5",
        "-0.5",
        "1e-30",
        "1e30",
    ),
    *(
        ".inf",
        "-.inf",
        ".nan",
        "",
        " ",
        "x",
        "a: b",
        "[",
        "]",
        "{",
        "}",
        "[]",
        "{}",
        "[1]",
        "[1, 2]",
        "[[]]",
        "[[8, 8]]",
        "[yes, no]",
    ),
    *(
        "[.nan]",
        "{a: 1}",
        "[x, [y]]",
        "007",
        "1_000",
        "0x10",
        "2024-01-01",
        "é",
        "披萨",
        "\u202e",
        "${x}",
        "!!python/object:os.system",
        "&a *a",
    ),
    *("~", "./x", "/dev/null", "a/b", "a/b/c", "cosine", "epsilon", "v_prediction", "euler-a", "bf16", "flow", "auto", "unet"),
]


class Hang(Exception):
    """A case took too long."""


def attempt(case, counts: Counter, label: str, wrong: list, clear: tuple) -> None:
    """Run a case and count what came; `clear`: the errors that are right."""

    def late(number, frame):
        raise Hang(f"over {LIMIT} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            case()
        counts["worked"] += 1
    except clear:
        counts["clear error"] += 1
    except Exception as error:
        counts["WRONG"] += 1
        where = traceback.extract_tb(error.__traceback__)[-1]
        wrong.append(f"{label}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"[:400])
    finally:
        signal.alarm(0)


def configs(rng, folder, count):
    """Settings through load and rules."""
    path, keys = tiny.config_file(folder), list(_leaves(config_class()))
    for _ in range(count):
        items = [f"{rng.choice(keys)}={rng.choice(VALUES)}" for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.2:
            items.append(
                f"{rng.choice(['unet', 'scheduler', 'data', 'x'])}.{rng.choice(['a', 'layers_per_block'])}={rng.choice(VALUES)}"
            )
        yield repr(items), lambda: load_config(path, items)


def networks(rng, folder, count):
    """UNets through the check that comes before the data."""
    downs = [
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "AttnDownBlock2D",
        "SimpleCrossAttnDownBlock2D",
        "ResnetDownsampleBlock2D",
        "Nonsense",
    ]
    ups = ["UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"]
    for _ in range(count):
        depth = rng.randint(1, 4)
        odd = rng.random() < 0.5
        unet = {
            "block_out_channels": [rng.choice([0, 3, 4, 8, 16, 32] if odd else [8, 16, 32]) for _ in range(depth)],
            "down_block_types": [
                rng.choice(downs if odd else downs[:3]) for _ in range(max(1, depth + odd * rng.choice([0, 0, 1, -1])))
            ],
            "up_block_types": [rng.choice(ups if odd else ups[:3]) for _ in range(depth)],
            "layers_per_block": rng.choice([0, 1, 2, 1000, [1] * depth] if odd else [1, 2]),
            "norm_num_groups": rng.choice([1, 2, 4, 3, 0] if odd else [1, 2, 4]),
            "attention_head_dim": rng.choice([1, 2, 3, 8, 0, -1] if odd else [2, 4]),
        }
        for name, values in {
            "act_fn": ["silu", "gelu", "mish", "nothing"],
            "mid_block_type": ["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None, "x"],
            "transformer_layers_per_block": [1, 2, 10**6],
            "time_embedding_type": ["positional", "fourier", "x"],
            "resnet_time_scale_shift": ["default", "scale_shift"],
            "class_embed_type": [None, "timestep", "identity"],
            "center_input_sample": [True, "x"],
        }.items():
            if odd and rng.random() < 0.3:
                unet[name] = rng.choice(values)
        size = rng.choice([8, 16, 24, 32])

        def case():
            path = tiny.config_file(folder)
            content = tiny.yaml.safe_load(path.read_text())
            content |= {"unet": unet, "data": {**content["data"], "resolution": size}}
            path.write_text(tiny.yaml.safe_dump(content))
            check_network(load_config(path))

        yield json.dumps([unet, size]), case


def calls(rng, folder, count):
    """The pipeline's call."""
    pipe = tiny.pipeline(folder)
    nan = float("nan")
    picture = Image.new("RGB", (16, 16), "red")
    choices = {
        "prompt": ["a", "", ["a", "b"], [], None, 7, ["a", None], "x" * 3000, b"a", "\ud800"],
        "negative_prompt": [None, "b", ["a"], ["a", "b", "c"], 3],
        "num_inference_steps": [1, 2, 3, 0, -1, 1001, 2.5, None, True],
        "guidance_scale": [None, 0, 1, 3.0, -1, nan, 1e308, "3", True],
        "num_images_per_prompt": [1, 2, 0, None],
        "height": [None, 16, 24, 15, 0, -8, 1.5, 10**9],
        "width": [None, 16, 8, "x"],
        "image": [None, picture, np.zeros((16, 16, 3), np.uint8), torch.zeros(3, 16, 16), [picture, picture], np.full((16, 16, 3), nan), "x", [],
                  np.zeros((2,)), torch.zeros(3, 16, 16, device="meta"), torch.zeros(0, 3, 16, 16), np.array(["a"]), picture.convert("F")],
        "mask_image": [None, picture.convert("L"), np.ones((16, 16)), np.zeros((16, 16)), torch.ones(1, 16, 16) * 2, 5, []],
        "strength": [None, 0.5, 1, 0, 2, nan, "x"],
        "generator": [None, torch.Generator(), [torch.Generator()], 3, []],
        "latents": [None, torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), nan), [1], torch.zeros(1), torch.zeros(1, 3, 16, 16, dtype=torch.long)],
        "prompt_embeds": [None, torch.zeros(1, 20, 32), torch.zeros(1, 40, 32), torch.zeros(1, 20, 7), torch.zeros(20), "x", torch.full((1, 20, 32), nan)],
        "negative_prompt_embeds": [None, torch.zeros(1, 20, 32), torch.zeros(2, 20, 32), torch.zeros(1, 3, 32), 5],
        "output_type": ["np", "pt", "pil", "latent", "x", None],
        "callback_on_step_end": [None, "x", lambda *a: {}, lambda *a: None],
        "callback_on_step_end_tensor_inputs": [["latents"], [], ["x"], None, "latents", [3]],
        "num_resamples": [1, 2, 0, None],
        "noise_level": [None, 1, "x"],
        "control_image": [None, picture],
        "controlnet_conditioning_scale": [1.0, nan, "x", None],
        "cross_attention_kwargs": [None, {}, {"scale": 0.5}, {"x": 1}, 3],
    }  # fmt: skip
    for _ in range(count):
        some = rng.sample(sorted(choices), rng.randint(1, 4))
        arguments = {
            "prompt": "a",
            "num_inference_steps": 1,
            "output_type": "np",
            **{name: rng.choice(choices[name]) for name in some},
        }
        if "prompt_embeds" in some and arguments["prompt_embeds"] is not None:
            arguments["prompt"] = None

        def case():
            drawn = pipe(**arguments).images
            if isinstance(drawn, np.ndarray) and not np.isfinite(drawn).all():
                raise AssertionError("drew numbers that are not finite")

        yield str({k: str(v)[:60] for k, v in arguments.items()}), case


def sources(rng, folder, count):
    """Folders, tables and archives of odd things."""

    def body():
        kind = rng.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "cut", "noise", "empty", "text"])
        file = io.BytesIO()
        Image.new(rng.choice(["RGB", "L"]), (rng.randint(1, 40), rng.randint(1, 40))).save(
            file, "PNG" if kind.islower() else kind
        )
        cut = file.getvalue()[: rng.randint(0, 60)]
        return {"cut": cut, "noise": rng.randbytes(200), "empty": b"", "text": b"hello"}.get(kind, file.getvalue())

    names = ["a.png", "b.jpg", "c.txt", "a.txt", "d.v1.png", "d.v1.txt", "e.heic", "f.svg", "g", ".hidden.png", "x/y.png", "train/z.png", "test/z.png",
             "metadata.csv", "metadata.jsonl", "README.md", "h.json", "k.cls", "../up.png", "/abs.png", "n\x1b[31m.png", "w" * 200 + ".png"]  # fmt: skip
    texts = [
        "file_name,text\na.png,x\n",
        'file_name,text\na.png,"x\nb.jpg,y\n',
        '{"file_name": "a.png", "text": "x"}\n{',
        "a;b\n",
        "\ufefffile_name,text\n",
        "\x00",
        "",
    ]
    for number in range(count):
        place = folder / f"s{number}"
        place.mkdir()
        chosen = rng.sample(names, rng.randint(0, 8))
        source = place
        if rng.random() < 0.5:
            source = place / rng.choice(["set.tar", "set.tar.gz"])
            with tarfile.open(source, "w:gz" if source.suffix == ".gz" else "w") as archive:
                for name in chosen:
                    content = body() if not name.endswith((".csv", ".jsonl", ".txt")) else rng.choice(texts).encode()
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    info.type = rng.choice([tarfile.REGTYPE] * 9 + [tarfile.SYMTYPE, tarfile.FIFOTYPE])
                    archive.addfile(info, io.BytesIO(content))
            raw = bytearray(source.read_bytes())
            for _ in range(rng.choice([0, 0, 1, 5])):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            source.write_bytes(bytes(raw[: rng.choice([len(raw), len(raw), rng.randrange(len(raw))])]))
        else:
            for name in chosen:
                if name.startswith(("/", "..")):
                    continue
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(
                    body() if not name.endswith((".csv", ".jsonl", ".txt")) else rng.choice(texts).encode()
                )
            if rng.random() < 0.1:
                os.mkfifo(place / "fifo.png")
        cache = folder / "cache"
        yield (
            f"{source}: {chosen}",
            lambda: prepare(DataConfig(name=str(source), resolution=16, cache_dir=str(cache), max_bad_share=0.99)),
        )


def strangers(rng, folder, count):
    """Exported folders in which something was changed."""
    import shutil

    model = folder / "model"
    export_pipeline(tiny.pipeline(folder), model)
    for number in range(count):
        other = folder / f"m{number}"
        shutil.copytree(model, other)
        files = sorted(path for path in other.rglob("*") if path.is_file())
        path = rng.choice([f for f in files if f.suffix in (".json", ".safetensors")])
        how = rng.choice(["cut", "flip", "value", "gone", "pipe", "empty", "list"])
        if how == "value" and path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content:
                content[rng.choice(sorted(content))] = rng.choice(
                    [None, -1, 10**9, "x", [], {}, [10**6] * 3, True, "os.system"]
                )
            path.write_text(json.dumps(content))
        elif how in ("gone", "pipe"):
            path.unlink()
            if how == "pipe":
                os.mkfifo(path)
        else:
            raw = bytearray(path.read_bytes())
            if how == "flip":
                for _ in range(8):
                    raw[rng.randrange(min(len(raw), 400))] = rng.randrange(256)
            path.write_bytes({"cut": raw[: rng.randrange(len(raw))], "empty": b"", "list": b"[1, 2]"}.get(how, bytes(raw)))

        def case():
            try:
                pipe = SfumatoPipeline.from_pretrained(other)
            except UnicodeDecodeError as error:
                raise AssertionError(f"unclear: {error}") from error
            except OSError as error:  # diffusers' own, of files that are not there
                raise ValueError(str(error)) from error
            del pipe

        yield f"{how} {path.relative_to(other)}", case
        shutil.rmtree(other)


DOORS = {configs: 10_000, networks: 500, calls: 2_000, sources: 300, strangers: 100}


def main() -> int:
    """Fuzz every door and write the figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--scale", type=float, default=1.0)
    options.add_argument("--only")
    given = options.parse_args()
    torch.set_num_threads(1)
    figures, failed = {}, 0
    for door, count in DOORS.items():
        if given.only and door.__name__ != given.only:
            continue
        rng, counts, wrong = random.Random(given.seed), Counter(), []
        with tempfile.TemporaryDirectory() as folder:
            for label, case in door(rng, Path(folder), max(1, round(count * given.scale))):
                attempt(case, counts, label, wrong, (*CLEAR, TypeError) if door is calls else CLEAR)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        figures[door.__name__] = {"tried": sum(counts.values()), **counts, "peak_mb": peak}
        print(door.__name__, figures[door.__name__], flush=True)
        for line, times in Counter(wrong).most_common(15):
            print(f"  {times} x {line}", flush=True)
        failed += len(wrong)
    if given.scale == 1.0 and not given.only:
        (Path(__file__).parent / "fuzz.json").write_text(json.dumps({"seed": given.seed, **figures}, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""How the app shows a run's data, starts a new run and writes a report; without Gradio."""

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import dropwhile, takewhile
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.app.watch import place_of, start_apart
from sfumato.figures import loss_curve, to_pil
from sfumato.training.config.comments import sections
from sfumato.training.config.load import config_names, dump_config, load_config
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import ArraySet
from sfumato.training.data.prepare import prepared_folder
from sfumato.training.publish.facts import public_settings

PAGE = 24  # images per page of the data tab
SCANNED = 20_000  # images that are searched for duplicates and whose captions are searched
LEFT_BEHIND = {"app.log", "doctor.png", ".lock"}  # files of a run that did not start, and of the doctor
FOUND = 30  # settings that a search shows


@dataclass(frozen=True, kw_only=True)
class DataPage:
    """Some records of a prepared set, and facts about the whole set.

    Attributes:
        images: `(image, captions)`.
        matching: how many records match the search; in a larger set, only among the first `SCANNED`.
        facts: `(what, figure)` lines.
        skipped: `(reason, names)` of the records that could not be used or were left out.
    """

    images: list[tuple[Image.Image, str]]
    matching: int
    searched_all: bool
    facts: list[tuple[str, str]]
    skipped: list[tuple[str, str]]


def read_data(folder: Path, name: str, search: str = "", split: str = "train", page: int = 0) -> DataPage:
    """A page of the prepared set that a run trains on.

    Raises:
        ValueError: no such run, its set is not prepared, or its data are read as a stream.
    """
    config = load_config(place_of(folder, name) / "config.yaml")
    if config.data.stream:
        raise ValueError("the data of this run are read as a stream and not stored")
    place = prepared_folder(config.data)
    if not (place / "report.json").is_file():
        raise ValueError("the prepared set of this run no longer exists")
    images = ArraySet(place)
    chosen = every = images.select(split)
    words = search.lower().split()
    if words:
        said = ((i, " ".join(images[int(i)]["captions"]).lower()) for i in chosen[:SCANNED])
        chosen = np.array([i for i, text in said if all(word in text for word in words)], np.int64)
    shown = chosen[page * PAGE : (page + 1) * PAGE]
    return DataPage(
        images=[(to_pil(images.picture(int(i))), " | ".join(images[int(i)]["captions"])) for i in shown],
        matching=len(chosen),
        searched_all=not words or len(every) <= SCANNED,
        facts=list(_facts(place)),
        skipped=[
            (reason, f"{len(names)}: {', '.join(names[:5])}")
            for reason, names in (*images.skipped.items(), *images.left_out.items())
        ],
    )


@lru_cache(maxsize=8)
def _facts(place: Path) -> tuple[tuple[str, str], ...]:
    images = ArraySet(place)
    train = images.select("train")
    lengths = [len(images[int(i)]["captions"][0].split()) for i in train[:SCANNED]]
    hashes = [hashlib.sha256(images.image(int(i)).tobytes()).digest() for i in train[:SCANNED]]
    sizes = ", ".join(f"{width} x {height}" for height, width in images.buckets)
    return (
        ("training images", f"{len(train):,}"),
        ("held out", f"{len(images) - len(train):,}"),
        ("size", f"{sizes}, {images.channels} channels"),
        ("words per caption: fewest, median, most", " / ".join(f"{q:.0f}" for q in np.quantile(lengths or [0], (0, 0.5, 1)))),
        ("duplicates", f"{len(hashes) - len(set(hashes)):,} / {len(hashes):,}"),
        *((what, f"{count:,}") for what, count in images.noted.items()),
    )


STYLE = """
body { font: 16px/1.5 system-ui; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% }
td { padding: .2rem 1rem }
"""
# The settings that have their own field in the train tab; all others are entered as lines.
ASKED = (
    *("data.name", "data.resolution", "train.max_minutes", "train.max_steps", "train.batch_size"),
    *("optim.name", "optim.lr", "seed", "validation.every_steps", "checkpoint.every_steps"),
)


def find_settings(search: str) -> list[tuple[str, str, str]]:
    """`(key, default, description)` of settings whose key, description or section description hold all words of the search."""
    words = search.lower().split()
    every = [(setting, section.words) for section in sections() for setting in section.settings]
    found = [s for s, more in every if all(word in f"{s.key} {s.words} {more}".lower() for word in words)]
    return [(s.key, s.default, s.words) for s in found[:FOUND]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run to be started: a preset, `key=value` settings, and its own folder in the folder of runs."""

    preset: str
    overrides: list[str]
    output_dir: Path

    def config(self) -> Config:
        """The config; raises ValueError if the settings cannot work."""
        return load_config(self.preset, self.arguments[1:])

    @property
    def arguments(self) -> list[str]:
        """The preset and the settings, as every command takes them."""
        return [self.preset, *self.overrides, f"output_dir={self.output_dir}"]

    def yaml(self) -> str:
        """The whole config as YAML."""
        return dump_config(self.config())


def plan(runs: Path, preset: str, name: str, asked: dict[str, str], more: str) -> Plan:
    """Make a plan from the fields of the train tab; empty settings keep the preset's value.

    Raises:
        ValueError: no such preset, or a name that cannot be that of a new folder in `runs`.
    """
    if preset not in config_names():
        raise ValueError(f"there is no preset {preset!r}")
    if not re.fullmatch(r"\w[\w.-]{0,63}", name):
        raise ValueError("the run needs a name of letters, digits, dots and dashes")
    if (runs / name).exists() and {path.name for path in (runs / name).iterdir()} - LEFT_BEHIND:
        raise ValueError(f"{name} already exists; choose another name")
    overrides = [f"{key}={value.strip()}" for key, value in asked.items() if value.strip()]
    overrides += [line.strip() for line in more.splitlines() if line.strip()]
    if odd := [text for text in overrides if "=" not in text or text.split("=")[0].strip() == "output_dir"]:
        raise ValueError(f"settings are lines of key=value, without output_dir; got {odd[0]!r}")
    return Plan(preset=preset, overrides=overrides, output_dir=runs / name)


def ask_doctor(wanted: Plan, seconds: float = 900) -> str:
    """What `sfumato doctor` says of a plan.

    Raises:
        ValueError: it took longer, for example to prepare a large set; a terminal has no limit.
    """
    command = [sys.executable, "-m", "sfumato", "doctor", *wanted.arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"the doctor took more than {seconds / 60:.0f} minutes; run it in a terminal") from error
    errors = "" if done.returncode == 0 else done.stderr
    return f"{done.stdout.strip()}\n{errors.strip()}".strip()


def launch_command(wanted: Plan, processes: int = 1) -> list[str]:
    """The command that starts a plan, also in a shell.

    Raises:
        ValueError: several processes without a GPU.
    """
    import torch

    where = ["--cpu"]
    if torch.accelerator.is_available():
        where = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    elif processes > 1:
        raise ValueError("without a GPU one process is as fast; on several machines use torchrun (docs/guide/gpus.md)")
    launch = ["accelerate", "launch", "--num_machines", "1", "--num_processes", str(processes)]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", *where]
    return [*launch, "-m", "sfumato.training.train", *wanted.arguments]


def start(wanted: Plan, processes: int = 1) -> subprocess.Popen:
    """Start `accelerate launch` on a plan in a separate process, which writes to the run's `app.log`.

    Raises:
        ValueError: settings that cannot work.
    """
    wanted.config()
    command = launch_command(wanted, processes)
    wanted.output_dir.mkdir(parents=True, exist_ok=True)
    (wanted.output_dir / "app.log").unlink(missing_ok=True)
    return start_apart([sys.executable, "-m", "accelerate.commands.launch", *command[2:]], wanted.output_dir)


def wait_for_start(process: subprocess.Popen, wanted: Plan, seconds: float = 20) -> None:
    """Wait until a run has its config, or for `seconds` if it is still preparing its data.

    Raises:
        ValueError: it ended before that; the message is its last output.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (wanted.output_dir / "config.yaml").exists():
        if process.poll() not in (None, 0):
            said = (wanted.output_dir / "app.log").read_text(encoding="utf-8", errors="replace").splitlines()
            told = [*dropwhile(lambda line: not line.startswith("sfumato:"), said)]
            told = [*takewhile(lambda line: not line.startswith("Traceback"), told)]
            raise ValueError("\n".join(told[:20] or said[-5:]) or "the run ended at once")
        time.sleep(0.2)


def write_report(folder: Path, name: str, out: Path) -> Path:
    """Write a self-contained page about a run: figures, curve, samples, memorisation, config.

    Raises:
        ValueError: no such run.
    """
    run = place_of(folder, name)
    parts = [f"<h1>{html.escape(name)}</h1>"]
    if rows := read_evaluation(folder, name):
        cells = "".join(f"<tr><td>{html.escape(what)}</td><td>{html.escape(figure)}</td></tr>" for what, figure in rows)
        parts += ["<h2>Evaluation</h2>", f"<table>{cells}</table>"]
    curve = loss_curve(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else None
    pictures = [("Loss", curve), ("Samples", next(iter(sorted(run.glob("samples/step-*.png"), reverse=True)), None))]
    pictures += [("The drawings nearest to training images", _first(run, "memorisation.png"))]
    pictures += [("Training images", _first(run, "doctor.png"))]
    for title, picture in pictures:
        if picture is not None:
            parts += [f"<h2>{title}</h2>", f'<img alt="{title}" src="data:image/png;base64,{_base64(picture)}">']
    config = public_settings(load_config(run / "config.yaml"))
    parts += ["<h2>Config</h2>", f"<pre>{html.escape(config)}</pre>"]
    head = f'<meta charset="utf-8"><title>{html.escape(name)}</title><style>{STYLE}</style>'
    out.write_text(f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n", encoding="utf-8")
    return out


def read_evaluation(folder: Path, name: str) -> list[tuple[str, str]]:
    """`(metric, figure with its interval)` of a run's evaluation; none if it was not evaluated.

    Raises:
        ValueError: no such run.
    """
    path = _first(place_of(folder, name), "evaluation.json")
    if path is None:
        return []
    rows, content = [], json.loads(path.read_text(encoding="utf-8"))
    for what, found in content.get("scores", content).items():
        if isinstance(found, dict) and isinstance(found.get("value"), int | float):
            half = found.get("half_width")
            rows.append((what, f"{found['value']:.4g}" + (f" ± {half:.2g}" if half else "")))
        elif isinstance(found, int | float | str):
            rows.append((what, str(found)))
    return rows


def _first(run: Path, name: str) -> Path | None:
    """The file of `sfumato evaluate`, which lies beside the model, or else the trainer's own."""
    return next((path for path in (run / "pipeline" / name, run / name) if path.is_file()), None)


def _base64(picture: Path | Image.Image) -> str:
    if isinstance(picture, Path):
        return base64.b64encode(picture.read_bytes()).decode()
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()

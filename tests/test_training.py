"""The loop: it learns, resumes, survives, and hands over what it trained."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.card import recommended_settings
from sfumato.training import loop
from sfumato.training.config.load import load_config
from sfumato.training.engine import processes
from sfumato.training.engine.checkpoints import find_damage
from sfumato.training.tasks import text_to_image
from sfumato.training.train import main

ROOT = Path(__file__).parent.parent


def metrics(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def weights(folder, step):
    return load_file(folder / "run" / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


def assert_equal_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_leaves_everything_where_it_belongs(tmp_path, capsys):
    assert main([str(tiny.config_file(tmp_path, validation={"every_steps": 2}))]) == 0
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "validation.jsonl",
        "samples",
        "checkpoints",
        "pipeline",
        "evaluation.json",
        ".lock",
        "finished.json",
    }
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["images_seen"] == 24
    assert {"step", "images_seen", "seconds", "loss", "lr", "grad_norm"} <= set(lines[0])
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    assert {p.name for p in (run / "samples").iterdir()} == {f"step-0000000{i}.png" for i in (2, 4, 6)}
    assert load_config(run / "config.yaml").train.max_steps == 6
    assert set(json.loads((run / "evaluation.json").read_text())) >= {"colour", "shape", "size", "place", "ground", "all"}
    assert "DiffusionPipeline.from_pretrained" in capsys.readouterr().out
    for pipeline in (run / "pipeline", run / "checkpoints" / "step-00000003" / "pipeline"):
        assert SfumatoPipeline.from_pretrained(pipeline).scheduler.config.prediction_type == "v_prediction"


def test_exported_weights_are_the_averaged_ones(tmp_path):
    main([str(tiny.config_file(tmp_path, optim={"lr": 0.01, "lr_decay": "constant", "lr_warmup_steps": 0}))])
    unet = load_file(tmp_path / "run" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    kept = weights(tmp_path, 6)
    name = "conv_in.weight"
    assert torch.equal(unet[name], kept[f"ema.unet.{name}"])
    assert not torch.equal(unet[name], kept[f"raw.unet.{name}"])


@pytest.mark.parametrize(
    "prediction_type, weight",
    [
        ("epsilon", "min_snr"),
        ("sample", "unit"),
        ("v_prediction", "min_snr"),
        pytest.param("epsilon", "unit", marks=pytest.mark.slow),
        pytest.param("sample", "min_snr", marks=pytest.mark.slow),
        pytest.param("v_prediction", "unit", marks=pytest.mark.slow),
    ],
)
def test_every_objective_learns_to_overfit_one_image(tmp_path, prediction_type, weight):
    path = tiny.config_file(
        tmp_path,
        data={"num_pictures": 1},
        scheduler={"prediction_type": prediction_type},
        objective={"weight": weight},
        optim={"lr": 3e-3, "lr_warmup_steps": 5, "lr_decay": "constant"},
        train={"max_steps": 40, "batch_size": 8},
        checkpoint={"every_steps": None},
        validation={"num_judged": 1},
    )
    assert main([str(path)]) == 0
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    """Stopped in the middle of an epoch and gone on: weights, EMA, optimizer and losses are those of one run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    more = {
        "train": {"max_steps": 10, "gradient_accumulation_steps": 2},
        "optim": {"lr_decay": "constant"},
        "data": {"num_pictures": 30},
    }
    main([str(tiny.config_file(whole, **more))])
    path = str(tiny.config_file(parts, **more))
    main([path, "train.max_steps=3"])
    main([path, "checkpoint.resume=auto"])
    assert_equal_tensors(weights(whole, 10), weights(parts, 10))
    assert [line["loss"] for line in metrics(whole)] == [line["loss"] for line in metrics(parts)]
    assert [line["step"] for line in metrics(parts)] == list(range(1, 11))


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path):
    results = []
    for name, train in {"large": {"batch_size": 8}, "parts": {"batch_size": 4, "gradient_accumulation_steps": 2}}.items():
        (tmp_path / name).mkdir()
        main([str(tiny.config_file(tmp_path / name, train={**train, "max_steps": 3}))])
        results.append([line["loss"] for line in metrics(tmp_path / name)])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


def test_resume_that_is_impossible_is_an_error(tmp_path, capsys):
    path = str(tiny.config_file(tmp_path))
    assert main([path, "checkpoint.resume=nowhere"]) == 2
    assert "not a complete checkpoint" in capsys.readouterr().err
    assert main([path, "train.max_steps=3"]) == 0
    assert main([path]) == 2
    assert "checkpoint.resume=auto" in capsys.readouterr().err
    assert main([path, "checkpoint.resume=auto", "unet.block_out_channels=[8,8]"]) == 2
    assert "another model" in capsys.readouterr().err


def test_going_back_past_newer_checkpoints_is_refused(tmp_path, capsys):
    path = str(tiny.config_file(tmp_path))
    assert main([path]) == 0
    old = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert main([path, f"checkpoint.resume={old}", "train.max_steps=9"]) == 2
    assert "would lose them" in capsys.readouterr().err
    assert len(list(old.parent.iterdir())) == 2


def test_a_half_written_checkpoint_is_not_taken(tmp_path):
    path = str(tiny.config_file(tmp_path))
    main([path, "train.max_steps=3"])
    torn = tmp_path / "run" / "checkpoints" / "step-00000099"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match="step-00000099: state.json is missing"):
        assert main([path, "checkpoint.resume=auto"]) == 0
    assert metrics(tmp_path)[-1]["step"] == 6


def test_nan_never_reaches_the_weights(tmp_path, monkeypatch):
    """Every gradient from step 4 on is NaN: steps are skipped and counted, the run stops, the checkpoint stays good."""
    real, calls = text_to_image.weighted_mse, []

    def poisoned(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) > 3 else 1.0)

    monkeypatch.setattr(text_to_image, "weighted_mse", poisoned)
    assert main([str(tiny.config_file(tmp_path, train={"max_steps": 50, "max_bad_steps": 5}))]) == 3
    lines = metrics(tmp_path)
    assert len(lines) == 8 and lines[-1]["skipped_steps"] == 5 and lines[-1]["loss"] is None
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path, 3).values())


def test_a_fault_in_the_middle_is_not_told_as_a_wrong_setting(tmp_path, monkeypatch):
    def broken(*arguments):
        raise ValueError("a fault of the code")

    monkeypatch.setattr(text_to_image, "weighted_mse", broken)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(ValueError, match="a fault of the code"):
        main([str(tiny.config_file(tmp_path))])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_one_nan_is_skipped_and_the_run_goes_on(tmp_path, monkeypatch):
    real, calls = text_to_image.weighted_mse, []

    def poisoned(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(text_to_image, "weighted_mse", poisoned)
    assert main([str(tiny.config_file(tmp_path))]) == 0
    assert metrics(tmp_path)[-1]["skipped_steps"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path, 6).values())


def test_a_signal_on_a_validation_step_saves_and_draws_nothing_more(tmp_path, monkeypatch):
    real = text_to_image.weighted_mse

    def struck(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(text_to_image, "weighted_mse", struck)
    assert main([str(tiny.config_file(tmp_path, validation={"every_steps": 1}))]) == 143
    assert find_damage(tmp_path / "run" / "checkpoints" / "step-00000001") is None
    assert not list((tmp_path / "run").glob("samples/*")) and not (tmp_path / "run" / "validation.jsonl").read_text()


def test_minutes_end_a_run_and_drive_the_learning_rate(tmp_path):
    path = tiny.config_file(tmp_path, train={"max_steps": None, "max_minutes": 0.05}, checkpoint={"every_steps": None})
    assert main([str(path)]) == 0
    lines = metrics(tmp_path)
    assert 3 <= lines[-1]["seconds"] < 4.5
    # The rate of a step follows what was done before it.
    assert lines[-1]["lr"] < 0.02 * max(line["lr"] for line in lines)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system ties no process to cores")
def test_threads_are_as_many_as_the_cores_that_a_run_may_use(tmp_path, monkeypatch):
    """A second thread on one core made a step half as slow again. OMP_NUM_THREADS counts before, for doctor as well."""
    config = load_config(tiny.config_file(tmp_path), ["train.num_threads=null"])
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert processes.num_threads(config) == 7
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # launched: a 1 is the launcher's own
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = b"OMP_NUM_THREADS=1" in processes._parent("environ")  # by whoever started these tests
    assert processes.num_threads(config) == (1 if asked else len(os.sched_getaffinity(0)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        os.sched_setaffinity(0, {min(cores)})
        processes.start_accelerator(load_config(tiny.config_file(tmp_path), ["train.num_threads=null"]))
        assert torch.get_num_threads() == 1
        os.sched_setaffinity(0, cores)
        processes.start_accelerator(load_config(tiny.config_file(tmp_path), ["train.num_threads=null"]))
        assert torch.get_num_threads() == len(cores)
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def test_longer_captions_than_the_limit_are_told(tmp_path):
    with pytest.warns(UserWarning, match="text_encoder.max_length=.* would hold them all"):
        loop.prepare(load_config(tiny.config_file(tmp_path, text_encoder={"max_length": 8})))


def test_a_pretrained_text_encoder_is_frozen_and_kept(tmp_path):
    pipe = tiny.pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "base")
    path = tiny.config_file(
        tmp_path, text_encoder={"pretrained": str(tmp_path / "base")}, vae={"pretrained": str(tmp_path / "base")}
    )
    with pytest.warns(UserWarning, match="captions are longer than 20 tokens"):  # its few words are not those of shapes
        assert main([str(path)]) == 0
    after = SfumatoPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    for a, b in zip(pipe.text_encoder.parameters(), after.text_encoder.parameters()):
        assert torch.equal(a, b)
    assert not any(name.startswith("raw.text_encoder") for name in weights(tmp_path, 6))


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize(
    "override, message",
    [
        ("unet.no_such_thing=1", "UNet2DConditionModel has no argument no_such_thing"),
        ("unet.in_channels=4", "contradicts"),
        ("scheduler.beta_schedule=cosin", "unknown beta_schedule"),
        ("scheduler.beta=1", "SfumatoDDPMScheduler has no argument beta"),
        ("data.name=nowhere", "neither openmoji nor shapes"),
        ("data.cache_dir=/dev/null/cache", "Not a directory"),
    ],
)
def test_wrong_settings_end_before_training(tmp_path, capsys, override, message):
    assert main([str(tiny.config_file(tmp_path)), override]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def launch(path, *overrides):
    command = [sys.executable, str(ROOT / "training" / "train.py"), str(path), *overrides]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    "number, code, workers", [(signal.SIGTERM, 143, 2), pytest.param(signal.SIGINT, 130, 0, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_whole_group_saves_and_leaves_with_its_code(tmp_path, number, code, workers):
    train = {"max_steps": 100_000, "num_workers": workers}
    path = tiny.config_file(tmp_path, train=train, checkpoint={"every_steps": None})
    child = launch(path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = tmp_path / "run" / "metrics.jsonl"
        if file.is_file() and file.read_text().count("\n") > 3:
            break
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.1)
    os.killpg(child.pid, number)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == code, out
    last = metrics(tmp_path)[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "state.json").is_file()
    assert "checkpoint.resume=auto" in out


@pytest.mark.slow
def test_two_processes_follow_one(tmp_path):
    """The same global batch on one and on two processes gives the same losses to float tolerance."""
    losses = {}
    for count, batch_size in ((1, 8), (2, 4)):
        folder = tmp_path / str(count)
        folder.mkdir()
        path = tiny.config_file(folder, train={"batch_size": batch_size})
        launcher = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(ROOT / "configs/accelerate/cpu.yaml"),
        ]
        command = [*launcher, "--num_processes", str(count)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(ROOT / "training/train.py"), str(path)], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        losses[count] = [line["loss"] for line in metrics(folder)]
    np.testing.assert_allclose(losses[1], losses[2], rtol=1e-4)


def test_bars_write_seldom_into_a_log():
    """A bar of two seconds, which writes ten times a second on a terminal, writes into a file at its beginning and end."""
    code = """
import time
from sfumato.files import refresh_bars_slowly_in_files
refresh_bars_slowly_in_files()
from tqdm.auto import tqdm
for _ in tqdm(range(40)):
    time.sleep(0.05)
"""
    env = {**{key: value for key, value in os.environ.items() if key != "TQDM_MININTERVAL"}, "PYTHONPATH": str(ROOT)}
    for seconds, least, most in ((None, 2, 4), ("0.1", 8, 60)):
        chosen = env if seconds is None else {**env, "TQDM_MININTERVAL": seconds}
        done = subprocess.run([sys.executable, "-c", code], env=chosen, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert least <= len(done.stderr.splitlines()) <= most, done.stderr


def test_the_sampler_and_guider_of_validation_draw_the_grids_and_the_sampler_travels(tmp_path):
    """The folder names the sampler that drew its samples, so stock diffusers draws them again without a word about it."""
    chosen = {"sampler": "dpm++", "num_inference_steps": 5, "guidance_scale": 2.0, "prompts": ["a red circle"]}
    path = str(tiny.config_file(tmp_path, validation=chosen))
    assert main([path, "train.max_steps=3"]) == 0
    folder = tmp_path / "run" / "pipeline"
    stock = DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is StableDiffusionPipeline and type(stock.scheduler) is DPMSolverMultistepScheduler
    again = stock("a red circle", **recommended_settings(str(folder)), generator=torch.Generator().manual_seed(0)).images[0]
    assert recommended_settings(str(folder)) == {"num_inference_steps": 5, "guidance_scale": 2.0}
    drawn = np.asarray(Image.open(folder / "samples" / "0.png"), int)
    assert np.abs(np.asarray(again, int) - drawn).max() <= 1
    # Training itself goes on with the schedule, whatever draws; another guider draws another image.
    assert main([path, "checkpoint.resume=auto", "validation.guider=apg", "validation.guidance_interval=[0.2,0.8]"]) == 0
    assert metrics(tmp_path)[-1]["step"] == 6
    assert np.abs(np.asarray(Image.open(folder / "samples" / "0.png"), int) - drawn).max() > 1


def test_a_sampler_that_cannot_draw_is_told_before_training(tmp_path, capsys):
    path = tiny.config_file(tmp_path, scheduler={"prediction_type": "sample"}, validation={"sampler": "euler-a"})
    assert main([str(path)]) == 2
    assert "euler-a cannot draw" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_config_counts_whatever_the_environment_says(tmp_path, monkeypatch, capsys):
    config = load_config(tiny.config_file(tmp_path, train={"gradient_accumulation_steps": 2, "mixed_precision": "no"}))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "5")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = processes.start_accelerator(config)
    assert accelerator.gradient_accumulation_steps == 2 and accelerator.mixed_precision == "no"
    said = capsys.readouterr()
    assert "not ACCELERATE_GRADIENT_ACCUMULATION_STEPS=5" in said.err and "not the bf16 of accelerate" in said.err
    assert "1 process on cpu" in said.out and "8 images per step" in said.out
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match=r"set train\.compile"):
        processes.start_accelerator(config)


@pytest.mark.parametrize(
    "unet, said",
    [
        ({"block_out_channels": [8, 12], "norm_num_groups": 8}, "UNet2DConditionModel cannot be made|cannot draw"),
        ({"layers_per_block": 100000}, "at most 200"),
        ({"block_out_channels": [800000, 1600000], "norm_num_groups": 4}, "parameters; at most"),
        ({"block_out_chanels": [8, 16]}, "did you mean block_out_channels"),
    ],
)
def test_a_network_that_cannot_be_is_told_before_the_data_are_prepared(tmp_path, capsys, unet, said):
    assert main([str(tiny.config_file(tmp_path, unet=unet))]) == 2
    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "cache").exists()


@pytest.mark.filterwarnings("ignore:.*has no effect")
def test_a_missing_predecessor_is_told_with_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(tiny.config_file(tmp_path, unet={}, scheduler={}))
    assert main([path, "init_from=runs/demo/pipeline", "unet={}", "scheduler={}"]) == 2
    assert "sfumato train demo" in capsys.readouterr().err

"""The doctor finds what is planted, and finds nothing where nothing is."""

import json

import numpy as np
import pytest
import tiny
from test_data import image

from sfumato import cli
from sfumato.training import doctor
from sfumato.training.config.load import load_config
from sfumato.training.train import main


def findings(path, *overrides):
    return {(f.severity, f.what): f for f in doctor.examine(load_config(path, overrides))}


def told(found, severity, words):
    return any(s == severity and words in what for s, what in found)


def test_a_sound_config_gets_no_warning_but_for_its_length(tmp_path, capsys):
    path = tiny.config_file(tmp_path, data={"num_pictures": 200})
    found = findings(path)
    assert not [what for severity, what in found if severity in ("warning", "error") and "only 6 steps" not in what]
    assert (tmp_path / "run" / "doctor.png").is_file()
    assert told(found, "fine", "4 images per step") and told(found, "fine", "weights are trained")
    assert cli.main(["doctor", str(path)]) == 0
    assert "last noise level" in capsys.readouterr().out
    assert told(findings(path, "train.max_steps=1000000000"), "warning", "days on one process")


@pytest.mark.filterwarnings("ignore:skipped", "ignore:.*captions are longer")
def test_planted_faults_are_found(tmp_path):
    for i in range(20):
        image(tmp_path / "f" / f"{i}.png", "red" if i < 10 else (i, 2 * i, 0))
    rows = [{"file_name": f"{i}.png", "text": "red thing " * 30 if i < 12 else "thing"} for i in range(20)]
    rows += [{"file_name": "gone.png", "text": "x"}]
    (tmp_path / "f" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tiny.config_file(
        tmp_path,
        data={"name": str(tmp_path / "f"), "max_bad_share": 0.5},
        scheduler={"beta_schedule": "linear", "beta_end": 0.002},
        objective={"caption_dropout": 0.0},
    )
    found = findings(path)
    assert told(found, "note", "1 of 21 records") and told(found, "note", "1 missing: gone.png")
    assert told(found, "warning", "are copies of another")
    assert told(found, "warning", "longer than 20 tokens")
    assert told(found, "warning", "no caption is ever dropped")
    assert told(found, "warning", "last noise level")
    assert told(found, "warning", "training images")
    assert all(f.reason or f.advice for (severity, _), f in found.items() if severity in ("warning", "error"))


def test_a_result_is_judged(tmp_path):
    path = tiny.config_file(tmp_path)
    main([str(path)])
    assert told(findings(path), "fine", "averaged weights") or told(findings(path), "warning", "averaged weights")


@pytest.mark.filterwarnings("ignore:.*captions are longer", "ignore:data.num_pictures", "ignore:validation.num_judged")
def test_a_result_with_a_damaged_checkpoint_and_two_sizes_is_judged(tmp_path):
    for kind, size in {"tall": (20, 40), "wide": (40, 20)}.items():
        for i in range(3):
            image(tmp_path / "f" / kind / f"{i}.png", size=size)
    path = tiny.config_file(tmp_path, data={"name": str(tmp_path / "f"), "buckets": [[24, 16], [16, 24]]})
    main([str(path)])
    (tmp_path / "run" / "checkpoints" / "step-00000006" / "state.safetensors").unlink()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    found = findings(path)
    assert any("averaged weights" in what for _, what in found) and any("samples" in what for _, what in found)


def test_dead_alike_and_tinted_samples():
    rng = np.random.default_rng(0)
    data = rng.random((8, 16, 16, 3))
    judge = lambda images: [f.what.split(":")[0].split(" by ")[0] for f in doctor.judge_samples(images, data)]  # noqa: E731
    assert judge(rng.random((8, 16, 16, 3))) == ["samples have the data's contrast, variety and colour"]
    assert judge(np.full_like(data, 0.5)) == ["samples are dead", "samples are all alike"]
    assert judge(np.repeat(data[:1], 8, 0)) == ["samples are all alike"]
    assert judge(data * [1, 1, 0.5]) == ["samples are tinted"]

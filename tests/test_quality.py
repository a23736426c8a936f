"""Metrics against independent implementations, and the whole report through the command line."""

import json

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from transformers import BertConfig, BertModel

from sfumato.cli import main as cli
from sfumato.training.config import schema as configs
from sfumato.training.data.prepare import prepare
from sfumato.training.data.sources import openmoji
from sfumato.training.engine.checkpoints import find_damage
from sfumato.training.quality.attributes import attributes, pairs
from sfumato.training.quality.command import EvaluateOptions, open_for_evaluation
from sfumato.training.quality.distances import (
    distances,
    frechet_distance,
    gaussian,
    kernel_distance,
    kernel_within,
    manifold_scores,
)
from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.features import compute_features
from sfumato.training.quality.judge import Judge, alter_image
from sfumato.training.quality.memorisation import flat_rows, memorisation, nearest, nearest_training
from sfumato.training.quality.retrieval import retrieval, retrieval_in_chinese
from sfumato.training.quality.statistics import jackknife_score, mean_score, student_quantile
from sfumato.training.train import main

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n, m, d", [(300, 200, 16), (40, 30, 64), (200, 20, 50)])
def test_frechet_distance_is_that_of_scipy_with_more_or_fewer_images_than_features(n, m, d):
    a, b = RNG.normal(size=(n, d)), 1.5 * RNG.normal(size=(m, d)) + 0.3
    s, t = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(gaussian(a), b) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_kernel_distance_is_that_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b = (torch.from_numpy(RNG.normal(size=(60, 24))) + shift for shift in (0, 0.2))
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    from torchmetrics.image.kid import maximum_mean_discrepancy

    expected = maximum_mean_discrepancy(kernel(a, a), kernel(a, b), kernel(b, b)).item()
    assert kernel_distance(a.numpy(), b.numpy()) == pytest.approx(expected, rel=1e-4)
    assert kernel_distance(a.numpy(), b.numpy(), kernel_within(a.numpy())) == pytest.approx(expected, rel=1e-4)
    many = RNG.normal(size=(600, 4))  # more than are taken at once
    k = (many @ many.T / 4 + 1) ** 3
    assert kernel_within(many) == pytest.approx((k.sum() - np.trace(k)) / (600 * 599), rel=1e-9)
    assert poly_mmd(a, b).item() == pytest.approx(expected, rel=1e-4)


def test_manifold_scores_are_those_of_the_formulas():
    """By loops over balls, as Naeem et al. 2020 write them, equations 1 to 7."""
    true, made, k = RNG.normal(size=(40, 6)), 0.8 * RNG.normal(size=(30, 6)) + 0.2, 3
    radius = {name: np.sort(cdist(x, x), axis=1)[:, k] for name, x in (("true", true), ("made", made))}
    in_true = [[np.linalg.norm(y - x) < r for x, r in zip(true, radius["true"])] for y in made]
    in_made = [[np.linalg.norm(x - y) < r for y, r in zip(made, radius["made"])] for x in true]
    expected = {
        "precision": np.mean([any(row) for row in in_true]),
        "recall": np.mean([any(row) for row in in_made]),
        "density": np.sum(in_true) / (k * len(made)),
        "coverage": np.mean([any(row[i] for row in in_true) for i in range(len(true))]),
    }
    got = {name: values.mean() for name, values in manifold_scores(true, made, k).items()}
    assert got == pytest.approx(expected)
    np.testing.assert_allclose(distances(true, made), cdist(true, made), rtol=1e-6)


def test_confidence_intervals_cover_the_truth():
    for draw, truth in (
        (lambda: RNG.random(60) < 0.3, 0.3),
        (lambda: RNG.random(40) < 0.02, 0.02),
        (lambda: RNG.normal(size=6), 0),
    ):
        scores = [mean_score(draw()) for _ in range(400)]
        assert 0.92 < np.mean([abs(score.value - truth) <= score.half_width for score in scores])
    assert mean_score(np.zeros(45)).half_width == pytest.approx(0.079, abs=0.01), "none of 45 is not none for sure"
    assert mean_score([1.0]).half_width is None
    assert student_quantile(9) == pytest.approx(2.262, abs=0.005) and student_quantile(4) == pytest.approx(2.776, abs=0.03)


def test_the_interval_of_a_distance_is_its_spread_over_other_sets():
    """FD and KID of fresh sets from one distribution: the told half width is about 1.96 of their standard deviation."""
    true = RNG.normal(size=(500, 16))
    for distance in (lambda x: frechet_distance(true, x), lambda x: kernel_distance(true, x)):
        scores = [jackknife_score(distance, RNG.normal(size=(150, 16)) + 0.1) for _ in range(60)]
        spread = 1.96 * np.std([score.value for score in scores])
        assert np.median([score.half_width for score in scores]) == pytest.approx(spread, rel=0.5)


def test_copies_are_found_and_new_images_are_not():
    train, held_out, new = (RNG.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8) for n in (50, 40, 30))
    copies = np.clip(train[:30].astype(int) + RNG.integers(-2, 3, (30, 8, 8, 3)), 0, 255).astype(np.uint8)
    rows = flat_rows(train)
    apart, which = nearest(flat_rows(copies), [rows[:20], rows[20:]])  # in two blocks
    assert which.tolist() == list(range(30))
    np.testing.assert_allclose(apart, cdist(flat_rows(copies), rows).min(1), rtol=1e-6)
    assert np.linalg.norm(flat_rows(np.zeros((1, 8, 8, 3))) - flat_rows(np.full((1, 8, 8, 3), 255))) == pytest.approx(1)
    for drawn, share in ((copies, 1.0), (new, None)):
        near, which = nearest_training(drawn, flat_rows(drawn), [train[:20], train[20:]], rows)
        assert near.shape == which.shape == (30, 2) and (which[:, 0] == which[:, 1]).all()
        scores = memorisation(near, nearest_training(held_out, flat_rows(held_out), [train], rows)[0])
        key = "share nearer than 95% of held-out images, pixels"
        assert scores[key].mean() == share if share is not None else scores[key].mean() < 0.3


def test_skin_tones_are_read_off_openmoji():
    assert openmoji.split_tone("woman firefighter medium-light skin tone") == ("medium-light skin tone", "woman firefighter")
    assert openmoji.split_tone("person medium skin tone bald") == ("medium skin tone", "person bald")
    assert openmoji.split_tone("pizza") == (None, "pizza")
    assert openmoji.split_tone("woman and man holding hands medium skin tone dark skin tone")[0] is None
    right, plain = [], []
    for record in openmoji.records(["en"], True, ["firefighter", "judge", "teacher"]):
        tone = openmoji.split_tone(record["captions"][0])[0]
        read = openmoji.read_tone(openmoji.rasterise(record["svg"], 32))
        (right if tone else plain).append(read == tone)
    assert len(right) == 45 and np.mean(right) > 0.9


def test_captions_of_the_same_image_count_as_one(tmp_path):
    """OpenMoji draws a man and a person walking alike, so a judge that names the one for the other is right."""
    images = prepare(configs.DataConfig(languages=["en"], words=["walking"], cache_dir=str(tmp_path)))
    number = {images[i]["captions"][0]: i for i in range(len(images))}
    man, person, woman = (number[f"{who} walking medium skin tone"] for who in ("man", "person", "woman"))
    evaluation = object.__new__(Evaluation)  # drawing is tested below
    evaluation.dataset = images
    assert evaluation.duplicates[man] == evaluation.duplicates[person] != evaluation.duplicates[woman]
    evaluation.parts = {"train": np.array([person]), "held_out": np.zeros(0, int), "combination": np.array([person])}
    evaluation.drawings = np.stack([images.image(person)] * 2)
    for named, right in ((man, 1), (woman, 0)):
        scores = np.eye(len(images))[None, named : named + 1]
        evaluation.judge_scores = lambda part, captions, scores=scores: {"": scores, " by true images": scores}
        assert retrieval(evaluation)["retrieval at 1, training captions"].value == right
        assert attributes(evaluation)["held-out combinations wholly right"].value == right
    others = [i for i in range(len(images)) if evaluation.duplicates[i] != evaluation.duplicates[person]]
    several = [
        i for i in others if evaluation.duplicates[i] in (evaluation.duplicates[others[0]], evaluation.duplicates[others[1]])
    ]
    scores = np.full((1, 1, len(images)), 0.1)
    scores[0, 0, several], scores[0, 0, person] = 0.9, 0.5
    evaluation.judge_scores = lambda part, captions: {"": scores}
    found = retrieval(evaluation)
    assert len(several) >= 2 and found["retrieval at 1, training captions"].value == 0
    assert found["retrieval at 5, training captions"].value == 1


class Eye:
    """A judge that knows every image of a set by heart."""

    def __init__(self, images):
        self.captions = {images.image(i).tobytes(): images[i]["captions"][0] for i in range(len(images))}

    def scores(self, images, captions, seen):
        return np.array([[caption == self.captions[image.tobytes()] for caption in captions] for image in images], float)


def test_chinese_prompts_are_judged_by_the_english_captions_of_their_images(tmp_path):
    images = prepare(configs.DataConfig(languages=["en", "zh"], words=["cat", "dog"], resolution=16, cache_dir=str(tmp_path)))
    chinese = {images[i]["captions"][-1]: images.image(i) for i in range(len(images))}
    evaluation = object.__new__(Evaluation)
    evaluation.dataset, evaluation.judges = images, [Eye(images)]
    evaluation.parts = {"train": images.select("train"), "held_out": images.select("held_out")}
    evaluation.draw = lambda captions: np.stack([chinese[caption] for caption in captions])
    found = retrieval_in_chinese(evaluation)
    assert found["retrieval at 1, training captions in Chinese"].value == 1
    evaluation.draw = lambda captions: np.stack([chinese[caption] for caption in captions[1:] + captions[:1]])
    assert retrieval_in_chinese(evaluation)["retrieval at 1, training captions in Chinese"].value < 0.2
    evaluation.dataset = prepare(configs.DataConfig(languages=["en"], words=["cat"], resolution=16, cache_dir=str(tmp_path)))
    evaluation.parts = {"train": evaluation.dataset.select("train"), "held_out": evaluation.dataset.select("held_out")}
    del evaluation.duplicates
    assert retrieval_in_chinese(evaluation) == {}


def test_a_caption_that_many_images_have_counts_once(tmp_path):
    """Folders named like their class: of three captions the right one is among the first five, whatever the judge says."""
    for k, name in enumerate(("red", "green", "blue")):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.new("RGB", (8, 8), tuple(200 + i if c == k else 9 * i for c in range(3))).save(tmp_path / name / f"{i}.png")
    images = prepare(configs.DataConfig(name=str(tmp_path), resolution=8, cache_dir=str(tmp_path / "cache")))
    evaluation = object.__new__(Evaluation)
    evaluation.dataset, train = images, images.select("train")
    evaluation.parts = {"train": train, "held_out": np.zeros(0, int)}
    worst = np.stack([np.array([0.1 if evaluation.caption(i) == c else 0.9 for c in ("red", "green", "blue")]) for i in train])
    order = list(dict.fromkeys(evaluation.caption(i) for i in range(len(images))))
    worst = worst[:, [("red", "green", "blue").index(caption) for caption in order]]
    evaluation.judge_scores = lambda part, captions: {"": worst[None]}
    found = retrieval(evaluation)
    assert found["retrieval at 1, training captions"].value == 0 and found["retrieval at 5, training captions"].value == 1


def test_held_out_images_that_are_trained_under_another_caption_are_not_judged(tmp_path):
    images = prepare(configs.DataConfig(languages=["en"], words=["walking", "teacher", "pilot"], cache_dir=str(tmp_path)))
    evaluation = object.__new__(Evaluation)
    evaluation.dataset = images
    trained = {images.image(int(i)).tobytes() for i in images.select("train")}
    held_out, unseen = images.select("held_out_combination"), evaluation.unseen("held_out_combination")
    assert 0 < len(unseen) < len(held_out)
    assert set(unseen) == {i for i in held_out if images.image(int(i)).tobytes() not in trained}


def test_pairs_of_true_images_are_right_and_of_others_wrong(tmp_path):
    """By a judge that knows each caption: the colour is read off the pixels, the thing among captions of that colour."""
    settings = {"languages": ["en"], "skin_tones": False, "words": ["book", "heart", "apple"], "recolours": 8}
    images = prepare(configs.DataConfig(**settings, cache_dir=str(tmp_path)))
    evaluation = object.__new__(Evaluation)
    evaluation.dataset = images
    numbers = evaluation.unseen("held_out_pair")
    assert len(numbers) > 3
    evaluation.parts = {"train": [], "held_out": [], "combination": [], "pair": numbers}
    perfect = np.eye(len(images))[None, numbers]
    evaluation.judge_scores = lambda part, captions: {"": perfect, " by true images": perfect}
    evaluation.drawings = evaluation.real(numbers)
    found = pairs(evaluation)
    assert found["thing of held-out pairs"].value == 1
    assert found["colour of held-out pairs"].value == found["held-out pairs wholly right by true images"].value > 0.7
    evaluation.drawings = np.full_like(evaluation.drawings, 255)
    assert pairs(evaluation)["held-out pairs wholly right"].value == 0


def test_judges_that_disagree_count_by_their_share_and_by_most(tmp_path):
    """Retrieval is their mean, with a wider interval than that of one judge; a combination is right when most say so."""
    images = prepare(configs.DataConfig(languages=["en"], words=["student"], cache_dir=str(tmp_path)))
    evaluation = object.__new__(Evaluation)
    evaluation.dataset, numbers = images, np.arange(len(images))
    evaluation.parts = {"train": numbers, "held_out": np.zeros(0, int), "combination": numbers}
    evaluation.drawings = np.concatenate([evaluation.real(numbers)] * 2)
    right = np.eye(len(images))
    wrong = right[::-1]
    for panel, share, vote in (((right, right, wrong), 2 / 3, True), ((right, wrong, wrong), 1 / 3, False)):
        evaluation.judge_scores = lambda part, captions, panel=panel: {"": np.stack(panel), " by true images": np.stack(panel)}
        found = retrieval(evaluation)["retrieval at 1, training captions"]
        assert found.value == pytest.approx(share, abs=0.1) and found.half_width > 0.5
        whole = attributes(evaluation)["profession and gender of held-out combinations"].value
        assert (whole > 0.8) == vote


def test_captions_that_differ_at_their_end_only_are_told_apart():
    """And where they cannot be, no image is found: what is equal does not count as right."""
    long = [" ".join(["a", "very"] + ["long"] * 40 + [word]) for word in ("red", "green", "blue")]
    judge = Judge(long)
    assert len({tuple(row.tolist()) for row in judge.tokens(long)}) == 3
    evaluation = object.__new__(Evaluation)
    evaluation.dataset, evaluation.duplicates = long, np.arange(3)
    evaluation.caption = long.__getitem__
    evaluation.parts = {"train": np.arange(3), "held_out": np.zeros(0, int)}
    evaluation.judge_scores = lambda part, captions: {"": np.full((1, 3, 3), 0.5)}
    assert retrieval(evaluation)["retrieval at 1, training captions"].value == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_altered_images_are_moved_blurred_and_noisy_but_little(channels):
    image = np.zeros((64, 64, channels), np.uint8)
    image[20:40, 10:30] = 200
    rng, tops, edges = np.random.default_rng(0), set(), set()
    for _ in range(30):
        made = alter_image(image, rng)
        assert made.shape == image.shape and made.dtype == np.uint8
        assert made[24:36, 14:26].mean() > 180 and made[50:].mean() < 10
        profile = made[:, 14:26].mean((1, 2))
        tops.add(int(np.argmax(profile > 100)))
        edges.add(bool(np.diff(profile).max() > 160))
    assert tops == {18, 19, 20, 21, 22} and edges == {True, False}, "moved by up to two pixels; sharp and blurred ones"


def test_features_of_a_transformers_model(tmp_path):
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(tmp_path / "dino")
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    CLIPModel(CLIPConfig(vision_config=size | {"intermediate_size": 32}, text_config=text, projection_dim=12)).save_pretrained(
        tmp_path / "clip"
    )
    images = RNG.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    assert compute_features(images, f"transformers:{tmp_path / 'dino'}").shape == (3, 16)
    assert compute_features(images, f"transformers:{tmp_path / 'clip'}").shape == (3, 12)
    with pytest.raises(ValueError, match="cannot be opened"):
        compute_features(images, f"transformers:{tmp_path}")
    with pytest.raises(ValueError, match="unknown extractor"):
        compute_features(images, "vgg")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    data = {"name": "openmoji", "languages": ["en"], "words": ["student", "singer"], "resolution": 32}
    assert main([str(tiny.config_file(folder, data=data))]) == 0
    return folder


def test_evaluate_puts_figures_protocol_and_images_into_the_card(run, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(run))
    monkeypatch.setattr("sfumato.training.quality.judge.STEPS", 30)
    monkeypatch.setattr("sfumato.training.quality.judge.NUM_ALTERED_COPIES", 1)
    folder = run / "run" / "pipeline"
    command = ["evaluate", "--model", str(folder), "--images", "12", "--steps", "2", "--bits", "2"]
    assert cli(command) == 0
    told = json.loads((folder / "evaluation.json").read_text())
    names = set(told["scores"])
    assert {"FD", "KID", "precision", "recall", "density", "coverage"} <= names
    assert {"retrieval at 1, training captions", "retrieval at 5, held-out captions by true images"} <= names
    assert {"skin tone of held-out combinations", "held-out combinations wholly right by true images"} <= names
    assert {"diversity: distance between drawings of one caption", "bits per dimension, train"} <= names
    assert {f"share nearer than 95% of held-out images, pixels{part}" for part in ("", ", held-out captions")} <= names
    assert told["scores"]["skin tone of held-out combinations by true images"]["value"] > 0.6
    assert all(np.isfinite(score["value"]) for score in told["scores"].values())
    assert (folder / "memorisation.png").is_file()
    card = ModelCard.load(folder / "README.md")
    assert card.text.count("## How good it is") == 1 and told["protocol"] in card.text
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures["FD"] == pytest.approx(told["scores"]["FD"]["value"], abs=1e-4)
    assert "inference" in card.data.to_dict() and "memorisation.png" in card.text
    before = (folder / "evaluation.json").read_text()
    assert cli(command) == 0
    assert ModelCard.load(folder / "README.md").text.count("## How good it is") == 1
    assert (folder / "evaluation.json").read_text() == before, "evaluation is a function of model and data"


def test_evaluate_of_a_run_knows_its_data_and_leaves_checkpoints_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sfumato.training.quality.judge.STEPS", 2)
    monkeypatch.setattr("sfumato.training.quality.judge.NUM_ALTERED_COPIES", 1)
    data = tmp_path / "images"
    data.mkdir()
    for i in range(105, 130):  # of which one is held out, by its name
        Image.fromarray(RNG.integers(0, 256, (16, 16, 4)).astype(np.uint8)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"image {i}")
    path = tiny.config_file(tmp_path, data={"name": str(data), "channels": 4},
                            checkpoint={"every_steps": 3, "best_by": "held_out_loss"},
                            validation={"every_steps": 3, "guider": "apg", "guidance_interval": [0.2, 0.8]})  # fmt: skip
    assert main([str(path)]) == 0
    run = tmp_path / "run"
    short = ["--images", "4", "--steps", "1"]
    assert cli(["evaluate", "--model", str(run), *short]) == 0, "the data are those of config.yaml"
    told = json.loads((run / "pipeline" / "evaluation.json").read_text())
    assert "guidance 3.0 (apg) in 0.2 to 0.8 of the steps" in told["protocol"]
    assert "retrieval at 1, training captions" in told["scores"], "transparent images have a judge too"
    options = EvaluateOptions(images=4, steps=1, sampler="unipc")
    assert type(open_for_evaluation(str(run / "pipeline"), options)[0].guider).__name__ == "AdaptiveProjectedGuidance", (
        "as its grids were drawn"
    )
    assert cli(["evaluate", "--model", str(run / "best" / "pipeline"), *short]) == 0
    inside = next((run / "checkpoints").iterdir()) / "pipeline"
    assert cli(["evaluate", "--model", str(inside), *short]) == 2 and "--out" in capsys.readouterr().err
    assert cli(["evaluate", "--model", str(inside), *short, "--out", str(tmp_path / "figures")]) == 0
    assert find_damage(inside.parent) is None and (tmp_path / "figures" / "evaluation.json").is_file()


def test_evaluate_says_what_it_cannot_do(run, tmp_path, capsys, monkeypatch):
    pipe = tiny.pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "bare")
    assert cli(["evaluate", "--model", str(tmp_path / "bare")]) == 2
    assert "--out" in capsys.readouterr().err
    assert cli(["evaluate", "--model", str(tmp_path / "bare"), "--out", str(tmp_path / "out")]) == 2
    assert "--data" in capsys.readouterr().err
    folder = str(run / "run" / "pipeline")
    monkeypatch.setattr(
        "sfumato.training.quality.drawing.draw_images", lambda *a, **k: pytest.fail("drawn before it was checked")
    )
    other, blind = tiny.config_file(tmp_path, data={"resolution": 24}), tmp_path / "reads words"
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        blind
    )
    for wrong in (
        ["--data", str(other)],
        ["--steps", "0"],
        ["--sampler", "x"],
        ["--steps", "5000"],
        ["--guidance-scale", "nan"],
        ["--images", "1"],
        ["--bits", "-1"],
        ["--seed", "-1"],
        ["--out", str(other)],
        ["--extractor", f"transformers:{blind}"],
        ["--extractor", "x"],
        ["--extractor", "transformers:/nowhere"],
    ):
        assert cli(["evaluate", "--model", folder, *wrong]) == 2, wrong

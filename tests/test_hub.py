"""Sharing through a loopback Hub: the real client pushes from one process and loads from others."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import crashes
import numpy as np
import pytest
import tiny
import torch
from loopback_hub import Hub, point_client_at
from PIL import Image
from stock_process import run_stock

from sfumato.cli import main
from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.pipelines.export import RunRecord
from sfumato.training.train import main as train

# Draws with whatever class; sfumato cannot be imported. Arguments: a file for the images, then (class, keywords) as JSON.
LOAD = """
    import json, os, sys, urllib.request, numpy as np, torch
    import diffusers
    images = {}
    for i, (name, repo, keywords) in enumerate(json.loads(sys.argv[2])):
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mark").read()  # so that the log of requests tells the loads apart
        pipe = getattr(diffusers, name).from_pretrained(repo, **keywords)
        pipe.set_progress_bar_config(disable=True)
        images[f"{i} {type(pipe).__name__}"] = pipe("a red circle", guidance_scale=3.0, num_inference_steps=3,
            output_type="np", generator=torch.Generator().manual_seed(0)).images
    np.savez(sys.argv[1], **images)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An exported folder and what it draws."""
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny.pipeline(folder)
    facts = {"title": "Tiny", "steps": 3}
    export_pipeline(pipe, folder / "model", facts, run=RunRecord(samples=[("a red circle", Image.new("RGB", (16, 16)))]))
    generator = torch.Generator().manual_seed(0)
    images = pipe("a red circle", guidance_scale=3.0, num_inference_steps=3, output_type="np", generator=generator).images
    return folder / "model", images


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


def run(hub, home, *command, token="writer", check=True):
    """A fork that takes `hub` for the Hub and runs the command `sfumato`."""
    command = [str(part) for part in command]
    child = forked(hub, home, lambda: main(command), token)
    assert not check or child.returncode == 0, child.stderr
    return child


def forked(hub, home, task, token):
    """Run `task()` in a fork; the client's settings are as the environment of a new process would set them."""
    home.mkdir(exist_ok=True)

    def child():
        sys.stdout, sys.stderr = (open(home / name, "w", buffering=1) for name in ("out", "err"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            os.environ.pop(name, None)
        os.environ.update(hub.env(home, token))
        point_client_at(hub.url, home)
        return task()

    (code,) = crashes.wait([crashes.fork(child, quiet=False)])
    return subprocess.CompletedProcess("fork", code, (home / "out").read_text(), (home / "err").read_text())


def load(hub, tmp_path, *doors, home="reader"):
    """Images by all doors, from a child without sfumato, and what it said."""
    start = (
        "import os, pathlib, sys\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "from loopback_hub import point_client_at\n"
        f"os.environ.update({hub.env(tmp_path / home, None)!r})\n"
        f"point_client_at({hub.url!r}, pathlib.Path({str(tmp_path / home)!r}))\n"
    )
    child = run_stock(start + textwrap.dedent(LOAD), tmp_path / "images", json.dumps(doors))
    return dict(np.load(tmp_path / "images.npz")), child.stderr


def test_pushed_once_and_loaded_by_every_door(hub, model, tmp_path):
    folder, expected = model
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = run(hub, tmp_path / "home", "push", folder, "tiny", "--tag", "v1").stdout
    assert f"pushed {hub.url}/ada/tiny/commit/" in said
    repository = hub.repositories["ada/tiny"]
    assert len(repository.history) == 1 and set(repository.tags) == {"v1"}
    (sha,) = repository.history
    assert set(repository.commits[sha]) == {str(path.relative_to(folder)) for path in before} | {".gitattributes"}
    card = repository.commits[sha]["README.md"].decode()
    assert 'from_pretrained("ada/tiny"' in card and str(folder) not in card
    run(hub, tmp_path / "home", "push", folder, "ada/tiny", "--tag", "v1")  # nothing new: no commit
    assert repository.history == [sha]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    code = {"custom_pipeline": "ada/tiny", "trust_remote_code": True}
    doors = [
        ("DiffusionPipeline", "ada/tiny", {}),
        ("StableDiffusionPipeline", "ada/tiny", {"revision": sha}),
        ("AutoPipelineForText2Image", "ada/tiny", {"revision": "v1"}),
        ("DiffusionPipeline", "ada/tiny", code),
        ("DiffusionPipeline", "ada/tiny", {}),
    ]
    images, said = load(hub, tmp_path, *doors)
    assert [name.split()[1] for name in images] == ["StableDiffusionPipeline"] * 3 + [
        "SfumatoPipeline",
        "StableDiffusionPipeline",
    ]
    for name, got in images.items():
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=name)
    for trouble in ("newly initialized", "not expected", "Expected types", "MISSING", "UNEXPECTED"):
        assert trouble not in said
    last = hub.requests[len(hub.requests) - hub.requests[::-1].index("GET /mark") :]
    assert len(last) == 2, last  # the rest was in the cache


def test_ours_opens_a_repository_and_exports_the_same_folder(hub, model, tmp_path):
    folder, _ = model
    run(hub, tmp_path / "home", "push", folder, "tiny")
    run(hub, tmp_path / "home", "export", "ada/tiny", tmp_path / "again")
    files = hub.repositories["ada/tiny"].commits[hub.repositories["ada/tiny"].history[0]]
    again = {str(p.relative_to(tmp_path / "again")): p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file()}
    text = files["README.md"].decode().replace('"ada/tiny"', '"again"')
    assert again.pop("README.md").decode() == text and again == {
        k: v for k, v in files.items() if k not in ("README.md", ".gitattributes")
    }


def test_a_cascade_is_drawn_and_exported_whole(hub, model, tmp_path):
    second = export_pipeline(tiny.pipeline(tmp_path, task="upscaling", data={"resolution": 32}), tmp_path / "second")
    export_pipeline(SfumatoPipeline.from_pretrained(model[0]), tmp_path / "cascade", upscaler=second)
    run(hub, tmp_path / "home", "push", tmp_path / "cascade", "two")
    run(
        hub,
        tmp_path / "new",
        "sample",
        "a red circle",
        "--model",
        "ada/two",
        "--steps",
        "2",
        "--each",
        tmp_path,
        "--out",
        tmp_path / "g.png",
    )
    assert Image.open(tmp_path / "00000.png").size == (32, 32), "the second model has drawn too"
    run(hub, tmp_path / "home", "export", "ada/two", tmp_path / "again")
    assert (tmp_path / "again" / "upscaler" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_dry_run_lists_and_changes_nothing(hub, model, tmp_path):
    said = run(hub, tmp_path, "push", model[0], "tiny", "--dry-run").stdout
    assert "would push to ada/tiny, main (a new repository, public): " in said and " MB; " in said
    assert "unet/diffusion_pytorch_model.safetensors" in said
    assert not hub.repositories
    assert "holds all of this already" not in run(hub, tmp_path, "push", model[0], "tiny", "--private").stdout
    assert "(there already, private)" in run(hub, tmp_path, "push", model[0], "tiny", "--dry-run").stdout
    assert "holds all of this already" in run(hub, tmp_path, "push", model[0], "tiny").stdout


def test_files_that_are_gone_go_and_a_branch_is_its_own(hub, model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model[0], folder)
    run(hub, tmp_path, "push", folder, "tiny")
    (folder / "samples" / "0.png").unlink()
    assert "removed samples/0.png" in run(hub, tmp_path, "push", folder, "tiny", "--dry-run").stdout
    run(hub, tmp_path, "push", folder, "tiny", "--branch", "step-2")
    repository = hub.repositories["ada/tiny"]
    assert "samples/0.png" in repository.commits[repository.branches["main"]]
    assert "samples/0.png" not in repository.commits[repository.branches["step-2"]]
    assert len(repository.history) == 2


def test_a_pull_request_where_one_may_not_write(hub, model, tmp_path):
    run(hub, tmp_path, "push", model[0], "tiny")
    hub.repositories["press/tiny"] = hub.repositories.pop("ada/tiny")
    said = run(hub, tmp_path, "push", model[0], "press/tiny", "--pull-request", check=False)
    assert said.returncode == 0, said.stderr
    repository = hub.repositories["press/tiny"]
    assert repository.branches["main"] == repository.history[0] and "refs/pr/1" in repository.pulls


@pytest.mark.parametrize(
    "token, repo_id, message",
    [
        (None, "tiny", "there is no Hub token; run `hf auth login`"),
        ("wrong", "tiny", "the Hub does not know this token"),
        ("reader", "tiny", "is read-only"),
        ("writer", "press/tiny", "ada may not write to press, only to ada, lab"),
        ("writer", "a b", "is not allowed"),
        ("writer", "ada/foreign", "holds something that Sfumato did not make"),
    ],
)
def test_what_cannot_be_pushed_is_one_line_and_known_before_training(hub, model, tmp_path, token, repo_id, message):
    run(hub, tmp_path, "push", model[0], "foreign")
    repository = hub.repositories["ada/foreign"]
    repository.commit("main", {"thesis.tex": b"x"}, False)
    commits = len(repository.history)
    path = tiny.config_file(tmp_path, hub={"push": True, "repo_id": repo_id})
    for command in (("push", model[0], repo_id), *([("train", path)] if token == "reader" else [])):  # the same check
        child = run(hub, tmp_path, *command, token=token, check=False)
        assert child.returncode == 2 and message in child.stderr, child.stderr
        assert len([line for line in child.stderr.splitlines() if line.startswith("sfumato: ")]) == 1
        assert "Traceback" not in child.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and len(repository.history) == commits


def test_no_hub_at_all_is_one_line(hub, model, tmp_path):
    hub.url = "http://127.0.0.1:9"
    child = run(hub, tmp_path, "push", model[0], "tiny", check=False)
    assert child.returncode == 2 and "the Hub cannot be reached" in child.stderr and "Traceback" not in child.stderr


def test_a_cut_connection_is_taken_up_where_it_broke(hub, model, tmp_path):
    hub.cut_uploads = 2
    child = run(hub, tmp_path, "push", model[0], "tiny")
    repository = hub.repositories["ada/tiny"]
    assert len(repository.history) == 1 and hub.cut_uploads == 0, child.stdout
    sent = [request for request in hub.requests if request.startswith("PUT")]
    assert len(sent) <= len(repository.lfs) + 2  # what had arrived was not sent again


def test_killed_while_pushing_leaves_the_old_revision_and_the_folder(hub, model, tmp_path):
    folder, expected = model
    run(hub, tmp_path / "home", "push", folder, "tiny")
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    weights = changed / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    before = {path: path.read_bytes() for path in changed.rglob("*") if path.is_file()}
    hub.stall.clear()
    env = {**os.environ, **hub.env(tmp_path / "home")}
    child = subprocess.Popen([sys.executable, "-m", "sfumato.cli", "push", str(changed), "tiny"], env=env)
    while not any(request.startswith("PUT") and "ada/tiny" in request for request in hub.requests[-1:]):
        time.sleep(0.02)
        assert child.poll() is None
    child.kill()
    child.wait()
    hub.stall.set()
    assert len(hub.repositories["ada/tiny"].history) == 1
    assert {path: path.read_bytes() for path in changed.rglob("*") if path.is_file()} == before
    images, _ = load(hub, tmp_path, ("DiffusionPipeline", "ada/tiny", {}))
    np.testing.assert_allclose(*images.values(), expected, atol=1e-5)


@pytest.mark.parametrize("plant", ["unet/weights.bin", "link"])
def test_what_should_not_travel_is_refused(hub, model, tmp_path, plant):
    folder = tmp_path / "model"
    shutil.copytree(model[0], folder)
    if plant == "link":
        (tmp_path / "secret").write_text("secret")
        (folder / "samples" / "1.png").symlink_to(tmp_path / "secret")
    else:
        (folder / plant).write_bytes(b"x")
    child = run(hub, tmp_path, "push", folder, "tiny", check=False)
    assert child.returncode == 2 and re.search("link out of|pickle", child.stderr) and not hub.repositories


def test_training_pushes_checkpoints_in_the_background_and_the_result(hub, tmp_path):
    path = tiny.config_file(tmp_path, hub={"push": True, "repo_id": "tiny", "every_steps": 3, "tag": "v1"})
    said = run(hub, tmp_path, "train", path)
    repository = hub.repositories["ada/tiny"]
    assert set(repository.branches) == {"main", "step-3"} and set(repository.tags) == {"v1"}
    assert said.stdout.count(f"pushed {hub.url}/ada/tiny/commit/") == 2
    assert not (tmp_path / "run" / ".push").exists()
    files, early = (repository.commits[repository.branches[name]] for name in ("main", "step-3"))
    name = "unet/diffusion_pytorch_model.safetensors"
    assert files[name] != early[name]
    for file in (tmp_path / "run" / "pipeline").rglob("*.safetensors"):
        assert file.read_bytes() == files[str(file.relative_to(tmp_path / "run" / "pipeline"))]
    assert {"training_args.yaml", "samples/0.png"} <= set(files)
    assert str(tmp_path).encode() not in b"".join(files[name] for name in files if not name.endswith(".safetensors"))


def test_a_hub_that_refuses_costs_the_push_and_nothing_else(hub, tmp_path):
    hub.full = True
    path = tiny.config_file(tmp_path, hub={"push": True, "repo_id": "tiny", "every_steps": 3})
    child = run(hub, tmp_path, "train", path, check=False)
    assert child.returncode == 5 and "step-00000003 is not pushed: the Hub refused: " in child.stdout
    assert "sfumato: not pushed: the Hub refused: " in child.stderr and "storage is full" in child.stderr
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    hub.full = False
    run(hub, tmp_path, "push", tmp_path / "run", "tiny")
    assert len(hub.repositories["ada/tiny"].commits[hub.repositories["ada/tiny"].branches["main"]]) > 10


def test_private_is_not_made_of_a_public_one(hub, model, tmp_path):
    run(hub, tmp_path, "push", model[0], "tiny")
    child = run(hub, tmp_path, "push", model[0], "tiny", "--private", check=False)
    assert child.returncode == 2 and "ada/tiny is public, and private was asked for" in child.stderr


def test_a_card_that_cannot_be_read_is_one_line(hub, model, tmp_path):
    folder = shutil.copytree(model[0], tmp_path / "model")
    for text in ("---\ntitle: a: b\n---\n", "---\nlicense: mit\n---\nno tag for what it does\n"):
        (folder / "README.md").write_text(text)
        child = run(hub, tmp_path, "push", folder, "tiny", check=False)
        assert child.returncode == 2 and "Traceback" not in child.stderr and "sfumato: the Hub refused: " in child.stderr


def test_a_tag_is_not_moved_and_a_foreign_card_is_kept(hub, model, tmp_path):
    folder = shutil.copytree(model[0], tmp_path / "model")
    foreign = '---\nlicense: mit\npipeline_tag: text-to-image\n---\n\n# Theirs\n\n`x.from_pretrained("some/control")`\n'
    (folder / "README.md").write_text(foreign)
    run(hub, tmp_path, "push", folder, "tiny", "--private", "--tag", "v1")
    repository = hub.repositories["ada/tiny"]
    card = repository.commits[repository.branches["main"]]["README.md"].decode()
    assert repository.private and "# Theirs" in card and "some/control" in card and "- sfumato" in card
    run(hub, tmp_path, "push", folder, "tiny")
    assert len(repository.history) == 1  # ours to push to, and nothing new
    (folder / "samples" / "0.png").unlink()
    child = run(hub, tmp_path, "push", folder, "tiny", "--tag", "v1", check=False)
    assert child.returncode == 2 and "the tag v1 names another state already" in child.stderr
    assert repository.tags["v1"] == repository.history[0]


def test_a_model_with_self_conditioning_opens_by_id_and_its_code_does_not_run(hub, tmp_path):
    pipe = tiny.pipeline(tmp_path, objective={"self_conditioning": True})
    folder = export_pipeline(pipe, tmp_path / "own", {"title": "Own"})
    (folder / "pipeline.py").write_text((folder / "pipeline.py").read_text() + "\nraise SystemExit('ran')\n")
    run(hub, tmp_path / "home", "push", folder, "own")

    def draw():
        pipe = SfumatoPipeline.from_pretrained("ada/own")
        print(pipe.reads, pipe("a red circle", num_inference_steps=2).images[0].size)

    child = forked(hub, tmp_path / "home", draw, "writer")
    assert child.returncode == 0 and "estimate (16, 16)" in child.stdout, child.stderr


def test_a_space_draws_with_the_model_that_was_pushed(hub, model, tmp_path):
    """Its page runs in a process without sfumato, opens the model from the Hub and draws as stock classes do."""
    folder, _ = model
    run(hub, tmp_path / "home", "push", folder, "tiny", "--space", "tiny-page")
    said = run(hub, tmp_path / "home", "push", folder, "tiny", "--space", "tiny-page").stdout  # and again
    assert f"made {hub.url}/spaces/ada/tiny-page" in said
    space = hub.repositories["spaces/ada/tiny-page"]
    files = space.commits[space.history[-1]]
    assert {"app.py", "requirements.txt", "README.md"} <= set(files)
    front = files["README.md"].decode()
    assert 'sdk: "gradio"' in front and 'models: ["ada/tiny"]' in front and b"diffusers>=" in files["requirements.txt"]
    (tmp_path / "page.py").write_bytes(files["app.py"])
    pytest.importorskip("gradio")
    home = tmp_path / "visitor"
    code = f"""
        import os, sys
        sys.path.append({str(Path(__file__).parent)!r})
        from loopback_hub import point_client_at
        import pathlib
        os.environ.update({hub.env(home, None)!r})
        point_client_at({hub.url!r}, pathlib.Path({str(home)!r}))
        import runpy
        page = runpy.run_path({str(tmp_path / "page.py")!r}, run_name="page")
        drawn = page["draw"]("a red circle\\n\\na blue square", "", 3, 2, 2.0)
        assert [prompt for _, prompt in drawn] == ["a red circle", "a blue square"]
        assert drawn[0][0].width >= 256 and page["MODEL"] == "ada/tiny"
        assert "sfumato" not in sys.modules
    """
    run_stock(textwrap.dedent(code))


def test_a_page_is_made_only_of_what_it_can_draw(hub, model, tmp_path):
    folder, _ = model
    both = run(hub, tmp_path / "home", "push", folder, "tiny", "--space", "page", "--pull-request", check=False)
    assert both.returncode == 2 and "leave one of them out" in both.stderr
    assert main_of_arrays(tmp_path) == 0
    arrays = run(hub, tmp_path / "home", "push", tmp_path / "solids" / "run", "solids", "--space", "page", check=False)
    assert arrays.returncode == 2 and "draws images from text alone" in arrays.stderr
    assert "ada/solids" not in hub.repositories and "spaces/ada/page" not in hub.repositories
    run(hub, tmp_path / "home", "push", folder, "shy", "--private", "--space", "shy-page")
    assert hub.repositories["spaces/ada/shy-page"].private


def main_of_arrays(tmp_path) -> int:
    (tmp_path / "solids").mkdir()
    data = {"name": "volumes", "channels": 16}
    few = {"num_judged": 1}
    path = tiny.config_file(tmp_path / "solids", data=data, train={"max_steps": 1}, validation=few)
    return train([str(path)])

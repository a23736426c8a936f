"""A Space on the Hub that draws with a model there: a Gradio page that needs diffusers and none of our code."""

import importlib.metadata
import json
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.card import recommended_settings, sample_prompts
from sfumato.training.publish.hub import CannotPush, Target

GRADIO = "6.31.0"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def check_space(folder: Path) -> None:
    """Check that stock diffusers can draw images with a model from text alone, which is what the page does.

    Raises:
        CannotPush: it cannot.
    """
    pipe = SfumatoPipeline.from_pretrained(folder)
    if pipe.codec is not None or pipe.reads is not None or pipe.controlnet is not None:
        raise CannotPush("a Space's page draws images from text alone; this model does something else")


def space_files(model_id: str, folder: Path, title: str, revision: str = "main") -> dict[str, str]:
    """The files of a Space, name -> text, for the model of a folder that is on the Hub as `model_id`."""
    advice = recommended_settings(str(folder))
    code = Path(__file__).with_name("space_app.py").read_text(encoding="utf-8")
    steps, scale = advice["num_inference_steps"], advice["guidance_scale"]
    for old, new in (
        ('"OWNER/NAME"', json.dumps(model_id)),
        ('REVISION = "main"', f"REVISION = {json.dumps(revision)}"),
        ("STEPS, SCALE = 30, 3.0", f"STEPS, SCALE = {steps}, {scale}"),
        ("EXAMPLES: list[str] = []", f"EXAMPLES: list[str] = {sample_prompts(folder)[:4]!r}"),
    ):
        assert old in code
        code = code.replace(old, new)
    front = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "app_file": "app.py",
        "models": [model_id],
        "tags": ["sfumato"],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]
    return {
        "app.py": code,
        "requirements.txt": "".join(f"{name}>={importlib.metadata.version(name).split('+')[0]}\n" for name in PACKAGES),
        "README.md": "\n".join(["---", *lines, "---", "", f"Draws with [{model_id}](https://huggingface.co/{model_id}).", ""]),
    }


def push_space(folder: Path, space_id: str, target: Target, title: str = "Sfumato") -> str:
    """Create or update the Space `space_id` for a folder that was pushed to `target`; returns its address.

    A private model has a private Space, which needs a token of its own as the secret `HF_TOKEN`.

    Raises:
        CannotPush: the Hub refuses.
    """
    api = HfApi()
    files = space_files(target.repo_id, folder, title, target.branch)
    try:
        private = target.private or None
        made = api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        additions = [CommitOperationAdd(name, text.encode()) for name, text in files.items()]
        api.create_commit(made.repo_id, additions, repo_type="space", commit_message="Draw with a model of Sfumato")
    except (HfHubHTTPError, httpx2.TransportError, OSError, RuntimeError, ValueError) as error:
        raise CannotPush(f"the model is on the Hub, but its Space {space_id} could not be made: {error}") from error
    return str(made)

"""A Space on the Hub that draws with a model there: a page of Gradio that needs diffusers and nothing of ours."""

import importlib.metadata
import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from sfumato.pipelines.card import recommended_settings, sample_prompts
from sfumato.training.publish.hub import CannotPush

GRADIO = "6.31.0"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def space_files(model_id: str, folder: Path, title: str) -> dict[str, str]:
    """Name -> text of the files of a Space for the model of a folder that is on the Hub as `model_id`."""
    advice = recommended_settings(folder)
    code = Path(__file__).with_name("space_app.py").read_text(encoding="utf-8")
    code = code.replace('"OWNER/NAME"', json.dumps(model_id))
    code = code.replace(
        "STEPS, SCALE = 30, 3.0", f"STEPS, SCALE = {advice['num_inference_steps']}, {advice['guidance_scale']}"
    )
    code = code.replace("EXAMPLES: list[str] = []", f"EXAMPLES: list[str] = {sample_prompts(folder)[:4]!r}")
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


def push_space(model_id: str, folder: Path, space_id: str, title: str = "Sfumato") -> str:
    """Make or renew the Space `space_id`; its address.

    Raises:
        CannotPush: the Hub refuses.
    """
    api = HfApi()
    files = space_files(model_id, folder, title)
    try:
        made = api.create_repo(space_id, repo_type="space", space_sdk="gradio", exist_ok=True)
        additions = [CommitOperationAdd(name, text.encode()) for name, text in files.items()]
        api.create_commit(made.repo_id, additions, repo_type="space", commit_message="Draw with a model of Sfumato")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CannotPush(f"the Space {space_id} could not be made: {error}") from error
    return str(made)

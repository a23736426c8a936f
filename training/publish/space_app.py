"""Draw from text with the model of this Space; diffusers and Gradio are all it needs."""

import os
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline

MODEL = os.environ.get("SFUMATO_MODEL", "OWNER/NAME")
REVISION = "main"
STEPS, SCALE = 30, 3.0
EXAMPLES: list[str] = []

pipe: Any = DiffusionPipeline.from_pretrained(MODEL, revision=REVISION)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
pipe.set_progress_bar_config(disable=True)


def draw(prompts: str, negative: str, seed: float, steps: float, scale: float, progress=gr.Progress()):  # noqa: B008  (Gradio finds it so)
    """One image per line, at most eight; image i has the seed `seed` + i."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()][:8]
    if not lines:
        raise gr.Error("Nothing to draw.", print_exception=False)

    def tell(pipe, step, t, tensors):
        progress((step + 1, int(steps)))
        return tensors

    images = pipe(
        lines,
        negative_prompt=[negative] * len(lines) if negative else None,
        num_inference_steps=int(steps),
        guidance_scale=float(scale),
        generator=[torch.Generator().manual_seed(int(seed) + i) for i in range(len(lines))],
        callback_on_step_end=tell,
    ).images
    large = [image.resize((image.width * k, image.height * k), 0) for image in images for k in [max(1, 256 // image.width)]]
    return list(zip(large, lines))


with gr.Blocks(title=MODEL) as app:
    gr.Markdown(f"# [{MODEL}](https://huggingface.co/{MODEL})\nTrained with Sfumato. One prompt per line.")
    with gr.Row():
        with gr.Column():
            prompts = gr.Textbox("\n".join(EXAMPLES), label="Prompts", lines=4, max_length=2000)
            negative = gr.Textbox("", label="Negative prompt", max_length=500)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1)
            steps = gr.Slider(1, 100, STEPS, step=1, label="Steps")
            scale = gr.Slider(1.0, 15.0, SCALE, step=0.1, label="Guidance scale")
            go = gr.Button("Draw", variant="primary")
        gallery = gr.Gallery(label="Images", columns=4, object_fit="contain", format="png")
    go.click(draw, [prompts, negative, seed, steps, scale], gallery, api_name="draw")

if __name__ == "__main__":
    app.launch()

"""The Gradio pages of the app, and the server that they are mounted in."""

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sfumato.app import run_pages
from sfumato.app.notices import errors_on_the_page, told
from sfumato.app.studio import AXES, MAX_STEPS, Studio, enlarge, read_settings, read_values
from sfumato.app.words import speaker
from sfumato.figures import flatten, open_image
from sfumato.pipelines.conditions import default_size
from sfumato.pipelines.explain import heat_image
from sfumato.pipelines.guided import guidance_width
from sfumato.pipelines.images import to_8_bits
from sfumato.pipelines.sample import crop_middle
from sfumato.registries import GUIDERS, SAMPLERS
from sfumato.training.tasks.control import find_edges

MODELS_OWN = "–"
MAX_SEED = 2**53 - 1  # the largest that a browser counts exactly
MAX_SCALE = 15.0
MAX_PIXELS = 1_048_576  # of an enlarged image
CANVAS = 512  # side of the area to paint in, in pixels


def build(model: str, *, runs: Path, token: str, host: str, password: str | None, language: str) -> FastAPI:
    """The app as a web application that answers only to its own addresses; see `sfumato.app.launch`.

    Raises:
        ValueError: no such model or language.
    """
    say = speaker(language)
    studio = Studio(model)
    with gr.Blocks(title="Sfumato", analytics_enabled=False) as pages:
        gr.Markdown("# Sfumato")
        if studio.image_input is not None:
            with gr.Tab(say("Redraw")):
                _draw_from_image(studio, say)
        else:
            with gr.Tab(say("Draw")):
                _draw(studio, say)
            if studio.pipe.codec is None:
                with gr.Tab(say("Redraw")):
                    _redraw(studio, say)
                with gr.Tab(say("Why")):
                    _why(studio, say)
            with gr.Tab(say("Compare")):
                _compare(studio, say)
        run_pages.build(pages, runs, Path(studio.places.name), token, say)
    app = FastAPI()
    hosts = ["127.0.0.1", "localhost", *([] if host in ("0.0.0.0", "::") else [host])]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["*"] if host in ("0.0.0.0", "::") else hosts)
    return gr.mount_gradio_app(
        app,
        pages.queue(default_concurrency_limit=1),
        path="/",
        auth=("sfumato", password) if password else None,
        allowed_paths=[studio.places.name],
        max_file_size="20mb",
        ssr_mode=False,
        show_error=True,
        theme=gr.themes.Default(font=["system-ui"], font_mono=["monospace"]),
    )


def _draw(studio: Studio, say) -> None:
    advice = studio.advice
    own_guiders = [name for name in GUIDERS if not GUIDERS[name].weak]
    with gr.Row():
        with gr.Column():
            prompts = gr.Textbox("red heart", label=say("Prompts, one per line"), lines=3, max_length=4000)
            negative = gr.Textbox("", label=say("Negative prompt"), max_length=1000)
            with gr.Row():
                seed = gr.Number(0, label=say("Seed"), precision=0, minimum=0, maximum=MAX_SEED)
                steps = gr.Slider(1, MAX_STEPS, advice["num_inference_steps"], step=1, label=say("Steps"))
                scale = gr.Slider(1.0, MAX_SCALE, advice["guidance_scale"], step=0.1, label=say("Guidance scale"))
            with gr.Row():
                sampler = gr.Dropdown([MODELS_OWN, *SAMPLERS], value=MODELS_OWN, label=say("Sampler"))
                guider = gr.Dropdown(own_guiders, value="cfg", label=say("Guider"))
            with gr.Row():
                go = gr.Button(say("Draw"), variant="primary")
                stop = gr.Button(say("Stop"))
            few = guidance_width(studio.pipe.unet) is not None
            typing = gr.Checkbox(few, label=say("Draw while I type"), visible=studio.pipe.codec is None)
            dropped = gr.Image(
                type="filepath",
                image_mode=None,
                label=say("Drop an image drawn here to restore its settings"),
                height=120,
                sources=["upload", "clipboard"],
            )
        with gr.Column():
            live = gr.Image(label=say("What the network expects"), interactive=False, height=340)
            gallery = gr.Gallery(label=say("Images"), columns=4, object_fit="contain", format="png")
            ending = "" if studio.pipe.codec is None else studio.pipe.codec.endings[0]
            sound = gr.Audio(label=say("Sound"), visible=ending == ".wav", interactive=False)
            solid = gr.Model3D(label=say("Solid"), visible=ending == ".glb")
            files = gr.Files(label=say("Files"), visible=bool(ending), interactive=False)
            command = gr.Textbox(label=say("The equivalent command"), interactive=False)

    def draw(prompts, negative, seed, steps, scale, sampler, guider):
        own = None if sampler == MODELS_OWN else sampler
        settings = {"negative": negative, "seed": int(seed or 0), "steps": steps, "scale": scale, "sampler": own}
        with errors_on_the_page(say):
            for moment in studio.draw(prompts or "", **settings, guider=guider):
                last = moment.things[-1] if moment.things else None
                # For clips, show the clips themselves, which the gallery plays.
                shown = moment.things if ending == ".gif" else moment.done
                of_kind = [last if ending == kind else None for kind in (".wav", ".glb")]
                yield moment.expected, shown, *of_kind, moment.things, moment.command

    def draw_typed(typing, *settings):
        if typing and settings[0].strip():
            yield from draw(*settings)

    def recall(path):
        if path is None:
            return [gr.skip()] * 7
        found = read_settings(path)
        return [
            found.get("prompts", ""),
            found.get("negative_prompt", ""),
            min(max(found.get("seed", 0), 0), MAX_SEED),
            min(max(found.get("steps", advice["num_inference_steps"]), 1), MAX_STEPS),
            min(max(found.get("guidance_scale", advice["guidance_scale"]), 1.0), MAX_SCALE),
            found.get("sampler", MODELS_OWN),
            found.get("guider", "cfg") if found.get("guider") in own_guiders else "cfg",
        ]

    settings = [prompts, negative, seed, steps, scale, sampler, guider]
    results = [live, gallery, sound, solid, files, command]
    gr.on([go.click, negative.submit], draw, settings, results, api_name="draw")
    # Keys are pressed while an image is drawn: only the latest text is drawn next, not every one.
    prompts.input(
        draw_typed,
        [typing, *settings],
        results,
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )
    stop.click(studio.stop, queue=False, api_name="stop")
    dropped.upload(told(recall, say), dropped, settings, api_name="recall")


def _redraw(studio: Studio, say) -> None:
    height, width = studio.pipe.trained_size
    with gr.Row():
        with gr.Column():
            label = say("Paint over the part to redraw")
            image = gr.ImageEditor(
                type="pil",
                label=label,
                sources=["upload", "clipboard"],
                image_mode="RGBA",
                canvas_size=(CANVAS, CANVAS),
                fixed_canvas=True,
                brush=gr.Brush(default_size=CANVAS // 8, colors=["#8040ff"], color_mode="fixed"),
            )
            take = gr.Button(say("Use the last drawn image"))
            prompt = gr.Textbox("", label=say("Prompt"), max_length=1000)
            with gr.Row():
                strength = gr.Slider(0.0, 1.0, 1.0, step=0.05, label=say("Strength"))
                again = gr.Slider(1, 10, 3, step=1, label=say("Repeats of each step"))
                seed = gr.Number(0, label=say("Seed"), precision=0, minimum=0, maximum=MAX_SEED)
            go = gr.Button(say("Redraw"), variant="primary")
        with gr.Column():
            live = gr.Image(label=say("What the network expects"), interactive=False, height=340)
            gallery = gr.Gallery(label=say("Images"), columns=2, object_fit="contain", format="png")

    def redraw(painted, prompt, strength, again, seed):
        if not painted or painted.get("background") is None:
            raise gr.Error(say("Nothing to draw."), print_exception=False)
        inputs: dict[str, Any] = {"image": _fit(painted["background"], width, height), "strength": strength}
        mask = painted_mask(painted, width, height)
        if mask is not None:
            inputs |= {"mask_image": mask, "num_resamples": int(again)}
        with errors_on_the_page(say):
            for moment in studio.draw(prompt or "", seed=int(seed or 0), **inputs):
                yield moment.expected, moment.done

    def last():
        path = studio.last
        if path is None:
            raise ValueError("Nothing to draw.")
        with open_image(Path(path)) as drawn:
            return drawn.convert("RGBA").resize((CANVAS, CANVAS), Image.Resampling.NEAREST)

    take.click(told(last, say), None, image, api_visibility="private")
    go.click(redraw, [image, prompt, strength, again, seed], [live, gallery], api_name="redraw")


def _draw_from_image(studio: Studio, say) -> None:
    """The page of a model that draws only from an image: one to enlarge, or one whose edges a ControlNet follows."""
    height, width = studio.pipe.trained_size
    follows = studio.image_input == "control_image"
    with gr.Row():
        with gr.Column():
            label = say("Image whose edges to follow") if follows else say("Image to enlarge")
            image = gr.Image(type="pil", image_mode=None, label=label, sources=["upload", "clipboard"], height=340)
            is_map = gr.Checkbox(False, label=say("It is already an edge map"), visible=follows)
            prompt = gr.Textbox("", label=say("Prompt"), max_length=1000)
            with gr.Row():
                seed = gr.Number(0, label=say("Seed"), precision=0, minimum=0, maximum=MAX_SEED)
                steps = gr.Slider(1, MAX_STEPS, studio.advice["num_inference_steps"], step=1, label=say("Steps"))
            go = gr.Button(say("Draw"), variant="primary")
        with gr.Column():
            live = gr.Image(label=say("What the network expects"), interactive=False, height=340)
            gallery = gr.Gallery(label=say("Images"), columns=2, object_fit="contain", format="png")

    def draw(image, is_map, prompt, seed, steps):
        with errors_on_the_page(say):
            if image is None:
                raise ValueError("Nothing to draw.")
            read = flatten(image)
            size = default_size(studio.pipe, read)
            if size[0] * size[1] > MAX_PIXELS:
                raise ValueError(f"{size[1]} x {size[0]} pixels would be drawn; at most {MAX_PIXELS:,}. Take a smaller image")
            if follows:
                read = _fit(read, width, height)
                edges = (255 * find_edges(np.asarray(read))).astype(np.uint8)
                read = read if is_map else Image.fromarray(edges).convert("RGB")
            inputs: dict[str, Any] = {str(studio.image_input): read}
            for moment in studio.draw(prompt or "", seed=int(seed or 0), steps=steps, **inputs):
                yield moment.expected, moment.done

    go.click(draw, [image, is_map, prompt, seed, steps], [live, gallery], api_name="from_image")


def painted_mask(painted: dict, width: int, height: int) -> Image.Image | None:
    """White where any layer was painted, `(height, width)`; None if nothing was."""
    layers = [np.asarray(layer.convert("RGBA"))[..., 3] for layer in painted.get("layers") or []]
    if not layers or not any(layer.any() for layer in layers):
        return None
    mask = Image.fromarray((255 * np.any([layer > 0 for layer in layers], axis=0)).astype(np.uint8))
    fitted = np.asarray(_fit(mask, width, height))
    return Image.fromarray(np.where(fitted > 127, 255, 0).astype(np.uint8))


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of an image at the model's size, on white."""
    cut = crop_middle(image, width, height)
    whole = cut.width % width == 0 and cut.height % height == 0  # enlarged by a whole factor: each pixel becomes one again
    cut = cut.resize((width, height), Image.Resampling.BOX if whole else Image.Resampling.LANCZOS)
    return to_8_bits(cut, 3) if cut.mode == "RGBA" else cut


def _why(studio: Studio, say) -> None:
    found = gr.State()
    with gr.Row():
        prompt = gr.Textbox("woman firefighter dark skin tone", label=say("Prompt"), max_length=1000)
        seed = gr.Number(0, label=say("Seed"), precision=0, minimum=0, maximum=MAX_SEED)
        ablate = gr.Checkbox(False, label=say("Also without each word"))
        go = gr.Button(say("Ask"), variant="primary")
    word = gr.Radio([], label=say("Word"), interactive=True)
    with gr.Row():
        image = gr.Image(label=say("Image"), interactive=False, height=340)
        heat = gr.Image(label=say("Where it was read"), interactive=False, height=340)
        without = gr.Image(label=say("What changes without it"), interactive=False, height=340)
    step = gr.Slider(1, 2, 1, step=1, label=say("Step"))
    expected = gr.Image(label=say("What the network expects"), interactive=False, height=340)

    def ask(prompt, seed, ablate):
        result = studio.explain(prompt or "", seed=int(seed or 0), ablate=bool(ablate))
        words = [f"{number + 1}. {text}" for number, text in enumerate(result.words)]
        count = len(result.expected)
        shown = show(result, words[0]) if words else (None, None)
        last = gr.Slider(1, max(count, 2), count, step=1)
        choice = gr.Radio(words, value=words[0] if words else None)
        return result, choice, enlarge(result.image), *shown, last, look(result, count)

    def show(result, chosen):
        if result is None or not chosen:
            return None, None
        number = int(chosen.partition(".")[0]) - 1
        other = None if result.ablation is None else enlarge(heat_image(result.image, result.ablation[number]))
        return enlarge(heat_image(result.image, result.heat[number])), other

    def look(result, step):
        if result is None:
            return None
        pixels = result.expected[min(int(step), len(result.expected)) - 1]
        return enlarge(Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8).squeeze()))

    outputs = [found, word, image, heat, without, step, expected]
    go.click(told(ask, say), [prompt, seed, ablate], outputs, api_name="why")
    word.select(show, [found, word], [heat, without], api_name="word", api_visibility="private")
    step.change(look, [found, step], expected, api_name="step", api_visibility="private")


def _compare(studio: Studio, say) -> None:
    names = [name for name in AXES if name != "checkpoint" or studio.checkpoints()]
    advice = studio.advice
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox("red heart", label=say("Prompt"), max_length=1000)
            with gr.Row():
                down = gr.Dropdown(names, value="sampler", label=say("Down"))
                rows = gr.Textbox("ddpm\ndpm++", label=say("Values, one per line"), lines=3, max_length=4000)
            with gr.Row():
                across = gr.Dropdown(names, value="steps", label=say("Across"))
                columns = gr.Textbox("4, 8, 16", label=say("Values, one per line"), lines=3, max_length=4000)
            with gr.Row():
                seed = gr.Number(0, label=say("Seed"), precision=0, minimum=0, maximum=MAX_SEED)
                steps = gr.Slider(1, MAX_STEPS, advice["num_inference_steps"], step=1, label=say("Steps"))
                scale = gr.Slider(1.0, MAX_SCALE, advice["guidance_scale"], step=0.1, label=say("Guidance scale"))
            with gr.Row():
                go = gr.Button(say("Compare"), variant="primary")
                stop = gr.Button(say("Stop"))
        with gr.Column():
            sheet = gr.Image(label=say("The same noise"), interactive=False, format="png")
            file = gr.File(label=say("As a file"), interactive=False)

    def compare(prompt, down, rows, across, columns, seed, steps, scale):
        settings = {"seed": int(seed or 0), "steps": int(steps), "scale": float(scale)}
        with errors_on_the_page(say):
            grid = (down, read_values(down, rows)), (across, read_values(across, columns))
            yield from studio.compare(prompt or "", *grid, settings)

    inputs = [prompt, down, rows, across, columns, seed, steps, scale]
    go.click(compare, inputs, [sheet, file], api_name="compare")
    stop.click(studio.stop, queue=False, api_visibility="private")

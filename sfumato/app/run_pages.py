"""The tabs of runs: watch them, look at their data, start new ones, report on them."""

import math
import secrets
import shlex
from functools import partial
from pathlib import Path

import gradio as gr
import pandas as pd

from sfumato.app import desk, watch
from sfumato.app.notices import told
from sfumato.training.config.load import config_names

MAX_PROCESSES = 64
ALL = ""  # all prompts
ERROR = "log10 of the error"


def build(pages: gr.Blocks, runs: Path, places: Path, token: str, say) -> None:
    """The tabs of runs: watch them, look at their data, start new ones, report on them.

    Args:
        runs: the folder of runs.
        places: a folder whose files the app may serve.
        token: without it, nothing can be started or stopped.
    """
    may = gr.State(False)

    def admit(request: gr.Request):
        return secrets.compare_digest(str(request.query_params.get("token", "")), token)

    pages.load(admit, None, may, api_visibility="private")
    with gr.Tab(say("Runs")):
        _runs(pages, runs, may, say)
    with gr.Tab(say("Data")):
        _data(runs, say)
    with gr.Tab(say("Train")):
        _train(runs, may, say)
    with gr.Tab(say("Report")):
        _report(pages, runs, places, say)


def _admitted(may: bool) -> None:
    if not may:
        raise ValueError("Open the address that includes the token to stop or start runs.")


def _runs(pages: gr.Blocks, folder: Path, may: gr.State, say) -> None:
    with gr.Row():
        name = gr.Dropdown(watch.list_runs(folder), label=say("Run"), interactive=True)
        again = gr.Button(say("Refresh"))
    state = gr.Markdown()
    with gr.Row():
        buttons = {kind: gr.Button(say(text)) for kind, text in _BUTTONS.items()}
    answer = gr.Markdown()
    with gr.Row():
        losses = gr.LinePlot(x="step", y="loss", title=say("Loss"), height=280)
        held_out_title = say("Held-out error by noise level")
        bands = gr.LinePlot(x="step", y=ERROR, color="log-SNR", title=held_out_title, height=280, visible=False)
        rates = gr.LinePlot(x="step", y="rate", title=say("Learning rate"), height=280)
    prompt = gr.Dropdown([(say("all prompts"), ALL)], value=ALL, label=say("Samples of"), interactive=True)
    gallery = gr.Gallery(label=say("Samples"), columns=4, object_fit="contain", format="png")
    shown = gr.State()  # run, prompt and newest grid of the gallery, which is renewed only when these change

    def look(chosen, wanted, seen):
        names = watch.list_runs(folder)
        if not names:
            return gr.Dropdown([], value=None), f"{say('No runs yet in')} {folder}", None, None, None, gr.skip(), [], None
        chosen = chosen if chosen in names else names[0]
        run = watch.read_run(folder, chosen)
        held_out = [(step, error, say("all")) for step, error in run.held_out] + run.bands
        errors = pd.DataFrame(
            [(step, math.log10(max(error, 1e-9)), band) for step, error, band in held_out],
            columns=["step", ERROR, "log-SNR"],
        )
        tables = (
            pd.DataFrame(run.losses, columns=["step", "loss"]),
            gr.update(value=errors, visible=bool(held_out)),  # before the first validation there is nothing to plot
            pd.DataFrame(run.rates, columns=["step", "rate"]),
        )
        prompts = watch.sampled_prompts(folder, chosen)
        wanted = wanted if wanted in map(str, range(len(prompts))) else ALL
        now = (chosen, wanted, watch.newest_sheet(folder, chosen))
        images = gr.skip() if now == seen else watch.samples(folder, chosen, None if wanted == ALL else int(wanted))
        places = [(f"{number + 1}. {prompt}", str(number)) for number, prompt in enumerate(prompts)]
        choice = gr.Dropdown([(say("all prompts"), ALL), *places], value=wanted)
        return gr.Dropdown(names, value=chosen), _line(run, say), *tables, choice, images, now

    def act(kind, chosen, may):
        _admitted(may)
        if kind == "resume":
            watch.resume(folder, chosen or "")
            return say("starting")
        watch.ask(folder, chosen or "", kind)
        return say("requested")

    inputs, outputs = [name, prompt, shown], [name, state, losses, bands, rates, prompt, gallery, shown]
    gr.on([pages.load, again.click, name.input, prompt.input], told(look, say), inputs, outputs, api_name="look")
    gr.Timer(5).tick(told(look, say), inputs, outputs, api_visibility="private", show_progress="hidden")
    for kind, button in buttons.items():
        handler = told(partial(act, kind), say)
        button.click(handler, [name, may], answer, api_name=f"{kind}_run")


_BUTTONS = {"stop": "Stop and save", "save": "Save now", "sample": "Sample now", "resume": "Resume"}


def _line(run: watch.RunState, say) -> str:
    how = say("training") if run.trains else say("done") if run.finished else say("not training")
    parts = [f"**{run.name}**: {how}", f"{say('Step')} {run.step:,}", f"{run.done:.0%}"]
    parts.append(f"{run.images_per_second:.0f} images/s")
    if run.seconds_left is not None:
        parts.append(f"{run.seconds_left / 60:.0f} min")
    return ", ".join(parts)


def _data(folder: Path, say) -> None:
    with gr.Row():
        name = gr.Dropdown(watch.list_runs(folder), label=say("Run"), interactive=True)
        search = gr.Textbox("", label=say("Search captions"), max_length=200)
        split = gr.Radio([(say("trained on"), "train"), (say("held out"), "held_out")], value="train", label=say("Part"))
        page = gr.Number(0, label=say("Page"), precision=0, minimum=0, maximum=10**6)
        go = gr.Button(say("Show"))
    matching = gr.Markdown()
    images = gr.Gallery(label=say("Images"), columns=8, object_fit="contain", format="png")
    with gr.Row():
        facts = gr.Dataframe(headers=[say("Item"), ""], interactive=False, label=say("Data set"))
        skipped = gr.Dataframe(headers=[say("Reason"), ""], interactive=False, label=say("Not used"))

    def look(chosen, search, split, page):
        names = watch.list_runs(folder)
        if not names:
            return gr.Dropdown([], value=None), f"{say('No runs yet in')} {folder}", [], None, None
        chosen = chosen if chosen in names else names[0]
        found = desk.read_data(folder, chosen, search or "", split, int(page or 0))
        count = f"{found.matching:,}" + ("" if found.searched_all else f" ({say('of the first')} {desk.SCANNED:,})")
        lines = [(say(what), figure) for what, figure in found.facts]
        return gr.Dropdown(names, value=chosen), count, found.images, lines, found.skipped or None

    inputs, outputs = [name, search, split, page], [name, matching, images, facts, skipped]
    gr.on([name.input, page.input, go.click], told(look, say), inputs, outputs, api_name="data")
    # A new search starts at its first page.
    anew = gr.on([search.submit, split.input], lambda: 0, None, page, api_visibility="private")
    anew.then(told(look, say), inputs, outputs, api_visibility="private")


def _train(folder: Path, may: gr.State, say) -> None:
    with gr.Row():
        with gr.Column():
            preset = gr.Dropdown(config_names(), value="folder_cpu", label=say("Preset"))
            name = gr.Textbox("my-run", label=say("Name of the run"), max_length=64)
            asked = [gr.Textbox("", label=key, placeholder=say("as in the preset"), max_length=500) for key in desk.ASKED]
            more = gr.Textbox("", label=say("More settings, key=value, one per line"), lines=3, max_length=4000)
            processes = gr.Slider(1, MAX_PROCESSES, 1, step=1, label=say("Processes"))
        with gr.Column():
            search = gr.Textbox("", label=say("Search all settings"), max_length=100)
            settings = gr.Dataframe(headers=[say("Setting"), say("Default"), ""], interactive=False, wrap=True)
            with gr.Row():
                show = gr.Button(say("Show the config"))
                doctor = gr.Button(say("Ask the doctor"))
                go = gr.Button(say("Start"), variant="primary")
            command = gr.Textbox(label=say("The equivalent command"), interactive=False)
            text = gr.Code(label=say("Config"), language="yaml", interactive=False)
            answer = gr.Textbox(label=say("Answer"), lines=6, interactive=False)

    def plan(may, preset, name, more, *values):
        _admitted(may)
        return desk.plan(folder, preset or "", (name or "").strip(), dict(zip(desk.ASKED, values)), more or "")

    def look(processes, *arguments):
        wanted = plan(*arguments)
        return shlex.join(desk.launch_command(wanted, int(processes))), wanted.yaml()

    def ask(*arguments):
        return desk.ask_doctor(plan(*arguments))

    def start(processes, *arguments):
        wanted = plan(*arguments)
        desk.wait_for_start(desk.start(wanted, int(processes)), wanted)
        return f"{say('starting')}: {wanted.output_dir}"

    inputs = [may, preset, name, more, *asked]
    search.change(lambda text: desk.find_settings(text or ""), search, settings, api_name="settings")
    show.click(told(look, say), [processes, *inputs], [command, text], api_name="config")
    doctor.click(told(ask, say), inputs, answer, api_name="doctor")
    go.click(told(start, say), [processes, *inputs], answer, api_name="start")


def _report(pages: gr.Blocks, folder: Path, places: Path, say) -> None:
    with gr.Row():
        name = gr.Dropdown(watch.list_runs(folder), label=say("Run"), interactive=True)
        go = gr.Button(say("Report"), variant="primary")
    file = gr.File(label=say("As a file"), interactive=False)
    figures = gr.Dataframe(headers=[say("Metric"), ""], interactive=False)

    def report(chosen):
        names = watch.list_runs(folder)
        if not names:
            raise ValueError(f"{say('No runs yet in')} {folder}")
        if chosen not in names:
            raise ValueError(say("Choose a run."))
        out = desk.write_report(folder, chosen, places / f"report-{chosen}.html")
        return gr.Dropdown(names, value=chosen), desk.read_evaluation(folder, chosen) or None, str(out)

    go.click(told(report, say), name, [name, figures, file], api_name="report")
    pages.load(lambda: gr.Dropdown(watch.list_runs(folder)), None, name, api_visibility="private")

"""Train a text-conditional diffusion model: `accelerate launch training/train.py configs/NAME.yaml key.subkey=value ...`"""

import sys
from pathlib import Path

# `accelerate launch training/train.py` puts this folder first on the path, where `data`, `models` and `config` would hide
# other packages of these names.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]

import faulthandler  # noqa: E402

from sfumato.files import printable, refresh_bars_slowly_in_files  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, train.

    Returns:
        The exit code: 0 done, 2 a wrong setting or unusable data, 3 the loss diverged or all images became alike, 4 no room
        to save, 5 done but not pushed, 129, 130 or 143 stopped by a signal.
    """
    refresh_bars_slowly_in_files()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        print("\nEvery key and its meaning: training/config/schema.py. Examples: configs/*.yaml, or their bare names.")
        return 0 if arguments else 2
    from sfumato.training.config.load import load_config

    try:
        config = load_config(arguments[0], arguments[1:])
        from sfumato.training import loop  # torch and diffusers only now: a wrong setting is reported at once

        run = loop.prepare(config)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"sfumato: {printable(error)}", file=sys.stderr)
        return 2
    return finish_training(run)


def finish_training(run) -> int:
    """Train the run that `loop.prepare` gives, to its end; returns the exit code as `main` does."""
    from sfumato.files import go_on_without_readers

    go_on_without_readers()
    code = 1
    try:
        code = train_to_the_end(run)
        return code
    finally:
        run.lock.release(force=True)
        tell_the_webhook(run, code)


def train_to_the_end(run) -> int:
    """Train, leave the group of processes, push; returns the exit code as `main` does."""
    from sfumato.files import CannotSave
    from sfumato.training import loop
    from sfumato.training.tasks.protocol import Collapsed

    try:
        code = 0 if loop.tell_finished(run) else loop.train(run)
    except (CannotSave, OSError) as error:
        print(f"sfumato: {printable(error)}", file=sys.stderr)
        return 4
    except Collapsed as error:
        print(f"sfumato: {printable(error)}", file=sys.stderr)
        return 3
    except ModuleNotFoundError as error:  # of a package that only a metric needs
        print(f"sfumato: {printable(error)}", file=sys.stderr)
        return 2
    leave(run)
    return code or loop.push_result(run)  # last, so that no process waits for an upload


def tell_the_webhook(run, code: int) -> None:
    """Tell `train.webhook` how the run ended, from the first process."""
    if run.config.train.webhook and run.accelerator.is_main_process and not run.finished:
        from sfumato.training.engine import webhook

        state = run.state
        failed = webhook.tell(run.config.train.webhook, run.output_dir, code, state["step"], state["seconds"])
        if failed:
            print(f"sfumato: {printable(failed)}", file=sys.stderr)


def leave(run) -> None:
    """End the trackers and leave the group of processes, all at the same time.

    Everything is done and saved by then. If leaving hangs, as it did once in each of two sweeps of two-process crashes, the
    process is ended after a minute and shows where it was.
    """
    run.accelerator.wait_for_everyone()  # none tears the process group down while another still needs it
    for tracker in run.accelerator.trackers:
        tracker.finish()
    if run.accelerator.num_processes > 1:
        faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__ or sys.stderr)
        run.accelerator.state.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    sys.exit(main())

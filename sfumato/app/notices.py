"""Show the errors of a handler as notices on the page."""

from contextlib import contextmanager

import gradio as gr


@contextmanager
def errors_on_the_page(say):
    """Turn a ValueError into a notice on the page."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(say(str(error)), print_exception=False) from error


def told(function, say):
    """A handler whose ValueErrors become notices on the page."""

    def handler(*arguments):
        with errors_on_the_page(say):
            return function(*arguments)

    return handler

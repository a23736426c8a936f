"""`sfumato app`: draw, redraw, ask why, compare, train and watch runs in a browser. Gradio is imported here alone.

It needs the extra `app`, reads files and calls the Python interface, and holds no state of its own but the model that is open.
"""

import secrets
from pathlib import Path

from sfumato.app.words import LANGUAGES

__all__ = ["LANGUAGES", "launch"]


def launch(
    model: str = "openmoji_128",
    *,
    runs: str = "runs",
    host: str = "127.0.0.1",
    port: int = 7860,
    password: str | None = None,
    language: str = "en",
) -> None:
    """Serve the app until Ctrl-C.

    Args:
        model: what `sfumato sample --model` takes.
        runs: a folder of run folders.
        host: an address of this machine; others than its own can connect only to one that is not 127.0.0.1.
        port: where; 0 takes a free one.
        password: of the user `sfumato`.
        language: of `LANGUAGES`.

    Raises:
        ValueError: other machines could connect and there is no password.
        ModuleNotFoundError: without Gradio.
    """
    if host not in ("127.0.0.1", "localhost") and not password:
        raise ValueError(f"--host {host}: other machines can connect; set --password")
    try:
        import uvicorn

        from sfumato.app.pages import build
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the app needs a package ({error.name}): pip install 'sfumato[app]'") from error
    token = secrets.token_urlsafe(16)
    app = build(model, runs=Path(runs), token=token, host=host, password=password, language=language)
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))
    socket = server.config.bind_socket()
    address = f"http://{host}:{socket.getsockname()[1]}/?token={token}"
    print(f"open {address}    (Ctrl-C ends it; the token lets you stop and resume runs)", flush=True)
    server.run(sockets=[socket])

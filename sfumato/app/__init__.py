"""`sfumato app`: draw, redraw, ask why, compare, train and watch runs in a browser. Gradio is imported only here.

It needs the extra `app`, reads files and calls the Python interface; its only state is the open model.
"""

import secrets
from pathlib import Path

from sfumato.app.words import LANGUAGES
from sfumato.pipelines.locate import DEFAULT

__all__ = ["LANGUAGES", "launch"]


def launch(
    model: str = DEFAULT,
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
        host: an address of this machine; other machines can connect only if it is not 127.0.0.1.
        port: the port; 0 picks a free one.
        password: the password of the user `sfumato`.
        language: one of `LANGUAGES`.

    Raises:
        ValueError: other machines could connect and there is no password.
        ModuleNotFoundError: Gradio is not installed.
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
    print(f"open {address}    (Ctrl-C stops it; the token lets you stop and resume runs)", flush=True)
    server.run(sockets=[socket])

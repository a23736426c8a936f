"""Push an exported folder to the Hub: checked before training starts, one commit per push, none if nothing changed.

Nothing heavy is imported, so that `sfumato push` responds at once.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"}
HUB_FILES = {".gitattributes"}  # the Hub's own, which no folder has
ATTEMPTS, PAUSE = 3, 3.0  # the client itself has tried several times before each of ours fails


class CannotPush(ValueError):
    """Why a folder cannot go to the Hub, in one line that says what to do."""


EXPORTED = (".json", ".safetensors", ".txt", ".md", ".png")


def files_to_push(folder: Path) -> list[str]:
    """The files of an exported folder that go to the Hub, relative to it.

    Raises:
        CannotPush: it is not an exported pipeline, or holds what must not be uploaded: pickles, links out of it.
    """
    folder = Path(folder)
    for name in ("model_index.json", "README.md"):
        if not (folder / name).is_file():
            raise CannotPush(f"{folder} is not an exported pipeline: it has no {name}; make one with `sfumato export`")
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CannotPush(f"{path} is a link out of the folder; only what is in the folder is pushed")
        if path.suffix.lower() in PICKLES:
            raise CannotPush(f"{path} may hold a pickle, which runs code when opened; only safetensors are pushed")
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CannotPush(f"{path} is not a regular file")
        if path.is_file() and is_exported(name):
            found.append(name.as_posix())
    return found


def is_exported(name: PurePath) -> bool:
    """Whether a file, relative to an exported folder, is of a kind that an export makes."""
    hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
    code_or_settings = name.name in ("pipeline.py", "codec.py", "training_args.yaml")
    return not hidden and (code_or_settings or name.suffix.lower() in EXPORTED)


def check(repo_id: str, pull_request: bool = False, private: bool = False) -> str:
    """Ask the Hub whether this user may push there; returns the full id, `owner/name`.

    Raises:
        CannotPush: a bad name, a missing or wrong token, no write access, a repository of something else, no connection.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CannotPush(f"hub.repo_id={repo_id!r} is not allowed: {error}") from error
    if get_token() is None:
        raise CannotPush("there is no Hub token; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise CannotPush("the Hub does not know this token; run `hf auth login --force`, or correct HF_TOKEN") from error
        raise CannotPush(f"the Hub does not answer: {_last_line(error)}") from error
    except (httpx2.TransportError, OSError) as error:
        raise CannotPush(f"the Hub cannot be reached: {_last_line(error)}") from error
    repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    owner = repo_id.split("/")[0]
    writable = [user["name"], *(org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read")]
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise CannotPush("this Hub token is read-only; create one with write access, and run `hf auth login`")
    if owner not in writable and not pull_request:
        raise CannotPush(f"{user['name']} may not write to {owner}, only to {', '.join(writable)}; or make it a pull request")
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if owner not in writable:
            raise CannotPush(f"there is no {repo_id} to make a pull request to") from None
        return repo_id
    except (HfHubHTTPError, httpx2.TransportError) as error:
        raise CannotPush(f"the Hub does not answer: {_last_line(error)}") from error
    if private and not info.private and not pull_request:
        raise CannotPush(f"{repo_id} is public, and private was asked for; make it private on the Hub first")
    foreign = {sibling.rfilename for sibling in info.siblings or []} - HUB_FILES - {"README.md"}
    if foreign and "sfumato" not in (info.tags or []) and not pull_request:
        raise CannotPush(f"{repo_id} holds something that Sfumato did not make ({len(foreign)} files); choose another name")
    return repo_id


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a push goes.

    Attributes:
        repo_id: `name` or `owner/name`; created if it does not exist.
        private: make it private; an existing one must be private.
        branch: created if it does not exist.
        tag: name for the result.
        pull_request: propose the change instead of making it.
    """

    repo_id: str
    private: bool = False
    branch: str = "main"
    tag: str | None = None
    pull_request: bool = False


def push(
    folder: str | Path, target: Target, *, message: str = "Upload with Sfumato", say: Callable[[str], None] = print
) -> str:
    """Make the repository hold exactly what the folder holds, in one commit; no commit if it already does.

    Large files that arrived before a connection broke are not sent again. The local folder is only read; in the uploaded
    card, the snippets name the repository instead of the folder.

    Args:
        folder: an exported pipeline.
        target: where to push it.
        message: the commit message.
        say: called with a line when an attempt fails and is repeated.

    Returns:
        The address of the commit or pull request.

    Raises:
        CannotPush: see `files_to_push` and `check`; or the connection failed repeatedly.
    """
    folder = Path(folder)
    names = files_to_push(folder)
    if target.tag and target.pull_request:
        raise CannotPush("a pull request cannot be tagged; leave the tag out")
    target = replace(target, repo_id=check(target.repo_id, target.pull_request, target.private))
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _push_once(folder, names, target, message, say)
        except (httpx2.TransportError, OSError, RuntimeError) as error:  # the client wraps what an upload raises
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            if isinstance(cause, OSError) and getattr(cause, "filename", None):
                raise CannotPush(f"{cause.filename} cannot be read: {cause.strerror}") from error
            if isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500 and cause.response.status_code != 429:
                raise CannotPush(f"the Hub refused: {_last_line(cause)}") from error
            if attempt == ATTEMPTS:
                raise CannotPush(
                    f"the connection to the Hub failed {ATTEMPTS} times: {_last_line(cause)}. The folder is as it was; "
                    "push again, and what has arrived is not sent again"
                ) from error
            say(f"the connection to the Hub broke ({_last_line(cause)}); trying again")
            time.sleep(PAUSE * attempt)
        except CannotPush:
            raise
        except (ValueError, YAMLError) as error:
            raise CannotPush(f"the Hub refused: {_last_line(error)}") from error
    raise AssertionError("unreachable")


def look_at_branch(repo_id: str, branch: str | None) -> ModelInfo | None:
    """What the Hub says about a branch, or about the repository; None if it does not exist yet."""
    try:
        return HfApi().model_info(repo_id, revision=branch)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def stale_files(info: ModelInfo | None, names: list[str]) -> list[str]:
    """Files that a branch holds and the folder does not, which a push therefore removes."""
    there = {file.rfilename for file in (info.siblings if info is not None else None) or []}
    return sorted(there - set(names) - HUB_FILES)


def describe_push(folder: Path, target: Target) -> list[str]:
    """What a push would do, as lines; changes nothing. Without a token, what would be sent, as far as this machine knows.

    Raises:
        CannotPush: see `files_to_push` and `check`.
    """
    names = files_to_push(folder)
    if get_token() is None:
        sizes = [f"{(folder / name).stat().st_size:12,} {name}" for name in names]
        unknown = "(there is no Hub token, so permissions and what is there were not checked: `hf auth login`)"
        return [f"would push to {target.repo_id}, {target.branch}: {unknown}", *sizes]
    repo_id = check(target.repo_id, target.pull_request, target.private)
    info = look_at_branch(repo_id, target.branch)
    removed = [f"     removed {name}" for name in stale_files(info, names)]
    bytes_of = {name: (folder / name).stat().st_size for name in names}
    sizes = [f"{size:12,} {name}" for name, size in bytes_of.items()]
    whole = info or look_at_branch(repo_id, None)
    kind = "private" if (whole.private if whole is not None else target.private) else "public"
    there = "a new repository" if whole is None else "a new branch" if info is None else "there already"
    there = f"{there}, {kind}"
    total = f"{len(names)} files, {sum(bytes_of.values()) / 1e6:.1f} MB; files already there and unchanged are not sent"
    return [f"would push to {repo_id}, {target.branch} ({there}): {total}", *removed, *sizes]


def _push_once(folder: Path, names: list[str], target: Target, message: str, say: Callable[[str], None]) -> str:
    api, repo_id = HfApi(), target.repo_id
    if not target.pull_request:
        api.create_repo(repo_id, private=target.private or None, exist_ok=True)
    if target.branch != "main" and not target.pull_request:
        api.create_branch(repo_id, branch=target.branch, exist_ok=True)
    additions = [CommitOperationAdd(name, _content(folder / name, repo_id, name.rpartition("/")[0])) for name in names]
    before = look_at_branch(repo_id, target.branch)
    removals = [CommitOperationDelete(name) for name in stale_files(before, names)]
    commit = api.create_commit(
        repo_id,
        [*additions, *removals],
        commit_message=message,
        revision=target.branch,
        create_pr=target.pull_request or None,
    )
    if before is not None and before.sha == commit.oid:
        say("the Hub holds all of this already")
    if target.tag and not target.pull_request:
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        if tags.get(target.tag, commit.oid) != commit.oid:
            raise CannotPush(
                f"pushed {commit.commit_url}, but the tag {target.tag} names another state already; choose another"
            )
        if target.tag not in tags:
            api.create_tag(repo_id, tag=target.tag, revision=commit.oid)
    return commit.pr_url or commit.commit_url


def _content(path: Path, repo_id: str, inside: str = "") -> str | bytes:
    """A file unchanged; in our card, the snippets name the repository, and every card gets the tag `sfumato`.

    `inside`: the folder in the repository that the card is for, if not all of it: diffusers opens such a folder only locally.
    """
    if path.name != "README.md":
        return str(path)
    card = ModelCard(path.read_text("utf-8"), ignore_metadata_errors=True)
    data: Any = card.data
    if "sfumato" not in (data.tags or []):
        data.tags = [*(data.tags or []), "sfumato"]
    text = str(card)
    if "Made by Sfumato" in text and (where := re.search(r'from_pretrained\("([^"]*)"', text)):
        found = f'snapshot_download("{repo_id}") + "/{inside}"' if inside else f'"{repo_id}"'
        text = text.replace(f'"{where[1]}"', found)
        if inside:
            text = text.replace("```python\n", "```python\nfrom huggingface_hub import snapshot_download\n")
    return text.encode()


def _last_line(error: BaseException) -> str:
    """The most informative line of a client's error, which may have many."""
    rows = [row.strip() for row in str(error).splitlines() if row.strip() and "Request ID" not in row]
    return rows[-1] if rows else type(error).__name__


class BackgroundPush:
    """Pushes checkpoints while training continues: one at a time, never waited for, never able to end the run."""

    def __init__(self, hold: Path):
        self.hold = hold
        self.messages: list[str] = []
        shutil.rmtree(hold, ignore_errors=True)  # of a run that was killed
        self._thread = None

    def start(self, folder: Path, target: Target) -> None:
        """Push `folder` unless a push is still under way. Its files are kept by hard links, so it may be removed meanwhile."""
        if self._thread is not None and self._thread.is_alive():
            self._say(f"{folder.parent.name} is not pushed: the push before it is still under way")
            return
        try:
            shutil.rmtree(self.hold, ignore_errors=True)
            shutil.copytree(folder, self.hold, copy_function=_link)
        except OSError as error:
            self._say(f"{folder.parent.name} is not pushed: {error}")
            return

        def work():
            try:
                outcome = f"pushed {push(self.hold, target, say=self._say)}"
            except Exception as error:  # whatever it is, the run goes on
                outcome = f"{folder.parent.name} is not pushed: {_last_line(error)}"
            self._say(outcome)
            shutil.rmtree(self.hold, ignore_errors=True)

        self._thread = threading.Thread(target=work, daemon=True)  # a daemon, so that no upload keeps a run from ending
        self._thread.start()

    def _say(self, text: str) -> None:
        self.messages.append(text)

    def wait(self) -> None:
        """Wait until the push under way, if any, has ended."""
        if self._thread is not None:
            self._thread.join()

    def new_messages(self) -> list[str]:
        """What has been said since the last call."""
        messages, self.messages = self.messages, []
        return messages


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:  # a disk without links
        shutil.copy(source, target)

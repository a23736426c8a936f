"""A small Hub on this machine for the real `huggingface_hub` client: what a push and a load ask for, and no more.

A child process finds it by the environment `Hub.env(...)`. Everything is kept in memory.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USERS = {
    "writer": {"name": "ada", "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "press", "roleInOrg": "read"}]},
    "reader": {"name": "ada", "orgs": [], "auth": {"accessToken": {"role": "read"}}},
}


class Repository:
    """Files of each commit, and the branches, tags and pull requests that name commits."""

    def __init__(self):
        first = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self.commits, self.branches, self.tags, self.pulls, self.lfs = {"0" * 40: first}, {"main": "0" * 40}, {}, {}, {}
        self.private, self.history = False, []

    def resolve(self, revision: str) -> str | None:
        names = {**self.branches, **self.tags, **self.pulls}
        return names.get(revision, revision if revision in self.commits else None)

    def commit(self, branch: str, files: dict[str, bytes], pull: bool) -> str:
        sha = hashlib.sha1(repr(sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items())).encode() +
                           str(len(self.commits)).encode()).hexdigest()  # fmt: skip
        self.commits[sha] = files
        self.history.append(sha)
        if pull:
            self.pulls[f"refs/pr/{len(self.pulls) + 1}"] = sha
        else:
            self.branches[branch] = sha
        return sha


class Hub:
    """Start with `with Hub() as hub`. `cut_uploads`: how many of the next large uploads lose their connection.
    `full`: no large upload is taken any more."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.cut_uploads, self.full, self.stall = 0, False, threading.Event()
        self.stall.set()  # cleared: large uploads wait

    def __enter__(self):
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.stall.set()
        self.server.shutdown()
        self.server.server_close()

    def env(self, home, token: str | None = "writer") -> dict[str, str]:
        """What a child process needs to take this for the Hub."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }  # fmt: skip


def point_client_at(url: str, home) -> None:
    """Set this process's client, imported already, as the environment of a new process would."""
    from huggingface_hub import constants, hf_api

    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = url, False, True
    constants.HF_HOME = str(home)
    constants.HF_HUB_CACHE = str(home / "hub")
    hf_api.api.endpoint = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"


class Handler(BaseHTTPRequestHandler):
    """One request; routes are tried in order."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self):
        self._route()

    do_POST = do_PUT = do_HEAD = do_GET

    def log_message(self, *_):
        pass

    def _route(self):
        path = unquote(urlsplit(self.path).path)
        self.query = urlsplit(self.path).query
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0) or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, *match.groups())
        self._send(404, {"error": f"no route {self.command} {path}"})

    def _send(self, code: int, content=None, headers: dict | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _user(self) -> dict | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _may_write(self, repo_id: str) -> bool:
        user = self._user()
        if user is None or user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            return False
        return repo_id.removeprefix("spaces/").split("/")[0] in [
            user["name"],
            *(o["name"] for o in user["orgs"] if o["roleInOrg"] != "read"),
        ]

    def _repository(self, repo_id: str) -> Repository | None:
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and not self._user()):
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _files(self, repo_id: str, revision: str):
        if (found := self._repository(repo_id)) is None:
            return None, None, None
        if (sha := found.resolve(revision)) is None:
            self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            return None, None, None
        return found, sha, found.commits[sha]

    def whoami(self):
        user = self._user()
        self._send(200, {"type": "user", **user}) if user else self._send(401, {"error": "Invalid username or password."})

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or (self._user() or {}).get('name')}/{asked['name']}"
        kind = "spaces/" if asked.get("type") == "space" else ""
        if kind and asked.get("sdk") != "gradio":
            return self._send(400, {"error": "a Space needs an sdk"})
        if not self._user():
            return self._send(401, {"error": "Unauthorized"})
        if kind + repo_id in self.hub.repositories:
            url = f"{self.hub.url}/{kind}{repo_id}"
            return self._send(409, {"error": "You already created this model repo", "url": url})
        if not self._may_write(repo_id):
            return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        self.hub.repositories[kind + repo_id] = repository = Repository()
        repository.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self._send(200, {"url": f"{self.hub.url}/{kind}{repo_id}"})

    def info(self, repo_id, revision="main"):
        repository, sha, files = self._files(repo_id, revision)
        if repository is None:
            return
        front = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.S)
        tags = re.findall(r"^- (\S+)$", front[1], re.M) if front else []
        siblings = [{"rfilename": name} for name in sorted(files)]
        self._send(200, {"id": repo_id, "sha": sha, "private": repository.private, "tags": tags, "siblings": siblings})

    def tree(self, repo_id, revision, *_):
        repository, _, files = self._files(repo_id, revision)
        if repository is not None:
            self._send(200, [self._entry(repository, name, body) for name, body in sorted(files.items())])

    def _entry(self, repository, name, body):
        entry = {"type": "file", "path": name, "size": len(body), "oid": _blob(body)}
        digest = hashlib.sha256(body).hexdigest()
        if digest in repository.lfs:
            entry["lfs"] = {"oid": digest, "size": len(body), "pointerSize": 134}
        return entry

    def paths(self, repo_id, revision):
        repository, _, files = self._files(repo_id, revision)
        if repository is not None:
            asked = json.loads(self.body)["paths"]
            self._send(200, [self._entry(repository, name, files[name]) for name in asked if name in files])

    def refs(self, repo_id):
        if (repository := self._repository(repo_id)) is not None:
            rows = {
                key: [{"name": name, "ref": f"refs/{key}/{name}", "targetCommit": sha} for name, sha in known.items()]
                for key, known in (("branches", repository.branches), ("tags", repository.tags))
            }
            self._send(200, {**rows, "converts": [], "pullRequests": []})

    def branch(self, repo_id, name):
        self._name(repo_id, name, "branches", json.loads(self.body or b"{}").get("startingPoint", "main"))

    def tag(self, repo_id, revision):
        self._name(repo_id, json.loads(self.body)["tag"], "tags", revision)

    def _name(self, repo_id, name, kind, revision):
        repository, sha, _ = self._files(repo_id, revision)
        if repository is None:
            return
        if not self._may_write(repo_id):
            return self._send(403, {"error": "Forbidden"})
        if name in getattr(repository, kind):
            return self._send(409, {"error": "Reference already exists"})
        getattr(repository, kind)[name] = sha
        self._send(200, {})

    def preupload(self, repo_id, revision):
        repository, _, files = self._files(repo_id, revision)
        if repository is None:
            return
        if not self._may_write(repo_id) and "create_pr=1" not in self.query:
            return self._send(403, {"error": "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"})
        rows = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            rows.append({"path": name, "uploadMode": "lfs" if name.endswith((".safetensors", ".png")) else "regular",
                         "shouldIgnore": False})  # fmt: skip
            if name in files:
                digest = hashlib.sha256(files[name]).hexdigest()
                rows[-1]["oid"] = digest if digest in repository.lfs else _blob(files[name])
        self._send(200, {"files": rows})

    def batch(self, repo_id):
        if (repository := self._repository(repo_id)) is None:
            return
        if self.hub.full:
            return self._send(403, {"error": "Your storage is full"})
        rows = []
        for entry in json.loads(self.body)["objects"]:
            rows.append({"oid": entry["oid"], "size": entry["size"]})
            if entry["oid"] not in repository.lfs:
                rows[-1]["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{repo_id}/{entry['oid']}"},
                                       "verify": {"href": f"{self.hub.url}/verify/{repo_id}"}}  # fmt: skip
        self._send(200, {"transfer": "basic", "objects": rows})

    def store(self, repo_id, oid):
        if self.hub.cut_uploads > 0:
            self.hub.cut_uploads -= 1
            self.close_connection = True
            return self.connection.shutdown(2)
        self.hub.stall.wait()
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.repositories[repo_id].lfs[oid] = self.body
        self._send(200, {})

    def verify(self, repo_id):
        known = json.loads(self.body)["oid"] in self.hub.repositories[repo_id].lfs
        self._send(200 if known else 404, {})

    def commit(self, repo_id, revision):
        repository, _, files = self._files(repo_id, revision)
        if repository is None:
            return
        pull = "create_pr=1" in self.query
        if not self._may_write(repo_id) and not pull:
            return self._send(403, {"error": "Forbidden"})
        files = dict(files)
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = repository.lfs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        sha = repository.commit(revision, files, pull)
        answer = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        if pull:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{len(repository.pulls)}"
        self._send(200, answer)

    def resolve(self, repo_id, revision, name):
        repository, sha, files = self._files(repo_id, revision)
        if repository is None:
            return
        if name not in files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        body = files[name]
        digest = hashlib.sha256(body).hexdigest()
        etag = digest if digest in repository.lfs else _blob(body)
        self._send(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "X-Linked-Size": str(len(body))})

    def validate(self):
        asked = json.loads(self.body)
        bad = asked.get("repoType", "model") == "model" and "pipeline_tag" not in asked["content"]
        self._send(400 if bad else 200, {"errors": [{"message": "no pipeline_tag"}] if bad else [], "warnings": []})


def _blob(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


ID, MODEL = r"([\w.-]+/[\w.-]+)", r"/api/(?:models/)?((?:spaces/)?[\w.-]+/[\w.-]+)"
ROUTES = [
    (r"GET /mark", lambda handler: handler._send(200, {})),
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"GET {MODEL}", Handler.info),
    (rf"GET {MODEL}/revision/(.+)", Handler.info),
    (rf"GET {MODEL}/tree/(refs/pr/\d+|[^/]+)(/.*)?", Handler.tree),
    (rf"POST {MODEL}/paths-info/(.+)", Handler.paths),
    (rf"GET {MODEL}/refs", Handler.refs),
    (rf"POST {MODEL}/branch/(.+)", Handler.branch),
    (rf"POST {MODEL}/tag/(.+)", Handler.tag),
    (rf"POST {MODEL}/preupload/(.+)", Handler.preupload),
    (rf"POST {MODEL}/commit/(.+)", Handler.commit),
    (rf"POST /{ID}.git/info/lfs/objects/batch", Handler.batch),
    (rf"PUT /lfs/{ID}/(\w+)", Handler.store),
    (rf"POST /verify/{ID}", Handler.verify),
    (rf"(?:GET|HEAD) /{ID}/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.resolve),
]

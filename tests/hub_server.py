"""
A Hub on loopback for the real `huggingface_hub` client, in memory, with the standard library's HTTP server.

It answers what the client asks when it creates, uploads (regular and LFS files), branches, tags, lists, downloads and deletes;
keeps a record of all that was sent; and misbehaves on request (`Fault`, `HubServer.interrupt`).

    with HubServer() as hub:
        hub.faults.append(Fault("PUT", "/upload/", status=500))
        ...  # a client with HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET=1
        hub.files("user/model")["config.json"]
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

from huggingface_hub import ModelCard


TOKEN = "hf_thetokenthatmustnotleak"
USER, ORGANISATION = "user", "org"
LARGE = (".safetensors", ".bin", ".png", ".pt")  # what the Hub's .gitattributes sends to LFS
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """The next `times` requests of this method and path (a regular expression) get `status`, or the connection is cut."""

    method: str
    path: str
    status: int | None = None  # None: cut the connection when half of the body has come
    times: int = 1
    headers: dict = field(default_factory=dict)
    message: str = "made to fail"


@dataclass
class File:
    """A committed file: its content, and whether it is kept as a large file."""

    content: bytes
    large: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self):
        """The git blob id, of the LFS pointer where the file is large."""
        blob = self.content
        if self.large:
            blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(blob)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.large else self.oid


class Repo:
    """One repository: commits are snapshots of all files, references name commits, large files are kept by SHA-256."""

    def __init__(self, private=False):
        self.private = private
        self.large: dict[str, bytes] = {}
        self.commits: dict[str, dict[str, File]] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pulls: dict[str, str] = {}
        self.branches["main"] = self.add_commit({".gitattributes": File(b"*.safetensors filter=lfs\n", False)})

    def add_commit(self, files):
        content = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items())) + str(len(self.commits))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def resolve(self, revision):
        """The commit of a branch, tag, pull request or commit id; None if there is none."""
        for references in (self.branches, self.tags, self.pulls):
            if revision in references:
                return references[revision]
        return revision if revision in self.commits else None


class Refused(Exception):
    """An answer that is not a success."""

    def __init__(self, status, message, code=None, **body):
        self.status, self.code, self.body = status, code, {"error": message, **body}


class HubServer:
    """
    The server; a context manager. `uploads` lists (repo, SHA-256) of each large file that came whole, `requests` each
    request as (method, path), `received` the bytes of all bodies by repository. `interrupt(method, path)` is called when
    half of a body has come.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict] = {}
        self.faults: list[Fault] = []
        self.interrupt: Callable[[str, str], None] | None = None
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[tuple[str, str]] = []
        self.received: dict[str, int] = {}
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo, revision="main"):
        """{path: content} of a revision."""
        commit = self.repos[repo].commits[self.repos[repo].resolve(revision)]
        return {path: file.content for path, file in commit.items() if path != ".gitattributes"}

    def all_received(self):
        return sum(self.received.values())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    hub: HubServer

    def log_message(self, *args):
        pass

    def handle_any(self):
        raw, _, query = self.path.partition("?")
        self.query = {name: values[0] for name, values in parse_qs(query).items()}
        size = int(self.headers.get("Content-Length") or 0)
        with self.hub.lock:
            self.hub.requests.append((self.command, unquote(raw)))
            fault = next((f for f in self.hub.faults if f.method == self.command and re.search(f.path, unquote(raw))), None)
            if fault is not None:
                fault.times -= 1
                if not fault.times:
                    self.hub.faults.remove(fault)
        body = self.rfile.read(size // 2)
        if fault is not None and fault.status is None:
            self.close_connection = True
            self.connection.close()
            return
        if self.hub.interrupt is not None:
            self.hub.interrupt(self.command, unquote(raw))
        body += self.rfile.read(size - len(body))
        if len(body) < size:
            self.close_connection = True
            return
        self.body = body
        repo = re.match(r"/(?:api/models/|upload/)?([^/]+/[^/.]+(?:\.[^/]+?)*?)(?:\.git)?(?:/|$)", unquote(raw))
        with self.hub.lock:
            name = repo[1] if repo else ""
            self.hub.received[name] = self.hub.received.get(name, 0) + len(body)
        try:
            if fault is not None:
                raise Refused(fault.status, fault.message)
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, raw)
                if match and method == self.command.replace("HEAD", "GET"):
                    with self.hub.lock:
                        function(self, *map(unquote, match.groups()))
                    return
            raise Refused(404, f"no route {self.command} {raw}")
        except Refused as refused:
            headers = dict(fault.headers) if fault is not None else {}
            headers |= {"X-Error-Message": refused.body["error"]} | ({"X-Error-Code": refused.code} if refused.code else {})
            self.answer(refused.body, refused.status, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def answer(self, content=None, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def json(self):
        return json.loads(self.body)

    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def require_write(self, repo):
        if self.token() != TOKEN:
            # The Hub repeats what it was given, so a client that repeats the Hub's words can leak it.
            raise Refused(401, f"Invalid credentials in Authorization header: {self.token()}")
        if repo.split("/")[0] not in (USER, ORGANISATION):
            raise Refused(403, f"You don't have the rights to write to {repo}")

    def repo(self, name, write=False):
        if write:
            self.require_write(name)
        repo = self.hub.repos.get(name)
        if repo is None or repo.private and self.token() != TOKEN:
            raise Refused(404 if self.token() == TOKEN else 401, "Repository not found", "RepoNotFound")
        return repo

    def commit(self, repo, revision):
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # What a user has, and repositories.

    def whoami(self):
        self.require_write(f"{USER}/any")
        orgs = [{"type": "org", "name": ORGANISATION}]
        self.answer({"type": "user", "name": USER, "orgs": orgs, "auth": {"accessToken": {"role": "write"}}})

    def create_repo(self):
        name = f"{self.json['organization'] or USER}/{self.json['name']}"
        self.require_write(name)
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=url)
        self.hub.repos[name] = Repo(self.json.get("visibility") == "private")
        self.answer({"url": url, "name": name})

    def delete_repo(self):
        name = f"{self.json['organization'] or USER}/{self.json['name']}"
        self.repo(name, write=True)
        del self.hub.repos[name]
        self.answer({})

    def validate(self):
        errors = []
        try:
            data = ModelCard(self.json["content"]).data
            for name, kinds in (("license", str), ("library_name", str), ("pipeline_tag", str), ("tags", list)):
                if data.get(name) is not None and not isinstance(data.get(name), kinds):
                    errors.append(f'"{name}" must be a {kinds.__name__}')
            if not all(isinstance(tag, str) for tag in data.get("tags") or []):
                errors.append('"tags" must be strings')
            for base in [data.get("base_model")] if isinstance(data.get("base_model"), str) else data.get("base_model") or []:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
                    errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
        except (ValueError, TypeError, KeyError) as error:
            errors.append(str(error))
        self.answer({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    # Reading.

    def info(self, name, revision="main"):
        repo = self.repo(name)
        sha = self.commit(repo, revision)
        files = repo.commits[sha]
        card = ModelCard(files["README.md"].content.decode()).data.to_dict() if "README.md" in files else {}
        self.answer({
            "_id": name, "id": name, "modelId": name, "sha": sha, "private": repo.private, "gated": False, "disabled": False,
            "downloads": 0, "likes": 0, "tags": card.get("tags") or [], "cardData": card, "lastModified": DATE,
            "createdAt": DATE, "siblings": [{"rfilename": path} for path in files],
        })  # fmt: skip

    def refs(self, name):
        repo = self.repo(name)

        def named(references, kind):
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in references.items()]

        self.answer({"branches": named(repo.branches, "heads"), "tags": named(repo.tags, "tags"), "converts": []})

    def tree(self, name, revision, folder=""):
        repo = self.repo(name)
        files = repo.commits[self.commit(repo, revision)]
        inside = {path: file for path, file in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        folders = {path.rsplit("/", 1)[0] for path in inside if "/" in path} - {folder}
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
        self.answer(entries + [_listed(path, file) for path, file in sorted(inside.items())])

    def paths_info(self, name, revision):
        repo = self.repo(name)
        files = repo.commits[self.commit(repo, revision)]
        self.answer([_listed(path, files[path]) for path in self.json["paths"] if path in files])

    def resolve(self, name, revision, path):
        repo = self.repo(name)
        sha = self.commit(repo, revision)
        file = repo.commits[sha].get(path)
        if file is None:
            raise Refused(404, f"Entry not found: {path}", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        if file.large:
            headers |= {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.etag}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(file.content) - 1)
            part = f"bytes {first}-{last}/{len(file.content)}"
            self.answer(file.content[first : last + 1], 206, **headers, **{"Content-Range": part})
        else:
            self.answer(file.content, **headers)

    # Writing.

    def preupload(self, name, revision):
        repo = self.repo(name, write=True)
        files = repo.commits[self.commit(repo, revision)]
        rows = []
        for file in self.json["files"]:
            present = files.get(file["path"])
            large = file["path"].endswith(LARGE) or file["size"] > 10_000_000
            rows.append({
                "path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                "oid": present.etag if present and present.large == large else None,
            })  # fmt: skip
        self.answer({"files": rows})

    def large_batch(self, name):
        repo = self.repo(name, write=True)
        rows = []
        for wanted in self.json["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.large:
                signed = f"{self.hub.url}/upload/{name}/{wanted['oid']}?X-Amz-Signature=secret"
                row["actions"] = {
                    "upload": {"href": signed, "header": {}},
                    "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/verify", "header": {}},
                }
            rows.append(row)
        self.answer({"transfer": "basic", "objects": rows})

    def large_put(self, name, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content does not have this SHA-256")
        self.hub.repos[name].large[oid] = self.body
        self.hub.uploads.append((name, oid))
        self.answer({})

    def large_verify(self, name):
        if self.json["oid"] not in self.repo(name, write=True).large:
            raise Refused(404, "Object does not exist")
        self.answer({})

    def add_commit(self, name, revision):
        repo = self.repo(name, write=True)
        parent = self.commit(repo, revision)
        files = dict(repo.commits[parent])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", parent) != parent:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.large:
                    raise Refused(400, f"{value['path']} points to a large file that was not uploaded")
                files[value["path"]] = File(repo.large[value["oid"]], True)
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        sha = repo.add_commit(files)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "hookOutput": ""}
        if "create_pr" in self.query:
            number = len(repo.pulls) + 1
            repo.pulls[f"refs/pr/{number}"] = sha
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        else:
            repo.branches[revision] = sha
        self.answer(answer)

    def create_branch(self, name, branch):
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise Refused(409, f"Reference already exists: {branch}")
        repo.branches[branch] = self.commit(repo, self.json.get("startingPoint", "main"))
        self.answer({})

    def delete_branch(self, name, branch):
        if self.repo(name, write=True).branches.pop(branch, None) is None:
            raise Refused(404, f"no branch {branch}", "RevisionNotFound")
        self.answer({})

    def create_tag(self, name, revision):
        repo = self.repo(name, write=True)
        if self.json["tag"] in repo.tags:
            raise Refused(409, "Tag already exists")
        repo.tags[self.json["tag"]] = self.commit(repo, revision)
        self.answer({})

    def delete_tag(self, name, tag):
        if self.repo(name, write=True).tags.pop(tag, None) is None:
            raise Refused(404, f"no tag {tag}", "RevisionNotFound")
        self.answer({})

    # Collections.

    def create_collection(self):
        self.require_write(f"{self.json['namespace']}/any")
        slug = f"{self.json['namespace']}/{re.sub(r'[^a-z0-9]+', '-', self.json['title'].lower())}-{'0' * 24}"
        if slug in self.hub.collections:
            raise Refused(409, "This collection already exists", slug=slug)
        self.hub.collections[slug] = {
            "slug": slug, "title": self.json["title"], "private": self.json["private"], "owner": {"name": self.json["namespace"]},
            "items": [], "lastUpdated": DATE, "position": 0, "theme": "blue", "upvotes": 0, "isUpvotedByUser": False,
        }  # fmt: skip
        self.answer(self.hub.collections[slug])

    def collection(self, slug):
        self.answer(self.hub.collections[slug])

    def add_collection_item(self, slug):
        self.require_write(slug)
        items, item = self.hub.collections[slug]["items"], self.json["item"]
        if any(known["id"] == item["id"] for known in items):
            raise Refused(409, "This item is already in the collection")
        note = {"text": self.json.get("note", ""), "html": ""}
        items.append({"_id": str(len(items)), **item, "position": len(items), "repoType": "model", "note": note})
        self.answer(self.hub.collections[slug])


def _listed(path, file):
    row = {"type": "file", "path": path, "oid": file.oid, "size": len(file.content)}
    if file.large:
        row["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
    return row


_NAME, _MODEL = r"/([^/]+/[^/]+)", r"/api/models/([^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("DELETE", "/api/repos/delete", _Handler.delete_repo),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", _MODEL, _Handler.info),
    ("GET", _MODEL + "/revision/([^/]+)", _Handler.info),
    ("GET", _MODEL + "/refs", _Handler.refs),
    ("GET", _MODEL + "/tree/([^/]+)", _Handler.tree),
    ("GET", _MODEL + "/tree/([^/]+)/(.+)", _Handler.tree),
    ("POST", _MODEL + "/paths-info/([^/]+)", _Handler.paths_info),
    ("GET", _NAME + "/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("POST", _MODEL + "/preupload/([^/]+)", _Handler.preupload),
    ("POST", _NAME + r"\.git/info/lfs/objects/batch", _Handler.large_batch),
    ("PUT", r"/upload/([^/]+/[^/]+)/([0-9a-f]{64})", _Handler.large_put),
    ("POST", _NAME + r"\.git/info/lfs/verify", _Handler.large_verify),
    ("POST", _MODEL + "/commit/([^/]+)", _Handler.add_commit),
    ("POST", _MODEL + "/branch/([^/]+)", _Handler.create_branch),
    ("DELETE", _MODEL + "/branch/([^/]+)", _Handler.delete_branch),
    ("POST", _MODEL + "/tag/([^/]+)", _Handler.create_tag),
    ("DELETE", _MODEL + "/tag/([^/]+)", _Handler.delete_tag),
    ("POST", "/api/collections", _Handler.create_collection),
    ("GET", "/api/collections/([^/]+/[^/]+)", _Handler.collection),
    ("POST", "/api/collections/([^/]+/[^/]+)/items", _Handler.add_collection_item),
]

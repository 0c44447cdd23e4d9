"""data/download.py against a server on this machine that misbehaves in the ways of the real ones. No network."""
import http.server
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from hashlib import sha256
from pathlib import Path

import pytest

from chapters import CHAPTERS_ROOT

SCRIPT = CHAPTERS_ROOT / "data" / "download.py"
SPEC = importlib.util.spec_from_file_location("download", SCRIPT)
download = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(download)

CONTENT = random.Random(0).randbytes(300_000)
WRONG = bytes(len(CONTENT))


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; `mode` says how. requests holds the Range header of each request (None: the whole file)."""
    content, mode = CONTENT, "range"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.paths = [], []
        self.go_on = threading.Event()   # the mode "stop" sends half and waits for this
        self.url = f"http://127.0.0.1:{self.server_port}/file.txt"

    def handle_error(self, request, client_address):
        """A client that hangs up is part of these tests; by default its traceback goes to standard error."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, content, mode = self.server, self.server.content, self.server.mode
        server.requests.append(self.headers["Range"])
        server.paths.append(self.path)
        start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers["Range"] else 0
        if mode.isdigit():
            self.send_error(int(mode))
        elif mode == "chunked, dropped":
            self.protocol_version = "HTTP/1.1"
            self.head(200, {"Transfer-Encoding": "chunked"})
            self.wfile.write(b"%x\r\n" % len(content) + content[:len(content) // 2])
            self.close_connection = True
        elif mode == "range" and start >= len(content):
            self.send_error(416)
        elif mode == "range" and start:
            self.head(206, {"Content-Length": len(content) - start,
                            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})
            self.wfile.write(content[start:])
        else:
            self.head(200, {"Content-Length": len(content)})
            self.wfile.write(content[:len(content) // 2])
            if mode == "stop":
                server.go_on.wait(20)
            if mode != "dropped":
                self.wfile.write(content[len(content) // 2:])

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def here(server, tmp_path, monkeypatch):
    """An empty folder in place of data/, and one small file in the table."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("urllib.request._opener", None)   # made at the first request, it remembers the proxies
    monkeypatch.setattr(download, "FOLDER", tmp_path)
    monkeypatch.setattr(download, "DATASETS", {"file": entry(server.url)})
    return tmp_path


def entry(url):
    return download.File("file.txt", url, len(CONTENT), sha256(CONTENT).hexdigest(), "public domain")


@pytest.fixture
def call(monkeypatch, capsys):
    """Run main() in this process; returns (exit status, standard output, standard error)."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["download.py", *arguments])
        status = 0
        try:
            download.main()
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()
    return call


def start(here, url):
    """The same in a process of its own, for what needs two processes or a signal."""
    code = ("import importlib.util, pathlib, sys\n"
            "spec = importlib.util.spec_from_file_location('download', sys.argv[1])\n"
            "download = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(download)\n"
            "download.FOLDER = pathlib.Path(sys.argv[2])\n"
            f"download.DATASETS = {{'file': download.File('file.txt', sys.argv[3], {len(CONTENT)},"
            f" '{sha256(CONTENT).hexdigest()}', 'public domain')}}\n"
            "sys.argv[1:] = ['file']\n"
            "download.main()\n")
    return subprocess.Popen([sys.executable, "-c", code, str(SCRIPT), str(here), url], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def files(folder):
    """What lies in the folder, locks aside."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def assert_refused(outcome, *words):
    """Exit status 2, nothing on standard output, one line that holds these words (a progress bar may precede it)."""
    status, out, err = outcome
    assert status == 2 and out == "", outcome
    assert err.endswith("\n") and err.count("error: ") == 1 and "Traceback" not in err, err
    last = err.splitlines()[-1]
    assert last.startswith("error: file: ") and all(word in last for word in words), last


# -------------------------------------------------------------------------------------------------- the good case

def test_installs_the_file_and_prints_only_its_path(call, here, server):
    status, out, err = call("file")
    assert (status, out) == (0, f"{here / 'file.txt'}\n")
    assert files(here) == {"file.txt": CONTENT} and server.requests == [None]
    assert "100%" in err and "error" not in err


def test_a_second_call_asks_nobody(call, here, server):
    call("file")
    server.mode = "404"
    assert call("file") == (0, f"{here / 'file.txt'}\n", "file: already here\n")
    assert len(server.requests) == 1


def test_proxy_variables_are_honoured(call, here, server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/file.txt"))
    monkeypatch.setattr(download, "DATASETS", {"file": entry("http://some.host.invalid/file.txt")})
    assert call("file")[0] == 0 and server.paths == ["http://some.host.invalid/file.txt"]


# ------------------------------------------------------------------------------------------ continuing a download

@pytest.mark.parametrize("mode", ["dropped", "chunked, dropped"])
def test_a_dropped_connection_leaves_a_part_that_the_next_call_continues(call, here, server, mode):
    server.mode = mode
    assert_refused(call("file"), "connection lost", "run this again")
    part = files(here)["file.txt.part"]
    assert CONTENT.startswith(part) and list(files(here)) == ["file.txt.part"]
    server.mode = "range"
    assert call("file")[0] == 0
    assert files(here) == {"file.txt": CONTENT}
    assert server.requests == [None, f"bytes={len(part)}-" if part else None]
    assert part or mode != "dropped"


def test_a_server_that_ignores_range_sends_everything_once(call, here, server):
    server.mode = "whole"
    (here / "file.txt.part").write_bytes(CONTENT[:1000])
    status, _, err = call("file")
    assert status == 0 and files(here) == {"file.txt": CONTENT}
    assert server.requests == ["bytes=1000-"] and "damaged" not in err


@pytest.mark.parametrize("part, requests", [
    (CONTENT, []),                                        # complete: killed between the last byte and the rename
    (CONTENT[:1000], ["bytes=1000-"]),
    (b"", [None]),
    (WRONG[:1000], ["bytes=1000-", None]),                # damaged: seen by the checksum at the end
    (WRONG, [None]),
    (CONTENT + b"!", [None]),
])
def test_whatever_lies_in_the_part_the_file_is_right(call, here, server, part, requests):
    (here / "file.txt.part").write_bytes(part)
    assert call("file")[0] == 0
    assert files(here) == {"file.txt": CONTENT} and server.requests == requests


def test_416_means_start_over(call, here, server):
    """The server's file has become shorter than our part: it cannot be what the table describes."""
    server.content = CONTENT[:1000]
    (here / "file.txt.part").write_bytes(CONTENT[:2000])
    assert_refused(call("file"), "sends 1000 bytes")
    assert files(here) == {} and server.requests == ["bytes=2000-", None]


def test_killed_half_way_then_continued(here, server):
    server.mode = "stop"
    process = start(here, server.url)
    wait_for_part(here, process)
    process.kill()
    process.communicate()
    assert list(files(here)) == ["file.txt.part"]
    server.mode = "range"
    again = start(here, server.url)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0 and files(here) == {"file.txt": CONTENT}, err
    assert out == f"{here / 'file.txt'}\n" and server.requests[1].startswith("bytes=")


def test_killed_at_any_instant(here, server, record_property):
    """With KILLS=1000 fifty of them.

    What is installed is right, what is somebody else's stays, and in the end there is no part.
    """
    rng, kills = random.Random(0), max(1, int(os.environ.get("KILLS", 0)) // 20)
    (here / "file.old").write_text("somebody's")
    for _ in range(kills):
        server.mode = rng.choice(["range", "stop"])
        process = start(here, server.url)
        time.sleep(rng.uniform(0.1, 0.5))
        process.kill()
        process.communicate()
        found = files(here)
        assert found.keys() <= {"file.old", "file.txt", "file.txt.part"} and found.get("file.txt", CONTENT) == CONTENT
        (here / "file.txt").unlink(missing_ok=True)
    server.mode = "range"
    out, err = start(here, server.url).communicate(timeout=60)
    assert files(here) == {"file.txt": CONTENT, "file.old": b"somebody's"}, err
    record_property("kills", ("data/download.py", {"some time later": kills}))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_keeps_the_part_and_exits_with_130(here, server):
    server.mode = "stop"
    process = start(here, server.url)
    wait_for_part(here, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err, err
    assert CONTENT.startswith(files(here)["file.txt.part"]) and "file.txt" not in files(here)


def wait_for_part(here, process):
    part = here / "file.txt.part"
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None, process.communicate()
        threading.Event().wait(0.01)


def test_two_processes_at_once(here, server):
    """The second waits for the first; neither writes into the other's part, and the server is asked once."""
    server.mode = "stop"
    first = start(here, server.url)
    wait_for_part(here, first)
    second = start(here, server.url)
    threading.Event().wait(0.7)   # without a lock, the second has asked the server by now
    server.go_on.set()
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, f"{here / 'file.txt'}\n"), err
    assert files(here) == {"file.txt": CONTENT} and server.requests == [None]


# ---------------------------------------------------------------------------------------------------- refusals

def test_wrong_bytes_are_not_installed(call, here, server):
    server.content = WRONG
    assert_refused(call("file"), "checksum")
    assert files(here) == {} and server.requests == [None]


@pytest.mark.parametrize("mode", ["404", "500"])
def test_http_error(call, here, server, mode):
    server.mode = mode
    assert_refused(call("file"), mode, server.url)
    assert files(here) == {}


def test_a_login_page_does_not_touch_the_part(call, here, server):
    server.content, server.mode = b"<html>Please accept our terms</html>", "whole"
    (here / "file.txt.part").write_bytes(CONTENT[:1000])
    assert_refused(call("file"), "login page")
    assert files(here) == {"file.txt.part": CONTENT[:1000]}


def test_nobody_listens(call, here, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setattr(download, "DATASETS", {"file": entry(f"http://127.0.0.1:{port}/file.txt")})
    assert_refused(call("file"), "cannot reach 127.0.0.1", "refused", "network")
    assert files(here) == {}


def test_a_name_that_does_not_resolve(call, monkeypatch):
    def getaddrinfo(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    assert_refused(call("file"), "cannot reach", "Name or service not known")


def test_a_network_that_swallows_everything(call, here, monkeypatch):
    """The lookup of the name never returns, and no timeout of urllib covers it."""
    never = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: never.wait())
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.1)
    assert_refused(call("file"), "no answer in 0.1 seconds")
    never.set()


def test_a_changed_file_is_replaced_only_by_a_right_one(call, here, server):
    (here / "file.txt").write_bytes(b"edited")
    server.mode = "404"
    assert_refused(call("file"), "404")
    assert files(here) == {"file.txt": b"edited"}
    server.mode = "range"
    assert call("file")[0] == 0 and files(here) == {"file.txt": CONTENT}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(call, here):
    (here / "file.txt.part").symlink_to("/dev/full")
    assert_refused(call("file"), "No space left", str(here))
    assert not (here / "file.txt").exists()


def test_unwritable_folder(call, tmp_path, monkeypatch):
    (tmp_path / "not-a-folder").write_text("")
    monkeypatch.setattr(download, "FOLDER", tmp_path / "not-a-folder")
    assert_refused(call("file"), "cannot write to", "not-a-folder")


def test_unknown_name(call):
    status, out, err = call("shakspeare")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "shakspeare" in err and "choose from file" in err


# ------------------------------------------------------------------------------------------------------- the hub

# As the hub has them: an empty line is "", every other line ends in a newline, and an article begins after two empty
# lines. "Notes" is a section that carries one "=" too few.
ROWS = ["", " = First = \n", "", " Once . \n", " = not a title \n", "", " = = Section = = \n", "", " x = y = z \n", "",
        " = Notes = \n", "", " More . \n", "", "",
        " = A = B = \n", "", " Twice . \n", "", " = = Empty = = \n", "", "", " = = = Deep = = = \n", "", "",
        " = Last “one” = \n", "", " \u2028End"]


def test_titles_open_articles_and_sections_do_not():
    assert download.articles(ROWS) == [
        " = First = \n Once . \n = not a title \n = = Section = = \n x = y = z \n = Notes = \n More . \n",
        " = A = B = \n Twice . \n = = Empty = = \n = = = Deep = = = \n",
        " = Last “one” = \n \u2028End"]


def test_a_title_at_the_top_and_text_before_the_first_title():
    assert download.articles([" = A = \n", " a \n"]) == [" = A = \n a \n"]
    assert download.articles([" lost ? \n", "", "", " = A = \n"]) == [" lost ? \n", " = A = \n"]


def test_no_text_is_lost_between_articles():
    generator = random.Random(1)
    for _ in range(300):
        rows = generator.choices(ROWS, k=generator.randrange(40))
        documents = download.articles(rows)
        assert "".join(documents) == "".join(rows)
        assert all(document.strip() for document in documents) or not "".join(rows).strip()


@pytest.fixture
def hub(server, monkeypatch):
    """A stand-in for the datasets library, and an entry for it. hub.calls holds the arguments of load_dataset."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        monkeypatch.setenv(name, "")   # so that what load() sets is undone after the test
    monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/file.txt"))
    hub = types.SimpleNamespace(calls=[], splits=dict.fromkeys(("train", "validation", "test"), {"text": ROWS}))

    def load_dataset(*args, **kwargs):
        hub.calls.append((args, kwargs, os.environ["HF_HUB_OFFLINE"]))
        if isinstance(hub.splits, Exception):
            raise hub.splits
        return hub.splits

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(download, "DATASETS", {"file": download.HubDataset(
        "wiki", "Some/wiki", "raw", "b08601", 1000, "CC BY-SA 3.0", download.articles)})
    return hub


def test_hub_dataset_becomes_jsonl(call, here, hub):
    status, out, err = call("file")
    assert (status, out) == (0, f"{here / 'wiki'}\n"), err
    assert hub.calls == [(("Some/wiki", "raw"), {"revision": "b08601"}, "")]
    assert sorted(files(here / "wiki")) == ["complete.json", "test.jsonl", "train.jsonl", "validation.jsonl"]
    lines = (here / "wiki" / "train.jsonl").read_text(encoding="utf-8").splitlines()   # splits at U+2028 as well
    assert [json.loads(line)["text"] for line in lines] == download.articles(ROWS)
    assert call("file") == (0, f"{here / 'wiki'}\n", "file: already here\n") and len(hub.calls) == 1


@pytest.mark.parametrize("damage", [
    lambda wiki: (wiki / "test.jsonl").unlink(),
    lambda wiki: (wiki / "test.jsonl").write_text("{"),
    lambda wiki: (wiki / "complete.json").unlink(),
    lambda wiki: (wiki / "complete.json").write_bytes(b"\xff"),
])
def test_an_incomplete_hub_dataset_is_made_again(call, here, hub, damage):
    call("file")
    whole = files(here / "wiki")
    damage(here / "wiki")
    assert call("file")[0] == 0 and len(hub.calls) == 2 and files(here / "wiki") == whole


def test_another_revision_is_another_dataset(call, hub, monkeypatch):
    call("file")
    monkeypatch.setattr(download.DATASETS["file"], "revision", "c0ffee")
    assert call("file")[0] == 0 and len(hub.calls) == 2


def test_interrupted_between_two_splits_is_not_complete(call, here, hub):
    hub.splits = {"train": {"text": ROWS}, "test": {}}   # stands for a kill while the second split is being written
    with pytest.raises(KeyError):
        call("file")
    dataset = download.DATASETS["file"]
    assert (here / "wiki" / "train.jsonl").exists() and not dataset.is_complete(here / "wiki")


def test_the_library_s_error_becomes_one_line(call, here, hub):
    hub.splits = ValueError("no such\nconfiguration")
    assert_refused(call("file"), "Some/wiki", "no such configuration")
    assert files(here) == {}


def test_an_unreachable_hub_leaves_the_cache(call, here, hub, server):
    server.mode = "503"
    assert call("file")[0] == 0 and hub.calls[0][2] == "1"   # the library was told that there is no network
    hub.splits = ConnectionError("a page of explanations")
    (here / "wiki" / "train.jsonl").unlink()
    assert_refused(call("file"), "503")


def test_the_real_library_offline_says_one_line(tmp_path, server):
    """No retries, no warnings, no traceback: the script and the library as a reader without network has them."""
    server.mode = "503"
    copy = tmp_path / "download.py"
    copy.write_bytes(SCRIPT.read_bytes())
    environment = os.environ | {"HF_ENDPOINT": server.url.removesuffix("/file.txt"), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, copy, "wikitext-2"], env=environment, cwd="/", capture_output=True,
                          text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(r"error: wikitext-2: Salesforce/wikitext: .*503.*\n", done.stderr), done.stderr
    assert not (tmp_path / "wikitext-2").exists() and len(server.requests) == 1


@pytest.fixture
def files_of_the_hub(server, monkeypatch):
    """A stand-in for huggingface_hub, and an entry for it. files: what the next call finds there, or an error."""
    monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/file.txt"))
    hub = types.SimpleNamespace(calls=[], files={"sample/a.parquet": b"a", "sample/b.parquet": b"bb"}, error=None)

    def snapshot_download(source, repo_type, revision, allow_patterns, local_dir):
        hub.calls.append((source, repo_type, revision, allow_patterns))
        for name, content in hub.files.items():
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / name).write_bytes(content)
        if hub.error:
            raise hub.error

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.setattr(download, "DATASETS", {"file": download.HubFiles(
        "web", "Some/web", "sample/*.parquet", "87f091", 1000, "ODC-By 1.0")})
    return hub


def test_files_of_the_hub_are_there_when_all_are(call, here, files_of_the_hub):
    hub, web = files_of_the_hub, here / "web"
    whole, hub.files, hub.error = hub.files, {"sample/a.parquet": b"a"}, ConnectionError("a page\nof explanations")
    assert_refused(call("file"), "Some/web", "a page of explanations", "run this again")
    assert not (web / "complete.json").exists() and (web / "sample" / "a.parquet").exists()   # to go on with
    hub.files, hub.error = whole, None
    assert call("file")[:2] == (0, f"{web}\n") and len(hub.calls) == 2
    assert hub.calls[0] == ("Some/web", "dataset", "87f091", "sample/*.parquet")
    assert call("file") == (0, f"{web}\n", "file: already here\n") and len(hub.calls) == 2
    (web / "sample" / "b.parquet").unlink()
    assert call("file")[0] == 0 and len(hub.calls) == 3


def test_without_network_what_is_there_is_not_taken_for_all(call, here, files_of_the_hub, server):
    server.mode = "503"
    assert_refused(call("file"), "Some/web", "503")
    assert not files_of_the_hub.calls


# ----------------------------------------------------------------------------------------------------- the table

def test_list_shows_every_entry(call, here, server):
    for arguments in ([], ["--list"]):
        status, out, _ = call(*arguments)
        assert status == 0 and re.fullmatch(rf"file +0\.3 MB +not here +public domain +{server.url}\n", out)
    call("file")
    assert "not here" not in call("--list")[1]


def test_the_entries_of_the_repository_are_pinned(monkeypatch):
    monkeypatch.undo()
    assert download.FOLDER == SCRIPT.parent and {"tinyshakespeare", "wikitext-2"} <= download.DATASETS.keys()
    for name, dataset in download.DATASETS.items():
        pin = dataset.source if isinstance(dataset, download.File) else dataset.revision
        assert re.search(r"\b[0-9a-f]{40}\b", pin) and dataset.licence and dataset.size, name
        if isinstance(dataset, download.File):
            assert re.fullmatch("[0-9a-f]{64}", dataset.sha256), name

"""Download a data set by its name into this folder: complete and checked, or not at all.

    python data/download.py --list             what there is: size, licence, source, and whether it is here
    python data/download.py tinyshakespeare    data/tinyshakespeare.txt
    python data/download.py wikitext-2         data/wikitext-2/train.jsonl, validation.jsonl, test.jsonl
    python data/download.py fineweb-edu        data/fineweb-edu/sample/10BT/*.parquet, 28.5 GB

train.py calls this by itself. Downloads break off, and a model trains on half a file without complaint. So bytes
collect in NAME.part, which the next call continues; only when the checksum is right does one rename install the file.
Standard output is the path of what is installed, everything else goes to standard error.
Exit status: 0 installed, 2 not installed (one line says why), 130 interrupted.
"""
import argparse
import hashlib
import http.client
import io
import json
import os
import queue
import re
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Callable
from urllib.parse import urlsplit

from filelock import FileLock   # torch and datasets stand on it, so it is there
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
CONNECT_SECONDS = 5   # until the server answers: short, because without network train.py waits this long to start
READ_SECONDS = 30     # without a single byte in the middle of a download


class DownloadError(Exception):
    """Nothing was installed; the message is the one line that the reader sees."""


def say(text):
    print(text, file=sys.stderr)


# ------------------------------------------------------------------------------------------ one file behind a URL

def open_url(url, headers):
    """urlopen() with a time limit. Raises HTTPError if the server refuses, DownloadError if there is no answer.

    The timeout of urlopen is no limit: it counts for each address of the server in turn, and not for the lookup of its
    name. Where packets are swallowed that adds up to a minute, so the call runs in a thread that we can leave behind.
    """
    answers = queue.SimpleQueue()

    def work():
        try:
            answers.put(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=READ_SECONDS))
        except Exception as error:   # of any kind: the main thread waits for it
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        answer = TimeoutError(f"no answer in {CONNECT_SECONDS} seconds")
    if isinstance(answer, urllib.error.HTTPError):
        raise answer
    if isinstance(answer, Exception):
        reason = getattr(answer, "reason", answer)   # a URLError wraps the error that says what happened
        raise DownloadError(f"cannot reach {urlsplit(url).netloc} ({getattr(reason, 'strerror', None) or reason});"
                            " connect to the network and run this again")
    return answer


def transfer(url, part, size):
    """Add to the file part what it lacks of the size bytes at url. If that fails, what has arrived stays in part."""
    have = part.stat().st_size if part.exists() else 0
    try:
        response = open_url(url, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if have and error.code == 416:   # the server has nothing after these bytes: the checksum will judge them
            return
        raise DownloadError(f"{url} answered {error.code} {error.reason}") from None
    if response.status != 206:           # it ignores Range and sends everything
        have = 0
    announced = response.headers["Content-Length"]
    if not have and announced not in (None, str(size)):
        raise DownloadError(f"{url} sends {announced} bytes, not {size}: another file, perhaps a login page")
    with (response, open(part, "ab" if have else "wb") as file,
          tqdm(desc=part.stem, initial=have, total=size, unit="B", unit_scale=True) as bar):
        for chunk in iter(lambda: read(response), b""):
            file.write(chunk)
            bar.update(len(chunk))
    if part.stat().st_size < size:
        raise DownloadError(f"connection lost after {part.stat().st_size} of {size} bytes; run this again to continue")


def read(response):
    """The next bytes; none at the end, and none where the connection breaks."""
    try:
        return response.read(1 << 16)
    except (OSError, http.client.HTTPException):
        return b""


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class File:
    """One file behind a URL, small enough to be hashed again on every call."""
    path: str
    source: str
    size: int   # bytes
    sha256: str
    licence: str

    def is_complete(self, path):
        return path.is_file() and sha256(path) == self.sha256

    def fetch(self, path):
        part = path.with_name(path.name + ".part")
        while True:
            continued = part.exists()
            if not continued or part.stat().st_size < self.size:
                transfer(self.source, part, self.size)
            found = sha256(part)
            if found == self.sha256:
                return os.replace(part, path)
            part.unlink()   # a damaged part would spoil every later attempt
            if not continued:
                raise DownloadError(f"{self.source}: wrong checksum (sha256 {found}, not {self.sha256})")
            say(f"{part.name} is damaged: starting over")


# -------------------------------------------------------------------------------- a data set of the Hugging Face hub

def articles(rows):
    """Join the lines of a WikiText split into articles. Nothing is lost: "".join(articles(rows)) == "".join(rows).

    " = Title = " opens an article, " = = Section = = " does not. Lines of the first form also occur inside articles, so
    the two empty lines that stand above an article (above the very first only one) must be there as well.
    """
    documents = [""]
    for i, row in enumerate(rows):
        is_title = re.fullmatch(r" = (?!= ).+ = \n", row) and not "".join(rows[max(0, i - 2):i]).strip()
        if is_title and documents[-1].strip():
            documents.append("")
        documents[-1] += row
    return documents


@dataclass
class HubDataset:
    """A data set of the hub, saved as SPLIT.jsonl with {"text": ...} on each line, fetched through `datasets`.

    complete.json is written last and records the sizes of the others, so that no later call has to hash them.
    """
    path: str
    source: str
    configuration: str
    revision: str        # a commit, so that the text cannot change under us
    size: int            # bytes of text
    licence: str
    documents: Callable  # the "text" column of a split -> its documents

    def is_complete(self, path):
        return (path / "complete.json").is_file() and (path / "complete.json").read_bytes() == self.inventory(path)

    def inventory(self, path):
        sizes = {file.name: file.stat().st_size for file in sorted(path.glob("*.jsonl"))}
        return json.dumps({"source": self.source, "revision": self.revision, "bytes": sizes}).encode()

    def fetch(self, path):
        splits = self.load()
        path.mkdir(exist_ok=True)
        for split, rows in splits.items():
            documents = self.documents(rows["text"][:])
            say(f"{path.name}/{split}.jsonl: {len(documents)} documents")
            install(path / f"{split}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in documents).encode())
        install(path / "complete.json", self.inventory(path))

    def load(self):
        """The splits, from the hub or from the library's cache. Raises DownloadError."""
        os.environ |= {"HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}   # not a line for every retry
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        problem = None
        try:
            open_url(f"{hub}/api/datasets/{self.source}", {}).close()
        except (urllib.error.HTTPError, DownloadError) as error:
            problem = str(error)
            os.environ["HF_HUB_OFFLINE"] = "1"   # the cache or nothing: without this, half a minute of retries
        import datasets   # not before these variables are set: it reads them only once
        try:
            return datasets.load_dataset(self.source, self.configuration, revision=self.revision)
        except Exception as error:   # from four libraries, which share no base class
            raise DownloadError(f"{self.source}: {problem or ' '.join(str(error).split())}") from None


@dataclass
class HubFiles:
    """Files of a data set of the hub as they lie there, too large to be read at once.

    huggingface_hub continues what broke off. complete.json is written last, as above.
    """
    path: str
    source: str
    files: str           # their pattern within the data set
    revision: str
    size: int            # bytes of the files
    licence: str

    def is_complete(self, path):
        return (path / "complete.json").is_file() and (path / "complete.json").read_bytes() == self.inventory(path)

    def inventory(self, path):
        sizes = {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.glob(self.files))}
        return json.dumps({"source": self.source, "revision": self.revision, "bytes": sizes}).encode()

    def fetch(self, path):
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:   # without this, the library takes what is there for all that there is
            open_url(f"{hub}/api/datasets/{self.source}", {}).close()
        except urllib.error.HTTPError as error:
            raise DownloadError(f"{self.source}: {error}") from None
        import huggingface_hub
        try:
            huggingface_hub.snapshot_download(self.source, repo_type="dataset", revision=self.revision,
                                              allow_patterns=self.files, local_dir=path)
        except Exception as error:   # from several libraries, which share no base class
            raise DownloadError(f"{self.source}: {' '.join(str(error).split())}; run this again to continue") from None
        install(path / "complete.json", self.inventory(path))


def install(path, data):
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


# ---------------------------------------------------------------------------------------- the table and the command

DATASETS = {
    "tinyshakespeare": File(
        path="tinyshakespeare.txt",
        source="https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
               "/data/tinyshakespeare/input.txt",
        size=1115394, sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        licence="public domain"),
    "wikitext-2": HubDataset(
        path="wikitext-2", source="Salesforce/wikitext", configuration="wikitext-2-raw-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        size=13346749, licence="CC BY-SA 3.0, GFDL", documents=articles),
    "fineweb-edu": HubFiles(   # a sample of ten billion of GPT-2's tokens
        path="fineweb-edu", source="HuggingFaceFW/fineweb-edu", files="sample/10BT/*.parquet",
        revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        size=28518193415, licence="ODC-By 1.0"),
}


def download(name):
    """Make sure that the data set is here and return its path. Raises DownloadError, or OSError from the disk."""
    if name not in DATASETS:
        raise DownloadError(f"no data set has this name; choose from {', '.join(DATASETS)}")
    dataset = DATASETS[name]
    path = FOLDER / dataset.path
    if dataset.is_complete(path):
        say(f"{name}: already here")
        return path
    if path.exists():
        say(f"{name}: what is here is incomplete or was changed; downloading it again")
    with FileLock(FOLDER / f".{name}.lock"):   # two processes never write one .part: the second waits here ...
        if not dataset.is_complete(path):      # ... and finds the work done
            dataset.fetch(path)
    return path


class StandardError(io.FileIO):
    """What it cannot write is lost, for there is nowhere to say so; the work goes on."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def open_streams():
    """Let no standard stream end the work by being closed, full or of a narrow encoding."""
    if sys.stderr is not sys.__stderr__:   # a test or a notebook has streams of its own
        return
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # The next file that is opened would get its number, and what a compiler says would be written there.
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, closefd=False))
    sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout.reconfigure(errors="backslashreplace")
    raw = StandardError(sys.stderr.fileno(), "w", closefd=False)
    sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, "backslashreplace", line_buffering=True)


def main():
    open_streams()
    try:
        work()
        sys.stdout.flush()
    except OSError as error:
        say(f"error: standard output cannot be written: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # Python will try once more
        sys.exit(2)


def work():
    parser = argparse.ArgumentParser(description="Download a data set into the folder of this script.")
    parser.add_argument("name", nargs="?", help=f"one of: {', '.join(DATASETS)}")
    parser.add_argument("--list", action="store_true", help="show what there is (so does giving no name)")
    args = parser.parse_args()
    if args.list or not args.name:
        for name, dataset in DATASETS.items():
            state = "here" if dataset.is_complete(FOLDER / dataset.path) else "not here"
            print(f"{name:16} {dataset.size / 1e6:8,.1f} MB  {state:8}  {dataset.licence:18}  {dataset.source}")
        return
    try:
        path = download(args.name)
    except DownloadError as error:
        say(f"error: {args.name}: {error}")
        sys.exit(2)
    except PermissionError as error:   # of a file that somebody else's download has left, too
        say(f"error: {args.name}: {error.filename}: {error.strerror}")
        sys.exit(2)
    except OSError as error:
        say(f"error: {args.name}: cannot write to {FOLDER}: {error.strerror}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted; run this again to continue")
        sys.exit(130)
    print(path)


if __name__ == "__main__":
    main()

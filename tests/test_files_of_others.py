"""What a script writes and reads beside other people's files: nothing is removed or replaced that it has not made, what
it makes others may read as the umask says, and what it may not read it does not call missing."""
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from chapters import expect_error, load_chapter, run_here

QUANTIZATION = "chapter-07-quantization"


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not yours")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def umask():
    """umask(mask) until the end of the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def expect_modes(paths, mask):
    for path in paths:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == wanted, (path, oct(path.stat().st_mode), oct(wanted))


# ------------------------------------------------------------------------------------------------- train.py

def test_a_run_leaves_other_files_alone_and_its_own_can_be_read(chapter, trained, tmp_path, text_file, umask):
    """Names like ours, in --out and beside it. What an earlier run has written there it replaces, and nothing else."""
    out = shutil.copytree(trained, tmp_path / "out")
    fill(out, "probe.tmp", "checkpoint.tmp/model.safetensors", "checkpoint.old/state.json",
         "checkpoint-500/model.safetensors", "model.tmp/a",
         "config.json.tmp", "model.safetensors.tmp", "tensorboard/notes.txt",
         "tensorboard/other/events.out.tfevents.1", "out.tmp/a")
    fill(tmp_path, "out.tmp/a", "out.old/a", "checkpoint/a")
    before = {name: data for name, data in contents(tmp_path).items() if data == b"not yours"}
    umask(0o027)
    run_here(chapter.train, "--data", text_file, *chapter.quick, "--steps", 1, "--out", out)
    after = contents(tmp_path)
    assert before.items() <= after.items(), {name for name in before if after.get(name) != before[name]}
    events = list((out / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 2   # of one run: add_hparams has a file of its own
    assert not any("unfinished" in name or "replaced" in name for name in after)
    expect_modes([out / "checkpoint", *(out / "checkpoint").iterdir(), *events,
                  *map(out.joinpath, chapter.checkpoint.MODEL_FILES)], 0o027)


@pytest.mark.parametrize("names, word", [
    (["config.json"], "config.json"), (["model.safetensors", "tokenizer.json"], "tokenizer.json"),
    (["summary.json"], "summary.json"),
    (["checkpoint/model.safetensors"], "checkpoint"), (["checkpoint/state.json", "checkpoint/notes.txt"], "notes.txt"),
    (["checkpoint"], "checkpoint")])
def test_a_run_that_would_replace_other_files_does_not_begin(chapter, tmp_path, call, names, word):
    fill(tmp_path, *names)
    before = contents(tmp_path)
    for resume in ([], ["--resume"]):
        expect_error(call(chapter.train, "--data", tmp_path / "never.txt", "--out", tmp_path, *resume), "--out", word)
    assert contents(tmp_path) == before


def test_a_run_does_not_overwrite_what_it_begins_with(chapter, trained, tmp_path, text_file, call):
    if not hasattr(chapter.checkpoint, "load_pretrained"):
        pytest.skip("chapter 1 has no --init")
    out = shutil.copytree(trained, tmp_path / "out")
    before = contents(out)
    (tmp_path / "link").symlink_to(out)
    for name in ("out", "out/../out", "link"):
        expect_error(call(chapter.train, "--init", out, "--data", text_file, *chapter.quick, "--out", tmp_path / name),
                     "--out", "--init")
    shutil.rmtree(out / "checkpoint")   # as a folder from the hub looks
    expect_error(call(chapter.train, "--init", out, "--data", text_file, *chapter.quick, "--out", out), "--out",
                 "config.json")
    assert contents(out) == {name: data for name, data in before.items() if not name.startswith("checkpoint/")}


def test_a_checkpoint_of_an_earlier_version_resumes(chapter, trained, tmp_path, text_file, call):
    """Killed between its two renamings, it has left checkpoint.old."""
    out = shutil.copytree(trained, tmp_path / "out")
    (out / "checkpoint").rename(out / "checkpoint.old")
    status, printed, err = call(chapter.train, "--data", text_file, *chapter.quick, "--steps", 4, "--out",
                                out, "--resume")
    assert status == 0 and "resuming after step 3" in printed, err


# ---------------------------------------------------------------------------------------------- quantize.py

@pytest.fixture(scope="module")
def full(text_file, tmp_path_factory):
    chapter, folder = load_chapter(QUANTIZATION), tmp_path_factory.mktemp("full") / "Qwen3-0.6B"
    tokenizer = chapter.make_tokenizer(chapter.data.load_documents(text_file)[0])
    folder.mkdir()
    chapter.checkpoint.save_model(folder, chapter.make_model(tokenizer), tokenizer)
    return folder


def quantize(full, out, **how):
    load_chapter(QUANTIZATION).quantize.quantize(full, "int8", out, **how)


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_quantize_leaves_other_files_alone_and_its_own_can_be_read(full, tmp_path, umask, mask):
    out = tmp_path / "Qwen3-0.6B-int8"
    fill(tmp_path, "Qwen3-0.6B-int8.tmp/a", "Qwen3-0.6B-int8.old/a", "Qwen3-0.old/a", "Qwen3-0.6B-int4/notes.txt")
    before = contents(tmp_path)
    umask(mask)
    quantize(full, out)
    expect_modes([out, *out.iterdir()], mask)
    fill(out, "notes.txt", "more/notes.txt")
    before |= {"Qwen3-0.6B-int8/notes.txt": b"not yours", "Qwen3-0.6B-int8/more/notes.txt": b"not yours"}
    quantize(full, out)
    assert before.items() <= contents(tmp_path).items()
    assert {path.name for path in out.iterdir()} == {*load_chapter(QUANTIZATION).checkpoint.MODEL_FILES,
                                                     "notes.txt", "more"}


def test_quantize_into_the_folder_one_is_in(full, tmp_path, monkeypatch):
    """An empty one, a link to one, one below the checkpoint: found, and filled where it is."""
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", tmp_path / "link", "./", "../here"):
        quantize(full, out)
        assert load_chapter(QUANTIZATION).checkpoint.load_model(".")
    source = shutil.copytree(full, tmp_path / "source")
    quantize(source, source / "small")
    assert load_chapter(QUANTIZATION).checkpoint.load_model(source)


def test_where_quantize_cannot_write_it_says_so_before_the_work(full, tmp_path, call, monkeypatch):
    module = load_chapter(QUANTIZATION).quantize
    monkeypatch.setattr(module, "quantized_state", lambda *_: pytest.fail("the work has begun"))
    fill(tmp_path, "file", "folder/notes.txt", "folder/below/a")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path / "folder")
    for out in ("/", ".", "..", tmp_path / "file", tmp_path / "file" / "below", "/proc/self/none", full, full / "..",
                full / "." / ""):
        expect_error(call(module, "--checkpoint", full, "--method", "int8", "--out", out))
    assert contents(tmp_path) == before


def test_a_killed_quantize_is_forgotten(full, tmp_path):
    """What it has left is used again, into an empty folder and into one that holds an older model."""
    name = load_chapter(QUANTIZATION).checkpoint.UNFINISHED
    for _ in range(2):
        fill(tmp_path / "out", f"{name}/model.safetensors")
        quantize(full, tmp_path / "out")
        assert {path.name for path in (tmp_path
                                       / "out").iterdir()} == {*load_chapter(QUANTIZATION).checkpoint.MODEL_FILES}


# ------------------------------------------------------------------------------------- what others may not read

def as_somebody_else(work):
    """What work() returns in a process that may read no more than others may."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    return json.loads(os.read(reader, 1 << 16))


@pytest.mark.parametrize("name", [".", "model.safetensors", "config.json", "tokenizer.json"])
def test_what_may_not_be_read_is_not_called_missing(chapter, trained, call, name):
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        folder = shutil.copytree(trained, Path(open_to_all) / "out")
        folder.chmod(0o755)
        (folder / name).chmod(0)
        result = as_somebody_else(lambda: call(chapter.generate, "a", 1, "--checkpoint", folder))
        (folder / name).chmod(0o700)
    expect_error(result, "Permission denied", folder / name if name != "." else folder)
    assert not any(word in result[2] for word in ("No such", "neither", "train one first")), result


def test_a_text_that_may_not_be_read_is_not_called_missing(chapter, text_file, tmp_path, call):
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o777)
        text = shutil.copy(text_file, open_to_all)
        os.chmod(text, 0)
        expect_error(as_somebody_else(lambda: call(chapter.train, "--data", text, "--out", f"{open_to_all}/out")),
                     text, "Permission denied")

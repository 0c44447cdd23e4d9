"""Bad input: one line that names what is wrong, exit status 2, no traceback, nothing lost."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from chapters import chapter1


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    chapter1.run("train.py", "--data", text_file, "--tokenizer", "char", "--steps", 2, "--out", out)
    return out


@pytest.fixture
def out(trained, tmp_path):
    """A copy of a finished run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "out")


def expect_error(result, *words):
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, result
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------- train.py

@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b"", ["too little text"]),
    ("one.txt", b"only one document, however long " * 50, ["1 document", "too little text"]),
    ("latin1.txt", "caf\u00e9\n\nth\u00e9".encode("latin-1"), ["not UTF-8", "byte 3"]),
    ("no.jsonl", b'{"text": "a"}\n{"words": "b"}\n', ["line 2"]),
    ("bad.jsonl", b"not json\n", ["line 1"]),
    ("list.jsonl", b'{"text": ["a"]}\n', ["line 1"]),
    ("empty.jsonl", b"", ["too little text"])])
def test_data_that_cannot_be_used(name, content, words, tmp_path, call):
    (tmp_path / name).write_bytes(content)
    expect_error(call(chapter1.train, "--data", tmp_path / name, "--out", tmp_path / "out"), name, *words)


def test_data_that_is_not_there(tmp_path, call):
    expect_error(call(chapter1.train, "--data", tmp_path / "nothing.txt", "--out", tmp_path / "o"), "does not exist")
    expect_error(call(chapter1.train, "--data", tmp_path, "--out", tmp_path / "o"), "is a folder")


@pytest.mark.parametrize("flags", [
    ["--steps", "0"], ["--steps", "-3"], ["--steps", "many"], ["--minutes", "0"], ["--minutes", "nan"],
    ["--batch-size", "0"], ["--seed", "-1"], ["--seed", str(2 ** 64)], ["--learning-rate", "-1"], ["--config", "huge"], ["--tokenizer", "words"], ["--no-such-flag"]])
def test_flags_that_make_no_sense(flags, tmp_path, call):
    expect_error(call(chapter1.train, *flags, "--out", tmp_path / "out"), flags[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_here(tmp_path, call):
    expect_error(call(chapter1.train, "--device", "cuda", "--out", tmp_path / "out"), "--device cuda")


def test_out_that_cannot_be_written(tmp_path, text_file, call):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        expect_error(call(chapter1.train, "--data", text_file, "--out", out), "cannot be written")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_keeps_the_last_checkpoint(out, text_file, call, monkeypatch):
    before = load_file(out / "checkpoint" / "model.safetensors")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(chapter1.checkpoint, "save_file", full)
    run = ["--data", text_file, "--tokenizer", "char", "--steps", 4, "--out", out]
    expect_error(call(chapter1.train, *run, "--resume"), "No space left", out)
    monkeypatch.undo()
    after = load_file(chapter1.checkpoint.complete_checkpoint(out) / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


# ----------------------------------------------------------------------------------------- resume and checkpoints

def test_resume_without_a_checkpoint_says_so_and_starts(tmp_path, text_file, call):
    status, stdout, _ = call(chapter1.train, "--data", text_file, "--tokenizer", "char", "--steps", 1, "--resume",
                             "--out", tmp_path)
    assert status == 0 and "no checkpoint" in stdout


@pytest.mark.parametrize("flags, difference", [
    (["--seed", 7], "seed 0"), (["--batch-size", 3], "batch_size"), (["--learning-rate", 1], "learning_rate"),
    (["--tokenizer", "bpe"], "tokenizer char"), (["--config", "gpt2-124m"], "config small")])
def test_resume_of_another_run_names_the_difference(flags, difference, out, text_file, call):
    run = ["--data", text_file, "--tokenizer", "char", "--steps", 4, "--out", out, "--resume"]
    expect_error(call(chapter1.train, *run, *flags), difference)


def test_resume_on_changed_data_names_the_difference(out, text_file, tmp_path, call):
    other = tmp_path / text_file.name
    other.write_text(text_file.read_text() + "\n\nOne more.")
    expect_error(call(chapter1.train, "--data", other, "--tokenizer", "char", "--steps", 4, "--out", out, "--resume"), "data")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json"])
def test_resume_from_a_damaged_checkpoint_names_the_file(name, out, text_file, call):
    run = ["--data", text_file, "--tokenizer", "char", "--steps", 4, "--out", out, "--resume"]
    truncate(out / "checkpoint" / name)
    expect_error(call(chapter1.train, *run), name)
    (out / "checkpoint" / name).unlink()
    expect_error(call(chapter1.train, *run), name)


# ---------------------------------------------------------------------------------------------- generate.py

@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_generate_from_a_damaged_folder_names_the_file(name, out, call):
    truncate(out / name)
    expect_error(call(chapter1.generate, "ROMEO:", "--checkpoint", out), name)


def test_generate_without_a_checkpoint_says_how_to_get_one(tmp_path, call):
    expect_error(call(chapter1.generate, "ROMEO:", "--checkpoint", tmp_path / "none"), "train.py")


def test_a_vocabulary_of_another_size(out, call):
    saved = json.loads((out / "tokenizer.json").read_text())
    edit_json(out / "tokenizer.json", tokens=saved["tokens"] + ["~"])
    expect_error(call(chapter1.generate, "a", "--checkpoint", out), "tokenizer.json", "vocab_size")


def test_a_vocabulary_of_the_same_size_but_another_order(out, call):
    saved = json.loads((out / "tokenizer.json").read_text())
    edit_json(out / "tokenizer.json", tokens=saved["tokens"][::-1])
    expect_error(call(chapter1.generate, "a", "--checkpoint", out), "another vocabulary")


def test_weights_of_another_shape_and_weights_that_are_missing_or_too_many(out, call):
    edit_json(out / "config.json", intermediate_size=48)
    expect_error(call(chapter1.generate, "a", "--checkpoint", out), "mlp", "48")
    edit_json(out / "config.json", surprise=1)
    expect_error(call(chapter1.generate, "a", "--checkpoint", out), "config.json", "surprise")


@pytest.mark.parametrize("name, changes", [
    ("config.json", {"hidden_size": "wide"}), ("config.json", {"num_hidden_layers": None}),
    ("tokenizer.json", {"tokens": [1, 2]}), ("tokenizer.json", {"kind": "words"})])
def test_json_of_the_wrong_types(name, changes, out, call):
    edit_json(out / name, **changes)
    expect_error(call(chapter1.generate, "a", "--checkpoint", out), name)


def test_an_optimizer_of_another_run(out, text_file, call):
    save_file({"0.exp_avg": torch.zeros(3)}, out / "checkpoint" / "optimizer.safetensors")
    run = ["--data", text_file, "--tokenizer", "char", "--steps", 4, "--out", out, "--resume"]
    expect_error(call(chapter1.train, *run), "optimizer.safetensors")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_weights_that_are_missing_or_too_many(change, out, call):
    path = out / "model.safetensors"
    weights, metadata = chapter1.checkpoint.read_tensors(path)
    if change == "missing":
        del weights["model.norm.bias"]
    else:
        weights["model.extra"] = torch.zeros(3)
    save_file(weights, path, metadata=metadata)
    expect_error(call(chapter1.generate, "a", "--checkpoint", out), "model.extra" if change == "extra" else "model.norm.bias",
                 "absent")


def test_a_prompt_with_unknown_characters(out, call):
    expect_error(call(chapter1.generate, "ROMEO: \u20ac\u00fc", "--checkpoint", out), "\u20ac", "\u00fc")


@pytest.mark.parametrize("flags", [["--temperature", "-1"], ["--top-p", "1.5"], ["--top-k", "0"], ["--max-new-tokens", "0"],
                                   ["--temperature", "nan"], ["--top-p", "-1"]])
def test_sampling_flags_that_make_no_sense(flags, out, call):
    expect_error(call(chapter1.generate, "a", "--checkpoint", out, *flags), flags[0])


def test_a_closed_pipe_is_no_error(out):
    """`generate.py | head -c 5`: the reader leaves, no traceback."""
    import subprocess
    import sys
    command = f"{sys.executable} {chapter1.folder / 'generate.py'} a 50 --checkpoint {out} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr

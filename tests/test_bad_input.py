"""Bad input: one line that names what is wrong, exit status 2, no traceback, nothing lost.

What is said in a row: test_situations.py.
"""
import gzip
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chapters import chapter1, expect_error, run_here


@pytest.fixture
def out(trained, tmp_path):
    """A copy of a finished run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "out")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------- train.py

def test_flags_of_the_chapter_that_make_no_sense(chapter, tmp_path, call):
    for name, value in chapter.wrong_flags:
        expect_error(call(chapter.train, name, value, "--out", tmp_path / "out"), name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_here(chapter, tmp_path, call):
    expect_error(call(chapter.train, "--device", "cuda", "--out", tmp_path / "out"), "--device cuda")


def test_out_that_cannot_be_written(chapter, tmp_path, text_file, call):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        expect_error(call(chapter.train, "--data", text_file, "--out", out), "cannot be written")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_keeps_the_last_checkpoint(chapter, out, text_file, call, monkeypatch):
    before = {path.name: load_file(path) for path in (out / "checkpoint").glob("*.safetensors")}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(*chapter.where_weights_are_written(), full)
    run = ["--data", text_file, *chapter.quick, "--steps", 4, "--out", out]
    expect_error(call(chapter.train, *run, "--resume"), "No space left", out)
    monkeypatch.undo()
    after = {path.name: load_file(path) for path in chapter.checkpoint.complete_checkpoint(out).glob("*.safetensors")}
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[file][name]) for file in before for name, tensor in before[file].items())


# ----------------------------------------------------------------------------------------- resume and checkpoints

def test_resume_without_a_checkpoint_says_so_and_starts(chapter, tmp_path, text_file, call):
    status, stdout, _ = call(chapter.train, "--data", text_file, *chapter.quick, "--steps", 1, "--resume",
                             "--out", tmp_path)
    assert status == 0 and "no checkpoint" in stdout


def test_resume_of_another_run_names_the_difference(chapter, out, text_file, call):
    run = ["--data", text_file, *chapter.quick, "--steps", 4, "--out", out, "--resume"]
    for flags, difference in [(("--seed", 7), "seed 0"), (("--learning-rate", 1), "learning_rate"),
                              *chapter.other_runs]:
        expect_error(call(chapter.train, *run, *flags), difference)


def test_resume_of_the_same_text_by_another_name(chapter, out, text_file, tmp_path, call, monkeypatch):
    """What is compared is the text."""
    run = [*chapter.quick, "--steps", 3, "--out", out, "--resume", "--data"]
    (tmp_path / "copy.txt.gz").write_bytes(gzip.compress(text_file.read_bytes()))
    monkeypatch.chdir(text_file.parent)
    for name in (text_file.name, f"../{text_file.parent.name}/{text_file.name}", tmp_path / "copy.txt.gz"):
        status, printed, _ = call(chapter.train, *run, name)
        assert status == 0 and "resuming after step 3" in printed


def test_resume_on_changed_data_names_the_difference(chapter, out, text_file, tmp_path, call):
    other = tmp_path / text_file.name
    other.write_text(text_file.read_text() + "\n\nOne more.")
    expect_error(call(chapter.train, "--data", other, *chapter.quick, "--steps", 4, "--out", out, "--resume"), "data")


def test_resume_from_a_damaged_checkpoint_names_the_file(chapter, out, text_file, call):
    run = ["--data", text_file, *chapter.quick, "--steps", 4, "--out", out, "--resume"]
    for name in chapter.saved:
        path = out / "checkpoint" / name
        whole = path.read_bytes()
        truncate(path)
        expect_error(call(chapter.train, *run), name)
        path.unlink()
        expect_error(call(chapter.train, *run), name)
        path.write_bytes(whole)


# ---------------------------------------------------------------------------------------------- generate.py

@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_generate_from_a_damaged_folder_names_the_file(chapter, name, out, call):
    truncate(out / name)
    expect_error(call(chapter.generate, "ROMEO:", "--checkpoint", out), name)


def test_a_vocabulary_that_is_too_large(chapter, out, call):
    size = chapter.checkpoint.load_model(out)[1].vocab_size
    edit_json(out / "tokenizer.json", **chapter.one_token_more(json.loads((out / "tokenizer.json").read_text())))
    expect_error(call(chapter.generate, "a", "--checkpoint", out), "tokenizer", size, size + 1)


def test_a_vocabulary_of_the_same_size_but_another_order(chapter, out, call):
    edit_json(out / "tokenizer.json", **chapter.in_another_order(json.loads((out / "tokenizer.json").read_text())))
    expect_error(call(chapter.generate, "a", "--checkpoint", out), "tokenizer.json", "another vocabulary")


def test_weights_of_another_shape(chapter, out, call):
    edit_json(out / "config.json", intermediate_size=48)
    expect_error(call(chapter.generate, "a", "--checkpoint", out), "model.safetensors", "mlp", "48")


def test_a_configuration_with_unknown_settings(text_file, tmp_path, call):
    """Chapter 1's file is its own. Later chapters read Hugging Face's, which holds much that a model need not know."""
    run_here(chapter1.train, "--data", text_file, *chapter1.quick, "--steps", 1, "--out", tmp_path)
    edit_json(tmp_path / "config.json", surprise=1)
    expect_error(call(chapter1.generate, "a", "--checkpoint", tmp_path), "config.json", "surprise")


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"num_hidden_layers": None}, {"vocab_size": []},
                                     {"hidden_size": -4}, {"num_attention_heads": 0}])
def test_a_configuration_that_describes_no_model(chapter, changes, out, call):
    edit_json(out / "config.json", **changes)
    expect_error(call(chapter.generate, "a", "--checkpoint", out), "config.json")


def test_a_tokenizer_of_the_wrong_types(chapter, out, call):
    before = json.loads((out / "tokenizer.json").read_text())
    for changes in chapter.wrong_tokenizers:
        edit_json(out / "tokenizer.json", **before | changes)
        expect_error(call(chapter.generate, "a", "--checkpoint", out), "tokenizer.json")


def test_an_optimizer_of_another_run(chapter, out, text_file, call):
    path = out / "checkpoint" / "optimizer.safetensors"
    if path.name not in chapter.saved:
        pytest.skip("test_sharded_checkpoint.py has one of its own")
    run = ["--data", text_file, *chapter.quick, "--steps", 4, "--out", out, "--resume"]
    whole = load_file(path)
    for tensors in ({"0.exp_avg": torch.zeros(3)}, whole | {"0.exp_avg": torch.zeros(3)},
                    {name: tensor for name, tensor in whole.items() if not name.startswith("1.")}):
        save_file(tensors, path)
        expect_error(call(chapter.train, *run), "optimizer.safetensors")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_weights_that_are_missing_or_too_many(chapter, change, out, call):
    path = out / "model.safetensors"
    weights = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if change == "missing":
        del weights["model.norm.weight"]
    else:
        weights["model.extra"] = torch.zeros(3)
    save_file(weights, path, metadata=metadata)
    expect_error(call(chapter.generate, "a", "--checkpoint", out),
                 "model.extra" if change == "extra" else "model.norm.weight")


def spoil(path, number):
    """Put one number into the last tensor of floats of a file; returns the tensor's name."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = [name for name in sorted(tensors) if tensors[name].is_floating_point()][-1]
    tensors[name].view(-1)[-1] = number
    save_file(tensors, path, metadata=metadata)
    return name


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(chapter, number, out, text_file, call):
    """Found when they are read, not after twenty steps by their gradients: by generate.py, --init, --resume."""
    run = ["--data", text_file, *chapter.quick, "--steps", 4]
    # Weights, and the optimizer's moments.
    for name in [name for name in chapter.saved if name.endswith(".safetensors")]:
        whole = (out / "checkpoint" / name).read_bytes()
        tensor = spoil(out / "checkpoint" / name, number)
        expect_error(call(chapter.train, *run, "--out", out, "--resume"), "checkpoint", tensor, "nan or inf")
        (out / "checkpoint" / name).write_bytes(whole)
    tensor = spoil(out / "model.safetensors", number)
    expect_error(call(chapter.generate, "a", "--checkpoint", out), "model.safetensors", tensor, "nan or inf")
    if chapter is not chapter1:
        expect_error(call(chapter.train, *run, "--init", out, "--out", out / "new"), "model.safetensors",
                     tensor, "nan or inf")
        assert not (out / "new" / "checkpoint").exists()


def test_a_prompt_with_unknown_characters(tmp_path, text_file, call):
    run_here(chapter1.train, "--data", text_file, "--tokenizer", "char", "--steps", 1, "--out", tmp_path)
    expect_error(call(chapter1.generate, "ROMEO: \u20ac\u00fc", "--checkpoint", tmp_path), "\u20ac", "\u00fc")


def test_a_closed_pipe_is_no_error(text_file, tmp_path):
    """`generate.py | head -c 5`: the reader leaves, no traceback. Once: cli.py is the same in all chapters."""
    run_here(chapter1.train, "--data", text_file, *chapter1.quick, "--steps", 1, "--out", tmp_path)
    command = f"{sys.executable} {chapter1.folder / 'generate.py'} a 50 --checkpoint {tmp_path} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr

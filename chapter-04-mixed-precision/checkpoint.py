"""Checkpoints that survive a kill at any instant, and a resume that continues bit for bit.

    OUT/checkpoint/          everything a resumed run needs, replaced as a whole
    OUT/config.json          the model for everyone else: generate.py, transformers
    OUT/model.safetensors
    OUT/tokenizer.json
    OUT/tokenizer_config.json

Only safetensors and JSON: a pickle runs whatever code it contains when it is opened.
"""
import filecmp
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from errors import InputError
from model import checkpoint_folder, load_pretrained, save_pretrained
from tokenizer import load_tokenizer

MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def beside(path, what):
    """A name that nobody gives a file of his own, so that what is found under it is ours: left behind by a run that was killed."""
    return path.with_name(f".{path.name}.{what}")


# --------------------------------------------------------------------------------------------------- saving

def save_checkpoint(out, model, tokenizer, optimizer, state):
    """Write OUT/checkpoint/ and the model files beside it. state: what else to remember, as JSON can hold it."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise InputError(f"the training diverged: its weights are not finite; a checkpoint in {out} is kept as it was;"
                         " try a lower --learning-rate")
    try:
        write_checkpoint(out, model, tokenizer, optimizer, state)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write a checkpoint to {out}: {error}; the one before it is complete") from None


def write_checkpoint(out, model, tokenizer, optimizer, state):
    final = Path(out) / "checkpoint"
    temporary = beside(final, "unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_model(temporary, model, tokenizer)
    tensors = {f"{i}.{key}": value for i, entry in optimizer.state_dict()["state"].items() for key, value in entry.items()}
    save_file({"random_state": torch.get_rng_state(), **tensors}, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=2))
    shutil.copymode(temporary / "state.json", temporary / "optimizer.safetensors")   # as for the weights
    replace_folder(temporary, final)
    for name in MODEL_FILES:
        copy = beside(Path(out) / name, "unfinished")
        shutil.copyfile(final / name, copy)
        install(copy, Path(out) / name)


def install(file, target):
    """Rename a finished model file to its place. The weights come last, and go before another model's configuration or tokenizer comes:
    a kill in between must not leave them beside each other."""
    if target.suffix == ".json" and not (target.is_file() and filecmp.cmp(file, target, shallow=False)):
        target.with_name("model.safetensors").unlink(missing_ok=True)
    os.replace(file, target)


def save_model(folder, model, tokenizer):
    """The four files of MODEL_FILES: all that is needed to use the model."""
    tokenizer.save(folder)
    save_pretrained(model, folder, {"tokenizer": sha256(folder / "tokenizer.json")})


def replace_folder(temporary, final):
    """Put a finished folder in the place of an older one, so that a complete one exists at every instant.

    Renaming is atomic, but a folder cannot be renamed onto another. So the old one steps aside first, and
    complete_checkpoint() looks there too.
    """
    for path in [*temporary.iterdir(), temporary]:   # a name must not reach the disk before the bytes it names
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    old = beside(final, "replaced")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- loading

def complete_checkpoint(out):
    """The last complete checkpoint folder of a run, or None. The third name is what earlier versions called the second."""
    final = Path(out) / "checkpoint"
    return next(filter(Path.is_dir, (final, beside(final, "replaced"), final.with_name("checkpoint.old"))), None)


def not_ours(out):
    """Names in a folder that a run would overwrite or delete although no run has made them."""
    checkpoint = complete_checkpoint(out)
    if not checkpoint:
        return [name for name in (*MODEL_FILES, "summary.json", "checkpoint") if (out / name).exists()]
    if not (checkpoint / "state.json").is_file():
        return [f"{checkpoint.name}/ without a state.json"]
    return [f"{checkpoint.name}/{path.name}" for path in checkpoint.glob("[!.]*") if path.suffix not in (".json", ".safetensors")]


def load_model(dir_or_hub_id, device="cpu", dtype=None):
    """A folder with the four model files, or a Hugging Face checkpoint -> (model, tokenizer).

    dtype: of the weights, the file's where it is None. Raises InputError that names the file and the difference.
    """
    folder = checkpoint_folder(dir_or_hub_id)
    if not any(path.match("model*.safetensors") for path in folder.iterdir()):   # glob finds nothing where it may not look
        raise InputError(f"no model.safetensors in {folder}; train one first: python {Path(__file__).parent.name}/train.py")
    tokenizer = load_tokenizer(folder)
    model = load_pretrained(folder, device, dtype)
    if tokenizer.vocab_size > model.config.vocab_size:   # fewer is fine: Qwen's table has rows to spare
        raise InputError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding in"
                         f" config.json only {model.config.vocab_size} rows")
    trained_with = read_metadata(folder / "model.safetensors").get("tokenizer")
    if trained_with and (folder / "tokenizer.json").is_file() and trained_with != sha256(folder / "tokenizer.json"):
        raise InputError(f"{folder / 'model.safetensors'} was trained with another vocabulary than tokenizer.json holds")
    # Qwen's config.json names one end, and only its generation_config.json both. A folder saved from here has but the first.
    model.config.eos_token_id = [tokenizer.end_of_text, tokenizer.end_of_turn]
    return model, tokenizer


def load_training_state(folder, optimizer):
    """Restore optimizer and random state from a checkpoint folder; returns the state that save_checkpoint was given."""
    try:
        state = json.loads((folder / "state.json").read_text())
        if not state["step"] >= 0:   # KeyError: it is the state of something else
            raise ValueError(f"step {state['step']!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / 'state.json'} is damaged: {error!r}") from None
    tensors, _ = read_tensors(folder / "optimizer.safetensors")
    try:
        torch.set_rng_state(tensors.pop("random_state"))
        entries = {}
        for name, value in tensors.items():
            i, key = name.split(".")
            entries.setdefault(int(i), {})[key] = value
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
        # There are no moments yet where fp16 has left out every step.
        for group in optimizer.param_groups if state["step"] > state.get("skipped", 0) else []:
            for parameter in group["params"]:
                shape = optimizer.state[parameter]["exp_avg"].shape   # load_state_dict compares no shapes
                if shape != parameter.shape:
                    raise ValueError(f"moments {tuple(shape)} for a parameter {tuple(parameter.shape)}")
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder / 'optimizer.safetensors'} is not of this run: {error!r}") from None
    return state


def read_metadata(path):
    """What a safetensors file says about itself, {} if there is none: the weights may be spread over several files."""
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_tensors(path):
    """(tensors, metadata) of a safetensors file; a truncated or foreign file, or one with nan in it, is an InputError."""
    try:
        with open(path, "rb"), safe_open(path, framework="pt") as file:   # safe_open calls missing what we are not allowed to read
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():   # no mask as large as the tensor
            raise InputError(f"{path}: {name} holds nan or inf: its training diverged, or the file is damaged")
    return tensors, metadata


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

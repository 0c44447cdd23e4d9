"""A model as a folder, and folders that survive a kill at any instant.

    config.json, model.safetensors, tokenizer.json      all that is needed to use the model

Only safetensors and JSON: a pickle runs whatever code it contains when it is opened.
"""
import contextlib
import dataclasses
import filecmp
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cli import InputError
from data import load_tokenizer
from model import ModelConfig, Transformer

MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")
UNFINISHED = ".model.unfinished"   # a folder's model files until all are written


def beside(path, what):
    """A name that nobody gives a file of his own, so that what is found under it is ours: left behind by a run that was
    killed.
    """
    return path.with_name(f".{path.name}.{what}")


# --------------------------------------------------------------------------------------------------- saving

def install(file, target):
    """Rename a finished model file to its place. The weights come last, and go before another model's configuration or
    tokenizer comes: a kill in between must not leave them beside each other."""
    if target.suffix == ".json" and not (target.is_file() and filecmp.cmp(file, target, shallow=False)):
        target.with_name("model.safetensors").unlink(missing_ok=True)
    os.replace(file, target)


def save_model(folder, model, tokenizer):
    """config.json, model.safetensors, tokenizer.json: all that is needed to use the model."""
    tokenizer.save(folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]   # the same table as embed_tokens: stored once
    save_file(weights, folder / "model.safetensors", metadata={"tokenizer": sha256(folder / "tokenizer.json")})
    # Safetensors lets nobody but the owner read it.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


@contextlib.contextmanager
def unfinished(folder):
    """A folder to save_model to. At the end its files move to the given one, where nothing else is touched; after an
    error none does.

    Raises InputError.
    """
    folder = Path(folder)
    made, temporary = not folder.exists(), folder / UNFINISHED
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        sync(temporary)
        for name in MODEL_FILES:
            install(temporary / name, folder / name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write a model to {folder}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):   # it is no longer empty
                folder.rmdir()


def sync(folder):
    """A name must not reach the disk before the bytes it names."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def replace_folder(temporary, final):
    """Put a finished folder in the place of an older one, so that a complete one exists at every instant.

    Renaming is atomic, but a folder cannot be renamed onto another. So the old one steps aside first, and
    complete_checkpoint() looks there too.
    """
    sync(temporary)
    old = beside(final, "replaced")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- loading

def complete_checkpoint(out):
    """The last complete checkpoint folder of a run, or None.

    The third name is what earlier versions called the second.
    """
    final = Path(out) / "checkpoint"
    return next(filter(Path.is_dir, (final, beside(final, "replaced"), final.with_name("checkpoint.old"))), None)


def not_ours(out):
    """Names in a folder that a run would overwrite or delete although no run has made them."""
    checkpoint = complete_checkpoint(out)
    if not checkpoint:
        return [name for name in (*MODEL_FILES, "summary.json", "checkpoint") if (out / name).exists()]
    if not (checkpoint / "state.json").is_file():
        return [f"{checkpoint.name}/ without a state.json"]
    return [f"{checkpoint.name}/{path.name}" for path in checkpoint.glob("[!.]*")
            if path.suffix not in (".json", ".safetensors")]


def load_model(folder, device="cpu"):
    """Folder with the three model files -> (model, tokenizer).

    Raises InputError that names the file and the difference.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"no model.safetensors in {folder}; train one first: python"
                         f" {Path(__file__).parent.name}/train.py")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    config = read_config(folder / "config.json")
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} tokens,"
                         f" {folder / 'config.json'} says vocab_size {config.vocab_size}")
    weights, metadata = read_tensors(folder / "model.safetensors")
    if metadata.get("tokenizer") != sha256(folder / "tokenizer.json"):
        raise InputError(f"{folder / 'model.safetensors'} was trained with another vocabulary than"
                         " tokenizer.json holds")
    try:
        model = Transformer(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder / 'config.json'} describes no model: {error}") from None
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    check_shapes(folder / "model.safetensors", weights, model.state_dict())
    model.load_state_dict(weights)
    return model.to(device), tokenizer


def read_config(path):
    try:
        return ModelConfig(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AssertionError, ZeroDivisionError, RecursionError) as error:
        raise InputError(f"{path} is not a configuration of this chapter: {error}") from None


def read_tensors(path):
    """(tensors, metadata) of a safetensors file; a truncated or foreign file, or one with nan in it, is an InputError.
    """
    try:
        # safe_open calls missing what we are not allowed to read.
        with open(path, "rb"), safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():   # no mask as large as the tensor
            raise InputError(f"{path}: {name} holds nan or inf: its training diverged, or the file is damaged")
    return tensors, metadata


def check_shapes(path, found, expected):
    """Compare the tensors of a file with those of the model and name the first difference."""
    for name in sorted(expected.keys() | found.keys()):
        a, b = (tuple(t[name].shape) if name in t else "absent" for t in (found, expected))
        if a != b:
            raise InputError(f"{path}: {name} is {a}, the configuration says {b}")


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

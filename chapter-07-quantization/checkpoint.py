"""A model as a folder, and folders that survive a kill at any instant.

    config.json, model.safetensors, tokenizer.json, tokenizer_config.json      all that is needed to use the model

Only safetensors and JSON: a pickle runs whatever code it contains when it is opened.
"""
import contextlib
import filecmp
import hashlib
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cli import InputError
from pretrained import checkpoint_folder, load_pretrained, save_pretrained
from tokenizer import load_tokenizer

MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
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
    """The four files of MODEL_FILES: all that is needed to use the model."""
    tokenizer.save(folder)
    save_pretrained(model, folder, {"tokenizer": sha256(folder / "tokenizer.json")})


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


def load_model(dir_or_hub_id, device="cpu", dtype=None):
    """A folder with the four model files, or a Hugging Face checkpoint -> (model, tokenizer).

    dtype: of the weights, the file's where it is None. Raises InputError that names the file and the difference.
    """
    folder = checkpoint_folder(dir_or_hub_id)
    # Glob finds nothing where it may not look.
    if not any(path.match("model*.safetensors") for path in folder.iterdir()):
        raise InputError(f"no model.safetensors in {folder}; train one first: python"
                         f" {Path(__file__).parent.name}/train.py")
    tokenizer = load_tokenizer(folder)
    model = load_pretrained(folder, device, dtype)
    if tokenizer.vocab_size > model.config.vocab_size:   # fewer is fine: Qwen's table has rows to spare
        raise InputError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding in"
                         f" config.json only {model.config.vocab_size} rows")
    trained_with = read_metadata(folder / "model.safetensors").get("tokenizer")
    if trained_with and (folder / "tokenizer.json").is_file() and trained_with != sha256(folder / "tokenizer.json"):
        raise InputError(f"{folder / 'model.safetensors'} was trained with another vocabulary than"
                         " tokenizer.json holds")
    # Qwen's config.json names one end, and only its generation_config.json both. A folder saved from here has but the
    # first.
    model.config.eos_token_id = [tokenizer.end_of_text, tokenizer.end_of_turn]
    return model, tokenizer


def read_metadata(path):
    """What a safetensors file says about itself, {} if there is none: the weights may be spread over several files."""
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

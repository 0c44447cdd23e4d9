"""Qwen3 checkpoints in Hugging Face's form: config.json, model.safetensors (or several with an index), local or from
the hub.

load_pretrained opens what transformers writes, and save_pretrained writes what transformers opens.
"""
import json
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cli import InputError
from model import ModelConfig, Transformer

# A name on the Hugging Face hub can get new content at any time; a revision cannot. Give others as "name@revision".
REVISIONS = {
    "Qwen/Qwen3-0.6B": "c1899de289a04d12100db370d81485cdf75e47ca",
    "Qwen/Qwen3-1.7B": "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e",
    "Qwen/Qwen3-4B": "1cfa9a7208912126459214e8b04321603b3df60c",
    "Qwen/Qwen3-8B": "b968826d9c46dd6066d109eabc6255188de91218",
    "Qwen/Qwen3-14B": "40c069824f4251a91eefaf281ebe4c544efd3e18",
    "Qwen/Qwen3-32B": "9216db5781bf21249d130ec9da846c4624c16137",
}
# Settings of config.json that change what a Qwen3 computes, and the only value of each that this model knows.
SUPPORTED = {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
             "use_sliding_window": False}


def checkpoint_folder(dir_or_hub_id):
    """The folder of a checkpoint: the given one, or where the hub's files are kept after a download."""
    if Path(dir_or_hub_id).is_dir():
        return Path(dir_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(dir_or_hub_id)):
        raise InputError(f"{dir_or_hub_id} is neither a folder nor a Hugging Face name such as Qwen/Qwen3-0.6B;"
                         f" to make a folder: python {Path(__file__).parent.name}/train.py")
    name, _, revision = str(dir_or_hub_id).partition("@")
    huggingface_hub.logging.set_verbosity_error()   # one error at the end, not a warning at each attempt
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or REVISIONS.get(name),
                                                      allow_patterns=["*.json", "*.safetensors", "merges.txt"]))
    except (OSError, ValueError) as error:   # among them the hub's own: no such name, no such revision, no network
        raise InputError(f"there is no folder {dir_or_hub_id}, and the Hugging Face hub does not give {name} either"
                         f" ({str(error).splitlines()[0]}); without network, give a folder") from None


def read_config(path):
    """config.json, as transformers 4 or 5 writes it, -> ModelConfig. Raises InputError for what this model is not."""
    try:
        saved = json.loads(path.read_text())
        # Transformers 4, 5, or one added to the other.
        ropes = [dict(saved.get(key) or {}) for key in ("rope_scaling", "rope_parameters")]
        found = {"model_type": None, "rope_theta": (ropes[0] | ropes[1]).get("rope_theta"),
                 "eos_token_id": None} | saved
        found |= {"rope_type": {rope.get("rope_type", rope.get("type", "default")) for rope in ropes},
                  "layer_types": set(saved.get("layer_types") or ()) | {"full_attention"}}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a configuration: {error}") from None
    known = SUPPORTED | {"rope_type": {"default"}, "layer_types": {"full_attention"}, "quantization_config": None}
    for key, value in known.items():
        if found.get(key, value) != value:
            raise InputError(f"{path}: {key} is {found[key]!r}; this chapter's model knows only {value!r}")
    for field in fields(ModelConfig):
        value = found.get(field.name)
        is_number = field.type in (int, float) and type(value) in (int, field.type) and 0 < value < 2 ** 31
        if not is_number and (field.type in (int, float) or not isinstance(value, field.type)):
            raise InputError(f"{path}: {field.name} is missing, of the wrong kind, not above zero or too large:"
                             f" {value!r}")
    try:
        return ModelConfig(**{field.name: found[field.name] for field in fields(ModelConfig)})
    except (AssertionError, ZeroDivisionError) as error:
        raise InputError(f"{path}: {error}") from None


def tensor_files(folder):
    """{name of a tensor: the file that holds it}, for one model.safetensors or an index of several files."""
    index = folder / "model.safetensors.index.json"
    path = folder / "model.safetensors"   # where there are both, the single file counts, as in transformers
    path = index if index.is_file() and not path.is_file() else path
    try:
        if path == index:
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        # safe_open calls missing what we are not allowed to read.
        with open(path, "rb"), safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except FileNotFoundError:
        raise InputError(f"{folder} has neither model.safetensors nor {index.name}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def read_tensor(path, name, device, dtype):
    """One tensor of a safetensors file, copied out of it.

    A file that is open is mapped into memory, and what has been read of it stays there. Closing it after each tensor is
    what keeps the peak at the size of the model instead of twice that.
    """
    try:
        with open(path, "rb"), safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise InputError(f"{path}: {name} is {tensor.dtype}; this model computes with 16 bits or more, no"
                                 " integers")
            tensor = tensor.to(device, dtype or tensor.dtype, copy=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file, {name} cannot be read: {error}") from None
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():   # no mask as large as the tensor
        raise InputError(f"{path}: {name} holds nan or inf: its training diverged, or the file is damaged")
    return tensor


def load_pretrained(dir_or_hub_id, device="cpu", dtype=None):
    """A checkpoint folder or a name on the Hugging Face hub -> Transformer, in the file's dtype unless one is given.

    Raises InputError that names what differs: another architecture, missing or unknown tensors, wrong shapes.
    """
    folder = checkpoint_folder(dir_or_hub_id)
    with torch.device("meta"):   # shapes without memory; the file's tensors then take the place of the model's own
        model = Transformer(read_config(folder / "config.json"))
    expected, files = model.state_dict(), tensor_files(folder)
    head = None
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
        head = files.pop("lm_head.weight", None)   # Qwen's own files hold the tied table twice
    for what, names in {"missing": expected.keys() - files.keys(), "unknown": files.keys() - expected.keys()}.items():
        if names:
            raise InputError(f"{folder}: {len(names)} {what} tensors, the first is {min(names)}")
    table = "model.embed_tokens.weight"
    if head and not torch.equal(read_tensor(head, "lm_head.weight", device, dtype),
                                read_tensor(files[table], table, device, dtype)):
        raise InputError(f"{head}: lm_head.weight is not {table}, but config.json says tie_word_embeddings")
    weights = {}
    for name in expected:
        weight = weights[name] = read_tensor(files[name], name, device, dtype)
        dtype = dtype or weight.dtype   # one for all: that of the first
        if weight.shape != expected[name].shape:
            raise InputError(f"{files[name]}: {name} is {tuple(weight.shape)},"
                             f" config.json says {tuple(expected[name].shape)}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def save_pretrained(model, folder, remarks={}):
    """Write config.json and model.safetensors, a folder that load_pretrained and transformers open.

    remarks: {name: text} to keep in the header of model.safetensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]   # the same table as embed_tokens: stored once
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", **remarks})
    config = {"architectures": ["Qwen3ForCausalLM"], **SUPPORTED, **asdict(model.config)}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": model.config.rope_theta}   # for transformers 5
    config["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    # Safetensors lets nobody but the owner read it.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")

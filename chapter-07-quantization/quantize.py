"""Quantize a trained model: a folder in, a smaller folder out.

    python quantize.py --method int4-gptq --out out-int4        (in this folder)
    python quantize.py --checkpoint Qwen/Qwen3-0.6B --method int8 --out qwen-int8
    python generate.py "ROMEO:" 200 --checkpoint out-int4

It goes from layer to layer and holds one of them in float32 at a time, besides what is already integers. A method that
wants to know the layer's inputs gets them from calibration text, which runs along: each layer sees what the quantized
layers before it make of it.
"""
import ctypes
import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from attention import packed_attention
from awq_smoothquant import awq, clipped, smoothquant
from checkpoint import UNFINISHED, save_model, unfinished
from cli import ArgumentParser, InputError, positive, run
from data import fetch, load_documents, packed_sequence_collate_fn, tokenize, training_packs
from device import choose_device
from gptq import gptq
from integers import Format, choose_scale, to_integers
from model import Block, Transformer, rotary_angles
from pretrained import checkpoint_folder, read_config, read_tensor, tensor_files
from quantized import WRITTEN_BY, Int8Embedding, check_device, empty_layer, linear_layers
from tokenizer import load_tokenizer

PACK = 1024       # tokens of calibration text that run together
PART = 4096       # rows of the token table that are read at a time
# Times larger than the inputs of a layer are on average (root mean square): so large is one that is kept apart.
OUTLIER = 6


def nearest(weight, statistics, format, dtype):
    """Every weight to the integer next to it. Returns integers, scale and zero, as integers.py has them."""
    scale, zero = choose_scale(weight, format, dtype)
    return to_integers(weight, scale, zero, format), scale, zero


def nearest_clipped(weight, statistics, format, dtype):
    return nearest(clipped(weight, statistics.products, format), statistics, format, dtype)


def compensated(weight, statistics, format, dtype):
    return gptq(weight, statistics.products, format, dtype)


@dataclass(frozen=True)
class Method:
    bits: int
    about: str
    activations: str = "float"          # see quantized.CLASSES
    rescale: object = None              # what happens to a layer beforehand: a function of block, statistics and format
    to_integers: object = nearest
    calibrated: bool = True


METHODS = {
    "int8": Method(8, "weights only, a scale for each row", calibrated=False),
    "int8-w8a8": Method(8, "and inputs, a scale for each token", "int8", calibrated=False),
    "int8-outliers": Method(8, "and inputs, except the few that are far larger: LLM.int8()", "int8 but outliers"),
    "int8-smoothquant": Method(8, "and inputs, after some of their size has gone over to the weights: SmoothQuant",
                               "int8", smoothquant),
    "int4": Method(4, "weights only, a scale for each group, to the nearest", calibrated=False),
    "int4-clipped": Method(4, "the largest of each group drawn in first, which makes its scale finer",
                           to_integers=nearest_clipped),
    "int4-gptq": Method(4, "each rounding makes up for the errors of those before: GPTQ", to_integers=compensated),
    "int4-awq": Method(4, "weights that meet large inputs are scaled up first: AWQ", rescale=awq),
}


class Statistics:
    """What flows into a linear layer, over all calibration tokens."""

    def __init__(self, K, device):
        self.tokens = 0
        self.products = torch.zeros(K, K, device=device)   # sum of x x^T
        self.sum, self.largest = torch.zeros(2, K, device=device)

    def add(self, x):
        """x (T, K)."""
        self.tokens += len(x)
        self.products.addmm_(x.T, x)
        self.sum += x.abs().sum(0)
        # An expert may get none.
        self.largest = torch.maximum(self.largest, x.abs().amax(0)) if len(x) else self.largest

    @property
    def mean(self):
        """(K,): the mean of |x|."""
        return self.sum / max(self.tokens, 1)


SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@torch.no_grad()
def observe(block, run_block):
    """{name of each linear layer of a block: Statistics} of what run_block() sends through it."""
    statistics, hooks = {}, []
    names = {layer: name for name, layer in block.named_modules()}
    for _, name, layer in linear_layers(block):
        if name not in SAME_INPUT:
            own = statistics[names[layer]] = Statistics(layer.in_features, layer.weight.device)
            hooks.append(layer.register_forward_pre_hook(lambda module, inputs, own=own: own.add(inputs[0])))
    run_block()
    for hook in hooks:
        hook.remove()
    for _, name, layer in linear_layers(block):
        path = names[layer].removesuffix(name)
        statistics[names[layer]] = statistics[path + SAME_INPUT.get(name, name)]
    return statistics


@torch.no_grad()
def quantize_block(block, described, method, statistics, dtype):
    """Replace the nn.Linear layers of a Block, float32, by layers of integers whose scales are numbers of dtype."""
    format = Format(described["bits"], described["group_size"], described["symmetric"])
    if method.rescale:
        method.rescale(block, statistics, format)
    names = {layer: name for name, layer in block.named_modules()}
    for parent, name, layer in linear_layers(block):
        seen, weight = statistics.get(names[layer]), layer.weight
        quantized = empty_layer(layer, described)
        if "outliers" in described:
            squares = seen.products.diagonal()
            columns = (squares > OUTLIER ** 2 * squares.mean()).nonzero()[:, 0]
            quantized.hold(columns, weight[:, columns])
            weight = weight.index_fill(1, columns, 0)
        integers, scale, zero = method.to_integers(weight, seen, format, dtype)
        quantized.fill(integers, scale.to(weight.dtype), zero)
        setattr(parent, name, quantized)


def calibration_batches(documents, tokenizer, tokens, limit):
    """PackedBatches of about so many tokens. Raises InputError if the text is shorter."""
    windows, _ = tokenize(documents, tokenizer, min(PACK, limit))
    there = sum(len(inputs) for inputs, _ in windows)
    if there < tokens:
        raise InputError(f"the calibration text has {there:,} tokens, {tokens:,} are asked for; give a longer one"
                         " (--data) or fewer --calibration-tokens")
    packs = training_packs(windows, PACK, seed=0)
    return [packed_sequence_collate_fn(chosen) for chosen in islice(packs, -(-tokens // PACK))]


class FullModel:
    """The tensors of a checkpoint folder, read one by one and checked."""

    def __init__(self, folder, config, device):
        self.files, self.device = tensor_files(folder), device
        with torch.device("meta"):
            self.expected = Transformer(config).state_dict()
        missing = {name for name in self.expected.keys() - self.files.keys() if not name.startswith("lm_head")
                   or not config.tie_word_embeddings}
        if missing:
            raise InputError(f"{folder}: {len(missing)} missing tensors, the first is {min(missing)}")

    def read(self, name, rows=slice(None)):
        tensor, expected = read_tensor(self.files[name], name, self.device, None, rows), self.expected[name][rows].shape
        if tensor.shape != expected:
            part = f" from row {rows.start} on" if rows.start else ""
            raise InputError(f"{self.files[name]}: {name}{part} is {tuple(tensor.shape)}, config.json says"
                             f" {tuple(expected)}")
        return tensor

    def read_in_parts(self, name):
        """A table, which is larger than any layer.

        The last part goes to the end of what there is, so that too many rows are seen.
        """
        last = (len(self.expected[name]) - 1) // PART * PART
        for start in range(0, last + 1, PART):
            yield self.read(name, slice(start, start + PART if start < last else None))


@torch.no_grad()
def quantized_state(full, config, method, batches):
    """The tensors of the quantized model, {name: tensor}.

    full: a FullModel. config: the new model's, with its quantization_config. batches: PackedBatches of calibration
    text, or where the method asks for none a token, to see that the layers compute. Raises InputError where they do
    not.
    """
    state, described = {}, config.quantization_config
    for name in ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not config.tie_word_embeddings):
        table, scales = torch.empty(full.expected[name].shape, dtype=torch.int8, device=full.device), []
        for rows, to in zip(full.read_in_parts(name), table.split(PART)):
            integers, scale, _ = nearest(rows, None, Format(8), rows.dtype)
            to.copy_(integers)
            scales.append(scale[:, 0])
        state |= {name: table, name.replace("weight", "scale"): torch.cat(scales)}
    dtype = scale.dtype
    embed = Int8Embedding(0, 0, dtype)
    embed.weight, embed.scale.data = state["model.embed_tokens.weight"], state["model.embed_tokens.scale"]
    xs = [embed(batch.input_ids).float() for batch in batches]                              # (T, D) each

    for i in tqdm(range(config.num_hidden_layers), unit="layer", dynamic_ncols=True):
        prefix = f"model.layers.{i}."
        with torch.device("meta"):
            block = Block(config).eval()
        block.load_state_dict({name: full.read(prefix + name).float() for name in block.state_dict()}, assign=True)

        def run_block():
            return [block(x, rotary_angles(batch.position_ids, config.head_dim, config.rope_theta, x.dtype),
                          partial(packed_attention, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen))
                    for x, batch in zip(xs, batches)]
        statistics = observe(block, run_block) if method.calibrated else {}
        expect_finite(f"layer {i}", [seen.products.diagonal() for seen in statistics.values()])
        quantize_block(block, described, method, statistics, dtype)
        xs = run_block()
        made = {prefix + name: tensor for name, tensor in block.to(dtype).state_dict().items()}
        expect_finite(f"layer {i} in integers", [*xs, *made.values()])
        state |= made
    return state | {"model.norm.weight": full.read("model.norm.weight")}


def expect_finite(what, tensors):
    """Look at what was made before it is called done. Raises InputError."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise InputError(f"{what} computes nan or inf: its weights are damaged, or too large for this method; nothing"
                         " was written")


def predicted_bytes(config, described, itemsize):
    """Of the folder's tensors, on paper. itemsize: bytes of a scale."""
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    experts = config.num_experts or 1
    if config.num_experts:
        F = config.moe_intermediate_size
    layer = (2 * D + 2 * config.head_dim + config.num_experts * D) * itemsize   # norms, and the router: as they were
    for count, N, K in [(1, queries, D), (2, keys, D), (1, D, queries), (2 * experts, F, D), (experts, D, F)]:
        scales = N * K / (described["group_size"] or K)
        layer += count * (N * K * described["bits"] / 8 + scales
                          * (itemsize if described["symmetric"] else itemsize + 1))
    tables = 1 if config.tie_word_embeddings else 2
    return int(L * layer + tables * config.vocab_size * (D + itemsize) + D * itemsize)


def describe(config, method, group, asymmetric, device):
    """`quantization_config` of the new config.json.

    Raises InputError where the matrices have no such groups, or the device cannot.
    """
    widths = {config.hidden_size, config.moe_intermediate_size if config.num_experts else config.intermediate_size,
              config.num_attention_heads * config.head_dim}
    bits = METHODS[method].bits
    if bits == 8 and (group or asymmetric):
        raise InputError(f"--group and --asymmetric are for 4 bits; {method} has a scale for each row, and 255 levels"
                         " around zero are enough")
    group = (group or 128) if bits == 4 else 0
    if bits == 4 and (group % 2 or any(width % group for width in widths)):
        raise InputError(f"--group {group} does not divide all rows, which are"
                         f" {', '.join(map(str, sorted(widths)))} long; {math.gcd(*widths)} does, if it is even")
    described = {"written_by": WRITTEN_BY, "method": method, "bits": bits, "group_size": group,
                 "symmetric": not asymmetric,
                 "activations": METHODS[method].activations} | ({"outliers": {}} if method == "int8-outliers" else {})
    check_device(described, widths, device)
    return described


def check_folders(checkpoint, out):
    """Raises InputError where writing out would destroy what is there."""
    if out.resolve() == Path(checkpoint).resolve():
        raise InputError(f"--out {out} is the checkpoint itself; choose another folder")
    others = [path for path in out.iterdir() if path.name != UNFINISHED] if out.is_dir() else []
    if out.exists() and not out.is_dir() or others and not is_quantized(out):
        raise InputError(f"--out {out} holds something else than a quantized model; choose another folder")


def is_quantized(folder):
    return (folder / "config.json").is_file() and bool(read_config(folder / "config.json").quantization_config)


def quantize(checkpoint, method, out, group=None, asymmetric=False, documents=(), tokens=16384, device="cpu"):
    """Write the quantized model of a checkpoint folder, or of a name on the hub, to the folder out.

    documents: the calibration text, of which so many tokens are used. Its files appear when all of them have been
    written.
    """
    folder, out = checkpoint_folder(checkpoint), Path(out)
    check_folders(folder, out)
    config, tokenizer = read_config(folder / "config.json"), load_tokenizer(folder)
    config.eos_token_id = [tokenizer.end_of_text, tokenizer.end_of_turn]   # as in load_model
    if config.quantization_config:
        raise InputError(f"{folder} is quantized already ({config.quantization_config.get('method')}); quantize the"
                         " model it was made of")
    if config.num_experts and METHODS[method].rescale:
        raise InputError(f"--method {method} divides what makes a layer's inputs, and experts share theirs with the"
                         " router; use int4-gptq or int8")
    described = describe(config, method, group, asymmetric, device)
    batches = [packed_sequence_collate_fn([([0], [0])])]
    if METHODS[method].calibrated:
        batches = calibration_batches(documents, tokenizer, tokens, config.max_position_embeddings)
    full = FullModel(folder, config, device)
    with unfinished(out) as temporary:   # a folder that cannot be written is found before the work
        state = quantized_state(full, replace(config, quantization_config=described), METHODS[method],
                                [batch.to(device) for batch in batches])
        if "outliers" in described:
            described["outliers"] = {name.removesuffix(".outlier"): len(columns) for name, columns in state.items()
                                     if name.endswith(".outlier")}
        with torch.device("meta"):
            model = Transformer(replace(config, quantization_config=described))
        model.load_state_dict(state, strict=False, assign=True)
        save_model(temporary, model, tokenizer)


def return_memory():
    """The opposite of train.keep_memory: what is freed goes back to the system at once. Otherwise what stays of a layer
    comes to lie between what was only needed for a while, and the peak is a quarter above the model and one layer."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 20)   # M_MMAP_THRESHOLD, in bytes


def main():
    return_memory()
    parser = ArgumentParser(description="Write a model's weights in 8 or 4 bits.")
    parser.add_argument("--checkpoint", default=Path(__file__).parent / "out", metavar="DIR|HUB_ID",
                        help="the model to be quantized")
    parser.add_argument("--method", choices=METHODS, required=True,
                        help="; ".join(f"{name}: {method.about}" for name, method in METHODS.items()))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--group", type=positive(int), metavar="N",
                        help="4 bits: neighbours that share a scale (None: 128)")
    parser.add_argument("--asymmetric", action="store_true", help="4 bits: with a zero point for each group")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="calibration text, as in train.py")
    parser.add_argument("--calibration-tokens", type=positive(int), default=16384, metavar="N", help="how much of it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    arguments = parser.parse_args()
    documents = load_documents(fetch(arguments.data))[0] if METHODS[arguments.method].calibrated else []
    quantize(arguments.checkpoint, arguments.method, arguments.out, arguments.group, arguments.asymmetric, documents,
             arguments.calibration_tokens, choose_device(arguments.device))
    before, after = (sum(path.stat().st_size for path in Path(folder).glob("model*.safetensors"))
                     for folder in (checkpoint_folder(arguments.checkpoint), arguments.out))
    print(f"{arguments.method}: {before / 1e6:,.2f} MB -> {after / 1e6:,.2f} MB, {before / after:.2f} times smaller")
    print(f"talk to it: python {Path(__file__).parent.name}/generate.py \"ROMEO:\" 200 --checkpoint {arguments.out}")


if __name__ == "__main__":
    run(main)

"""Decoding with weights of 16, 8 and 4 bits: how much faster, and what share of the memory's speed that is.

    python benchmark_decode.py --config qwen3-0.6b        some minutes, and with llama.cpp 3.5 GB of memory

One text and sixteen, with chapter 5's cache, compiled, by small_batch_matmul.cpp. The weights are random: a matrix
product takes as long with them as with trained ones. What is compared takes turns, so that a slow minute falls on all.
Where llama-cpp-python and gguf are installed, llama.cpp gets weights of the same bits and the same prompt; its Python
package writes one text at a time. On a CPU this chapter has another attention for steps of one token, and compiles a
little differently; a row without that is what chapter 5 does, and what the others are compared with. Writes
results/decode_CONFIG_DEVICE.json.
"""
import dataclasses
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy
import torch
from torch import nn

import generate
from cli import ArgumentParser, InputError, positive, run
from device import choose_device, keep_memory
from evaluate import held_bytes
from flops import read_ceiling
from sampling import Sampling
from static_batching import generate_batch
from model import CONFIGS, Transformer
from quantized import WRITTEN_BY
from results import write_results
from small_batch_matmul import SMALL, for_small_batches

GREEDY = Sampling(temperature=0)
PROMPT = 4    # tokens of the prompts, whose time is not looked at
AS_CHAPTER_5 = "bfloat16, as in chapter 5"
FORMATS = {"bfloat16": None, "int8": (8, 0), "int4, groups of 128": (4, 128), "int4, groups of 32": (4, 32)}
LLAMA = {"llama.cpp, Q8_0": "Q8_0", "llama.cpp, Q4_0": "Q4_0"}   # both: a scale of 16 bits for 32 weights


class NoText:
    """In the place of a tokenizer: no token means anything, so no answer ends before its time."""
    end_of_text = end_of_turn = -1

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


def build(config, integers, device, dtype=torch.bfloat16):
    """A model of random weights; integers: bits and group, or None.

    They are drawn as integers, and none is ever a float.
    """
    torch.manual_seed(0)
    if integers:
        config = dataclasses.replace(config, quantization_config={
            "written_by": WRITTEN_BY, "bits": integers[0], "group_size": integers[1], "symmetric": True,
            "activations": "float"})
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device).tie_weights()
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dtype in (torch.int8, torch.uint8):
                low, high = (-127, 128) if tensor.dtype == torch.int8 else (0, 256)
                tensor.random_(low, high)
                # How far uniform integers of 8 or 4 bits spread.
                nn.init.constant_(module.scale, 0.02 / (73 if low else 4.6))
            elif name == "weight" and tensor.dim() == 2:
                nn.init.normal_(tensor, std=0.02)
            elif name == "weight":
                nn.init.ones_(tensor)
    return for_small_batches(model.eval(), use_kernel=device == "cpu")


def random_prompt(vocab_size, n, seed):
    return random.Random(seed).choices(range(vocab_size), k=n)


def our_times(model, prompts, n, forward):
    """Seconds of each step of the batch, the prefill first."""
    times, start = [], time.perf_counter()
    for _ in generate_batch(model, NoText(model.config.vocab_size), prompts, n, GREEDY, True, forward):
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return times


# -------------------------------------------------------------------------------------------------------- llama.cpp

def write_gguf(config, kind, path):
    """The same architecture in llama.cpp's file format, with random weights: Q8_0 or Q4_0, the token table in Q8_0."""
    import gguf
    writer, rng = gguf.GGUFWriter(path, "qwen3"), numpy.random.default_rng(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Transformer(config).named_parameters()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, shape in shapes.items():
        name = names.get_name(name, try_suffixes=(".weight",))
        if len(shape) == 1:
            writer.add_tensor(name, numpy.ones(shape, dtype=numpy.float32))
            continue
        block = gguf.GGMLQuantizationType["Q8_0" if name == "token_embd.weight" else kind]
        # A scale in float16, then the integers.
        _, size = gguf.GGML_QUANT_SIZES[block]
        data = rng.integers(0, 256, (shape[0], shape[1] // 32, size), dtype=numpy.uint8)
        data[..., :2] = numpy.array([0.02 / (73 if size == 34 else 4.6)], dtype=numpy.float16).view(numpy.uint8)
        writer.add_tensor(name, data.reshape(shape[0], -1), raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_llama(config, kind, threads, length):
    """(the model, bytes of its tensors), or None where the packages are not installed."""
    try:
        import gguf   # noqa: F401
        import llama_cpp
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write_gguf(config, kind, path)
        model = llama_cpp.Llama(str(path), n_ctx=length, n_threads=threads, n_threads_batch=threads, use_mmap=False,
                                verbose=False)
        return model, path.stat().st_size


def their_times(model, prompt, n):
    """As our_times. The likeliest token each time, chosen as their package does it."""
    model.reset()
    times, tokens, start = [], prompt, time.perf_counter()
    for _ in range(n):
        model.eval(tokens)
        tokens = [model.sample(temp=0)]
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return times


# --------------------------------------------------------------------------------------------------------- the table

def decode(config, device, arguments):
    """Rows: batch and format."""
    ceiling, rows, llama = read_ceiling(device), [], {}
    models = {name: build(config, integers, device) for name, integers in FORMATS.items()}
    how = {"mode": "reduce-overhead"} if device == "cuda" else {"options": SMALL}
    forwards = {name: torch.compile(model, fullgraph=True, **how) for name, model in models.items()}
    torch._dynamo.config.recompile_limit = 32   # so many programs may be made of one Transformer.forward
    if device == "cpu":
        llama = {name: load_llama(config, kind, torch.get_num_threads(), PROMPT + arguments.tokens + 1)
                 for name, kind in LLAMA.items()}
    for batch in arguments.texts:
        prompts = [random_prompt(config.vocab_size, PROMPT, seed) for seed in range(batch)]
        ways = {name: lambda name=name: our_times(models[name], prompts, arguments.tokens, forwards[name])
                for name in models}
        if device == "cpu":
            by_hand = patch.object(generate, "one_token_attention", lambda *_: None)
            plain = torch.compile(models["bfloat16"], fullgraph=True)
            compiled = by_hand(lambda: our_times(models["bfloat16"], prompts, arguments.tokens, plain))
            ways = {AS_CHAPTER_5: compiled} | ways
        if batch == 1:
            ways |= {name: lambda found=found: their_times(found[0], prompts[0], arguments.tokens)
                     for name, found in llama.items() if found}
        times = {name: [] for name in ways}
        for way in ways.values():
            way()   # to warm up, and to compile
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                times[name] += way()[1:]
        # Every weight is read once for a step, the table too, which scores; of the cache what is filled, on the mean.
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * batch
        for name in (*(way for way in ways if way not in llama), *(llama if batch == 1 else ())):
            if name not in times:
                rows.append({"batch": batch, "way": name})
                continue
            held = llama[name][1] if name in llama else held_bytes(models["bfloat16" if name == AS_CHAPTER_5 else name])
            step = median(times[name])
            rows.append({"batch": batch, "way": name, "ms": step * 1e3, "tokens_per_second": batch / step,
                         "speed": median(times[next(iter(ways))]) / step,
                         "roofline": (held + cache * (PROMPT + arguments.tokens / 2)) / step / ceiling,
                         "held": (held + cache * (PROMPT + arguments.tokens)) / 1e9})
            print(rows[-1], flush=True)
    for found in filter(None, llama.values()):
        found[0].close()   # or it complains when Python ends
    columns = {"batch": "texts", "way": "weights", "ms": "ms a step", "tokens_per_second": "tokens/s",
               "speed": "times the first",
               "roofline": "share of the read bandwidth", "held": "GB held"}
    return columns, rows


def main():
    keep_memory()
    parser = ArgumentParser(description="Measure decoding with weights of 16, 8 and 4 bits.")
    parser.add_argument("--config", choices=CONFIGS, default="small", help="model size, see model.py")
    parser.add_argument("--texts", type=positive(int), nargs="+", default=[1, 16], metavar="N",
                        help="written at a time")
    parser.add_argument("--tokens", type=positive(int), default=24, metavar="N", help="tokens of each text")
    parser.add_argument("--rounds", type=positive(int), default=3, metavar="N", help="how often each way has its turn")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    if arguments.tokens < 2:
        raise InputError("--tokens must be 2 or more: the first one's time is that of the prompt")
    columns, rows = decode(CONFIGS[arguments.config], device, arguments)
    command = " ".join([f"python {Path(__file__).resolve().parent.name}/benchmark_decode.py", *sys.argv[1:]])
    print(write_results(f"decode_{arguments.config}_{device}", command, columns, rows, device))


if __name__ == "__main__":
    run(main)

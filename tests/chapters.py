"""Load the modules of one chapter without meeting those of another: seven folders all have a model.py.

    chapter = load_chapter("chapter-02-qwen3-packed")
    chapter.model.Transformer(...)

Set CHAPTERS_ROOT to load from another copy of the repository: the planted bugs (planted_bugs/) do.

What all chapters promise alike (the flags of train.py and generate.py, what a run writes and how it resumes, one line
for bad input, no logit that knows a later token) is tested once, for every chapter that has a train.py: fixture
`chapter` (conftest.py). What such a test needs and the chapters do differently is here: Chapter is how it goes from
chapter 2 on, Chapter1 the exception.

A test that says what code it needs,

    @pytest.mark.reaches("generate.sample", "data")      one name of generate.py, and all of data.py

is left out for a chapter where that code, and all that it reaches within the folder, is the same as in an earlier
chapter for which the test runs: the same code does the same. Such a test may use no other module of the chapter. A
chapter that changes a letter of that code (comments aside) is tested again, and so is every chapter with ALL=1 in the
environment.
"""
import ast
import contextlib
import functools
import importlib
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS_ROOT = Path(os.environ.get("CHAPTERS_ROOT", ROOT))


class Chapter:
    """A chapter folder whose modules are attributes, imported on first use and kept out of sys.modules."""

    def __init__(self, name):
        self.folder = CHAPTERS_ROOT / name
        self.modules = {}   # all that have been imported, of packages too
        self.found = {}     # those that a test has asked for

    def __getattr__(self, name):
        if name not in self.found:   # tests ask for the same module a thousand times
            self.found[name] = self.load(name)
        assert Chapter.allowed is None or name in Chapter.allowed, f"the test's mark `reaches` does not name {name}.py"
        return self.found[name]

    def load(self, name):
        package = sorted((self.folder / name).glob("*.py"))   # parallel/, say, with all its modules
        if not (self.folder / f"{name}.py").is_file() and not package:
            raise AttributeError(f"{self.folder} has no {name}.py")
        others = self.take_modules()
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.folder))
        try:
            for path in package:
                importlib.import_module(f"{name}.{path.stem}")
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(self.folder))
            self.modules = self.take_modules()
            sys.modules.update(others)

    def take_modules(self):
        """Take out of sys.modules whatever has the name of a module of this chapter."""
        own = {path.stem for path in self.folder.glob("*.py")}
        own |= {path.parent.name for path in self.folder.glob("*/*.py")}
        return {key: sys.modules.pop(key) for key in list(sys.modules) if key.partition(".")[0] in own}

    def run(self, script, *arguments, check=True, timeout=300, **kwargs):
        """Run one of the chapter's scripts as a reader would; returns the finished process with its output as text."""
        command = [sys.executable, str(self.folder / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)
        if check and done.returncode != 0:
            raise AssertionError(f"{script} ended with status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    # ---------------------------------------------------------------------------- for the tests that chapters share

    allowed = None   # the modules that the running test may use, if it says which: mark `reaches`

    quick = ("--batch-tokens", 256)   # of a short run on text_file
    last_rate, weight_decay = 0.0, 0.5   # of a run; the first as a share of the highest
    filling = "packed"                # how the bar of a run calls what is done about documents of different lengths
    wrong_flags = (("--batch-tokens", 0), ("--batch-tokens", 1.5))
    # Flags of a run that is not the quick one, and the difference.
    other_runs = ((("--batch-tokens", 300), "batch_tokens 256"), (("--config", "qwen3-0.6b"), "config small"),
                  (("--init", "elsewhere"), "init None"))
    sizes = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)

    def make_tokenizer(self, documents, vocab_size=300):
        return self.tokenizer.Tokenizer.train(documents, vocab_size)

    def make_model(self, tokenizer, seed=0, **changes):
        """A tiny model for the tokenizer, with random weights."""
        torch.manual_seed(seed)
        return self.model.Transformer(self.model.ModelConfig(**{
            "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "max_position_embeddings": 64, **self.sizes, **changes}))

    def logits(self, model, ids):
        """(T, V), of one document alone."""
        return model(torch.tensor(ids), torch.arange(len(ids)),
                     torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))

    def prompt_ids(self, tokenizer, text):
        """What generate() takes to continue a text."""
        return [tokenizer.end_of_text, *tokenizer.encode(text)]

    def evaluate(self, model, documents, tokenizer):
        return self.train.evaluate(model, documents, tokenizer, 100, "cpu")

    def training_batches(self, documents, tokenizer, max_length):
        """Endless batches of about 640 tokens."""
        windows, _ = self.data.tokenize(documents, tokenizer, max_length)
        return map(self.data.packed_sequence_collate_fn, self.data.training_packs(windows, 640, seed=0))

    def one_token_more(self, saved):
        """The contents of a tokenizer.json with one more token."""
        added = saved["added_tokens"]
        return saved | {"added_tokens": added + [added[-1] | {"id": added[-1]["id"] + 1, "content": "<|more|>"}]}

    def in_another_order(self, saved):
        """The contents of a tokenizer.json with the same tokens under other numbers."""
        vocab = saved["model"]["vocab"]
        return saved | {"model": saved["model"] | {"vocab": vocab | {"a": vocab["b"], "b": vocab["a"]}}}

    def make_optimizer(self, model):
        return self.optimizer.Optimizer(model, self.optimizer.adamw(model, 1e-3))

    wrong_tokenizers = ({"model": [1, 2]}, {"added_tokens": None}, {"pre_tokenizer": None})
    # OUT/checkpoint/.
    saved = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json")
    clip = "clip_grad_norm_"   # what of torch.nn.utils the loop clips with

    def where_weights_are_written(self):
        """(module, name) of a function that fails where a disk is full."""
        return self.pretrained, "save_file"


class Sharded(Chapter):
    """From chapter 6 on each rank writes its part of a checkpoint.

    What this changes test_sharded_checkpoint.py has of its own.
    """
    saved = ("shard-00001-model-00001-of-00001.safetensors", "state.json", "tokenizer.json")
    clip = "clip_grads_with_norm_"

    def where_weights_are_written(self):
        return self.parallel.checkpoint.HuggingFaceStorageWriter, "write_data"


class Chapter1(Chapter):
    """Padded batches, learned positions, and a choice of tokenizers."""
    quick = ("--tokenizer", "char")
    last_rate, weight_decay = 0.1, 0.1
    filling = "padding"
    wrong_flags = (("--batch-size", 0), ("--tokenizer", "words"))
    other_runs = ((("--batch-size", 3), "batch_size 16"), (("--config", "gpt2-124m"), "config small"),
                  (("--tokenizer", "bpe"), "tokenizer char"))
    sizes = dict(num_attention_heads=2)

    def make_tokenizer(self, documents, vocab_size=None):
        return self.data.CharTokenizer.train(documents)

    def make_model(self, tokenizer, seed=0, **changes):
        return super().make_model(tokenizer, seed, **{"pad_token_id": tokenizer.padding, **changes})

    def logits(self, model, ids):
        return model(torch.tensor(ids)[None])[0]

    def prompt_ids(self, tokenizer, text):
        return tokenizer.encode(text)

    def evaluate(self, model, documents, tokenizer):
        return self.train.evaluate(model, documents, tokenizer, "cpu")

    def training_batches(self, documents, tokenizer, max_length):
        windows, _ = self.data.tokenize(documents, tokenizer, max_length)
        for step in itertools.count():
            yield self.data.padded_collate_fn(self.data.training_windows(windows, 32, 0, step), tokenizer.padding)

    def one_token_more(self, saved):
        return saved | {"tokens": saved["tokens"] + ["~"]}

    def in_another_order(self, saved):
        return saved | {"tokens": saved["tokens"][::-1]}

    wrong_tokenizers = ({"tokens": [1, 2]}, {"kind": "words"})

    def where_weights_are_written(self):
        return self.checkpoint, "save_file"


def set_up(patch, module, *arguments):
    """Prepare a call of a script's main().

    Most of a short training run's time would go into samples and the machine's ceiling.
    """
    patch.setattr("sys.argv", [module.__file__, *map(str, arguments)])
    if hasattr(module, "write_sample"):
        write_sample = module.write_sample
        patch.setattr(module, "write_sample", lambda *given: write_sample(*given[:-1], min(given[-1], 20)))
    if hasattr(module, "gemm_ceiling"):
        patch.setattr(module, "gemm_ceiling", lambda device, dtype: 1e12)


def run_here(module, *arguments):
    """Run a script's main() without a new process. Returns what it printed; its errors come through."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        set_up(patch, module, *arguments)
        module.main()
    return printed.getvalue()


def expect_error(result, *words):
    """result: (exit status, standard output, standard error) of a command that must fail with one line holding the
    words.
    """
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, result
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def binds(statement, name):
    """Whether a module's statement gives the name its meaning.

    One that is no definition may do anything, so it does.
    """
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return statement.name == name
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return name in [alias.asname or alias.name for alias in statement.names]
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        return name in [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    main_block = isinstance(statement, ast.If) and "__main__" in ast.dump(statement.test)
    docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return not main_block and not docstring


@functools.cache
def reached(folder, *names):
    """The code of the chapter that these names reach: (name, its statements)... "data" is all of data.py, "data.pack"
    one name.
    """
    found, ahead = {}, list(names)
    while ahead:
        name = ahead.pop()
        module, _, symbol = name.partition(".")
        if name in found or not (folder / f"{module}.py").is_file():
            continue
        statements = [statement for statement in ast.parse((folder / f"{module}.py").read_bytes()).body
                      if not symbol or binds(statement, symbol)]
        found[name] = tuple(ast.dump(statement) for statement in statements)
        for node in itertools.chain.from_iterable(map(ast.walk, statements)):
            if isinstance(node, ast.Import):
                ahead += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                ahead += [f"{node.module}.{alias.name}" for alias in node.names] if symbol else [node.module]
            elif isinstance(node, ast.Name) and symbol:
                ahead.append(f"{module}.{node.id}")
    return frozenset(found.items())


def twins(items):
    """Of pytest's items those with the mark `reaches` whose code an earlier one of another chapter has tested."""
    seen, twins = set(), []
    for item in items:
        mark = item.get_closest_marker("reaches")
        name = next((value for value in item.callspec.params.values() if value in TRAINED), None) if mark else None
        if name:
            key = item.nodeid.replace(name, ""), reached(load_chapter(name).folder, *mark.args)
            if key in seen:
                twins.append(item)
            seen.add(key)
    return twins


CHAPTERS = sorted(path.name for path in CHAPTERS_ROOT.glob("chapter-0*"))
TRAINED = [name for name in CHAPTERS if (CHAPTERS_ROOT / name / "train.py").is_file()]
chapter1 = Chapter1("chapter-01-foundations")


@functools.cache   # a second copy would register the chapter's operators anew, and the first copy's would be gone
def load_chapter(name):
    if name == chapter1.folder.name:
        return chapter1
    return (Sharded if (CHAPTERS_ROOT / name / "parallel" / "checkpoint.py").is_file() else Chapter)(name)

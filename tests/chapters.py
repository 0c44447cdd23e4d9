"""Load the modules of one chapter without meeting those of another: seven folders all have a model.py.

    chapter = load_chapter("chapter-02-qwen3-packed")
    chapter.model.Transformer(...)

Set CHAPTERS_ROOT to load from another copy of the repository: the planted bugs (planted_bugs/) do.

The contracts of DESIGN.md are tested once, for every chapter that has a train.py: fixture `chapter` (conftest.py). What
such a test needs and the chapters do differently is here: Chapter is how it goes from chapter 2 on, Chapter1 the exception.
"""
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
        self.modules = {}

    def __getattr__(self, name):
        if not (self.folder / f"{name}.py").is_file():
            raise AttributeError(f"{self.folder} has no {name}.py")
        own = {path.stem for path in self.folder.glob("*.py")}
        others = {key: sys.modules.pop(key) for key in own & sys.modules.keys()}
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.folder))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(self.folder))
            self.modules = {key: sys.modules.pop(key) for key in own & sys.modules.keys()}
            sys.modules.update(others)

    def run(self, script, *arguments, check=True, timeout=300, **kwargs):
        """Run one of the chapter's scripts as a reader would; returns the finished process with its output as text."""
        command = [sys.executable, str(self.folder / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)
        if check and done.returncode != 0:
            raise AssertionError(f"{script} ended with status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    # ---------------------------------------------------------------------------- for the tests that chapters share

    quick = ("--batch-tokens", 256)   # of a short run on text_file
    filling = "packed"                # how the bar of a run calls what is done about documents of different lengths
    wrong_flags = (("--batch-tokens", 0), ("--batch-tokens", 1.5))
    other_runs = ((("--batch-tokens", 300), "batch_tokens 256"), (("--config", "qwen3-0.6b"), "config small"),
                  (("--init", "elsewhere"), "init None"))   # flags of a run that is not the quick one, and the difference
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
        return model(torch.tensor(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))

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

    wrong_tokenizers = ({"model": [1, 2]}, {"added_tokens": None}, {"pre_tokenizer": None})


class Chapter1(Chapter):
    """Padded batches, learned positions, and a choice of tokenizers."""
    quick = ("--tokenizer", "char")
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


def run_here(module, *arguments):
    """Run a script's main() without a new process. Returns what it printed; its errors come through."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [module.__file__, *map(str, arguments)])
        module.main()
    return printed.getvalue()


def expect_error(result, *words):
    """result: (exit status, standard output, standard error) of a command that must fail with one line holding the words."""
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, result
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


CHAPTERS = sorted(path.name for path in CHAPTERS_ROOT.glob("chapter-0*"))
TRAINED = [name for name in CHAPTERS if (CHAPTERS_ROOT / name / "train.py").is_file()]
chapter1 = Chapter1("chapter-01-foundations")


@functools.cache   # a second copy would register the chapter's operators anew, and the first copy's would be gone
def load_chapter(name):
    return chapter1 if name == chapter1.folder.name else Chapter(name)

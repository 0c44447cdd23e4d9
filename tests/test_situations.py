"""Situations that a user gets into, a row each: in plain words, the call, what must come out.

    refused("words", ...)   one line "error: ...", with these words in it, exit status 2, no traceback (a function:
                            InputError)
    works("words", ...)     exit status 0, with these words printed

Rows are grouped by subject: text files, conversations, flags, sampling, checkpoints, Hugging Face folders, tokenizers,
the engine, quantized folders, ranks, files, plans. A row runs in every chapter whose code for it is its own. What takes
more than a row to say, or a process of its own, is in the test file of the subject.
"""
import contextlib
import gzip
import io
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chapters import TRAINED, chapter1, expect_error, load_chapter, run_here

LAST = load_chapter(TRAINED[-1])
KNOWS = {name: [chapter for chapter in TRAINED if (load_chapter(chapter).folder / name).is_file()]
         for name in ("tokenizer.py", "engine.py", "parallel/mesh.py", "plan.py", "memory.py")}


class refused:
    """The outcome of a call that must fail with one line, which holds these words."""

    def __init__(self, *words):
        self.words = words

    def check(self, result):
        expect_error(result, *self.words)

    @contextlib.contextmanager
    def around(self, chapter):
        """For a function that is called directly."""
        with pytest.raises(chapter.cli.InputError) as caught:
            yield
        for word in self.words:
            assert word in str(caught.value), (word, str(caught.value))
        assert "\n" not in str(caught.value), "more than one line"


class works:
    """The outcome of a call that must succeed and print these words, or of a function that must return `value`."""

    def __init__(self, *words, value=None):
        self.words, self.value = words, value

    def check(self, result):
        status, out, err = result
        assert status == 0 and "Traceback" not in err and "error: " not in err, result
        for word in self.words:
            assert word in out + err, (word, result)

    @contextlib.contextmanager
    def around(self, chapter):
        yield


def rows(table):
    """A parameter of pytest for each row of a table; its name is the row's first column."""
    return pytest.mark.parametrize("row", [pytest.param(row[1:], id=row[0]) for row in table])


@pytest.fixture(scope="module", autouse=True)
def small_models():
    """What --config small means here, so that a training run takes a quarter of a second."""
    with pytest.MonkeyPatch.context() as patch:
        for chapter in map(load_chapter, TRAINED):
            patch.setitem(chapter.model.CONFIGS, "small", chapter.model.ModelConfig(**{
                "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                **chapter.sizes}))
        yield


@pytest.fixture(scope="module")
def finished(small_models, text_file, tmp_path_factory):
    """{chapter: the folder of a run of three steps}. Not to be changed."""
    folders = {chapter: tmp_path_factory.mktemp("finished") for chapter in map(load_chapter, TRAINED)}
    for chapter, folder in folders.items():
        run_here(chapter.train, "--data", text_file, *chapter.quick, "--steps", 3, "--out", folder)
    return folders


# ------------------------------------------------------------------------------------------- text files

SPEECH = "the king and the queen of night"
TWENTY = [f"{SPEECH} {i}" for i in range(20)]


def lines(*documents):
    return "\n".join(json.dumps(document) for document in documents)


TEXTS = [   # the situation, a file's name, its contents, what must come out
    ("speeches between blank lines", "a.txt", "\n\n".join(TWENTY), works(value=TWENTY)),
    ("lines that end as on Windows", "a.txt", "\r\n\r\n".join(TWENTY), works(value=TWENTY)),
    ("lines that end as on an old Mac", "a.txt", "\r\r".join(TWENTY), works(value=TWENTY)),
    ("a mark of UTF-8 at the beginning", "a.txt", "\ufeff" + "\n\n".join(TWENTY), works(value=TWENTY)),
    ("blank lines that hold a space", "a.txt", "\n \n".join(TWENTY), works(value=TWENTY)),
    ("blank lines that hold a tab", "a.txt", "\n\t\n".join(TWENTY), works(value=TWENTY)),
    ("many blank lines, at the ends too", "a.txt", "\n\n\n" + "\n\n\n\n".join(TWENTY) + "\n\n\n\n",
     works(value=TWENTY)),
    ("a file without a suffix", "plain", "\n\n".join(TWENTY), refused("plain", ".txt")),
    ("a README", "a.md", "\n\n".join(TWENTY), works(value=TWENTY)),
    ("a zero byte in a text", "a.txt", "\n\n".join(["a\0b"] * 20), works(value=["a\0b"] * 20)),
    ("separators of Unicode are no blank lines", "a.txt", "\n\n".join(["a\u2028\u2029\x85b"] * 20),
     works(value=["a\u2028\u2029\x85b"] * 20)),
    ("documents of one letter", "a.txt", "\n\n".join("abcdefghijkl"), works(value=list("abcdefghijkl"))),
    ("two documents, the second too large to validate", "a.txt", "y\n\n" + "x " * 500,
     refused("a.txt", "2 document(s)")),
    ("text in UTF-16, as Windows saves it", "a.txt", "\n\n".join(TWENTY).encode("utf-16"), refused("a.txt", "UTF-8")),
    ("text in Latin-1", "a.txt", "caf\u00e9\n\nth\u00e9".encode("latin-1"), refused("a.txt", "byte 3", "UTF-8")),
    ("a UTF-8 character cut in half at the end", "a.txt", "\n\n".join(TWENTY).encode() + b"\xe2\x82",
     refused("a.txt", "UTF-8")),
    ("an empty file", "a.txt", "", refused("a.txt", "too little text")),
    ("nothing but blank lines", "a.txt", "\n \n\n\t\n" * 9, refused("a.txt", "too little text")),
    ("one document", "a.txt", SPEECH * 99, refused("a.txt", "1 document", "too little text")),
    ("a line of JSON a document", "a.jsonl", lines(*({"text": text} for text in TWENTY)), works(value=TWENTY)),
    ("JSON lines that end as on Windows", "a.jsonl", lines(*({"text": text} for text in TWENTY)).replace("\n", "\r\n"),
     works(value=TWENTY)),
    ("a mark of UTF-8 before JSON", "a.jsonl", "\ufeff" + lines(*({"text": text} for text in TWENTY)),
     works(value=TWENTY)),
    ("the suffix in capitals", "a.JSONL", lines(*({"text": text} for text in TWENTY)), works(value=TWENTY)),
    ("the suffix .ndjson", "a.ndjson", lines(*({"text": text} for text in TWENTY)), works(value=TWENTY)),
    ("JSON with more keys than text", "a.jsonl", lines(*({"text": text, "meta": {"id": 1}} for text in TWENTY)),
     works(value=TWENTY)),
    ("half a character, which JSON can say", "a.jsonl", '{"text": "a \\ud83d"}\n' * 20, works(value=["a \ufffd"] * 20)),
    ("documents that are empty", "a.jsonl", lines(*({"text": text} for text in ["", "\n", *TWENTY])),
     works(value=TWENTY)),
    ("compressed text", "a.txt.gz", gzip.compress("\n\n".join(TWENTY).encode()), works(value=TWENTY)),
    ("compressed JSON", "a.jsonl.gz", gzip.compress(lines(*({"text": text} for text in TWENTY)).encode()),
     works(value=TWENTY)),
    ("compressed text cut off", "a.txt.gz", gzip.compress("\n\n".join(TWENTY).encode())[:-9], refused("a.txt.gz")),
    ("called .gz and is not", "a.txt.gz", "\n\n".join(TWENTY), refused("a.txt.gz")),
    ("an empty file of JSON", "a.jsonl", "", refused("a.jsonl", "too little text")),
    ("no JSON", "a.jsonl", "not json\n", refused("a.jsonl", "line 1")),
    ("JSON over several lines", "a.jsonl", json.dumps({"text": "a"}, indent=2), refused("a.jsonl", "line 1")),
    ("a line that is a text", "a.jsonl", '{"text": "a"}\n"b"\n', refused("a.jsonl", "line 2")),
    ("a line that is a number", "a.jsonl", "5\n", refused("a.jsonl", "line 1")),
    ("a line that is a list", "a.jsonl", '[{"text": "a"}]\n', refused("a.jsonl", "line 1")),
    ("a line that is null", "a.jsonl", "null\n", refused("a.jsonl", "line 1")),
    ("a text that is a number", "a.jsonl", '{"text": 3}\n', refused("a.jsonl", "line 1")),
    ("a text that is null", "a.jsonl", '{"text": "a"}\n{"text": null}\n', refused("a.jsonl", "line 2")),
    ("a text that is a list", "a.jsonl", '{"text": ["a"]}\n', refused("a.jsonl", "line 1")),
    ("another name for the text", "a.jsonl", '{"content": "a"}\n', refused("a.jsonl", "line 1")),
    ("brackets without end", "a.jsonl", '{"text": ' + "[" * 100_000, refused("a.jsonl", "line 1")),
    ("a line cut off", "a.jsonl", lines(*({"text": text} for text in TWENTY))[:-5], refused("a.jsonl", "line 20")),
    ("a list of JSON", "a.json", json.dumps([{"text": text} for text in TWENTY]), refused("a.json")),
    ("a table", "a.csv", "text\n\n" + "\n\n".join(TWENTY), refused("a.csv")),
    ("a table with tabs", "a.tsv", "text\n\n" + "\n\n".join(TWENTY), refused("a.tsv")),
    ("a document of Word", "a.docx", b"PK\x03\x04" + bytes(range(256)), refused("a.docx")),
    ("a document of Acrobat", "a.pdf", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", refused("a.pdf")),
    ("compressed by zstd", "a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(range(200)), refused("a.jsonl.zst")),
    ("a damaged table of Parquet", "a.parquet", b"PAR1" + bytes(300) + b"PAR1", refused("a.parquet"))]


@pytest.mark.reaches("data.load_documents", "cli")
@rows(TEXTS)
def test_text_files(chapter, row, tmp_path):
    name, content, outcome = row
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with outcome.around(chapter):
        train, validation = chapter.data.load_documents(path)
        assert train + validation == outcome.value and train and validation


SOURCES = [   # the situation, --data, what must come out
    ("a file that is not there", "{files}/nothing.txt", refused("nothing.txt", "does not exist")),
    ("a folder", "{files}", refused("is a folder")),
    ("a name in other letters", "TinyShakespeare",
     refused("TinyShakespeare", "tinyshakespeare, wikitext-2, python-docs")),
    ("an address of the web", "https://example.com/a.txt", refused("https://example.com/a.txt")),
    ("a data set of the hub", "Salesforce/wikitext", refused("Salesforce/wikitext")),
    ("a link that leads nowhere", "{files}/dangling.txt", refused("dangling.txt")),
    ("a link to itself", "{files}/loop.txt", refused("loop.txt")),
    ("a file taken for a folder", "{files}/file.txt/more.txt", refused("more.txt")),
    ("a name that no disk can hold", "a" * 300 + ".txt", refused("aaa.txt")),
    ("no name, as an unset variable gives", "''", refused("--data")),
    ("no data but a device", "/dev/null", refused("/dev/null"))]


@rows(SOURCES)
def test_sources(chapter, row, tmp_path, call):
    source, outcome = row
    (tmp_path / "file.txt").write_text("a")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (source,) = shlex.split(source.format(files=tmp_path))
    outcome.check(call(chapter.train, "--data", source, "--out", tmp_path / "out"))
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------- conversations

ASK, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
CONVERSATIONS = [   # the situation, a line of the file, what must come out
    ("a question and its answer", {"messages": [ASK, ANSWER]}, works()),
    ("a system prompt first", {"messages": [{"role": "system", "content": "Be brief."}, ASK, ANSWER]}, works()),
    ("several turns", {"messages": [ASK, ANSWER, ASK, ANSWER]}, works()),
    ("an answer without a question", {"messages": [ANSWER]}, works()),
    ("no answer", {"messages": [ASK]}, refused("line 3", "assistant")),
    ("an answer of nothing", {"messages": [ASK, ANSWER | {"content": ""}]}, refused("line 3", "assistant")),
    ("no messages", {"messages": []}, refused("line 3")),
    ("messages of nothing", {"messages": None}, refused("line 3", "messages")),
    ("messages of nothing beside a text", {"messages": None, "text": "a"}, refused("line 3", "messages")),
    ("messages that are a text", {"messages": "2 + 2?"}, refused("line 3")),
    ("messages that are a dictionary", {"messages": ASK}, refused("line 3")),
    ("a message that is a text", {"messages": ["2 + 2?"]}, refused("line 3")),
    ("a message without a role", {"messages": [{"content": "a"}, ANSWER]}, refused("line 3", "role")),
    ("a message without a content", {"messages": [{"role": "user"}, ANSWER]}, refused("line 3", "content")),
    ("a content of nothing", {"messages": [ASK, ANSWER | {"content": None}]}, refused("line 3", "content")),
    ("a content that is a number", {"messages": [ASK, ANSWER | {"content": 4}]}, refused("line 3", "content")),
    ("a content in parts, as with pictures",
     {"messages": [ASK | {"content": [{"type": "text", "text": "a"}]}, ANSWER]}, refused("line 3", "content")),
    ("a role that is nothing", {"messages": [ASK | {"role": None}, ANSWER]}, refused("line 3", "role")),
    ("a role that is a number", {"messages": [ASK | {"role": 1}, ANSWER]}, refused("line 3", "role")),
    ("ShareGPT's role human", {"messages": [ASK | {"role": "human"}, ANSWER]}, refused("line 3", "human")),
    ("ShareGPT's role gpt", {"messages": [ASK, ANSWER | {"role": "gpt"}]}, refused("line 3", "gpt")),
    ("a role in capitals", {"messages": [ASK, ANSWER | {"role": "Assistant"}]}, refused("line 3", "Assistant")),
    ("a role with a line end, which could end a turn", {"messages": [ASK | {"role": "user\n"}, ANSWER]},
     refused("line 3", "role")),
    ("a call of a tool", {"messages": [ASK, ANSWER | {"tool_calls": [{"name": "add"}]}]},
     refused("line 3", "tool_calls")),
    ("what a tool gives back", {"messages": [ASK, {"role": "tool", "content": "4"}, ANSWER]},
     refused("line 3", "tool")),
    ("thoughts beside the answer", {"messages": [ASK, ANSWER | {"reasoning_content": "hm"}]},
     refused("line 3", "reasoning_content")),
    ("tools for the conversation", {"messages": [ASK, ANSWER], "tools": [{"name": "add"}]}, refused("line 3", "tools")),
    ("ShareGPT's conversations", {"conversations": [{"from": "human", "value": "a"}]}, refused("line 3")),
    ("Alpaca's instructions", {"instruction": "a", "input": "", "output": "b"}, refused("line 3")),
    ("prompt and completion", {"prompt": "a", "completion": "b"}, refused("line 3")),
    ("pairs of preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, refused("line 3"))]


@pytest.mark.parametrize("name", KNOWS["tokenizer.py"])
@pytest.mark.reaches("data.load_documents", "cli")
@rows(CONVERSATIONS)
def test_conversations(name, row, tmp_path):
    chapter, (line, outcome) = load_chapter(name), row
    path = tmp_path / "chat.jsonl"
    path.write_text(lines({"messages": [ASK, ANSWER]}, {"messages": [ASK, ANSWER]}, line,
                          *[{"messages": [ASK, ANSWER]}] * 20))
    with outcome.around(chapter):
        train, validation = chapter.data.load_documents(path)
        assert [dict(message) for message in train[2]] == line["messages"] and len(train + validation) == 23


# ------------------------------------------------------------------------------------------- flags of train.py

TRAIN = [   # the situation, flags, what must come out; before the flags come --data and a small pack
    ("no step", "--steps 0", refused("--steps")),
    ("steps below none", "--steps -3", refused("--steps")),
    ("half a step", "--steps 0.5", refused("--steps")),
    ("steps in words", "--steps many", refused("--steps")),
    ("steps as a power", "--steps 1e3", refused("--steps")),
    ("steps without end", "--steps 99999999999", refused("--steps")),
    ("no time", "--minutes 0", refused("--minutes")),
    ("a time that is no number", "--minutes nan", refused("--minutes")),
    ("all the time", "--minutes inf", refused("--minutes")),
    ("a comma for a point", "--minutes 0,5", refused("--minutes")),
    ("no seed below zero", "--seed -1", refused("--seed")),
    ("a seed that torch cannot hold", f"--seed {2 ** 64}", refused("--seed")),
    ("a seed that is no whole number", "--seed 1.0", refused("--seed")),
    ("a learning rate of nothing", "--learning-rate 0", refused("--learning-rate")),
    ("a learning rate below nothing", "--learning-rate -1", refused("--learning-rate")),
    ("a learning rate that is no number", "--learning-rate nan", refused("--learning-rate")),
    ("a learning rate without end", "--learning-rate inf", refused("--learning-rate")),
    ("never saved", "--save-every 0", refused("--save-every")),
    ("a model that is not there", "--config huge", refused("--config", "small")),
    ("a model in capitals", "--config Small", refused("--config", "small")),
    ("no model, as an unset variable gives", "--config ''", refused("--config")),
    ("a device by another name", "--device gpu", refused("--device", "cuda")),
    ("one of several GPUs", "--device cuda:0", refused("--device")),
    ("a flag that is not there", "--no-such-flag", refused("--no-such-flag")),
    ("a flag of another program", "--epochs 3", refused("--epochs")),
    ("a flag without its value", "--steps", refused("--steps")),
    ("a beginning of several flags", "--s 3", refused("--s")),
    ("something without a flag", "more", refused("more"))]


@rows(TRAIN)
def test_flags_of_train(chapter, row, text_file, tmp_path, call):
    flags, outcome = row
    outcome.check(call(chapter.train, "--data", text_file, *chapter.quick, *shlex.split(flags), "--out",
                       tmp_path / "out"))
    assert not (tmp_path / "out").exists()


RUNS = [   # the situation, chapters, flags, what must come out
    ("a beginning of a flag", "17", "--step 1", works("after 1 steps")),
    ("a flag twice, the last counts", "17", "--steps 5 --steps 1", works("after 1 steps")),
    ("steps and minutes, whichever comes first", "17", "--steps 1 --minutes 60", works("after 1 steps")),
    ("hardly any time is one step", "17", "--minutes 1e-300", works("after 1 steps")),
    ("the largest seed", "17", f"--steps 1 --seed {2 ** 63 - 1}", works("after 1 steps")),
    ("a learning rate that float32 cannot hold", "17", "--steps 1 --learning-rate 1e-320", works("after 1 steps")),
    ("a learning rate that makes the weights large, and not yet infinite", "27", "--steps 2 --learning-rate 1e9",
     refused("diverged")),
    ("saved less often than there are steps", "17", "--steps 1 --save-every 2147483647", works("after 1 steps")),
    ("resumed with nothing there", "17", "--steps 1 --resume", works("no checkpoint", "after 1 steps")),
    ("packs of one token", "27", "--steps 1 --batch-tokens 1", works("after 1 steps")),
    ("packs larger than all text", "27", "--steps 1 --batch-tokens 100000", works("after 1 steps")),
    ("packs of no token", "2", "--steps 1 --batch-tokens 0", refused("--batch-tokens")),
    ("packs of half a token", "2", "--steps 1 --batch-tokens 1.5", refused("--batch-tokens")),
    ("batches of no document", "1", "--steps 1 --batch-size 0", refused("--batch-size")),
    ("batches of one document", "1", "--steps 1 --batch-size 1", works("after 1 steps")),
    ("a tokenizer that is not there", "1", "--steps 1 --tokenizer words", refused("--tokenizer", "char")),
    ("a pretrained model of nothing, as an unset variable gives", "27", "--steps 1 --init ''",
     refused("no model.safetensors")),
    ("a pretrained model by a name of one word", "27", "--steps 1 --init gpt2",
     refused("gpt2", "neither a folder nor")),
    ("a pretrained model of chapter 1", "27", "--steps 1 --init {chapter1}", refused("tokenizer.json")),
    ("a pretrained model that is a file", "27", "--steps 1 --init {text}", refused("neither a folder nor")),
    ("a precision of the newest GPUs", "4", "--steps 1 --precision fp8", refused("--precision", "bf16")),
    ("a precision of GPUs", "4", "--steps 1 --precision tf32", refused("--precision tf32", "cpu")),
    ("no pack accumulated", "4", "--steps 1 --accumulate 0", refused("--accumulate")),
    ("a way of checkpointing that is not there", "4", "--steps 1 --checkpointing yes",
     refused("--checkpointing", "full")),
    ("everything in 16 bits and recomputed", "4", "--steps 1 --precision bf16-pure --checkpointing full --accumulate"
                                                  " 2", works("after 1 steps")),
    ("a profile of too few steps", "3", "--steps 1 --profile", refused("--profile needs")),
    ("a profile of several packs", "4", "--steps 30 --profile --accumulate 2", refused("--accumulate")),
    ("a schedule that is not there", "6", "--steps 1 --schedule interleaved", refused("--schedule", "gpipe")),
    ("ranks without torchrun", "67", "--steps 1 --dp 2", refused("torchrun --nproc_per_node 2")),
    ("pieces of a matrix without torchrun", "6", "--steps 1 --tp 2", refused("torchrun --nproc_per_node 2")),
    ("stages without torchrun", "6", "--steps 1 --pp 3", refused("torchrun --nproc_per_node 3")),
    ("experts shared by nobody", "6", "--steps 1 --ep 2", refused("--ep 2")),
    ("nothing shared by one rank", "67", "--steps 1 --zero 3", works("after 1 steps")),
    ("torch's sharing with one rank", "67", "--steps 1 --zero torch", refused("--zero torch")),
    ("integers for rows that are too short", "7", "--steps 1 --qat int4", refused("--qat int4", "--qat int8")),
    ("integers of two bits", "7", "--steps 1 --qat int2", refused("--qat")),
    ("integers in training and 16 bits", "7", "--steps 1 --qat int8 --precision bf16-pure", works("after 1 steps"))]


def in_chapters(table):
    """The rows of a table whose second column says in which chapters they run: "17" is the first and the seventh."""
    return pytest.mark.parametrize("chapter_name, row", [
        pytest.param(name, row[2:], id=f"{name}-{row[0]}") for row in table for name in TRAINED if name[9] in row[1]])


@in_chapters(RUNS)
def test_runs(chapter_name, row, text_file, finished, tmp_path, call):
    chapter, (flags, outcome) = load_chapter(chapter_name), row
    flags = shlex.split(flags.format(chapter1=finished[chapter1], text=text_file))
    outcome.check(call(chapter.train, "--data", text_file, *chapter.quick, *flags, "--out", tmp_path / "out"))
    assert isinstance(outcome, works) or not (tmp_path / "out" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------ generate.py: prompts and sampling

GENERATE = [   # the situation, arguments, what must come out
    ("no token", "R 0", refused("TOKENS")),
    ("tokens below none", "R -1", refused("-1")),
    ("half a token", "R 2.5", refused("TOKENS")),
    ("tokens without end", "R 99999999999", refused("TOKENS")),
    ("a third argument", "R 3 4", refused("4")),
    ("no token, by its flag", "R --max-new-tokens 0", refused("--max-new-tokens")),
    ("tokens below none, by their flag", "R --max-new-tokens -1", refused("--max-new-tokens")),
    ("tokens that are no number", "R --max-new-tokens nan", refused("--max-new-tokens")),
    ("hotter than float32 can be", "R 3 --temperature 1e31", refused("--temperature")),
    ("cold below zero", "R 3 --temperature -1", refused("--temperature")),
    ("a temperature that is no number", "R 3 --temperature nan", refused("--temperature")),
    ("a temperature without end", "R 3 --temperature inf", refused("--temperature")),
    ("a temperature of nothing, as an unset variable gives", "R 3 --temperature ''", refused("--temperature")),
    ("a comma for a point", "R 3 --temperature 0,8", refused("--temperature")),
    ("no token to choose from", "R 3 --top-k 0", refused("--top-k")),
    ("llama.cpp's way to say all", "R 3 --top-k -1", refused("--top-k")),
    ("half a token to choose from", "R 3 --top-k 1.5", refused("--top-k")),
    ("more choice than a number can say", f"R 3 --top-k {2 ** 64}", refused("--top-k")),
    ("a probability in words", "R 3 --top-p x", refused("--top-p")),
    ("no probability", "R 3 --top-p 0", refused("--top-p")),
    ("more than all probability", "R 3 --top-p 1.5", refused("--top-p")),
    ("a probability below zero", "R 3 --top-p -0.1", refused("--top-p")),
    ("a probability that is no number", "R 3 --top-p nan", refused("--top-p")),
    ("a seed below zero", "R 3 --seed -1", refused("--seed")),
    ("a seed that torch cannot hold", f"R 3 --seed {2 ** 64}", refused("--seed")),
    ("a seed one too large", f"R 3 --seed {2 ** 63}", refused("--seed")),
    ("a seed in words", "R 3 --seed x", refused("--seed")),
    ("a beginning of several flags", "R 3 --top 5", refused("--top")),
    ("a flag of another program", "R 3 --num-beams 4", refused("--num-beams")),
    ("a prompt that looks like a flag", "--prompt -x 3", refused("--prompt")),
    ("two prompts", "R --prompt R --max-new-tokens 3", refused("--prompt")),
    ("a prompt that nobody reads", "R --interactive --max-new-tokens 3", refused("--interactive")),
    ("the likeliest token", "R 3 --temperature 0", works("R")),
    ("less than no temperature, by a sign only", "R 3 --temperature -0.0", works("R")),
    ("so cold that float32 cannot divide", "R 3 --temperature 1e-40", works("R")),
    ("so hot that all are alike", "R 3 --temperature 1e30", works("R")),
    ("more choice than there are tokens", "R 3 --top-k 2147483647", works("R")),
    ("all probability", "R 3 --top-p 1", works("R")),
    ("the largest seed", f"R 3 --seed {2 ** 63 - 1}", works("R")),
    ("a beginning of one flag", "R 3 --temp 0", works("R")),
    ("a flag twice, the last counts", "R --max-new-tokens 9999999 --max-new-tokens 3", works("R")),
    ("no prompt", "'' 3", works()),
    ("no prompt, by its flag", "--prompt '' --max-new-tokens 3", works()),
    ("a prompt of a space", "' ' 3", works()),
    ("a prompt longer than the context", "'" + "ROMEO " * 500 + "' 3", works("ROMEO")),
    ("help", "--help", works("--max-new-tokens"))]


@rows(GENERATE)
def test_generate(chapter, row, finished, call):
    arguments, outcome = row
    outcome.check(call(chapter.generate, *shlex.split(arguments), "--checkpoint", finished[chapter]))


PROMPTS = [   # the situation, chapters, a prompt, the beginning of what must come out
    ("bytes that are no UTF-8", "27", "R\udcff", "R\ufffd"),
    ("the name of a special token", "27", "<|im_end|>R", "<|im_end|>R"),
    ("a mark of UTF-8", "27", "\ufeffR", "\ufeffR"),
    ("a zero byte", "27", "R\0", "R\0"),
    ("flags and families", "27", "\U0001f468\u200d\U0001f469\u200d\U0001f467 R",
     "\U0001f468\u200d\U0001f469\u200d\U0001f467 R"),
    ("lines that end as on Windows", "27", "R\r\nR", "R\r\nR")]


@in_chapters(PROMPTS)
def test_prompts(chapter_name, row, finished, call):
    chapter, (prompt, begin) = load_chapter(chapter_name), row
    status, out, err = call(chapter.generate, prompt, 3, "--checkpoint", finished[chapter])
    assert status == 0 and err == "" and out.startswith(begin)


CHECKPOINTS = [   # the situation, --checkpoint, what must come out
    ("a folder that is not there", "{files}/none", refused("none", "train.py")),
    ("a folder that is empty", "{files}", refused("no model.safetensors", "train.py")),
    ("the file instead of its folder", "{finished}/model.safetensors", refused("model.safetensors", "train.py")),
    ("nothing, as an unset variable gives", "''", refused("train.py")),
    ("a name that no disk can hold", "a" * 300, refused("aaa")),
    ("a folder with a name that no disk can hold", "a" * 300 + "/b", refused("aaa")),
    ("an address of the web", "https://huggingface.co/Qwen/Qwen3-0.6B", refused("Qwen3-0.6B")),
    ("a home that the shell did not see", "'~/out'", refused("~/out")),
    ("a name of one word", "gpt2", refused("gpt2"))]


@rows(CHECKPOINTS)
def test_places_of_checkpoints(chapter, row, finished, tmp_path, call, monkeypatch):
    place, outcome = row
    monkeypatch.chdir(tmp_path)
    (place,) = shlex.split(place.format(finished=finished[chapter], files=tmp_path))
    outcome.check(call(chapter.generate, "R", 3, f"--checkpoint={place}"))


# -------------------------------------------------------------------------------- folders that are damaged or of others

def write(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name):
    return lambda folder: (folder / name).unlink()


def config(**changes):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | changes))


def weights(change):
    """change({name: tensor}) -> {name: tensor}; the header stays."""
    def damage(folder):
        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path,
                  metadata=header)
    return damage


def every(function):
    return weights(lambda tensors: {name: function(tensor) for name, tensor in tensors.items()})


def replaced_by_folder(name):
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


# What git clone leaves without git-lfs.
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n"
PAGE = "<html>404: Not found</html>"
FILES = [   # of each of the three files: the situation, what has happened to it
    ("is empty", lambda name: write(name, "")), ("is null", lambda name: write(name, "null")),
    ("is a list", lambda name: write(name, "[]")),
    ("is a web page", lambda name: write(name, PAGE)), ("is a pointer of git-lfs", lambda name: write(name, POINTER)),
    ("is missing", remove), ("is a folder", replaced_by_folder),
    ("is in UTF-16", lambda name: write(name, "{}".encode("utf-16"))),
    ("is brackets without end", lambda name: write(name, "[" * 200_000))]
DAMAGED = [(f"{name} {what}", damage(name), refused(name))
           for name in ("config.json", "tokenizer.json", "model.safetensors") for what, damage in FILES]


@rows(DAMAGED)
def test_damaged_folders(chapter, row, finished, tmp_path):
    damage, outcome = row
    folder = shutil.copytree(finished[chapter], tmp_path / "folder")
    damage(folder)
    with outcome.around(chapter):
        chapter.checkpoint.load_model(folder)


FOLDERS = [   # of Hugging Face: the situation, what has happened to a folder, what must come out
    ("a vocabulary of one", config(vocab_size=1), refused("embed_tokens", "config.json")),
    ("a vocabulary too large to be", config(vocab_size=10 ** 12), refused("vocab_size")),
    ("a vocabulary that is no whole number", config(vocab_size=300.0), refused("vocab_size")),
    ("a vocabulary that is true", config(vocab_size=True), refused("vocab_size")),
    ("no layers", config(num_hidden_layers=0), refused("num_hidden_layers")),
    ("more layers than there are", config(num_hidden_layers=3), refused("missing", "layers.2")),
    ("fewer layers than there are", config(num_hidden_layers=1), refused("unknown", "layers.1")),
    ("no positions", config(max_position_embeddings=0), refused("max_position_embeddings")),
    ("one position", config(max_position_embeddings=1), works()),
    ("positions without end", config(max_position_embeddings=2 ** 31 - 1), works()),
    ("no rotation", config(rope_theta=0, rope_parameters=None), refused("rope_theta")),
    ("a rotation in words", config(rope_theta="x"), refused("rope_theta")),
    ("longer texts by YaRN, as the model's page proposes", config(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
     refused("rope_type", "yarn")),
    ("YaRN by its older name", config(rope_scaling={"type": "yarn", "factor": 4.0}), refused("rope_type", "yarn")),
    ("YaRN in transformers 5", config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
     refused("rope_type", "yarn")),
    ("a norm without epsilon", config(rms_norm_eps=0), refused("rms_norm_eps")),
    ("an epsilon that is no number", config(rms_norm_eps=float("nan")), refused("rms_norm_eps")),
    ("heads that do not fit the weights", config(num_attention_heads=4), refused("q_proj")),
    ("more heads for keys than for queries", config(num_key_value_heads=4), refused("num_key_value_heads")),
    ("heads of an odd size", config(head_dim=7), refused("head_dim")),
    ("tied in words", config(tie_word_embeddings="yes"), refused("tie_word_embeddings")),
    ("a head of its own that is not there", config(tie_word_embeddings=False), refused("lm_head.weight")),
    ("an end in words", config(eos_token_id="x"), refused("eos_token_id")),
    ("no end", config(eos_token_id=None), works()),
    ("several ends", config(eos_token_id=[297, 299]), works()),
    ("another model", config(model_type="llama"), refused("model_type", "llama", "qwen3")),
    ("a sliding window that is not used", config(sliding_window=4096), works()),
    ("a sliding window", config(use_sliding_window=True), refused("use_sliding_window")),
    ("layers of two kinds", config(layer_types=["full_attention", "sliding_attention"]), refused("layer_types")),
    ("layers of no kind", config(layer_types=5), refused("config.json")),
    ("quantized by somebody else", config(quantization_config={"quant_method": "gptq"}),
     refused("quantization_config")),
    ("quantized by nobody", config(quantization_config=None), works()),
    ("settings that a model need not know", config(attention_dropout=0.0, transformers_version="9",
                                                   anything=[1]), works()),
    ("a setting twice, the last counts",
     lambda folder: write("config.json", '{"vocab_size": 3,' + (folder / "config.json").read_text()[1:])(folder),
     works()),
    ("weights in 16 bits", every(torch.Tensor.half), works()),
    ("weights in bfloat16", every(torch.Tensor.bfloat16), works()),
    ("weights in 64 bits", every(torch.Tensor.double), works()),
    ("weights that are integers", every(torch.Tensor.int), refused("int32")),
    ("weights in 8 bits", every(lambda x: x.to(torch.float8_e4m3fn)), refused("float8")),
    ("complex weights", every(lambda x: x.to(torch.complex64)), refused("complex64")),
    ("weights that are true or false", every(lambda x: x > 0), refused("bool")),
    ("weights that are all zero", every(torch.zeros_like), works()),
    ("a norm that is one number", weights(lambda w: w | {"model.norm.weight": torch.tensor(1.0)}),
     refused("model.norm.weight", "config.json")),
    ("weights turned over",
     weights(lambda w: w | {"model.layers.0.mlp.up_proj.weight": w["model.layers.0.mlp.up_proj.weight"].T}),
     refused("up_proj")),
    ("names that torch.compile gives", weights(lambda w: {"_orig_mod." + name: x for name, x in w.items()}),
     refused("missing")),
    ("names that DistributedDataParallel gives", weights(lambda w: {"module." + name: x for name, x in w.items()}),
     refused("missing")),
    ("names without model.", weights(lambda w: {name.removeprefix("model."): x for name, x in w.items()}),
     refused("missing")),
    ("an adapter's names", weights(lambda w: w | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}),
     refused("unknown", "lora_A")),
    ("a tied head that is there twice", weights(lambda w: w
                                                | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}), works()),
    ("a tied head that differs", weights(lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1}),
     refused("lm_head.weight")),
    ("weights of one tensor", weights(lambda w: {"model.norm.weight": w["model.norm.weight"]}), refused("missing")),
    ("no header", lambda folder: save_file(load_file(folder / "model.safetensors"),
                                           folder / "model.safetensors"), works()),
    ("a pickle instead of safetensors",
     lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
     refused("no model.safetensors")),
    ("a file of llama.cpp", lambda folder: (folder / "model.safetensors").rename(folder / "model.gguf"),
     refused("no model.safetensors")),
    ("one file of several without their index",
     lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
     refused("model.safetensors.index.json")),
    ("only an adapter", lambda folder: (folder / "model.safetensors").rename(folder / "adapter_model.safetensors"),
     refused("no model.safetensors")),
    ("an index of files that are not there",
     lambda folder: ((folder / "model.safetensors").rename(folder / "model-1.safetensors"),
        write("model.safetensors.index.json",
              json.dumps({"weight_map": {"model.norm.weight": "model-2.safetensors"}}))(folder)), refused("missing")),
    ("a file more", write("README.md", "# A model"), works())]


@pytest.mark.parametrize("name", KNOWS["tokenizer.py"])
@pytest.mark.reaches("checkpoint.load_model", "cli")
@rows(FOLDERS)
def test_hugging_face_folders(name, row, finished, tmp_path):
    chapter, (damage, outcome) = load_chapter(name), row
    folder = shutil.copytree(finished[chapter], tmp_path / "folder")
    damage(folder)
    with outcome.around(chapter):
        chapter.checkpoint.load_model(folder)


# ------------------------------------------------------------------------------------------- tokenizers

def tokenizer(change):
    """change(contents of tokenizer.json), in place."""
    def damage(folder):
        contents = json.loads((folder / "tokenizer.json").read_text())
        change(contents)
        (folder / "tokenizer.json").write_text(json.dumps(contents))
    return damage


TOKENIZERS = [   # the situation, what has happened to a folder, what must come out
    ("a model that is no BPE", tokenizer(lambda t: t["model"].update(type="WordPiece")),
     refused("tokenizer.json", "BPE")),
    ("another normalization", tokenizer(lambda t: t.update(normalizer={"type": "NFKC"})),
     refused("tokenizer.json", "NFC")),
    ("no normalization", tokenizer(lambda t: t.update(normalizer=None)), refused("tokenizer.json", "NFC")),
    ("no way to cut a text", tokenizer(lambda t: t.update(pre_tokenizer=None)), refused("tokenizer.json")),
    ("a way to cut a text that is no expression",
     tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(")),
     refused("tokenizer.json")),
    ("an end-of-text less", tokenizer(lambda t: t["added_tokens"].pop(0)), refused("<|endoftext|>")),
    ("no added tokens", tokenizer(lambda t: t.update(added_tokens=None)), refused("tokenizer.json")),
    ("an added token without an id", tokenizer(lambda t: t["added_tokens"][0].pop("id")), refused("tokenizer.json")),
    ("an added token with a negative id", tokenizer(lambda t: t["added_tokens"][0].update(id=-1)),
     refused("tokenizer.json")),
    ("two tokens with one id", tokenizer(lambda t: t["added_tokens"][0].update(id=5)),
     refused("tokenizer.json", "ids")),
    ("a byte without a token", tokenizer(lambda t: t["model"]["vocab"].pop("!")), refused("tokenizer.json")),
    ("a merge of what is no token", tokenizer(lambda t: t["model"]["merges"].append(["zq", "qz"])),
     refused("tokenizer.json")),
    ("merges in another order", tokenizer(lambda t: t["model"]["merges"].reverse()),
     refused("tokenizer.json", "order")),
    ("merges as texts, as older files have them",
     tokenizer(lambda t: t["model"].update(merges=[" ".join(m) for m in t["model"]["merges"]])),
     refused("another vocabulary")),   # as good a tokenizer, but not the file that the weights were trained with
    ("more tokens than the model has rows",
     tokenizer(lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 300, "content": "<|more|>"})),
     refused("301", "300")),
    ("a template more", write("chat_template.jinja", "{{ messages }}"), works())]


@pytest.mark.parametrize("name", KNOWS["tokenizer.py"])
@pytest.mark.reaches("checkpoint.load_model", "cli")
@rows(TOKENIZERS)
def test_tokenizers(name, row, finished, tmp_path):
    chapter, (damage, outcome) = load_chapter(name), row
    folder = shutil.copytree(finished[chapter], tmp_path / "folder")
    damage(folder)
    with outcome.around(chapter):
        chapter.checkpoint.load_model(folder)


# ------------------------------------------------------------------------------------------- a run that goes on

def in_checkpoint(damage):
    return lambda folder: damage(folder / "checkpoint")


def no_checkpoint(folder):
    shutil.rmtree(folder / "checkpoint")


def state(**changes):
    def damage(folder):
        path = folder / "checkpoint" / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return damage


# The situation, chapters, what has happened to the folder, flags besides --steps 4 --resume, what must come out.
RESUMED = [
    ("nothing", "17", lambda folder: None, "", works("resuming after step 3", "after 4 steps")),
    ("another seed", "17", lambda folder: None, "--seed 7", refused("seed 0")),
    ("another learning rate", "17", lambda folder: None, "--learning-rate 1", refused("learning_rate")),
    ("another text", "17", lambda folder: None, "--data {other}", refused("data")),
    ("the model files are gone, the checkpoint is not", "17",
     lambda folder: [path.unlink() for path in folder.glob("*.*")], "", works("after 4 steps")),
    ("the checkpoint is gone, the model files are not", "17", no_checkpoint, "", refused("choose another folder")),
    ("a checkpoint without its state", "17", in_checkpoint(remove("state.json")), "", refused("state.json")),
    ("a state of nothing", "17", in_checkpoint(write("state.json", "")), "", refused("state.json")),
    ("a state of something else", "17", in_checkpoint(write("state.json", "{}")), "", refused("state.json")),
    ("a state that is a list", "17", in_checkpoint(write("state.json", "[]")), "", refused("state.json")),
    ("a step in words", "17", state(step="three"), "", refused("state.json")),
    ("a step below zero", "17", state(step=-1), "", refused("state.json")),
    ("the tokenizer is gone", "17", in_checkpoint(remove("tokenizer.json")), "", refused("tokenizer")),
    ("an optimizer of nothing", "1", in_checkpoint(write("optimizer.safetensors", "")), "",
     refused("optimizer.safetensors")),
    ("a random state that is none", "1",
     in_checkpoint(lambda folder: save_file(load_file(folder / "optimizer.safetensors")
                                            | {"random_state": torch.zeros(3, dtype=torch.uint8)},
                                            folder / "optimizer.safetensors")), "",
     refused("optimizer.safetensors")),
    ("moments without a place", "1", in_checkpoint(lambda folder: save_file(load_file(folder / "optimizer.safetensors")
        | {"exp_avg": torch.zeros(3)}, folder / "optimizer.safetensors")), "", refused("optimizer.safetensors")),
    ("all steps are done", "17", lambda folder: None, "--steps 3", works("after 3 steps")),
    ("more steps are done", "17", lambda folder: None, "--steps 2", works("after 3 steps"))]


@in_chapters(RESUMED)
def test_runs_that_go_on(chapter_name, row, finished, text_file, tmp_path, call):
    chapter, (damage, flags, outcome) = load_chapter(chapter_name), row
    folder = shutil.copytree(finished[chapter], tmp_path / "folder")
    (tmp_path / "other.txt").write_text("\n\n".join(TWENTY))
    damage(folder)
    flags = ["--steps", 4, *shlex.split(flags.format(other=tmp_path / "other.txt"))]
    before = {path: path.read_bytes() for path in (folder / "checkpoint").glob("*")}
    outcome.check(call(chapter.train, "--data", text_file, *chapter.quick, *flags, "--resume", "--out", folder))
    assert isinstance(outcome, works) or before == {path: path.read_bytes()
                                                    for path in (folder / "checkpoint").glob("*")}


# ------------------------------------------------------------------------------------------- the engine

class Asked:
    """What add() is given, and what the answer ends with; the other request gets its own answer whatever happens."""

    def __init__(self, prompt, max_new_tokens=3, **settings):
        self.arguments = prompt, max_new_tokens, settings


ASKED = [   # the situation, what is asked for, how it ends or what must be said
    ("a list", Asked([1, 2]), "length"),
    ("a tuple", Asked((1, 2)), "length"),
    ("a range", Asked(range(3)), "length"),
    ("integers of numpy", Asked(np.array([1, 2])), "length"),
    ("one integer of numpy in a list", Asked([np.int64(1)]), "length"),
    ("integers of torch", Asked(torch.tensor([1, 2])), "length"),
    ("no token", Asked([]), refused("at least one token")),
    ("a token below zero", Asked([-1]), refused("-1")),
    ("a token that is not there", Asked([300]), refused("300")),
    ("half a token", Asked([1.5]), refused("1.5")),
    ("a token that is true", Asked([True]), refused("True")),
    ("a token in words", Asked(["a"]), refused("a")),
    ("a text instead of tokens", Asked("R"), refused("R")),
    ("nothing instead of tokens", Asked(None), refused("None")),
    ("several prompts at once", Asked(torch.tensor([[1, 2]])), refused()),
    ("tokens of torch that are no whole numbers", Asked(torch.tensor([1.5])), refused("1.5")),
    ("no new token", Asked([1], 0), refused("0")),
    ("new tokens below zero", Asked([1], -1), refused("-1")),
    ("half a new token", Asked([1], 2.5), refused("2.5")),
    ("new tokens without end", Asked([1], 10 ** 9), refused("1000000000")),
    ("nothing for the number of tokens", Asked([1], None), refused("None")),
    ("new tokens of numpy", Asked([1], np.int64(2)), "length"),
    ("no sample", Asked([1], samples=0), refused("0")),
    ("half a sample", Asked([1], samples=1.5), refused("1.5")),
    ("more samples than run at a time", Asked([1], samples=20), "length"),
    ("a stop text of nothing", Asked([1], stop=[""]), refused("empty")),
    ("a stop text that is a number", Asked([1], stop=[3]), refused("3")),
    ("an end that is not there", Asked([1], end_tokens=()), "length"),
    ("a prompt as long as the cache", Asked([1] * 125), "length"),
    ("a prompt longer than the cache", Asked([1] * 126), refused("126 prompt tokens")),
    ("the likeliest token", Asked([1], temperature=0), "length"),
    ("a temperature of numpy", Asked([1], temperature=np.float32(0.5)), "length"),
    ("a temperature in words", Asked([1], temperature="0.8"), refused("temperature")),
    ("no temperature", Asked([1], temperature=None), refused("temperature")),
    ("a temperature that is no number", Asked([1], temperature=float("nan")), refused("temperature")),
    ("a temperature without end", Asked([1], temperature=float("inf")), refused("temperature")),
    ("vLLM's way to take all tokens", Asked([1], top_k=-1), refused("top-k")),
    ("transformers' way to take all tokens", Asked([1], top_k=0), refused("top-k")),
    ("half a token to choose from", Asked([1], top_k=1.5), refused("top-k")),
    ("a choice of numpy", Asked([1], top_k=np.int64(3)), "length"),
    ("no probability", Asked([1], top_p=0.0), refused("top-p")),
    ("more than all probability", Asked([1], top_p=2), refused("top-p")),
    ("all probability", Asked([1], top_p=1), "length"),
    ("a probability in words", Asked([1], top_p="x"), refused("top-p")),
    ("a least probability below zero", Asked([1], min_p=-1), refused("min-p")),
    ("a least probability of one", Asked([1], min_p=1), "length"),
    ("a penalty of nothing", Asked([1], repetition_penalty=0), refused("repetition-penalty")),
    ("a penalty that is no number", Asked([1], repetition_penalty=float("nan")), refused("repetition-penalty")),
    ("a seed that torch cannot hold", Asked([1], seed=2 ** 64), refused("seed")),
    ("a seed below zero", Asked([1], seed=-1), refused("seed")),
    ("half a seed", Asked([1], seed=1.5), refused("seed")),
    ("no seed", Asked([1], seed=None), refused("seed"))]
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@pytest.fixture(scope="module")
def models(finished):
    return {name: load_chapter(name).checkpoint.load_model(finished[load_chapter(name)]) for name in KNOWS["engine.py"]}


@pytest.mark.parametrize("name", KNOWS["engine.py"])
@pytest.mark.reaches("engine", "generate", "sampling", "static_batching", "cli")
@rows(ASKED)
def test_requests(name, row, models):
    chapter, (asked, outcome) = load_chapter(name), row
    engine = chapter.engine.Engine(*models[name], num_blocks=8, max_sequences=4)
    other = engine.add([7, 8], 3, chapter.sampling.Sampling(temperature=0))
    prompt, max_new_tokens, settings = asked.arguments
    ends, sequence = isinstance(outcome, str), None
    with contextlib.nullcontext() if ends else outcome.around(chapter):
        sampling = chapter.sampling.Sampling(**{key: settings[key] for key in SAMPLING if key in settings})
        settings = {key: value for key, value in settings.items() if key not in SAMPLING}
        sequence = engine.add(prompt, max_new_tokens, sampling, **settings)
    for _ in range(50):
        engine.step()
    assert not engine.busy() and other.finished == "length" and (not ends or sequence.finished in (outcome, "end"))


ENGINES = [   # the situation, settings of an engine, what must come out
    ("no block", {"num_blocks": 0}, refused("0")), ("blocks below zero", {"num_blocks": -1}, refused("-1")),
    ("half a block", {"num_blocks": 1.5}, refused("1.5")), ("blocks of no token", {"block_size": 0}, refused("0")),
    ("steps of no token", {"max_tokens": 0}, refused("0")), ("steps of one token", {"max_tokens": 1}, works()),
    ("no sequence at a time", {"max_sequences": 0}, refused("0")),
    ("sequences below zero", {"max_sequences": -1}, refused("-1")),
    ("blocks of an odd size", {"block_size": 7}, works())]


@pytest.mark.parametrize("name", KNOWS["engine.py"])
@pytest.mark.reaches("engine", "cli")
@rows(ENGINES)
def test_engines(name, row, models):
    chapter, (settings, outcome) = load_chapter(name), row
    with outcome.around(chapter):
        engine = chapter.engine.Engine(*models[name], **{"num_blocks": 8} | settings)
        sequence = engine.add([1], 3)
        for _ in range(9):
            engine.step()
        assert sequence.finished


SERVED = [   # the situation, chapters, contents of the file, flags, what must come out
    ("two prompts", "57", "R\nJ\n", "", works("2 texts")),
    ("lines that end as on Windows", "57", "R\r\nJ\r\n", "", works("2 texts")),
    ("a mark of UTF-8", "5", "\ufeffR\n", "", works("1 texts")),
    ("blank lines between", "5", "\nR\n\n \nJ", "", works("2 texts")),
    ("the same prompt forty times", "57", "R\n" * 40, "", works("40 texts")),
    ("nothing", "57", "", "", refused("holds no prompt")),
    ("blank lines only", "5", "\n \n", "", refused("holds no prompt")),
    ("UTF-16", "5", "R\n".encode("utf-16"), "", refused("UTF-8")),
    ("no room", "57", "R\n", "--cache-tokens 0", refused("--cache-tokens")),
    ("room for less than a prompt", "57", "R " * 40, "--cache-tokens 16", refused("16 tokens of the cache")),
    ("room for one at a time", "57", "R\nJ\nK\n", "--cache-tokens 16 --max-sequences 1", works("3 texts")),
    ("nobody at a time", "5", "R\n", "--max-sequences 0", refused("--max-sequences")),
    ("more tokens than positions", "57", "R\n", "--max-new-tokens 2147483647", refused("positions")),
    ("a temperature that is no number", "57", "R\n", "--temperature nan", refused("--temperature")),
    ("a cache of 4 bits", "7", "R\nJ\n", "--cache-bits 4", works("2 texts")),
    ("a cache of 2 bits", "7", "R\n", "--cache-bits 2", refused("--cache-bits")),
    ("a flag of generate.py", "57", "R\n", "--top-k 3", refused("--top-k"))]


@in_chapters(SERVED)
def test_served_files(chapter_name, row, finished, tmp_path, call):
    chapter, (content, flags, outcome) = load_chapter(chapter_name), row
    (tmp_path / "prompts.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = call(chapter.engine, tmp_path / "prompts.txt", "--max-new-tokens", 2, *shlex.split(flags), "--checkpoint",
                  finished[chapter])
    outcome.check(result)


def test_prompts_from_standard_input(finished, call, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("R\n"))
    works("1 texts").check(call(LAST.engine, "-", "--max-new-tokens", 2, "--checkpoint", finished[LAST]))


# ------------------------------------------------------------------------------------------ quantize.py and its folders

QUANTIZE = [   # the situation, flags, what must come out
    ("8 bits", "--method int8", works("times smaller")),
    ("4 bits in small groups", "--method int4 --group 16 --asymmetric", works("times smaller")),
    ("the smallest group", "--method int4 --group 2", works("times smaller")),
    ("no method", "", refused("--method")),
    ("a method that is not there", "--method int2", refused("--method", "int8")),
    ("groups that do not divide a row", "--method int4", refused("--group 128", "32")),
    ("odd groups", "--method int4 --group 1", refused("--group 1")),
    ("no group", "--method int4 --group 0", refused("--group")),
    ("groups of 8 bits", "--method int8 --group 16", refused("--group", "4 bits")),
    ("a zero point of 8 bits", "--method int8 --asymmetric", refused("--asymmetric", "4 bits")),
    ("hardly any text to see", "--method int4-gptq --group 16 --data {text} --calibration-tokens 1",
     works("times smaller")),
    ("more text than there is", "--method int4-gptq --group 16 --data {text} --calibration-tokens 99999999",
     refused("--calibration-tokens")),
    ("text that is not there", "--method int4-gptq --group 16 --data {files}/none.txt", refused("none.txt")),
    ("a GPU that is not there", "--method int8 --device mps", refused("--device mps")),
    ("a model that is not there", "--method int8 --checkpoint {files}/none", refused("none")),
    ("a model of chapter 1", "--method int8 --checkpoint {chapter1}", refused("model_type")),
    ("a model of an earlier chapter", "--method int8 --checkpoint {chapter2}", works("times smaller")),
    ("the shards of a run", "--method int8 --checkpoint {finished}/checkpoint", refused("config.json")),
    ("into the model itself", "--method int8 --out {finished}", refused("is the checkpoint itself")),
    ("into a file", "--method int8 --out {files}/file", refused("file")),
    ("below a file", "--method int8 --out {files}/file/out", refused("file/out")),
    ("into a folder of somebody else", "--method int8 --out {files}", refused("something else")),
    ("into an empty folder", "--method int8 --out {files}/empty", works("times smaller"))]


@rows(QUANTIZE)
def test_quantize(row, finished, text_file, tmp_path, call):
    flags, outcome = row
    (tmp_path / "file").write_text("somebody's")
    (tmp_path / "empty").mkdir()
    places = {"finished": finished[LAST], "chapter1": finished[chapter1],
              "chapter2": finished[load_chapter(TRAINED[1])],
              "text": text_file, "files": tmp_path}
    outcome.check(call(LAST.quantize, "--checkpoint", finished[LAST], "--out", tmp_path / "out",
                       *shlex.split(flags.format(**places))))
    assert (tmp_path / "file").read_text() == "somebody's"
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "empty", "out"}   # nothing half-written beside them


def described(**changes):
    def damage(folder):
        contents = json.loads((folder / "config.json").read_text())
        contents["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(contents))
    return damage


SCALE = "model.layers.0.mlp.down_proj.scale"
QUANTIZED = [   # the situation, what has happened to a folder of int8, what must come out
    ("nothing", lambda folder: None, works("R")),
    ("other bits", described(bits=4), refused("config.json")),
    ("bits that are not there", described(bits=3), refused("quantization_config")),
    ("bits in words", described(bits="8"), refused("quantization_config")),
    ("no bits", described(bits=None), refused("quantization_config")),
    ("a group below zero", described(group_size=-1), refused("quantization_config")),
    ("a method of somebody else", described(quant_method="awq"), refused("quantization_config")),
    ("inputs of another kind", described(activations="float16"), refused("quantization_config")),
    ("outliers that it has not", described(outliers={}), refused("quantization_config")),
    ("no word of integers", config(quantization_config=None), refused("unknown", "scale")),
    ("a scale less", weights(lambda w: {name: x for name, x in w.items() if name != SCALE}), refused("missing", SCALE)),
    ("a scale that is no number", weights(lambda w: w | {SCALE: w[SCALE] * float("nan")}), refused("nan")),
    ("scales of integers", weights(lambda w: w | {SCALE: w[SCALE].int()}), refused(SCALE, "int32")),
    ("a scale for one row", weights(lambda w: w | {SCALE: w[SCALE][:1]}), refused(SCALE)),
    ("weights that are no integers", weights(lambda w: {name: x.float() if x.dtype == torch.int8 else x
                                                        for name, x in w.items()}),
     refused("float32", "int8"))]


@pytest.fixture(scope="module")
def int8(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "int8"
    run_here(LAST.quantize, "--checkpoint", finished[LAST], "--method", "int8", "--out", folder)
    return folder


@rows(QUANTIZED)
def test_quantized_folders(row, int8, tmp_path, call):
    damage, outcome = row
    folder = shutil.copytree(int8, tmp_path / "folder")
    damage(folder)
    outcome.check(call(LAST.generate, "R", 3, "--checkpoint", folder))


def test_no_other_chapter_opens_integers(int8, text_file, tmp_path, call):
    for name in KNOWS["tokenizer.py"][:-1]:
        refused("quantization_config").check(call(load_chapter(name).generate, "R", 3, "--checkpoint", int8))
    for script, flags in (("quantize", ["--method", "int8", "--checkpoint"]),
                          ("train", ["--data", text_file, "--init"])):
        refused("quantized").check(call(getattr(LAST, script), *flags, int8, "--out", tmp_path / "out"))


EVALUATE = [   # the situation, flags, what must come out
    ("a model that is not there", "--checkpoint {files}/none", refused("none")),
    ("text that is not there", "--data {files}/none.txt", refused("none.txt")),
    ("measured never", "--rounds 0", refused("--rounds")),
    ("groups of nothing", "--group 0", refused("--group")),
    ("a device that it does not know", "--device mps", refused("--device"))]


@rows(EVALUATE)
def test_evaluate(row, text_file, tmp_path, call):
    flags, outcome = row
    evaluate = LAST.__getattr__("evaluate")   # the method of that name is another
    outcome.check(call(evaluate, "--data", text_file, *shlex.split(flags.format(files=tmp_path)), "--out",
                       tmp_path / "out"))


# ------------------------------------------------------------------------------------------- ranks

RANKS = [   # the situation, the environment, flags, what must come out
    ("a number without the others", {"RANK": "0"}, "", refused("RANK")),
    ("how many, and no number", {"WORLD_SIZE": "2"}, "", refused("WORLD_SIZE")),
    ("a number in words", {"RANK": "first", "WORLD_SIZE": "1"}, "", refused("RANK")),
    ("the last of fewer", {"RANK": "3", "WORLD_SIZE": "2"}, "", refused("RANK")),
    ("no ranks to share a matrix", {}, "--tp 0", refused("--tp")),
    ("half a rank", {}, "--dp 1.5", refused("--dp"))]


@pytest.mark.parametrize("name", KNOWS["parallel/mesh.py"][:1])
@rows(RANKS)
def test_ranks(name, row, text_file, tmp_path, call, monkeypatch):
    chapter, (environment, flags, outcome) = load_chapter(name), row
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(chapter.cli, "leave", exit)   # a rank would end this process
    monkeypatch.setattr(chapter.cli.time, "sleep", lambda seconds: None)
    outcome.check(call(chapter.train, "--data", text_file, *chapter.quick, "--steps", 1, *shlex.split(flags), "--out",
                       tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- files and folders to write to

OUTS = [   # the situation, --out, what must come out
    ("a file in the way", "{files}/file", refused("file")),
    ("below a file", "{files}/file/below", refused("file/below")),
    ("a link that leads nowhere", "{files}/dangling", refused("dangling")),
    ("a link to itself", "{files}/loop", refused("loop")),
    ("a name that no disk can hold", "{files}/" + "a" * 300, refused("aaa")),
    ("a place of the kernel's", "/proc/out", refused("/proc/out")),
    ("a folder that has to be made", "{files}/a/b/c", works("after 1 steps")),
    ("a folder with a space and a dot", "'{files}/my run.v2'", works("after 1 steps")),
    ("a folder in other letters", "{files}/\u043c\u043e\u0434\u0435\u043b\u044c", works("after 1 steps")),
    ("a link to a folder", "{files}/link", works("after 1 steps")),
    ("a folder of somebody else's notes", "{files}/notes", works("after 1 steps")),
    ("a folder of somebody else's model", "{files}/model", refused("model"))]


@pytest.mark.parametrize("name", [TRAINED[0], TRAINED[-1]])
@rows(OUTS)
def test_folders_to_write_to(name, row, text_file, tmp_path, call):
    chapter, (out, outcome) = load_chapter(name), row
    (tmp_path / "file").write_text("somebody's")
    for folder, file in (("notes", "checkpoint.tmp"), ("notes", "model.tmp"), ("notes", "notes.old"),
                         ("model", "model.safetensors")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_text("somebody's")
    (tmp_path / "real").mkdir()
    for link, target in ("dangling", "nowhere"), ("loop", "loop"), ("link", "real"):
        (tmp_path / link).symlink_to(target)
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    (out,) = shlex.split(out.format(files=tmp_path))
    outcome.check(call(chapter.train, "--data", text_file, *chapter.quick, "--steps", 1, "--out", out))
    assert all(path.read_text() == content for path, content in before.items())


# ------------------------------------------------------------------------------------------- plans, and bytes on paper

PLANS = [   # the situation, flags of plan.py, what must come out
    ("as it is", "", works("meshes that fit")),
    ("one GPU and much memory", "--gpus 1 --memory 200", works("the best of each of the 1 meshes")),
    ("one GPU and too little", "--gpus 1", refused("nothing fits")),
    ("hardly any memory", "--memory 1", refused("nothing fits")),
    ("no GPU", "--gpus 0", refused("--gpus")),
    ("GPUs that do not fill their machines", "--gpus 12", refused("--gpus 12", "--per-node")),
    ("fewer GPUs than a machine has", "--gpus 4", works("meshes that fit")),
    ("an odd number", "--gpus 7 --per-node 7", works("meshes that fit")),
    ("machines of one GPU", "--per-node 1", works("meshes that fit")),
    ("a GPU that is not known", "--gpu tpu", refused("--gpu tpu", "h100")),
    ("a model that is not known", "--model gpt5", refused("--model gpt5", "llama-3.1-8b")),
    ("a precision that a GPU has not", "--precision fp8 --gpu a100", refused("fp8", "bf16")),
    ("a precision that nobody has", "--precision fp4", refused("--precision")),
    ("steps of less than a document", "--batch-tokens 5", refused("--batch-tokens 5", "--length")),
    ("steps of one document", "--batch-tokens 8192", works("meshes that fit")),
    ("documents that do not fill a step", "--length 7", refused("--length 7")),
    ("documents without end", "--length 2147483647", refused("--length")),
    ("memory that is no number", "--memory nan", refused("--memory")),
    ("a rate of nothing", "--peak 0", refused("--peak")),
    ("a slow network", "--between 1e-9", works("meshes that fit")),
    ("one layout to show", "--top 1", works("meshes that fit")),
    ("more layouts than there are", "--top 1000000", works("meshes that fit"))]


@pytest.mark.parametrize("name", KNOWS["plan.py"])
@rows(PLANS)
def test_plans(name, row, call):
    flags, outcome = row
    outcome.check(call(load_chapter(name).plan, *shlex.split(flags)))


MEMORY = [   # the situation, flags of memory.py, what must come out
    ("as it is", "", works("held")), ("one token", "--batch-tokens 1", works("held")),
    ("no token", "--batch-tokens 0", refused("--batch-tokens")),
    ("a model that is not there", "--config x", refused("--config")),
    ("a precision that is not there", "--precision fp8", refused("--precision")),
    ("a way that is not there", "--checkpointing half", refused("--checkpointing")),
    ("no pack", "--accumulate 0", refused("--accumulate")),
    ("what fits", "--fit", works("80 GB"))]


@pytest.mark.parametrize("name", KNOWS["memory.py"])
@rows(MEMORY)
def test_memory(name, row, call):
    flags, outcome = row
    outcome.check(call(load_chapter(name).memory, *shlex.split(flags)))


# ---------------------------------------------------------------------------------------- scripts that measure and show

SCRIPTS = [   # the situation, a script, its arguments, what must come out
    ("text that is not there", "1 bigram", "--data none.txt", refused("none.txt")),
    ("text that is not there", "1 ngram", "--data none.txt", refused("none.txt")),
    ("text that is not there", "1 gru", "--data none.txt", refused("none.txt")),
    ("text that is not there", "1 lineage", "--data none.txt", refused("none.txt")),
    ("a flag that is not there", "1 bigram", "--steps 3", refused("--steps")),
    ("a tokenizer that is not there", "1 bigram", "--tokenizer words", refused("--tokenizer")),
    ("a tokenizer that is not there", "1 ngram", "--tokenizer words", refused("--tokenizer")),
    ("a tokenizer that is not there", "1 gru", "--tokenizer words", refused("--tokenizer")),
    ("a tokenizer that is not there", "1 lineage", "--tokenizer words", refused("--tokenizer")),
    ("text that is not there", "1 sinusoidal_demo", "--data none.txt --out out", refused("none.txt")),
    ("a folder that cannot be written", "1 sinusoidal_demo", "--out /proc/x/y", refused("/proc/x")),
    ("a run that is not there", "1 training_curve", "--out none", refused("none", "train.py")),
    ("a run without a name", "1 training_curve", "--out", refused("--out")),
    ("text that is not there", "2 benchmark_padding", "--data none.txt", refused("none.txt")),
    ("packs of no token", "2 benchmark_padding", "--batch-tokens 0", refused("--batch-tokens")),
    ("a model that is not there", "2 benchmark_padding", "--config x", refused("--config")),
    ("neither of the two", "2 instructions", "read file", refused("read")),
    ("no file", "2 instructions", "write", refused("FILE|DIR")),
    ("two files", "2 instructions", "write a b", refused("one file")),
    ("a file that cannot be written", "2 instructions", "write /proc/x/y", refused("/proc/x/y")),
    ("a model that is not there", "2 instructions", "score none", refused("none")),
    ("a variant that is not there", "2 ablations", "--arms LayerNorm,MoE", refused("--arms MoE", "squared ReLU")),
    ("no variant, as an unset variable gives", "2 ablations", "--arms ''", refused("--arms", "LayerNorm")),
    ("one seed, which is no interval", "2 ablations", "--seeds 1", refused("--seeds 1")),
    ("no step", "2 ablations", "--steps 0", refused("--steps")),
    ("nobody to do it", "2 ablations", "--workers 0", refused("--workers")),
    ("text that is not there", "2 ablations", "--data none.txt", refused("none.txt")),
    ("how long it takes", "2 ablations", "--help", works("hours")),
    ("a folder that cannot be written", "3 idle", "--traces /proc/x/y", refused("/proc/x/y")),
    ("run never", "3 ladder", "--rounds 0", refused("--rounds")),
    ("text that is not there", "3 record", "--data none.txt --out o", refused("none.txt")),
    ("no time", "3 record", "--minutes 0 --out o", refused("--minutes")),
    ("a ladder for a time that has none", "3 record", "--ladder --minutes 2 --out o", refused("--minutes 1.38")),
    ("a folder that cannot be written", "3 record", "--out /proc/x", refused("/proc/x")),
    ("text that is not there", "3 scaling_laws", "--data none.txt --out out", refused("none.txt")),
    ("nobody who trains", "3 scaling_laws", "--workers 0", refused("--workers")),
    ("a folder that cannot be written", "3 scaling_laws", "--out /proc/x/y", refused("/proc/x")),
    ("text that is not there", "3 pretrain_124m", "--data none --out out", refused("none", "data/download.py")),
    ("no token", "3 pretrain_124m", "--tokens 0", refused("--tokens")),
    ("a folder that cannot be written", "3 pretrain_124m", "--out /proc/x/y", refused("/proc/x/y")),
    ("no step", "4 rounding_curves", "--steps 0", refused("--steps")),
    ("text that is not there", "4 rounding_curves", "--data none.txt", refused("none.txt")),
    ("nothing to measure", "5 benchmark_serving", "", refused("what")),
    ("something else to measure", "5 benchmark_serving", "speed", refused("speed")),
    ("longer than the model", "5 benchmark_serving", "cache --length 99999", refused("--length")),
    ("one token", "5 benchmark_serving", "decode --tokens 1", refused("--tokens")),
    ("nothing to compare", "6 benchmark_layouts", "--ranks 1", refused("--ranks 1")),
    ("packs that cannot be cut", "6 benchmark_layouts", "--batch-tokens 7", refused("--batch-tokens 7")),
    ("text that is not there", "6 moe_demo", "--data none.txt", refused("none.txt")),
    ("no run at a time", "6 moe_demo", "--workers 0", refused("--workers")),
    ("a folder that cannot be written", "6 moe_demo", "--out /proc/x/y", refused("/proc/x")),
    ("one token", "7 benchmark_decode", "--tokens 1", refused("--tokens")),
    ("no text", "7 benchmark_decode", "--texts 0", refused("--texts"))]


@pytest.mark.parametrize("row", [pytest.param(row[1:], id=f"{row[1]}: {row[0]}") for row in SCRIPTS])
def test_scripts(row, call, tmp_path, monkeypatch):
    script, arguments, outcome = row
    number, script = script.split()
    monkeypatch.chdir(tmp_path)
    outcome.check(call(getattr(load_chapter(TRAINED[int(number) - 1]), script), *shlex.split(arguments)))

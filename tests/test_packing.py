"""From chapter 2 on: packed batches and the packer, conversations, and --init. Nothing lost, nothing counted twice."""
import itertools
import json
import random
import shutil
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from chapters import TRAINED, chapter1, expect_error, run_here

pytestmark = pytest.mark.parametrize("chapter", [name for name in TRAINED if name != chapter1.folder.name],
                                     indirect=True)
CHAT = [{"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"},
        {"role": "user", "content": "the king of night?"}, {"role": "assistant", "content": "a fool\n\nwho speaks"}]
WORDS = "king queen night fool".split()


@pytest.fixture(scope="module")
def tokenizer(chapter, text_file):
    return chapter.make_tokenizer(chapter.data.read_text(text_file))


@pytest.fixture(scope="module")
def windows(chapter, tokenizer, text_file):
    """Of texts and conversations, whole ones and cut ones."""
    documents = [*chapter.data.read_text(text_file), CHAT, CHAT[1:3]]
    return chapter.data.tokenize(documents, tokenizer, 48)[0]


def random_windows(rng, number, longest):
    """Windows of random lengths; every token is the number of its window, so that each can be told from the others."""
    return [([i] * n, [i] * n) for i, n in enumerate(rng.choices(range(1, longest + 1), k=number))]


def numbers(packs):
    """The windows of each pack, by number."""
    return [[input_ids[0] for input_ids, _ in pack] for pack in packs]


# ------------------------------------------------------------------------------------------ documents to windows

def test_every_target_of_a_text_counts_once(chapter, tokenizer):
    """Documents cut into windows and packed: the targets, joined again, are the documents and their ends."""
    documents = ["the king", "the king and queen of night " * 9, "", "né", "a"]
    windows, cut = chapter.data.tokenize(documents, tokenizer, max_length=10)
    assert cut == 1 and max(len(input_ids) for input_ids, _ in windows) == 10
    batch = chapter.data.packed_sequence_collate_fn(windows)
    assert (batch.targets != chapter.data.IGNORE).all()
    assert tokenizer.decode(batch.targets.tolist()) == "".join(document + "\n\n" for document in documents)
    for document, start in zip(documents, [0, *(batch.targets == tokenizer.end_of_text).nonzero().flatten() + 1]):
        assert batch.input_ids[start] == tokenizer.end_of_text, document


@pytest.mark.parametrize("max_length", [1000, 10, 1])
def test_an_input_is_the_target_before_it(chapter, tokenizer, max_length):
    """Within a document, across its windows; the first is an end-of-text. A last window may be one token long."""
    text = "the king and queen of night speak softly to a fool"
    windows, _ = chapter.data.tokenize([text], tokenizer, max_length)
    input_ids, targets = ([i for window in windows for i in window[which]] for which in (0, 1))
    assert input_ids == [tokenizer.end_of_text, *tokenizer.encode(text)] and input_ids[1:] == targets[:-1]


@pytest.mark.parametrize("max_length", [1000, 7])
def test_only_the_assistants_tokens_are_targets(chapter, tokenizer, max_length):
    windows, cut = chapter.data.tokenize([CHAT], tokenizer, max_length)
    said = [i for message in CHAT if message["role"] == "assistant"
            for i in [*tokenizer.encode(message["content"]), tokenizer.end_of_turn]]
    ignore = chapter.data.IGNORE
    assert [i for _, targets in windows for i in targets if i != ignore] == said and cut == (max_length == 7)
    ids, _ = tokenizer.encode_conversation(CHAT)
    pairs = list(zip(ids, ids[1:]))
    assert all((i, target) in pairs for window in windows for i, target in zip(*window) if target != ignore)


def test_only_windows_without_any_target_are_dropped(chapter, tokenizer):
    long_question = [{"role": "user", "content": "the king of night " * 30}, {"role": "assistant", "content": "no"}]
    windows, cut = chapter.data.tokenize([long_question], tokenizer, 20)
    ids, _ = tokenizer.encode_conversation(long_question)
    assert cut == 1 and 1 <= len(windows) <= 2 < len(ids) // 20
    targets = [i for _, targets in windows for i in targets if i != chapter.data.IGNORE]
    assert targets == [*tokenizer.encode("no"), tokenizer.end_of_turn]


def test_bytes_and_fingerprint_of_conversations(chapter, tmp_path):
    """Bits per byte are of what the assistant says. And another question makes other data."""
    data = chapter.data
    other = [{**CHAT[0], "content": "Be long."}, *CHAT[1:]]
    assert data.num_bytes([CHAT, "né"]) == len("4\n\na fool\n\nwho speaks\n\nné".encode())
    assert chapter.train.fingerprint([CHAT]) != chapter.train.fingerprint([other])
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": CHAT, "id": 7}, {"text": "x"}, {"messages": other}])))
    assert data.read_jsonl(path) == [CHAT, "x", other]


@pytest.mark.parametrize("beside, inside", [
    ({"id": 7, "source": "x", "prompt_id": "a1", "prompt": "2 + 2?", "score": 0.5, "good": True, "meta": {"a": [1]},
      "metadata": {}}, {}),
    ({"tools": None, "functions": [], "chat_template_kwargs": {}, "system": ""},
     {"tool_calls": None, "function_call": None, "refusal": None, "reasoning_content": "", "name": None,
      "images": []})])
def test_what_describes_a_conversation_or_is_empty_may_stand_in_its_line(chapter, beside, inside, tmp_path):
    """Tables have all columns in all rows, and logs of an API all keys in all messages."""
    line = {"messages": [message | inside for message in CHAT], **beside}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    row = {**line, "meta": str(beside), "metadata": None, "chat_template_kwargs": None}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert chapter.data.read_file(tmp_path / "a.jsonl") == chapter.data.read_file(tmp_path / "a.parquet") == [CHAT]


def test_bits_per_byte_do_not_depend_on_the_form_of_a_character(chapter):
    """Composed or decomposed, the tokenizer reads the same; so the split, the tokens, the bytes and the bits are the
    same.
    """
    texts = ["\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc774\ub2e4", "caf\u00e9 \u1ec7 \u00c5", "plain",
             "\ub2e4\ub978 \uae00"] * 10
    composed = [*texts, *([{"role": "user", "content": text}, {"role": "assistant", "content": text}]
                          for text in texts)]
    decomposed = json.loads(unicodedata.normalize("NFD", json.dumps(composed, ensure_ascii=False)))
    assert composed != decomposed
    tokenizer = chapter.make_tokenizer(texts)
    model = chapter.make_model(tokenizer)
    expected = chapter.evaluate(model, composed, tokenizer)
    assert chapter.evaluate(model, decomposed, tokenizer) == expected
    assert chapter.data.num_bytes(decomposed) == len("\n\n".join(texts * 2).encode())
    half = [*composed[:40], *decomposed[40:]]
    for documents in (decomposed, half):
        splits = [chapter.data.split_documents(form, "x") for form in (documents, composed)]
        assert len(splits[0][0]) == len(splits[1][0])


# ------------------------------------------------------------------------------------------------------- batches

def test_collate(chapter):
    batch = chapter.data.packed_sequence_collate_fn([([5, 6, 7], [6, 7, 8]), ([5], [9]), ([5, 2], [-100, 3])])
    assert batch.input_ids.tolist() == [5, 6, 7, 5, 5, 2] and batch.targets.tolist() == [6, 7, 8, 9, -100, 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1] and batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.max_seqlen == 3 and isinstance(batch.max_seqlen, int)
    assert batch.cu_seqlens.dtype == torch.int32
    assert {batch.input_ids.dtype, batch.targets.dtype, batch.position_ids.dtype} == {torch.int64}
    moved = batch.to("meta")
    assert {value.device.type for value in vars(moved).values() if value is not moved.max_seqlen} == {"meta"}


def test_loss_of_a_packed_batch_is_the_sum_over_its_documents(chapter, tokenizer, windows):
    model = chapter.make_model(tokenizer)
    for pack in itertools.islice(chapter.data.training_packs(windows, 300, seed=0), 3):
        assert len(pack) > 3
        together = chapter.train.loss_sum(model, chapter.data.packed_sequence_collate_fn(pack))
        alone = sum(torch.nn.functional.cross_entropy(chapter.logits(model, input_ids), torch.tensor(targets),
                                                      reduction="sum")
                    for input_ids, targets in pack)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- the packer

def test_packs_of_an_example(chapter):
    windows = [([i] * n, [i] * n) for i, n in enumerate([4, 5, 3, 6, 1, 1, 8])]
    # 4 and 5 leave room for a 1 from further behind; then the first that waits, 3, goes first; 8 fits nowhere else.
    assert numbers(chapter.data.pack(windows, 10, [0, 1, 2, 3, 4, 5, 6])) == [[0, 1, 4], [2, 3, 5], [6]]
    assert numbers(chapter.data.pack(windows, 10, [6, 0, 5])) == [[6, 5], [0]]
    assert numbers(chapter.data.pack(windows, 10, [])) == []


@pytest.mark.reaches("data.pack", "data.LOOKAHEAD")
@pytest.mark.parametrize("lookahead", [256, 1, 5])
def test_packs_of_random_windows(chapter, monkeypatch, lookahead):
    """Every window once, never over the budget, in order but for those that wait, and who waits longest goes first."""
    monkeypatch.setattr(chapter.data, "LOOKAHEAD", lookahead)
    rng = random.Random(lookahead)
    for _ in range(60):
        budget = rng.randint(1, 60)
        windows = random_windows(rng, rng.randint(1, 400), rng.randint(1, budget))
        order = rng.sample(range(len(windows)), len(windows))
        length = {i: len(windows[i][0]) for i in order}
        packs = numbers(chapter.data.pack(windows, budget, order))
        assert sorted(itertools.chain.from_iterable(packs)) == sorted(order)
        waiting = list(order)
        for pack in packs:
            room = budget - sum(length[i] for i in pack)
            assert pack[0] == waiting[0] and room >= 0, ("the one that has waited longest is not first, "
                                                         "or too many tokens")
            assert pack == [i for i in waiting if i in set(pack)], "not in order"
            in_sight = [i for i in waiting[:lookahead] if i not in pack]
            assert all(length[i] > room for i in in_sight), "one that waits would have fitted"
            waiting = [i for i in waiting if i not in set(pack)]


@pytest.mark.reaches("data.python_docs", "data.tokenize", "data.training_packs", "tokenizer")
@pytest.mark.parametrize("budget", [1024, 4096])
def test_less_than_one_percent_of_the_budget_is_wasted_on_natural_documents(chapter, python_docs, budget):
    windows, _ = chapter.data.tokenize(*python_docs, budget)
    packs = chapter.data.training_packs(windows, budget, seed=0)
    steps = sum(len(input_ids) for input_ids, _ in windows) // budget   # an epoch
    used = [sum(len(input_ids) for input_ids, _ in pack) for pack in itertools.islice(packs, steps)]
    assert max(used) <= budget and sum(used) > 0.99 * budget * steps, f"{1 - sum(used) / budget / steps:.2%} wasted"


@pytest.fixture(scope="module")
def python_docs(chapter):
    """(documents, a tokenizer trained on a slice of them)"""
    documents = chapter.data.python_docs()
    return documents, chapter.make_tokenizer(documents[::20], 1024)


@pytest.mark.reaches("data.pack", "data.LOOKAHEAD")
def test_a_large_budget_is_filled_with_more_documents_than_the_packer_looks_at_in_once(chapter):
    windows = [([0] * 20, [0] * 20)] * 1000
    assert [len(pack) for pack in chapter.data.pack(windows, 8000, range(1000))] == [400, 400, 200]


def test_training_packs_depend_on_nothing_but_their_arguments(chapter, windows):
    def packs(seed, start=0, stop=60):
        return list(itertools.islice(chapter.data.training_packs(windows, 200, seed), start, stop))
    random.seed(1)
    torch.manual_seed(1)
    first = packs(seed=3)
    random.seed(2)
    torch.manual_seed(2)
    assert packs(seed=3) == first and packs(seed=4) != first
    assert packs(seed=3, start=17) == first[17:]


def test_every_window_once_an_epoch_and_a_new_order_each(chapter):
    """Windows that fill a pack each, so that the packs show the order."""
    windows = [([i] * 5, [i] * 5) for i in range(13)]
    stream = [i for [i] in numbers(itertools.islice(chapter.data.training_packs(windows, 5, seed=3), 104))]
    epochs = [stream[i:i + 13] for i in range(0, 104, 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


# ---------------------------------------------------------------------------------------- --init, fine-tuning, folders

def write_chat(path, number=200):
    """Conversations in which the assistant repeats the one word that it is asked to say."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for word in rng.choices(WORDS, k=number):
            messages = [{"role": "user", "content": f"speak softly: {word}"}, {"role": "assistant", "content": word}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def chat(chapter, trained, tmp_path_factory):
    """(folder, printed) of a model that was fine-tuned to answer."""
    folder = tmp_path_factory.mktemp("chat")
    data = write_chat(folder / "chat.jsonl")
    printed = run_here(chapter.train, "--init", trained, "--data", data, "--steps", 60, "--batch-tokens", 256,
                       "--learning-rate", 3e-3, "--out", folder / "out")
    return folder / "out", printed


def test_init_starts_from_exactly_those_weights_and_their_tokenizer(chapter, trained, tmp_path):
    """One step that is too small to change anything. Its loss is the mean over the targets, not over all tokens."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    path = write_chat(tmp_path / "chat.jsonl")
    run_here(chapter.train, "--init", trained, "--data", path, "--steps", 1, "--batch-tokens", 256,
             "--learning-rate", 1e-30,
             "--out", tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (trained / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "summary.json").read_text())["config"] == str(trained)

    model, tokenizer = chapter.checkpoint.load_model(trained)
    windows, _ = chapter.data.tokenize(chapter.data.load_documents(path)[0], tokenizer, 256)
    batch = chapter.data.packed_sequence_collate_fn(next(chapter.data.training_packs(windows, 256, seed=0)))
    targets = (batch.targets != chapter.data.IGNORE).sum()
    assert targets < len(batch.targets) / 2
    loss = chapter.train.loss_sum(model, batch) / targets
    [logged] = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert logged.value == pytest.approx(loss.item(), rel=1e-3)


def test_fine_tuning_prints_an_answer(chat):
    folder, printed = chat
    question, answer = next((line, following) for line, following in itertools.pairwise(printed.splitlines())
                            if line.startswith("user: speak softly: "))
    assert answer == question.split()[-1], printed


def test_chat_answers_and_stops_at_the_end_of_the_turn(chapter, chat, call):
    model, tokenizer = chapter.checkpoint.load_model(chat[0])
    for word in WORDS:
        prompt_ids, _ = tokenizer.encode_conversation([{"role": "user", "content": f"speak softly: {word}"}],
                                                      answer=True)
        assert list(chapter.generate.generate(model, tokenizer, prompt_ids, 20,
                                              temperature=0)) == tokenizer.encode(word)
        assert call(chapter.generate, "--chat", f"speak softly: {word}", "--checkpoint", chat[0],
                    "--temperature", 0) == (
            0, f"{word}\n", "")


def test_an_answer_ends_at_the_end_of_a_text_too(chapter, chat, call, monkeypatch, tmp_path):
    """As Qwen's generation_config.json says. A text goes on after it, with the next one."""
    model, tokenizer = chapter.checkpoint.load_model(chat[0])
    fool, = tokenizer.encode("f")
    drawn = []

    def sample(logits, *_, **__):
        drawn.append(fool if len(drawn) % 3 else tokenizer.end_of_text)
        return drawn[-1]
    monkeypatch.setattr(chapter.sampling, "sample", sample)
    flags = ("--checkpoint", chat[0], "--max-new-tokens", 7)

    def printed(*arguments):
        drawn[:] = [fool]   # the first of three has been drawn
        status, out, err = call(chapter.generate, *arguments, *flags)
        assert status == 0, err
        return out
    assert printed("--chat", "speak softly: fool") == "ff\n"
    assert printed("speak") == "speakff\n\nff\n\nf\n"
    drawn[:] = [fool]
    question = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "x"}]
    source = [chat[0], chapter.parallel.mesh.ALONE] if hasattr(chapter, "parallel") else [model]
    assert chapter.train.write_sample(*source, tokenizer, question, 7) == "user: who?\nff"
    if "--prompts" in (chapter.folder / "generate.py").read_text():
        (tmp_path / "prompts.txt").write_text("who?\n")
        assert printed("--chat", "--prompts", tmp_path / "prompts.txt") == "who?\nff\n"


def test_a_folder_names_its_ends(chapter, trained, chat, tmp_path, text_file):
    """For programs that know one end only it is the one that the model was trained for; the others get both."""
    from transformers import AutoTokenizer, GenerationConfig

    def ends(folder):
        """The one end of the folder's tokenizer, after a look at those in its config.json."""
        tokenizer = chapter.checkpoint.load_tokenizer(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert GenerationConfig.from_pretrained(folder, config_file_name="config.json").eos_token_id == [
            tokenizer.end_of_text, tokenizer.end_of_turn]
        return theirs.eos_token
    assert ends(trained) == "<|endoftext|>" and ends(chat[0]) == "<|im_end|>"
    # A model as Qwen publishes it, with one end in config.json, trained on text and on conversations; and what is
    # resumed.
    source = shutil.copytree(trained, tmp_path / "source")
    saved = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(saved | {"eos_token_id": saved["eos_token_id"][0]}))
    for end, data in (("<|endoftext|>", text_file), ("<|im_end|>", write_chat(tmp_path / "chat.jsonl"))):
        run = ["--init", source, "--data", data, "--batch-tokens", 256, "--out", tmp_path / end]
        run_here(chapter.train, *run, "--steps", 1)
        assert ends(tmp_path / end) == end
        run_here(chapter.train, *run, "--steps", 2, "--resume")
        assert ends(tmp_path / end) == end
    run_here(chapter.train, "--init", chat[0], "--data", text_file, "--batch-tokens", 256, "--steps", 1, "--out",
             tmp_path / "on")
    assert ends(tmp_path / "on") == "<|im_end|>"   # it can still chat


def test_transformers_opens_the_folder(chapter, chat):
    """Equal ids, equal logits, and its own generate() stops where ours does: config.json names the ends."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = chapter.checkpoint.load_model(chat[0])
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(chat[0]), AutoTokenizer.from_pretrained(chat[0])
    text = "the king and queen of night"
    ids = tokenizer.encode(text)
    assert their_tokenizer(text)["input_ids"] == ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], chapter.logits(model, ids),
                                   atol=1e-4, rtol=1e-4)

    prompt_ids, _ = tokenizer.encode_conversation([{"role": "user", "content": "speak softly: fool"}], answer=True)
    output = theirs.generate(torch.tensor([prompt_ids]), max_new_tokens=20, do_sample=False)
    answer = output[0, len(prompt_ids):].tolist()
    assert answer == [*tokenizer.encode("fool"), tokenizer.end_of_turn]


def test_spare_rows_of_the_embedding_are_never_sampled(chapter, tokenizer):
    """Qwen's table is larger than its vocabulary. Nobody could decode those ids."""
    model = chapter.make_model(tokenizer, vocab_size=4 * tokenizer.vocab_size, tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)   # all scores equal
    for seed in range(5):
        tokens = list(chapter.generate.generate(model, tokenizer, [tokenizer.end_of_text], 40,
                                                temperature=1.0, seed=seed))
        assert all(token < tokenizer.vocab_size for token in tokens)


# ------------------------------------------------------------------------------------------------------ bad input

@pytest.mark.reaches("data.read_jsonl", "cli")
@pytest.mark.parametrize("line, words", [
    ({"messages": CHAT[:2]}, ["without an assistant turn"]), ({"messages": []}, ["without an assistant turn"]),
    *[({"messages": messages}, ['"messages"', "role", "content"])
      for messages in ("hello", None, 7, {"role": "user", "content": "x"})],
    *[({"messages": CHAT[:2] + [message]}, ["message 3: ", *words]) for message, words in (
        ("hello", ["role", "content", "hello"]), ([], ["role", "content"]), ({"content": "x"}, ["role"]),
        ({"from": "human", "value": "x"}, ["role", "content", "from", "human"]),
        *[({"role": role, "content": "x"}, [json.dumps(role), "system, user, assistant"])
          for role in ("human", "gpt", "Assistant", "assistant ", "developer", "function", "", 1, None, ["user"])],
        ({"role": "tool", "content": "4", "tool_call_id": "a"}, ['"tool"', "system, user, assistant"]),
        ({"role": "assistant"}, ["no", "content"]), ({"role": "user", "content": None}, ["content", "null"]),
        ({"role": "assistant", "content": [{"type": "text", "text": "x"}]}, ["content", "type", "not a text"]),
        ({"role": "assistant", "content": 4}, ["content", "4"]),
        *[({"role": "assistant", "content": content}, ["says nothing", "end its turn"])
          for content in ("", " ", "\n\u00a0")],
        *[({"role": "assistant", "content": content, "tool_calls": [{"function": {}}]}, ['"tool_calls"'])
          for content in ("", None, "x")],
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, ['"tool_calls"']),
        *[({"role": "assistant", "content": "x", key: value}, [f'"{key}"']) for key, value in (
            ("reasoning_content", "so"), ("name", "Bob"), ("weight", 0), ("weight", 1),
            ("function_call", {"name": "f"}), ("images", ["a"]),
            ("prefix", False), ("id", 7))])],
    *[({"messages": CHAT, key: value}, [f'"{key}"']) for key, value in (
        ("tools", [{"type": "function"}]), ("tools", "[{}]"), ("functions", [{}]),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("parallel_tool_calls", False), ("system", "Be brief."), ("weight", 0.5), ("rejected", "no"),
        ("images", ["a.png"]),
        ("documents", [{"text": "x"}]), ("surprise", {"a": 1}))],
    *[({"messages": messages, "text": "x"}, ['"messages"', '"text"', json.dumps(messages)[:30]])
      for messages in (None, [], CHAT)],
    ({"conversations": [{"from": "human", "value": "x"}]}, ["messages", "role", "conversations", "from"]),
    (CHAT, ["messages", "[{"])])
def test_conversations_that_cannot_be_used(chapter, line, words, tmp_path):
    """Refused by the name of what is wrong, and where: what is ignored would be dropped without a word."""
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": CHAT}, {"text": "a"}, line])))
    with pytest.raises(chapter.cli.InputError) as error:
        chapter.data.read_jsonl(path)
    message = str(error.value)
    assert all(word in message for word in (f"{path}, line 3: ", *words)) and "\n" not in message, message


def test_a_conversation_that_cannot_be_used_ends_in_one_line(chapter, tmp_path, call):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": CHAT, "tools": "[]"}))
    expect_error(call(chapter.train, "--data", tmp_path / "bad.jsonl", "--out", tmp_path / "out"),
                 "bad.jsonl, line 1: ", "tools")


def test_init_from_nowhere(chapter, tmp_path, text_file, call):
    run = ["--data", text_file, "--out", tmp_path / "out", "--init"]
    expect_error(call(chapter.train, *run, tmp_path / "none"), tmp_path / "none", "neither a folder nor")
    (tmp_path / "empty").mkdir()
    expect_error(call(chapter.train, *run, tmp_path / "empty"), tmp_path / "empty", "model.safetensors")


@pytest.mark.parametrize("changes", [{"model_type": "llama"}, {"hidden_act": "gelu"}, {"attention_bias": True},
                                     {"num_key_value_heads": -2}, {"max_position_embeddings": 0},
                                     {"rope_parameters": "x"}])
def test_init_from_another_architecture(chapter, changes, trained, tmp_path, text_file, call):
    for path in trained.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    named = [repr(value) for value in changes.values() if value != "x"]
    expect_error(call(chapter.train, "--data", text_file, "--out", tmp_path / "out", "--init", tmp_path),
                 "config.json", *named)


def test_resume_with_another_name_of_init(chapter, chat, trained, tmp_path, call, monkeypatch):
    folder, _ = chat
    out = shutil.copytree(folder, tmp_path / "out")
    monkeypatch.chdir(trained.parent)
    status, printed, _ = call(chapter.train, "--init", f"./{trained.name}/", "--data", folder.parent / "chat.jsonl",
                              "--steps", 60,
                              "--batch-tokens", 256, "--learning-rate", 3e-3, "--out", out, "--resume")
    assert status == 0 and "resuming after step 60" in printed


def test_resume_with_another_init(chapter, chat, trained, call):
    folder, _ = chat
    run = ["--data", folder.parent / "chat.jsonl", "--steps", 61, "--batch-tokens", 256, "--learning-rate", 3e-3,
           "--out", folder, "--resume"]
    expect_error(call(chapter.train, *run), "init", trained, "None")
    expect_error(call(chapter.train, *run, "--init", folder), "init", trained, folder)
    expect_error(call(chapter.train, *run, "--init", trained, "--batch-tokens", 128), "batch_tokens 256", 128)

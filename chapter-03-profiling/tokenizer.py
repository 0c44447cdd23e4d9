"""The tokenizer of a checkpoint folder: Qwen's own files, read into tiktoken; special tokens and conversations.

A tokenizer is data, not code: a regular expression that cuts text into pieces, the merges with their ranks, and special
tokens. A Hugging Face folder keeps all of it in tokenizer.json (or the merges in vocab.json and merges.txt). tiktoken
needs the same three things, and is several times as fast. Equality with `transformers` is proven in
tests/test_qwen_tokenizer.py.
"""
import functools
import json
import unicodedata
from pathlib import Path

import regex
import tiktoken

from bpe_from_scratch import SPLIT_PATTERN, merge_in_place, train_bpe, valid_unicode
from cli import InputError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The same format as encode_conversation, in the language that `transformers` reads chat formats in.
CHAT_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{%"
                 " endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def byte_characters():
    """GPT-2's way to write bytes as visible characters, so that a JSON file can hold them: {byte: character}.

    Printable bytes stand for themselves; the others, in their order, take the characters from number 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


TO_CHARACTER = byte_characters()
TO_BYTE = {character: byte for byte, character in TO_CHARACTER.items()}


class Tokenizer:
    """Text <-> token ids, and conversations -> token ids.

    ranks: {bytes of an ordinary token: id}; special_tokens: {text: id}; marks: those of them that a text may contain,
    such as <think>. The text between them is brought to Unicode's NFC form first, as Qwen's tokenizer does: an e with
    an accent is one character, however the file writes it. merges: of each token that is more than a byte, oldest
    first, its two parts as tokenizer.json writes them; where they are not known they are found when they are needed.
    """

    def __init__(self, ranks, special_tokens, marks=frozenset(), pattern=SPLIT_PATTERN, merges=None):
        missing = [token for token in SPECIAL_TOKENS if token not in special_tokens]
        if missing:
            raise InputError(f"the tokenizer lacks the special tokens {', '.join(missing)}")
        self.ranks, self.special_tokens, self.marks = ranks, special_tokens, marks
        self.pattern, self.merges = pattern, merges
        # Of two marks that begin alike the longer one counts. (?!) matches nowhere.
        longest_first = "|".join(map(regex.escape, sorted(marks, key=len, reverse=True)))
        self.mark_pattern = regex.compile(f"({longest_first or '(?!)'})")
        self.encoding = tiktoken.Encoding("checkpoint", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special_tokens)
        self.end_of_text, self.start_of_turn, self.end_of_turn = (special_tokens[token] for token in SPECIAL_TOKENS)
        self.eos_token = SPECIAL_TOKENS[0]   # what programs that know one end only are told to stop at: see save()
        self.vocab_size = self.encoding.n_vocab
        self.tokens = [b""] * self.vocab_size   # what each id writes; most special tokens write nothing
        for token, i in ranks.items():
            self.tokens[i] = token
        for mark in marks:
            self.tokens[special_tokens[mark]] = mark.encode()
        self.tokens[self.end_of_text] = b"\n\n"

    @classmethod
    def train(cls, documents, vocab_size):
        ranks = train_bpe([unicodedata.normalize("NFC", text) for text in documents],
                          vocab_size - 256 - len(SPECIAL_TOKENS))
        return cls(ranks, {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)})

    def encode(self, text):
        """Ids of a text. A special token's name in it stays text, but for marks: nobody can end a turn by typing so."""
        ids = []
        for part in self.mark_pattern.split(text):   # before NFC, which makes one character of > and a stroke after it
            ids += ([self.special_tokens[part]] if part in self.marks
                    else self.encode_ordinary(unicodedata.normalize("NFC", part)))
        return ids

    def encode_ordinary(self, text):
        try:
            return self.encoding.encode(text, disallowed_special=())
        except ValueError:   # a million white spaces in a row are too many for tiktoken to split, though not to merge
            pieces = regex.findall(self.pattern, valid_unicode(text))
            return [i for piece in pieces for i in self.encoding._encode_single_piece(piece)]

    def encode_conversation(self, messages, answer=False):
        """Messages [{"role": ..., "content": ...}, ...] -> (ids, counts): Qwen's chat format, and which ids are
        learned.

            <|im_start|>user\\nWhat is 2 + 2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n

        counts is True for what the assistant says, its <|im_end|> included: that is how it learns to stop. With
        answer=True the ids end where the assistant is to speak.
        """
        ids, counts = [], []
        for message in messages:
            head, body = f"{message['role']}\n", message["content"]
            if message["role"] != "assistant":   # nothing of it is learned
                head, body = head + body, ""
            head, body = [self.start_of_turn, *self.encode(head)], [*self.encode(body), self.end_of_turn]
            tail = self.encode("\n")
            ids += head + body + tail
            counts += [False] * len(head) + [message["role"] == "assistant"] * len(body) + [False] * len(tail)
        if answer:
            head = [self.start_of_turn, *self.encode("assistant\n")]
            ids, counts = ids + head, counts + [False] * len(head)
        return ids, counts

    def decode(self, ids):
        # A token may end in the middle of a UTF-8 character, so join the bytes before decoding them.
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")

    @functools.cached_property
    def contents(self):
        """The text of tokenizer.json. It never changes, so it is made once, not for each checkpoint."""
        special = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                    "normalized": False,
                    "special": text not in self.marks} for text, i in self.special_tokens.items()]
        merges = self.merges or [[to_characters(part) for part in last_merge(token, self.ranks)]
                                 for token in sorted(self.ranks, key=self.ranks.get) if len(token) > 1]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                 "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                 "vocab": {to_characters(token): rank for token, rank in self.ranks.items()}, "merges": merges}
        contents = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
                    "normalizer": {"type": "NFC"},
                    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
                    "post_processor": None, "decoder": byte_level, "model": model}
        return json.dumps(contents, ensure_ascii=False)

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which `transformers` opens as a Qwen2Tokenizer."""
        (Path(folder) / "tokenizer.json").write_text(self.contents, encoding="utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": self.eos_token, "pad_token": SPECIAL_TOKENS[0],
            "chat_template": CHAT_TEMPLATE}, indent=2))


def to_characters(token):
    return "".join(TO_CHARACTER[byte] for byte in token)


def to_bytes(text):
    return bytes(TO_BYTE[character] for character in text)


def last_merge(token, ranks):
    """The two tokens whose merge made this one: what is left of its bytes before the last of the older merges."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        oldest = min((left + right for left, right in zip(parts, parts[1:])),
                     key=lambda pair: ranks.get(pair, len(ranks)))
        list(merge_in_place(parts, oldest))   # all of them at once: no token is older than its parts
    return parts


def load_tokenizer(folder):
    """The tokenizer of a checkpoint folder: from tokenizer.json, or from vocab.json and merges.txt."""
    folder = Path(folder)
    one_file = (folder / "tokenizer.json").is_file()
    try:
        tokenizer = read_tokenizer_json(folder / "tokenizer.json") if one_file else read_vocab_and_merges(folder)
        tokenizer.eos_token = read_eos_token(folder / "tokenizer_config.json")
        return tokenizer
    except FileNotFoundError as error:
        raise InputError(f"{folder} has neither tokenizer.json nor vocab.json and its companions:"
                         f" {Path(error.filename).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        names = "tokenizer.json or" if one_file else "vocab.json, merges.txt or"
        raise InputError(f"{folder}: {names} tokenizer_config.json is damaged or of another kind: {error!r}") from None


def read_tokenizer_json(path):
    contents = json.loads(path.read_text(encoding="utf-8"))
    model, before = contents["model"], contents["pre_tokenizer"]
    patterns = [step["pattern"]["Regex"] for step in before.get("pretokenizers", []) if step["type"] == "Split"]
    if model["type"] != "BPE" or len(patterns) != 1 or not patterns[0] or contents["normalizer"] != {"type": "NFC"}:
        raise InputError(f"{path} is not of Qwen's kind: byte-level BPE after one regular expression, on NFC text")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    added = {token["id"]: token for token in contents["added_tokens"]}
    return Tokenizer(check_ranks(model["vocab"], merges, added, path), *special_tokens_and_marks(added),
                     patterns[0], merges)


def read_vocab_and_merges(folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    return Tokenizer(check_ranks(vocab, merges, added, folder / "vocab.json"), *special_tokens_and_marks(added),
                     merges=merges)


def read_eos_token(path):
    """The end that tokenizer_config.json names, as a text or as the description of a token."""
    saved = json.loads(path.read_text(encoding="utf-8")).get("eos_token") if path.is_file() else None
    return saved["content"] if isinstance(saved, dict) else saved or SPECIAL_TOKENS[0]


def special_tokens_and_marks(added):
    """{id: description} of the tokens that no merge makes -> ({text: id}, the texts of those marked as not special)."""
    return ({token["content"]: int(i) for i, token in added.items()},
            frozenset(token["content"] for token in added.values() if not token["special"]))


def check_ranks(vocab, merges, added, path):
    """{bytes: id} for tiktoken, which takes the id of a token for the age of its merge.

    In these files they could differ.
    """
    ranks = {to_bytes(token): i for token, i in vocab.items()}
    ids = [*vocab.values(), *map(int, added)]
    if not all(type(i) is int and 0 <= i < 2 ** 31 for i in ids) or len(set(ids)) < len(ids):
        raise InputError(f"{path}: the ids of the tokens are not different numbers from 0 up")
    if not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise InputError(f"{path}: not every byte has a token of its own")
    ages = [vocab[left + right] for left, right in merges]
    if ages != sorted(ages) or len(ranks) != 256 + len(merges):
        raise InputError(f"{path}: the ids are not in the order of the merges, which tiktoken cannot express")
    return ranks

"""A small instruction set whose answers can be checked: make the conversations, and score a model on unseen ones.

    python instructions.py write instructions.jsonl          (in this folder)
    python train.py --init out --data instructions.jsonl --learning-rate 2e-3 --out out-chat
    python instructions.py score out out-chat

A pretrained model continues text. It has never seen a question that somebody answered, so it does not answer.
Fine-tuning shows it thousands of conversations, with the loss on the answers only, and then it does. Whether it has
understood or learned by heart is decided by questions that were kept out of the training: a tenth of all, by their
hash.
"""
import hashlib
import json
import random
from pathlib import Path

from tqdm import tqdm

from checkpoint import load_model
from cli import ArgumentParser, InputError, run
from generate import generate
from results import write_results

WORDS = ("king queen crown love night sword rose blood heart moon ghost storm ship gold fire tear song grave"
         " tower horse wine dream fool friend enemy brother sister mother father child").split()
PLACES = {"first": 0, "last": -1}


def next_number(rng):
    number = rng.randrange(10_000)
    return f"What number comes after {number}?", str(number + 1)


def larger_number(rng):
    a, b = rng.sample(range(1000), 2)
    return f"Which is larger, {a} or {b}?", str(max(a, b))


def digits_backwards(rng):
    digits = "".join(rng.choices("0123456789", k=rng.randint(3, 5)))
    return f"Write {digits} backwards.", digits[::-1]


def word_of_a_list(rng):
    words = rng.sample(WORDS, rng.randint(3, 5))
    place = rng.choice(list(PLACES))
    return f"What is the {place} of these words: {', '.join(words)}?", words[PLACES[place]]


KINDS = (next_number, larger_number, digits_backwards, word_of_a_list)


def held_out(question):
    """A tenth of all questions is never trained on. By hash: the same tenth, whoever makes them, in whatever order."""
    return hashlib.sha256(question.encode()).digest()[0] < 26


def examples(kind, number, seed, wanted):
    """number pairs (question, answer) of one kind, no two alike, all held out or none, as wanted says."""
    rng, found = random.Random(f"{kind.__name__} {seed}"), {}
    while len(found) < number:
        question, answer = kind(rng)
        if held_out(question) == wanted:
            found[question] = answer
    return list(found.items())


def write(path, number=20_000):
    pairs = [pair for kind in KINDS for pair in examples(kind, number // len(KINDS), 0, wanted=False)]
    random.Random(0).shuffle(pairs)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        for question, answer in pairs:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    print(f"{number:,} conversations in {path}, for example: {pairs[0][0]} {pairs[0][1]}")


def exact_match(model, tokenizer, pairs):
    """Share of the questions to which the likeliest answer is the right one, to the letter."""
    right = 0
    for question, answer in tqdm(pairs, leave=False):
        prompt_ids, _ = tokenizer.encode_conversation([{"role": "user", "content": question}], answer=True)
        right += tokenizer.decode(generate(model, tokenizer, prompt_ids, 20, temperature=0)) == answer
    return right / len(pairs)


def score(folders, number=100):
    """Exact match of each checkpoint on each kind of held-out question; writes results/instructions.json."""
    rows = []
    for folder in folders:
        model, tokenizer = load_model(folder)
        shares = {kind.__name__: exact_match(model, tokenizer, examples(kind, number, 1, wanted=True))
                  for kind in KINDS}
        shares["all"] = sum(shares.values()) / len(shares)
        rows.append({"checkpoint": Path(folder).name} | {name: f"{share:.0%}" for name, share in shares.items()})
        print(", ".join(f"{name}: {value}" for name, value in rows[-1].items()))
    columns = {"checkpoint": "checkpoint"} | {name: name.replace("_", " ") for name in shares}
    command = "python chapter-02-qwen3-packed/instructions.py score " + " ".join(folders)
    print(write_results("instructions", command, columns, rows))


def main():
    parser = ArgumentParser(description="Write the instruction set, or score checkpoints on its held-out questions.")
    parser.add_argument("action", choices=("write", "score"), help="write FILE, or score DIR...")
    parser.add_argument("paths", nargs="+", metavar="FILE|DIR", help="the file to write, or the checkpoints to score")
    arguments = parser.parse_args()
    if arguments.action == "score":
        return score(arguments.paths)
    if len(arguments.paths) != 1:
        raise InputError(f"write takes one file, not {len(arguments.paths)}")
    try:
        write(arguments.paths[0])
    except OSError as error:
        raise InputError(f"{arguments.paths[0]} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    run(main)

"""Are the validation documents a test? Not if they are trained on as well, and not if they are of another kind."""
import json
import random

import numpy as np

SAMPLE = 500   # documents that are looked at
DRAWS = 100    # tenths drawn by lot that the last one is compared with


def check_split(train_documents, val_documents):
    """Print a line about each reason why the loss on the validation documents would tell little."""
    train, validation = ([json.dumps(document) for document in part] for part in (train_documents, val_documents))
    known = set(train)
    share = sum(document in known for document in validation) / len(validation)
    if share >= 0.01:
        print(f"split   {share:.0%} of the validation documents are trained on too, word for word, and their loss shows"
              " what was learned by heart; remove what is there twice")
    step = -(-(len(train) + len(validation)) // SAMPLE)
    train, validation = train[::step], validation[::step]
    profiles = np.stack([profile(document) for document in train + validation])

    def distance(rows):
        return np.abs(profiles[rows].mean(0) - profiles.mean(0)).sum()
    dice, n = random.Random(0), len(profiles)
    by_lot = [distance(dice.sample(range(n), len(validation))) for _ in range(DRAWS)]
    if distance(range(len(train), n)) > max(by_lot):
        print(f"split   the validation documents, the last tenth, are less like the others than any of {DRAWS} tenths"
              " drawn by lot: the data are sorted, or not mixed; shuffle the documents")


def profile(document):
    """What kind of text it is, (320,): the share of each byte, and the length to a factor of two."""
    content = np.frombuffer(document[:10_000].encode(), np.uint8)
    return np.concatenate([np.bincount(content, minlength=256) / len(content), np.arange(64) == len(document).bit_length()])

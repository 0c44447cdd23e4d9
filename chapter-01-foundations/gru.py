"""A recurrent network with gates: read token by token, and carry what is worth remembering in one vector.

    python chapter-01-foundations/gru.py

An n-gram model forgets what leaves its window. A recurrent network has no window: after each token it makes a new state
from the old one and the token. In its plain form, h = tanh(W x + U h), every step rewrites all of h, and neither
memories nor gradients survive many rewritings. The GRU (Cho et al. 2014) adds two gates, numbers between 0 and 1:

    r = sigmoid(W_r x + U_r h)           reset: how much of the old state the proposal gets to see
    z = sigmoid(W_z x + U_z h)           update: how much of the old state simply stays
    n = tanh(W_n x + r * (U_n h))        the proposal
    h = (1 - z) * n + z * h              where z is near 1, memory and gradient pass through unchanged

(each product with a bias). Cho et al. write U_n (r * h) in the proposal. PyTorch resets after the product, so that one
matrix product serves all three lines; this file does as PyTorch does and shows that outputs and gradients are equal.

Its weakness is the loop: a text of L tokens takes L small steps one after the other, however many processors there are.
A GPT reads all L at once. That, as much as quality, ended this line.

We train with our own loop: at this size nn.GRU is no faster on a CPU, the script measures it. At work use nn.GRU, a few
fused kernels on a GPU, and torch.nn.utils.rnn.pack_padded_sequence, which skips the padding.

Shape letters: B documents in a batch, L their length, V vocab_size, D embedding, H state (elsewhere: heads).
"""
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from assert_equal import check_equal
from cli import ArgumentParser, run
from data import (IGNORE, fetch, load_documents, padded_collate_fn, tokenize, train_tokenizer,
                  training_windows)
from generate import generate
from model import CONFIGS
from optimizer import adamw, schedule
from train import evaluate, loss_sum

STEPS = 600


class GRU(nn.Module):
    """One layer. The parameters have nn.GRU's names and its order of the three gates: r, z, n."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * hidden_size, input_size))    # W_r, W_z, W_n
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))   # U_r, U_z, U_n
        self.bias_ih_l0 = nn.Parameter(torch.empty(3 * hidden_size))
        self.bias_hh_l0 = nn.Parameter(torch.empty(3 * hidden_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -hidden_size ** -0.5, hidden_size ** -0.5)

    def forward(self, x):
        """x (B, L, D) -> the state after each token (B, L, H). It begins as zeros."""
        from_x = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)              # (B, L, 3H): needs no loop
        h = x.new_zeros(x.shape[0], self.weight_hh_l0.shape[1])               # (B, H)
        states = []
        for x_t in from_x.unbind(dim=1):                                      # (B, 3H), L times
            h_t = F.linear(h, self.weight_hh_l0, self.bias_hh_l0)             # (B, 3H)
            (x_r, x_z, x_n), (h_r, h_z, h_n) = x_t.chunk(3, dim=-1), h_t.chunk(3, dim=-1)
            r = torch.sigmoid(x_r + h_r)
            z = torch.sigmoid(x_z + h_z)
            n = torch.tanh(x_n + r * h_n)
            h = (1 - z) * n + z * h                                           # (B, H)
            states.append(h)
        return torch.stack(states, dim=1)


class RecurrentModel(nn.Module):
    """Embedding, GRU, logits, in the same form as model.py: evaluate and generate fit this model too."""

    def __init__(self, vocab_size, embedding_size=128, hidden_size=256):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=256)   # what evaluate and generate cut texts to
        self.embed_tokens = nn.Embedding(vocab_size, embedding_size)
        self.gru = GRU(embedding_size, hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.1)

    def forward(self, input_ids):
        """input_ids (B, L) -> logits (B, L, V). Padding at the right comes after all real tokens and reaches none."""
        return self.lm_head(self.gru(self.embed_tokens(input_ids)))


def show_equal():
    """The same parameters in our loop and in nn.GRU: outputs, gradients, and the time both take."""
    ours, library = GRU(128, 256), nn.GRU(128, 256, batch_first=True)
    library.load_state_dict(ours.state_dict())
    x, weights = torch.randn(16, 64, 128), torch.randn(16, 64, 256)   # (B, L, D), (B, L, H)
    results, seconds = {}, {}
    for name, gru in (("ours", ours), ("nn.GRU", library)):
        for _ in range(5):   # the first ones warm up
            gru.zero_grad()
            inputs = x.clone().requires_grad_()
            start = time.perf_counter()
            states = gru(inputs) if gru is ours else gru(inputs)[0]
            (states * weights).sum().backward()
            seconds[name] = time.perf_counter() - start
        results[name] = {"states": states, "gradient of x": inputs.grad}
        results[name] |= {f"gradient of {key}": parameter.grad for key, parameter in gru.named_parameters()}
    print("The gate equations = nn.GRU, on random inputs:")
    for name, tensor in results["ours"].items():
        check_equal(name, tensor, results["nn.GRU"][name], tolerance=1e-3)   # gradients here reach several hundreds
    print("    forward and backward: " + ", ".join(f"{name} {s * 1000:.0f} ms" for name, s in seconds.items()) + "\n")


def train_step(model, optimizer, batch, max_norm):
    """One step with teacher forcing. Returns (loss in nats per token, gradient norm before clipping)."""
    # Teacher forcing: whatever the model would have said, its next input is the true token, batch.input_ids, not its
    # own guess. So each step has a right answer, and one early mistake does not derail the rest of the document. The
    # price: it never meets its own mistakes in training, but in generate() it reads nothing else.
    loss = loss_sum(model, batch) / (batch.targets != IGNORE).sum()
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)   # gradient_descent.py has it written out
    optimizer.step()
    return loss.item(), norm.item()


def show_clipping(windows, tokenizer):
    """Why recurrent networks made gradient clipping famous (Pascanu et al. 2013)."""
    print("\nGradient norm before training. The way back through L steps multiplies by much the same matrix L times:")
    longest = sorted(windows, key=len)[-8:]
    for scale in (1, 4, 8):
        print(f"    recurrent weights times {scale}", end="")
        for L in (4, 16, 64):
            torch.manual_seed(0)
            model = RecurrentModel(tokenizer.vocab_size)
            model.gru.weight_hh_l0.data *= scale
            batch = padded_collate_fn([window[:L + 1] for window in longest], tokenizer.padding)
            _, norm = train_step(model, torch.optim.SGD(model.parameters(), lr=0), batch, max_norm=1.0)
            print(f"    L = {L}: {norm:<7.2g}", end="")
        print()

    print("Loss of every 5th step of plain SGD with too large a learning rate:")
    for name, max_norm in (("norm clipped to 1", 1.0), ("not clipped", float("inf"))):
        torch.manual_seed(0)
        model = RecurrentModel(tokenizer.vocab_size)
        optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
        steps = [train_step(model, optimizer, padded_collate_fn(training_windows(windows, 8, 0, i), tokenizer.padding),
                            max_norm) for i in range(41)]
        print(f"    {name:<18}" + " ".join(f"{loss:>6.2f}" for loss, _ in steps[::5])
              + f"   largest norm {max(norm for _, norm in steps):,.0f}")
    print("AdamW divides each gradient by its usual size and forgives more. There clipping is an insurance.\n")


def train_model(model, windows, tokenizer, steps, batch_size=16, learning_rate=1e-2):
    """Padded batches, AdamW and the schedule of train.py. Returns the gradient norms of all steps."""
    optimizer = adamw(model, learning_rate)
    norms = []
    bar = tqdm(range(steps), unit="step", dynamic_ncols=True)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step / steps)
        batch = padded_collate_fn(training_windows(windows, batch_size, seed=0, step=step), tokenizer.padding)
        loss, norm = train_step(model, optimizer, batch, max_norm=1.0)
        norms.append(norm)
        bar.set_postfix(loss=f"{loss:.3f}")
    return norms


def run_model(source, kind):
    """Train, score, sample. source: a fetched name or a file; kind: of the tokenizer.

    Returns the row for lineage.py, with a sample.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    train_documents, val_documents = load_documents(source)
    tokenizer = train_tokenizer(kind, train_documents, val_documents, CONFIGS["small"].vocab_size)
    windows, _ = tokenize(train_documents, tokenizer, CONFIGS["small"].max_position_embeddings)
    model = RecurrentModel(tokenizer.vocab_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(windows):,} windows of up to {CONFIGS['small'].max_position_embeddings} tokens; {parameters:,}"
          " parameters")

    norms = train_model(model, windows, tokenizer, steps=500)
    _, bits = evaluate(model, val_documents, tokenizer, "cpu")
    seconds = time.perf_counter() - start
    print(f"Gradient norm: at most {max(norms):.2f}; clipped to 1 in {sum(norm > 1 for norm in norms)} of {len(norms)}"
          " steps.")
    show_clipping(windows, tokenizer)
    sample = tokenizer.decode(generate(model, tokenizer, [], 300))[:300]
    print(f"A sample:\n\n{sample}\n")
    print(f"GRU: {bits:.4f} bits per byte on the validation documents, {seconds:.0f} s, {parameters:,} parameters")
    return {"model": "GRU", "parameters": parameters, "context": "all before", "seconds": seconds,
            "val_bits_per_byte": bits, "sample": sample}


def main():
    parser = ArgumentParser(description="Train a recurrent network with gates.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="tinyshakespeare, python-docs, wikitext-2, or a .txt or .jsonl file")
    parser.add_argument("--tokenizer", choices=("bpe", "char"), default="bpe", help="byte pairs or single characters")
    arguments = parser.parse_args()
    source = fetch(arguments.data)
    torch.manual_seed(0)
    show_equal()
    run_model(source, arguments.tokenizer)


if __name__ == "__main__":
    run(main)

"""What a run shows while it goes on: a bar in the terminal, and curves and samples for TensorBoard."""
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Progress:
    """with Progress(out, steps, done) as progress: of `steps` steps (None: nobody knows) an earlier run has made
    `done`.
    """

    def __init__(self, out, steps, done):
        for events in (out / "tensorboard").glob("events.out.tfevents.*") if done == 0 else ():
            events.unlink()   # the curves of another run would mix with these
        # Of what a killed run has recorded, the steps from purge_step on are hidden: this run makes them again.
        self.writer = SummaryWriter(out / "tensorboard", purge_step=done + 1)
        self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)
        self.shown = {}   # what the bar says

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def step(self, number, shown, curves):
        """After each step. shown: {name: text} for the bar; curves: {name: number} for TensorBoard."""
        self.shown |= shown
        self.bar.update()
        self.bar.set_postfix(self.shown)
        for name, value in curves.items():
            self.writer.add_scalar(f"train/{name}", value, number)

    def validation(self, bits, sample):
        """After each checkpoint: bits per byte of some validation documents, and a text of the model's own."""
        self.writer.add_scalar("validation/bits_per_byte_of_an_eighth", bits, self.bar.n)
        self.writer.add_text("sample", sample, self.bar.n)
        self.shown["validation"] = f"{bits:.3f} bits per byte"

    def finish(self, settings, summary):
        """At the end of the run. summary: what summary.json holds."""
        bits = summary["val_bits_per_byte"]
        self.writer.add_hparams(settings, {"validation/bits_per_byte": bits}, run_name=".")
        self.writer.close()
        print(f"{bits:.4f} bits per byte on the validation documents ({summary['val_loss']:.4f} nats per token)"
              f" after {summary['steps']:,} steps, {summary['tokens']:,} tokens, {summary['wall_seconds']:.0f} s;"
              f" {summary['tokens_per_second']:,.0f} tokens/s")

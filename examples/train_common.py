"""What the two training examples share: text, batches, initial weights, hyperparameters, progress bar, plot. NumPy only.

The model is a small hybrid language model over characters. Each of its layers is

    u = norm(x);  v, gate, keep = u @ w_in, split in three
    v = silu(causal_conv1d(v))                  a short convolution over the last four characters
    h[t] = a[t] * h[t-1] + (1 - a[t]) * v[t]    a gated linear recurrence, a = sigmoid(keep)
    x = x + (h * silu(gate)) @ w_out

The text is this repository's licence. Both examples draw the same batches and start from the same weights.
"""

import argparse
import csv
import importlib.util
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = ROOT / "LICENSE"
DIM, LAYERS, WIDTH = 64, 2, 4
BATCH, SEQLEN = 8, 64
LEARNING_RATE, BETA1, BETA2, EPSILON = 1e-2, 0.9, 0.99, 1e-8
# Both examples compute in float32, in different orders, and training amplifies the differences. On a CPU they are 1e-6
# after 60 steps, in which the losses fall from 4.9 to 1.4; a wrong gradient shows at once.
AGREEMENT = 0.001


def load_text():
    """(the text as integers, the number of different characters)"""
    text = TEXT.read_text()
    characters = sorted(set(text))
    place = {character: i for i, character in enumerate(characters)}
    return np.array([place[character] for character in text], np.int32), len(characters)


def batches(text, steps):
    """Yields `steps` pairs of inputs and the characters that follow them, [BATCH, SEQLEN] each."""
    generator = np.random.default_rng(1)
    for _ in range(steps):
        starts = generator.integers(0, len(text) - SEQLEN, BATCH)
        window = text[starts[:, None] + np.arange(SEQLEN + 1)]
        yield window[:, :-1], window[:, 1:]


def initial_weights(characters):
    """{name: float32 array}"""
    generator = np.random.default_rng(0)

    def normal(*shape, scale):
        return (scale * generator.standard_normal(shape)).astype(np.float32)

    weights = {"embedding": normal(characters, DIM, scale=1.0)}
    for i in range(LAYERS):
        weights |= {
            f"w_in.{i}": normal(DIM, 3 * DIM, scale=DIM**-0.5),
            f"w_conv.{i}": normal(DIM, WIDTH, scale=WIDTH**-0.5),
            f"b_conv.{i}": np.zeros(DIM, np.float32),
            f"w_out.{i}": normal(DIM, DIM, scale=0.5 * DIM**-0.5),
        }
    return weights | {"head": normal(DIM, characters, scale=DIM**-0.5)}


def positive(text):
    """A count of an option: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def readable_losses(path):
    """The losses of a CSV file that `--losses` wrote."""
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    if head != ["step", "loss"] or not rows:
        raise ValueError(
            f"a head of step,loss and a line a step, got {','.join(head)!r} and {len(rows)} lines"
        )
    return [float(loss) for _, loss in rows]


def check(parser, options):
    """What cannot be read or written is said before the training; returns the losses to compare with, or None."""
    for name in ("losses", "plot"):
        if path := getattr(options, name):
            try:
                path.open("ab").close()
            except OSError as error:
                parser.error(f"--{name}: expected a file that can be written, got {error}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: expected matplotlib, which is not installed")
    if not options.compare:
        return None
    try:
        return readable_losses(options.compare)
    except (OSError, ValueError) as error:
        parser.error(f"--compare: expected losses as --losses writes them, got {error}")


def main(name, train, argv=None):
    """Runs one example: trains, reports, writes losses, compares and plots.

    Args:
      name: "torch" or "jax".
      train: function(weights, iterable of batches) that yields the loss of every step.
      argv: arguments of the command line; None: those of the process.

    Returns:
      The exit status: 1 if the losses differ by more than AGREEMENT from those in `--compare`.
    """
    parser = argparse.ArgumentParser(description=f"Trains a small hybrid language model with {name}.")
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--losses", type=pathlib.Path, help="write the loss of every step to this CSV file")
    parser.add_argument(
        "--compare", type=pathlib.Path, help="losses of the other example, to be compared with"
    )
    parser.add_argument(
        "--plot", type=pathlib.Path, help="draw the losses into this image (needs matplotlib)"
    )
    options = parser.parse_args(argv)
    other = check(parser, options)

    text, characters = load_text()
    losses = []
    for loss in train(initial_weights(characters), batches(text, options.steps)):
        losses.append(float(loss))
        progress(len(losses), options.steps, losses[-1])
    print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")

    curves = {name: losses}
    if options.losses:
        with options.losses.open("w", newline="") as file:
            csv.writer(file).writerows([["step", "loss"], *enumerate(losses)])
    status = 0
    if options.compare:
        curves[options.compare.stem] = other
        apart = max(abs(a - b) for a, b in zip(losses, other, strict=False))
        status = int(not apart <= AGREEMENT)
        print(f"losses are at most {apart:.2e} apart, {AGREEMENT} is allowed: {'no' if status else 'yes'}")
    if options.plot:
        plot(curves, options.plot)
    return status


def progress(step, steps, loss):
    """A bar on a terminal; nothing where output goes to a file."""
    if sys.stderr.isatty():
        done = 40 * step // steps
        end = "\n" if step == steps else ""
        print(f"\r[{'#' * done}{'.' * (40 - done)}] {step}/{steps} loss {loss:.4f}", end=end, file=sys.stderr)


def plot(curves, path):
    """Draws {name: losses} into an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for style, (name, losses) in zip(("-", "--"), curves.items(), strict=False):
        axes.plot(losses, style, label=name)
    axes.set(xlabel="step", ylabel="cross entropy (nats a character)", title="Hybrid language model")
    axes.legend()
    figure.savefig(path, dpi=120)

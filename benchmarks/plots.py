"""Pictures of results files of one commit and device, as SVG: `python -m benchmarks.plots FILE [FILE ...] [--out FOLDER]`.

ratio.svg   time over that of the limit, a copy of the same bytes, by workload, with what is required and peers of the file
tokens.svg  time against tokens, both axes logarithmic, with the line of the limit's bandwidth
skew.svg    time over the limit against the longest row, for both schedules

Nothing is drawn that the files do not hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks import report
from benchmarks.providers import PROVIDERS
from benchmarks.record import Result, Run, join, read
from benchmarks.workloads import WORKLOADS

COLORS = {"triton": "#0072b2", "pallas": "#d55e00", "torch_limit": "#555555", "jax_limit": "#999999"}
LABELS = {"triton": "Triton", "pallas": "Pallas", "torch_limit": "limit (torch)", "jax_limit": "limit (JAX)"}
MARKERS = {"triton": "o", "pallas": "s", "torch_limit": "^", "jax_limit": "v"}
PEERS = {
    "sglang": ("^", "SGLang"),
    "vllm": ("v", "vLLM"),
    "causal_conv1d": ("s", "causal-conv1d"),
    "fla": ("D", "FLA"),
}
MOST_RATIO = 2.5  # beyond this a peer is named at the edge instead of stretching the axis


def group(run: Run, prefix: str) -> list[str]:
    """Workload names of a group that the run timed, in the run's order."""
    return list(dict.fromkeys(r.workload for r in run.results if r.workload.startswith(prefix + "/")))


def cold(run: Run, workload: str, provider: str) -> float | None:
    result = run.find(workload, provider)
    return result.timings["cold"].median if result and "cold" in result.timings else None


class Basis(NamedTuple):
    """What times are divided by: the limit, or a copy of x in files of commits that had no other."""

    ratio: Callable[[Run, Result, str], float | None]
    words: str
    limit: bool

    def of(self, run: Run, workload: str, provider: str) -> float | None:
        result = run.find(workload, provider)
        return self.ratio(run, result, "cold") if result else None


def basis(run: Run) -> Basis:
    if any(PROVIDERS[r.provider].role == "limit" for r in run.results):
        return Basis(report.ratio, "as many bytes", True)
    return Basis(report.ratio_to_copy, "x to out", False)


def in_words(name: str) -> str:
    """A workload's rows and channels, a line each: its name says them in short."""
    w = WORKLOADS[name]
    counts: dict[int, int] = {}
    for length in w.lengths:
        counts[length] = counts.get(length, 0) + 1
    if len(counts) > 3:
        rows = f"{w.batch} uneven rows"
    else:
        rows = "\n+ ".join(
            f"{count} x {length}" if count > 1 else f"{length} tokens" for length, count in counts.items()
        )
    return f"{rows}\n{w.dim} channels"


def draw_ratio(run: Run, axes: Axes) -> bool:
    base = basis(run)
    names = [
        name for name in group(run, "main")
        if WORKLOADS[name].target is not None and WORKLOADS[name].target.unit == "ratio"
    ]  # fmt: skip
    names = [n for n in names if any(base.of(run, n, twin) for twin in report.TWINS)]
    if not names:
        return False
    seen = set()
    for place, name in enumerate(names):
        target = WORKLOADS[name].target
        for shift, twin in ((-0.2, "triton"), (0.2, "pallas")):
            value = base.of(run, name, twin)
            if value is not None:
                label = LABELS[twin] if twin not in seen else None
                seen.add(twin)
                axes.bar(place + shift, value, 0.36, color=COLORS[twin], label=label)
                axes.text(
                    place + shift, 0.05, f"{value:.2f}", ha="center", va="bottom", fontsize=7, color="white"
                )
        if base.limit:  # what is required speaks of the limit
            axes.hlines(target.required, place - 0.45, place + 0.45, colors="black", linestyles="dashed", linewidth=1,
                        label="required" if place == 0 else None)  # fmt: skip
        beyond = []
        for peer, (marker, label) in PEERS.items():
            value = base.of(run, name, peer)
            if value is None:
                continue
            if value > MOST_RATIO:
                beyond.append(f"{label} {value:.3g}")
                continue
            axes.plot(place, value, marker, color="#333333", markersize=5, linestyle="none", fillstyle="none",
                      label=label if label not in seen else None)  # fmt: skip
            seen.add(label)
        axes.text(place, MOST_RATIO, "\n".join(beyond), ha="center", va="top", fontsize=6)
    axes.axhline(1.0, color=COLORS["torch_limit"], linewidth=1)
    axes.set_xticks(range(len(names)), [in_words(n) for n in names], fontsize=7)
    axes.set_ylim(0, MOST_RATIO + 0.05)
    axes.set_ylabel(f"time / time of copying {base.words}")
    peers = any(label in seen for _, label in PEERS.values())
    axes.set_title(
        f"Prefill, cold: time over a copy of {base.words}"
        + (" (marks: peers of the same run)" if peers else ""),
        fontsize=10,
    )
    axes.legend(fontsize=7, ncols=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    return True


def draw_tokens(run: Run, axes: Axes) -> bool:
    names = sorted(group(run, "tokens"), key=lambda n: WORKLOADS[n].tokens)
    lines = {}
    for provider in COLORS:
        points = [(WORKLOADS[n].tokens, cold(run, n, provider)) for n in names]
        points = [(tokens, time) for tokens, time in points if time is not None]
        if points:
            lines[provider] = points
    if not lines:
        return False
    for provider, points in lines.items():
        style = "--" if provider.endswith("limit") else "-"
        axes.plot(
            *zip(*points, strict=True),
            style,
            marker=MARKERS[provider],
            markersize=3,
            color=COLORS[provider],
            label=LABELS[provider],
        )
    rates = [
        WORKLOADS[n].least_bytes / time
        for n in names for provider in ("torch_limit", "jax_limit")
        if (time := cold(run, n, provider)) is not None
    ]  # fmt: skip
    if rates:
        best = max(rates)  # bytes a microsecond
        tokens = [WORKLOADS[n].tokens for n in names]
        axes.plot(tokens, [WORKLOADS[n].least_bytes / best for n in names], ":", color="black", linewidth=1,
                  label=f"least bytes at {best / 1e3:.0f} GB/s, the best limit")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("tokens (one row, dim 2048)")
    axes.set_ylabel("GPU time, us")
    axes.set_title("Prefill: time against tokens", fontsize=10)
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(fontsize=7)
    return True


def draw_skew(run: Run, axes: Axes) -> bool:
    base = basis(run)
    names = sorted(group(run, "skew"), key=lambda n: max(WORKLOADS[n].lengths))
    drawn = False
    for twin in report.TWINS:
        for suffix, style, word in (
            ("_per_sequence", ":", "per_sequence"),
            ("_flat", "--", "flat"),
            ("", "-", "auto"),
        ):
            points = [(max(WORKLOADS[n].lengths), base.of(run, n, twin + suffix)) for n in names]
            points = [(longest, value) for longest, value in points if value is not None]
            if points:
                drawn = True
                axes.plot(*zip(*points, strict=True), style, marker=MARKERS[twin], markersize=3, color=COLORS[twin],
                          label=f"{LABELS[twin]}, {word}")  # fmt: skip
    if not drawn:
        return False
    axes.axhline(1.0, color=COLORS["torch_limit"], linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_locator(FixedLocator([1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("longest row, tokens (256 rows, 16640 tokens in all, dim 2048)")
    axes.set_ylabel(f"time / time of copying {base.words}")
    axes.set_title("Prefill: cost of skew, by schedule", fontsize=10)
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(fontsize=7)
    return True


PICTURES = {"ratio": draw_ratio, "tokens": draw_tokens, "skew": draw_skew}


def draw(run: Run, folder: Path) -> list[Path]:
    """Writes the pictures that the run has results for; the same file gives the same bytes."""
    plt.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, picture in PICTURES.items():
        figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
        if picture(run, axes):
            stamp = f"{run.header['device']}, {run.header['date'][:10]}, commit {run.header['commit']}"
            figure.supxlabel(stamp, fontsize=6, x=0.99, ha="right")
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            written.append(path)
        plt.close(figure)
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path, help="folder of the pictures (default: that of the first file)")
    options = parser.parse_args(argv)
    run = join([read(file) for file in options.files])
    if run.header["clock"] != "gpu":
        print("clock: expected a GPU run, got a dry run; nothing drawn", file=sys.stderr)
        return 2
    for path in draw(run, options.out or options.files[0].parent):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""
Draw what `speed.py` measured: how many times faster a step is, and what its loss takes of memory.

    python examples/benchmarks/speed_figure.py examples/results/speed
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


def rows_of(folder, name):
    path = Path(folder) / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def bars(axis, rows, series, title):
    width = 0.8 / len(series)
    for index, name in enumerate(series):
        values = [row[name]["ratio"] for row in rows]
        places = [place + (index - (len(series) - 1) / 2) * width for place in range(len(rows))]
        low = [row[name]["ratio"] - min(row[name]["quartiles"][0], row[name]["ratio"]) for row in rows]
        high = [max(row[name]["quartiles"][1], row[name]["ratio"]) - row[name]["ratio"] for row in rows]
        axis.bar(places, values, width, yerr=[low, high], label=name.removeprefix("times faster than "), capsize=2)
    axis.axhline(1, color="black", linewidth=0.8)
    labels = [row["shape"].replace("ultra", "ultra-\n") + f"\nG = {row['G']}" for row in rows]
    words = [row.get("vocab_size", 0) // 1024 for row in rows]
    labels = [label + f"\n{size}k words" * (size != words[0]) for label, size in zip(labels, words, strict=True)]
    axis.set_xticks(range(len(rows)), labels, fontsize=7)
    axis.set_title(title, fontsize=9)
    if len(series) > 1:
        axis.legend(fontsize=7, loc="upper left")
    axis.set_ylim(top=1.12 * max(row[name]["quartiles"][1] for row in rows for name in series))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="Where `speed.py` wrote its JSON.")
    folder = parser.parse_args().folder
    figure, axes = plt.subplots(1, 3, figsize=(16, 3.8), width_ratios=[4, 6, 2])
    against = rows_of(folder, "against_trl")
    bars(
        axes[0],
        against,
        [name for name in against[0] if name.startswith("times")],
        "GRKD's step, times as fast as that of",
    )
    bars(axes[1], rows_of(folder, "shapes"), ["auto"], "shared prompts against every row, times as fast")
    memory = [row for row in rows_of(folder, "memory") if row["vocab_size"] == 2**18]
    for index, name in enumerate(("plain", "ours", "trl")):
        heights = [row[f"{name} MiB"] for row in memory]
        axes[2].bar([place + (index - 1) * 0.27 for place in range(len(memory))], heights, 0.27, label=name)
    axes[2].set_xticks(range(len(memory)), [row["loss"].replace(" and ", "\nand ") for row in memory], fontsize=7)
    axes[2].set_title("peak of the loss, MiB, V = 256k", fontsize=9)
    axes[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(Path(folder) / "speed.png", dpi=130)


if __name__ == "__main__":
    main()

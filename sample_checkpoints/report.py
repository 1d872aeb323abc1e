"""What was measured, as lines on the terminal and as the tables of the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- written by make.py -->\n", "<!-- end of what make.py writes -->\n"
FORMS = {"module": "pickled module", "state_dict": "state dict", "pt2": "exported program"}


def print_rdrop(row: dict[str, Any]) -> None:
    """Print one network's accuracy and KL, without and with R-Drop."""
    plain, rdrop = row["without"], row["with"]
    print(
        f"{row['architecture']:<20}  without R-Drop: accuracy {plain['accuracy']:.2%}, KL {plain['kl']:.4f}"
        f"   with: accuracy {rdrop['accuracy']:.2%}, KL {rdrop['kl']:.4f}",
        flush=True,
    )


def write_readme(source: Path, target: Path, measured: dict[str, Any]) -> None:
    """Write ``source`` to ``target`` with fresh tables between the two marker lines."""
    head, rest = source.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    tables = f"{samples_table(measured)}\n{rdrop_table(measured)}\n"
    target.write_text(f"{head}{BEGIN}\n{tables}{END}{tail}")


def samples_table(measured: dict[str, Any]) -> str:
    """Return the table of files: what each is, how well it predicts, and what fusing it must give."""
    lines = [
        "| file | what it is | network | dtype | kB | parameters | test accuracy | convs | norms | scales |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for sample in measured["samples"]:
        form = FORMS[sample["form"]] + (", in training mode" if sample["training"] else "")
        changes = " | ".join(
            f"{sample[what]['before']} → {sample[what]['after']}" for what in ("convs", "norms", "scales")
        )
        lines.append(
            f"| `{sample['file']}` | {form} | `{sample['architecture']}` | {sample['dtype']} "
            f"| {sample['bytes'] / 1000:.0f} | {sample['parameters']:,} "
            f"| {sample['accuracy']:.2%} ({sample['correct']} of {measured['data']['images']}) | {changes} |"
        )
    return "\n".join(lines) + "\n"


def rdrop_table(measured: dict[str, Any]) -> str:
    """Return the table of accuracy and KL without and with R-Drop."""
    training = measured["training"]
    lines = [
        f"Mean symmetric KL in nats between two dropout passes over the {measured['data']['images']} held-out digits, "
        f"over {training['kl_pairs']} pairs of passes; {training['epochs']} epochs, alpha {training['alpha']:g}:\n",
        "| network | accuracy without R-Drop | with | KL without R-Drop | with |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in measured["rdrop"]:
        plain, rdrop = row["without"], row["with"]
        lines.append(
            f"| `{row['architecture']}` | {plain['accuracy']:.2%} | {rdrop['accuracy']:.2%} "
            f"| {plain['kl']:.4f} | {rdrop['kl']:.4f} |"
        )
    return "\n".join(lines) + "\n"

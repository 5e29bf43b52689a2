"""From finished rows to tables: mean and standard error, the published figures beside them, JSON and Markdown."""

import json
import statistics
from pathlib import Path
from typing import Any

from table_rows import BY_NAME, ROWS, TITLES, Row

from balms_cli.data.aside import replace_file

PAPER = Path(__file__).with_name("paper_figures.json")
METRICS = ("top1", "balanced_accuracy", "many", "medium", "few", "rarest3")


def summary(study: dict[str, Any], runs_of: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Every row with runs: mean and standard error over them, and the published figures. ``study``: what was asked for."""
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    cell, rows, made = f"{study['data']}/{study['imbalance']:g}", {}, {}
    for row in ROWS:
        runs = runs_of.get(row.name)
        if not runs:
            continue
        made = {k: runs[0][k] for k in ("class_counts", "device", "versions")} | {"date": max(r["date"] for r in runs)}
        entry: dict[str, Any] = {"label": row.label, "tables": list(row.tables), "runs": len(runs), "varied": varied(row, runs)}
        entry |= {k: v for k, v in (("note", row.note), ("table3", row.table3)) if v}
        for metric in METRICS:
            values = [run[metric] for run in runs]
            entry[metric] = None if None in values else mean_and_error(values)
        entry["class_accuracy"] = [
            round(statistics.fmean(a), 4) for a in zip(*(r["class_accuracy"] for r in runs), strict=True)
        ]
        entry |= {k: runs[0][k] for k in ("manifest_sha256", "tau_norm", "meta_set", "rates_variance") if k in runs[0]}
        published = {t: paper["tables"][t][row.name][cell] for t in (*row.tables, "reported")
                     if cell in paper["tables"][t].get(row.name, {})}  # fmt: skip
        rows[row.name] = entry | {"published": published}
    return {**study, **made, "sources": paper["sources"], "rows": rows}


def varied(row: Row, runs: list[dict[str, Any]]) -> str:
    """Which randomness the mean is over. Subset: one, of seed 0, always."""
    backbones = len({run["backbone_seed"] for run in runs})
    if row.random_head:
        return f"{len(runs) // backbones} classifier seeds on {backbones} backbone{'s' if backbones > 1 else ''}"
    return f"{backbones} backbone seed{'s' if backbones > 1 else ''}"


def mean_and_error(values: list[float]) -> list[float]:
    """[mean, standard error]; [mean] of a single run, which has no error to show."""
    mean = round(statistics.fmean(values), 4)
    return [mean] if len(values) == 1 else [mean, round(statistics.stdev(values) / len(values) ** 0.5, 4)]


def markdown(result: dict[str, Any]) -> str:
    """The tables as text: published, here, and the difference, in percent and points."""
    cifar10 = result["data"] == "cifar10"
    rare = ("rarest3", "rarest 3") if cifar10 else ("few", "few-shot")
    drawn = next(iter(result["rows"].values()))["manifest_sha256"][:12]
    lines = [f"# {result['data'].upper()}-LT, imbalance factor {result['imbalance']:g}, preset `{result['preset']}`", "",
             f"Top-1 accuracy in percent on the test split, last iterate, one draw of the data (index sha256 `{drawn}`), "
             f"{result['device']}, torch {result['versions']['torch']}, {result['date']}. "
             "± is the standard error over the runs named in the last column.",
             "Paper: the figures of the authors' own runs; reported: those that the supplement quotes from others. "
             "Both follow longer recipes than this preset."]  # fmt: skip
    for table, title in TITLES.items():
        rows = {n: r for n, r in result["rows"].items() if table in r["tables"]}
        if not rows:
            continue
        lines += ["", f"## {title}", "",
                  f"| method | paper | reported | here | difference | {rare[1]} | runs |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in rows.values():
            paper = row["published"].get(table)
            reported = row["published"].get("reported") if table == "table2" else None
            against = paper or reported
            gap = f"{100 * row['top1'][0] - against[0]:+.1f}" if against else ""
            label = row["table3"] if table == "table3" and "table3" in row else row["label"]
            label += f" ({row['note']})" if "note" in row else ""
            label += f", tau {row['tau_norm']:g}" if "tau_norm" in row else ""
            label += {"train": " (meta set: training images)", "meta": " (meta set: held out)"}.get(row.get("meta_set"), "")
            lines.append(f"| {label} | {plain(paper)} | {plain(reported)} | {percent(row['top1'])} | {gap} | "
                         f"{percent(row[rare[0]])} | {row['varied']} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def percent(value: list[float] | None) -> str:
    return "–" if value is None else " ± ".join(f"{100 * v:.1f}" for v in value)


def plain(value: list[float] | None) -> str:
    return " ± ".join(f"{v:.1f}" for v in value) if value else ""


def write_result(result: dict[str, Any], out: Path) -> Path:
    """One JSON (a line a row, so that a change reads well) and one Markdown file."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"tables_{result['data']}_if{result['imbalance']:g}_{result['preset']}.json"
    head = {k: v for k, v in result.items() if k != "rows"}
    rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(r)}" for n, r in result["rows"].items())
    replace_file(path, json.dumps(head, indent=1)[:-2] + ',\n "rows": {\n' + rows + "\n }\n}\n")
    replace_file(path.with_suffix(".md"), markdown(result))
    return path


README_ROWS = ("softmax", "cost-sensitive", "cbs", "focal", "class-balanced", "ldam-drw", "equalization", "l2rw",
               "meta-weight-net", "balanced", "posthoc", "tau-norm", "crt", "lws", "softmax-dt-ms", "balanced-dt",
               "balanced-cbs-dt", "balanced-dt-mr", "balms")  # fmt: skip


def readme_table(cifar10: dict[str, Any], cifar100: dict[str, Any]) -> str:
    """The rows that README shows, of both data sets: accuracy in percent, an empty cell where a row was not run."""

    def cells(result: dict[str, Any], name: str, rare: str) -> list[str]:
        row = result["rows"].get(name)
        return [f"{100 * row[k][0]:.1f}" if row and row[k] else "" for k in ("top1", rare)]

    lines = ["| method | CIFAR-10-LT | 3 rarest | CIFAR-100-LT | few-shot |", "|---|--:|--:|--:|--:|"]
    for name in README_ROWS:
        label = BY_NAME[name].label if name != "softmax-dt-ms" else "Softmax, meta sampler (DT, MS)"
        lines.append(f"| {' | '.join([label, *cells(cifar10, name, 'rarest3'), *cells(cifar100, name, 'few')])} |")
    return "\n".join(lines) + "\n"

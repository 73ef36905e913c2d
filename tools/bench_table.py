#!/usr/bin/env python3
"""What tools/gpu_check.sh measured, side by side: bench_table.py FOLDER

Reads step-*.json (`bench step --json`; step-*-largest.json was asked for the largest batch), pytorch-*.jsonl (`pytorch_baseline.py
--json`), train-speed.json, run/metrics.jsonl, knn.json (`eval knn --json`) and what steps-*.jsonl say of the steps themselves; writes tables in Markdown,
FOLDER/summary.md, and the same figures as FOLDER/table.json. What was not measured is left out, and said to be missing where it
decides something.
"""

import json
import pathlib
import sys

# How many times the engine is to be as fast as the best of PyTorch.
BAR = 1.2
BEST = "best of all"


def json_lines(path):
    """The objects of a JSON lines file; a torn last line, of a process that was stopped, is left out."""
    objects = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return objects


def json_file(path):
    """The object in a file; none where a command came to no end, which leaves an empty one."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        print(f"{path.name} is not complete", file=sys.stderr)
        return None


def ways(step):
    """What is not as usual in a step of the engine."""
    choices = [
        ("gram", step["bn_gram"] != "none"),
        (f"statistics of {step['fuse_statistics']}", step["fuse_statistics"] != "none"),
        (f"residual gradient {step['residual_gradient']}", step["residual_gradient"] != "accumulate"),
        ("fused pooling", step["fuse_pooling"]),
        ("shortcut apart", not step.get("fuse_shortcut", True)),
        (f"views {step['views']}", step["views"] != "together"),
        (f"memory budget {step['memory_budget']}", step["memory_budget"] is not None),
        ("autotuned", step["autotune"]),
        ("no graph", not step["graph"]),
    ]
    return [name for name, chosen in choices if chosen]


def engine_row(name, step):
    used = step["device_bytes_in_use"] or step["planned_bytes"]
    return {
        "who": "engine",
        "dtype": step["dtype"],
        "ways": ways(step),
        "setting": ", ".join([step["dtype"], *ways(step)]),
        "batch": step["batch"],
        "largest": name.endswith("-largest"),
        "images_per_s": step["images_per_s"],
        "step_ms": 1e3 * step["step_s"],
        "quartiles_ms": [1e3 * step["step_lower_quartile_s"], 1e3 * step["step_upper_quartile_s"]],
        "memory_gb": used / 1e9,
        "mfu": step["mfu"],
    }


def torch_row(result):
    return {
        "who": "PyTorch",
        "dtype": result["dtype"],
        "ways": [result["mode"]],
        "setting": f"{result['dtype']}, {result['mode']}",
        "batch": result["batch"],
        "largest": result.get("largest", False),
        "images_per_s": result["images_per_s"],
        "step_ms": result["step_ms_median"],
        "quartiles_ms": result["step_ms_quartiles"],
        "memory_gb": result.get("device_bytes_in_use", result["peak_rss_bytes"]) / 1e9,
        "mfu": None,
    }


def fastest(rows):
    return max(rows, key=lambda r: r["images_per_s"], default=None)


def comparisons(rows):
    """The engine against the best of PyTorch: at each batch that both have, at the largest of each, each at its best."""
    ours, theirs = ([r for r in rows if r["who"] == who] for who in ("engine", "PyTorch"))
    usual = [r for r in ours if not r["ways"]]
    batches = sorted({r["batch"] for r in ours} & {r["batch"] for r in theirs})
    pairs = [(f"batch {n}", *([r for r in side if r["batch"] == n] for side in (usual or ours, theirs))) for n in batches]
    pairs.append(("largest batch of each", *([r for r in side if r["largest"]] for side in (usual, theirs))))
    pairs.append((BEST, ours, theirs))
    compared = []
    for what, engine, torch in pairs:
        if engine and torch:
            best = {"engine": fastest(engine), "pytorch": fastest(torch)}
            compared.append({"what": what, **best, "ratio": best["engine"]["images_per_s"] / best["pytorch"]["images_per_s"]})
    return compared


def verdict(compared):
    """Whether the bar is reached, in one sentence."""
    needed = [c for c in compared if c["what"] != BEST]
    figures = ", ".join(f"{c['ratio']:.2f} at {'the ' * c['what'].startswith('largest')}{c['what']}" for c in needed)
    if not needed:
        return f"**{BAR} times the best PyTorch: not measured.**"
    if not all(c["ratio"] >= BAR for c in needed):
        return f"**{BAR} times the best PyTorch: no** ({figures})."
    if not any(c["what"].startswith("largest") for c in needed):
        return f"**{BAR} times the best PyTorch: not known yet** ({figures}; not measured at the largest batch of each)."
    return f"**{BAR} times the best PyTorch: yes** ({figures})."


def variants(rows):
    """The engine's other ways beside the usual one at the same batch and element type, and the milliseconds that they save."""
    ours = [r for r in rows if r["who"] == "engine"]
    compared = []
    for row in ours:
        same = [r for r in ours if not r["ways"] and (r["batch"], r["dtype"]) == (row["batch"], row["dtype"])]
        if row["ways"] and same:
            compared.append({"variant": row, "usual": same[0], "saved_ms": same[0]["step_ms"] - row["step_ms"]})
    return sorted(compared, key=lambda c: -c["saved_ms"])


def training(folder):
    lines, speed, knn = json_lines(folder / "run" / "metrics.jsonl"), json_file(folder / "train-speed.json"), json_file(folder / "knn.json")
    if not lines:
        return None
    speeds = sorted(line["timing"]["images_per_s"] for line in lines[1:] or lines)
    waits = sorted(line["timing"]["data_wait_share"] for line in lines[1:] or lines)
    return {
        "steps": lines[-1]["step"] + 1,
        "epochs": lines[-1]["epoch"] + 1,
        "loss": [lines[0]["loss"], lines[-1]["loss"]],
        "z_std": [lines[0]["z_std"], lines[-1]["z_std"]],
        "effective_rank": [line["effective_rank"] for line in lines if "effective_rank" in line],
        "knn": [[line["epoch"] + 1, line["knn"]] for line in lines if "knn" in line],
        "knn_of_checkpoint": knn and {"step": knn["network"]["step"], "device": knn["network"]["device"], **{
            who: knn[who]["best"] for who in ("trained", "untrained", "pixels") if knn.get(who)}},
        "median_images_per_s": speeds[len(speeds) // 2],
        "median_data_wait_share": waits[len(waits) // 2],
        "short_run_images_per_s": speed and speed["images_per_s"],
    }


def table(heads, rows, right=()):
    """A table in Markdown, with nothing when there are no rows."""
    if not rows:
        return []
    rule = "|".join("---:" if head in right else "---" for head in heads)
    return ["", f"| {' | '.join(heads)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def speed(r):
    return f"{r['images_per_s']:,.0f} images/s, {r['step_ms']:.2f} ms (batch {r['batch']}, {r['setting']}, {r['memory_gb']:.3g} GB)"


def row_of_all(r):
    low, high = r["quartiles_ms"]
    mfu = f"{100 * r['mfu']:.1f} %" if r["mfu"] is not None else ""
    batch = f"{r['batch']}{' (largest)' if r['largest'] else ''}"
    return [r["who"], batch, r["setting"], f"{r['images_per_s']:,.1f}", f"{r['step_ms']:.2f} ({low:.2f} to {high:.2f})", f"{r['memory_gb']:.3g}", mfu]


def of_knn(knn):
    if not knn:
        return []
    best = [f"{who} {100 * knn[who]['top1']:.2f} % (k = {knn[who]['k']}, T = {knn[who]['temperature']})"
            for who in ("trained", "untrained", "pixels") if who in knn]
    return [[f"kNN after step {knn['step']:,}, best k and T, on {knn['device']}", ", ".join(best)]]


def of_training(t):
    knn = [f"{100 * accuracy:.2f} % after epoch {epoch}" for epoch, accuracy in t["knn"]]
    shown = knn if len(knn) <= 4 else [knn[0], "...", *knn[-2:]]
    rank = [f"{rank:.1f}" for rank in t["effective_rank"]]
    rows = [
        ["steps", f"{t['steps']:,} ({t['epochs']} epochs)"],
        ["loss, first and last", " -> ".join(f"{loss:.4f}" for loss in t["loss"])],
        ["z std x sqrt(d), first and last", " -> ".join(f"{std:.3f}" for std in t["z_std"])],
        ["effective rank of z, first and last", " -> ".join(rank[:1] + rank[-1:] if len(rank) > 1 else rank) or "not measured"],
        ["kNN as it went", ", ".join(shown) or "not measured"],
        *of_knn(t["knn_of_checkpoint"]),
        ["images/s, median", f"{t['median_images_per_s']:,.0f}, waiting for data {100 * t['median_data_wait_share']:.0f} % of the time"],
    ]
    if t["short_run_images_per_s"]:
        rows.append(["images/s of `bench step --data`", f"{t['short_run_images_per_s']:,.0f}"])
    return rows


def markdown(report, title):
    lines = [f"# {title}", "", "## Engine against PyTorch", "", verdict(report["compared"])]
    lines += table(["at", "engine", "best PyTorch", "ratio"],
                   [[c["what"], speed(c["engine"]), speed(c["pytorch"]), f"**{c['ratio']:.2f}**"] for c in report["compared"]], {"ratio"})
    if report["variants"]:
        lines += ["", "## The engine's ways"]
    lines += table(["step", "batch", "ms", "usual, ms", "saved, ms", "memory, GB", "usual, GB"], [
        [v["setting"], str(v["batch"]), f"{v['step_ms']:.2f}", f"{u['step_ms']:.2f}", f"{c['saved_ms']:+.2f}", f"{v['memory_gb']:.3g}", f"{u['memory_gb']:.3g}"]
        for c in report["variants"] for v, u in [(c["variant"], c["usual"])]
    ], {"batch", "ms", "usual, ms", "saved, ms", "memory, GB", "usual, GB"})
    if report["training"]:
        lines += ["", "## Training", *table(["", ""], of_training(report["training"]))]
    if report["rows"]:
        lines += ["", "## All steps that were timed"]
    lines += table(["", "batch", "setting", "images/s", "step, ms (quartiles)", "memory, GB", "MFU"], [row_of_all(r) for r in report["rows"]],
                   {"batch", "images/s", "step, ms (quartiles)", "memory, GB", "MFU"})
    if report["steps"]:
        lines += ["", "## What was run"]
    lines += table(["step", "result", "seconds"], [[s["step"], s["result"], str(s["seconds"])] for s in report["steps"]], {"seconds"})
    return "\n".join(lines) + "\n"


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: bench_table.py FOLDER")
    folder = pathlib.Path(sys.argv[1])
    steps = {path.stem: step for path in sorted(folder.glob("step-*.json")) if (step := json_file(path))}
    torch = [result for path in sorted(folder.glob("pytorch-*.jsonl")) for result in json_lines(path)]
    rows = [engine_row(name, step) for name, step in steps.items()] + [torch_row(result) for result in torch]
    rows.sort(key=lambda r: (r["batch"], r["who"], -r["images_per_s"]))
    # Of a step that was run again the newest result counts.
    by_age = sorted(folder.glob("steps-*.jsonl"), key=lambda path: path.stat().st_mtime)
    checks = list({check["step"]: check for path in by_age for check in json_lines(path)}.values())
    report = {"rows": rows, "compared": comparisons(rows), "variants": variants(rows), "training": training(folder), "steps": checks}
    (folder / "table.json").write_text(json.dumps(report, indent=2) + "\n")
    devices = [step["device"] for step in steps.values()] + [f"{r['device']}, {r['framework']}" for r in torch]
    title = "; ".join(dict.fromkeys(devices)) or "nothing was timed"
    (folder / "summary.md").write_text(markdown(report, title))


if __name__ == "__main__":
    main()

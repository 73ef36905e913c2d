#!/usr/bin/env python3
"""What tools/gpu_check.sh measured, side by side: bench_table.py FOLDER

Reads step-*.json (`bench step --json`), pytorch.jsonl (`pytorch_baseline.py --json`), run/metrics.jsonl and what steps-*.jsonl say
of the steps themselves; writes tables in Markdown, FOLDER/summary.md, and the same figures as FOLDER/table.json. What was not
measured is left out.
"""

import json
import pathlib
import sys


def json_lines(path):
    """The objects of a JSON lines file; a torn last line, of a process that was stopped, is left out."""
    objects = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return objects


def engine_steps(folder):
    """Reports of `bench step`, by file name; those that came to no end are empty files."""
    steps = {}
    for path in sorted(folder.glob("step-*.json")):
        try:
            steps[path.stem] = json.loads(path.read_text())
        except json.JSONDecodeError:
            print(f"{path.name} is not complete", file=sys.stderr)
    return steps


def engine_row(name, step):
    used = step["device_bytes_in_use"] or step["planned_bytes"]
    return {
        "who": "engine",
        "setting": step["dtype"] + (", largest batch" if name.endswith("largest") else "") + (", no graph" if not step["graph"] else "") + (", autotuned" if step["autotune"] else "") + (", gram" if step.get("bn_gram", "none") != "none" else ""),
        "batch": step["batch"],
        "images_per_s": step["images_per_s"],
        "step_ms": 1e3 * step["step_s"],
        "quartiles_ms": [1e3 * step["step_lower_quartile_s"], 1e3 * step["step_upper_quartile_s"]],
        "memory_gb": used / 1e9,
        "mfu": step["mfu"],
    }


def torch_row(result):
    return {
        "who": "PyTorch",
        "setting": f"{result['dtype']}, {result['mode']}",
        "batch": result["batch"],
        "images_per_s": result["images_per_s"],
        "step_ms": result["step_ms_median"],
        "quartiles_ms": result["step_ms_quartiles"],
        "memory_gb": result.get("device_bytes_in_use", result["peak_rss_bytes"]) / 1e9,
        "mfu": None,
    }


def ratios(ours, theirs):
    """Ours against the best of PyTorch, at equal batches and, of each, at its own best."""
    compared = []
    pairs = [(batch, [r for r in ours if r["batch"] == batch], [r for r in theirs if r["batch"] == batch]) for batch in sorted({r["batch"] for r in ours})]
    for what, engine, torch in [*pairs, ("best of all", ours, theirs)]:
        if engine and torch:
            best = [max(rows, key=lambda r: r["images_per_s"]) for rows in (engine, torch)]
            compared.append({"batch": what, "engine": best[0], "pytorch": best[1], "ratio": best[0]["images_per_s"] / best[1]["images_per_s"]})
    return compared


def training(folder):
    lines = json_lines(folder / "run" / "metrics.jsonl")
    if not lines:
        return None
    speeds = sorted(line["timing"]["images_per_s"] for line in lines[1:] or lines)
    return {
        "steps": lines[-1]["step"] + 1,
        "epoch": lines[-1]["epoch"],
        "loss": lines[-1]["loss"],
        "z_std": lines[-1]["z_std"],
        "knn": [line["knn"] for line in lines if "knn" in line],
        "median_images_per_s": speeds[len(speeds) // 2],
    }


def markdown(rows, compared, trained, steps, title):
    lines = [f"# {title}", ""]
    if rows:
        lines += ["| | batch | setting | images/s | step, ms (quartiles) | memory, GB | MFU |", "|---|---:|---|---:|---:|---:|---:|"]
    for r in rows:
        low, high = r["quartiles_ms"]
        mfu = f"{100 * r['mfu']:.1f} %" if r["mfu"] is not None else ""
        lines.append(f"| {r['who']} | {r['batch']} | {r['setting']} | {r['images_per_s']:.1f} | {r['step_ms']:.2f} ({low:.2f} to {high:.2f}) "
                     f"| {r['memory_gb']:.2f} | {mfu} |")
    if compared:
        lines += ["", "| batch | engine, images/s | best PyTorch, images/s | ratio |", "|---|---:|---:|---:|"]
    for c in compared:
        settings = [f"{c[who]['images_per_s']:.1f} ({c[who]['setting']}, {c[who]['memory_gb']:.1f} GB)" for who in ("engine", "pytorch")]
        lines.append(f"| {c['batch']} | {settings[0]} | {settings[1]} | **{c['ratio']:.2f}** |")
    if trained:
        knn = f", kNN {100 * trained['knn'][-1]:.2f} %" if trained["knn"] else ""
        lines += ["", f"Training: {trained['steps']} steps (epoch {trained['epoch']}), loss {trained['loss']:.4f}, z std x sqrt(d) {trained['z_std']:.3f}"
                      f"{knn}, {trained['median_images_per_s']:.0f} images/s in the median."]
    if steps:
        lines += ["", "| step | result | seconds |", "|---|---|---:|"]
    lines += [f"| {s['step']} | {s['result']} | {s['seconds']} |" for s in steps]
    return "\n".join(lines) + "\n"


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: bench_table.py FOLDER")
    folder = pathlib.Path(sys.argv[1])
    steps, torch = engine_steps(folder), json_lines(folder / "pytorch.jsonl")
    ours = [engine_row(name, step) for name, step in steps.items()]
    theirs = [torch_row(result) for result in torch]
    rows = sorted(ours + theirs, key=lambda r: (r["batch"], r["who"], -r["images_per_s"]))
    compared, trained = ratios(ours, theirs), training(folder)
    # Of a step that was run again the newest result counts.
    by_age = sorted(folder.glob("steps-*.jsonl"), key=lambda path: path.stat().st_mtime)
    checks = list({check["step"]: check for path in by_age for check in json_lines(path)}.values())
    report = {"rows": rows, "compared": compared, "training": trained, "steps": checks}
    (folder / "table.json").write_text(json.dumps(report, indent=2) + "\n")
    devices = [step["device"] for step in steps.values()] + [f"{r['device']}, {r['framework']}" for r in torch]
    title = "; ".join(dict.fromkeys(devices)) or "nothing was measured"
    (folder / "summary.md").write_text(markdown(rows, compared, trained, checks, title))


if __name__ == "__main__":
    main()

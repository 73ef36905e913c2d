#!/usr/bin/env python3
"""What the compiled CUDA kernels take of a device and how they reach its memory, from the program's own fatbins.

    tools/kernel_report/report.py [--engine PATH]              prints the table, all generations of devices
    tools/kernel_report/report.py --write                      keeps it in tools/kernel_report/table.txt
    tools/kernel_report/report.py --check                      fails on a spill, and on a streaming kernel without 128-bit accesses

Registers, shared memory, stack and spills come from ptxas (`simsiam-engine kernels`), the accesses from the machine code (cuobjdump,
which is put into ./.venv from PyPI where it is missing). PATH is a program built with nvcc [default: target/debug/simsiam-engine].
"""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
TABLE = pathlib.Path(__file__).with_name("table.txt")
PACKAGES = ["nvidia-cuda-cuobjdump==13.2.*", "nvidia-cuda-nvdisasm==13.2.*"]

# Kernels whose time is that of the bytes they move, by name without element type: 16 bytes at a time.
READS = """relu relu_backward copy add slice_rows slice_rows_backward cast_from cast_to add_bias sum_rows sgd lars ceiling_copy
    batch_norm_statistics batch_norm_apply batch_norm_backward_reduce batch_norm_backward_apply max_pool max_pool_backward
    global_avg_pool global_avg_pool_backward negative_cosine negative_cosine_backward softmax_xent softmax_xent_backward_p
    softmax_xent_backward_z cosine_loss cross_entropy cross_entropy_backward row_rnorms non_finite non_finite_chunks summarise knn_merge
    augment_crop stem_wgrad_finish batch_norm_max_pool batch_norm_max_pool_reduce batch_norm_max_pool_backward batch_norm_apply_and_sum
    group_sums gram_masked_sums gram_centre subsample subsample_backward batch_norm_pair_apply batch_norm_pair_reduce
    batch_norm_pair_backward cast_all""".split()
WRITES = """relu relu_backward copy add fill slice_rows slice_rows_backward cast_from cast_to add_bias sgd lars ceiling_copy philox_stream
    batch_norm_apply batch_norm_backward_reduce batch_norm_backward_apply max_pool max_pool_backward global_avg_pool_backward
    negative_cosine_backward softmax_xent_backward_p softmax_xent_backward_z cosine_loss cross_entropy_backward
    augment_finish stem_conv batch_norm_max_pool batch_norm_max_pool_backward batch_norm_apply_and_sum gram_masked_sums gram_centre
    subsample subsample_backward batch_norm_pair_apply batch_norm_pair_backward""".split()


def untyped(kernel):
    return re.sub(r"_(f32|bf16|f16)$", "", kernel)


def cuobjdump():
    """The path of cuobjdump, with nvdisasm beside it."""
    found = sorted(ROOT.glob(".venv/lib/python3*/site-packages/nvidia/cu13/bin/cuobjdump"))
    if not found:
        pip = ROOT / ".venv/bin/python"
        if not pip.exists():
            sys.exit("report.py: no .venv; hint: run tools/install-nvcc.sh")
        command = [pip, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
        if subprocess.run(command).returncode != 0:
            sys.exit("report.py: pip could not install cuobjdump from PyPI; hint: its message is above")
        found = sorted(ROOT.glob(".venv/lib/python3*/site-packages/nvidia/cu13/bin/cuobjdump"))
    return found[0]


def accesses(tool, fatbin):
    """{(kernel, arch): Counter of "load 128", "store 16", ...} of global memory in a fatbin's machine code."""
    environment = os.environ | {"PATH": f"{tool.parent}:{os.environ['PATH']}"}
    text = subprocess.run([tool, "-sass", fatbin], env=environment, capture_output=True, text=True, check=True).stdout
    found, arch, kernel = collections.defaultdict(collections.Counter), None, None
    for line in text.splitlines():
        if match := re.search(r"code for (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            kernel = match[1]
            found[kernel, arch]
        elif match := re.search(r"\b(LDG|STG)\.(\S+)", line):
            width = next((bits for bits in ("256", "128", "64", "16", "8") if re.search(rf"(^|\.)[US]?{bits}(\.|$)", match[2])), "32")
            found[kernel, arch][f"{'load' if match[1] == 'LDG' else 'store'} {width}"] += 1
    return found


def gather(engine):
    """Rows of the table: what `kernels --json` says of each kernel and generation, and its accesses."""
    tool = cuobjdump()
    rows = json.loads(subprocess.run([engine, "kernels", "--json"], capture_output=True, text=True, check=True).stdout)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([engine, "kernels", "--extract", folder], capture_output=True, check=True)
        for fatbin in sorted(pathlib.Path(folder).glob("*.fatbin")):
            found |= accesses(tool, fatbin)
    for row in rows:
        row["accesses"] = found[row["kernel"], row["arch"]]
    return rows


def faults(rows):
    """One sentence for everything that is not as it must be."""
    for row in rows:
        where = f"{row['kernel']} for {row['arch']}"
        if row["spills"]:
            yield f"{where}: {row['spills']} bytes of spills"
        for names, access in ((READS, "load 128"), (WRITES, "store 128")):
            # From sm_100 on two neighbouring accesses of 128 bits may become one of 256.
            wide = row["accesses"][access] + row["accesses"][access.replace("128", "256")]
            if untyped(row["kernel"]) in names and not wide:
                yield f"{where}: no 128-bit {access.split()[0]}"
    unknown = {*READS, *WRITES} - {name for row in rows for name in (row["kernel"], untyped(row["kernel"]))}
    for name in sorted(unknown):
        yield f"{name}: there is no such kernel any more"


def table(rows):
    """The rows as text, one line each; columns of accesses count instructions in the machine code."""
    columns = [f"{access} {bits}" for access in ("load", "store") for bits in (256, 128, 64, 32)]
    head = f"{'kernel':<36} {'arch':<8} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}"
    lines = [head + "".join(f" {column:>9}" for column in columns)]
    for row in rows:
        figures = f"{row['kernel']:<36} {row['arch']:<8} {row['registers']:>9} {row['shared']:>7} {row['stack']:>6} {row['spills']:>6}"
        lines.append(figures + "".join(f" {row['accesses'][column]:>9}" for column in columns))
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=pathlib.Path, default=ROOT / "target/debug/simsiam-engine")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if not args.engine.is_file():
        sys.exit(f"report.py: no program at {args.engine}; hint: cargo build, or name one by --engine")
    rows = gather(args.engine)
    if args.write:
        TABLE.write_text(table(rows))
    elif not args.check:
        print(table(rows), end="")
    found = list(faults(rows))
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    if args.check and not found:
        archs = len({row["arch"] for row in rows})
        streaming = {row["kernel"] for row in rows if untyped(row["kernel"]) in {*READS, *WRITES}}
        kernels = len({row["kernel"] for row in rows})
        print(f"{kernels} kernels for {archs} generations: no spills; 128-bit accesses in all {len(streaming)} streaming kernels")
    return 1 if found and args.check else 0


if __name__ == "__main__":
    sys.exit(main())

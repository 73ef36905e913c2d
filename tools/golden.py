#!/usr/bin/env python3
"""Makes and checks goldens: the numbers PyTorch computes, in files the engine is tested against.

    tools/golden.py ops tests/golden/ops.safetensors          every op and gradient alone, in float64
    tools/golden.py verify FILE...                            reads files of either kind, recomputes them, checks the gradients
                                                              by finite differences

Needs the packages of tools/requirements.txt.
"""

import argparse
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from simsiam_torch import golden_ops, tensor_file


def make_ops(args):
    count = golden_ops.make(args.file)
    print(f"{args.file}: {count} cases, {args.file.stat().st_size} bytes")
    return True


def verify(args):
    """Recomputes files; true if all agree."""
    return all([verify_file(path, args.verbose) for path in args.files])


def verify_file(path, verbose):
    tensors, metadata = tensor_file.read(path)
    kind = metadata.get("kind")
    if kind == "simsiam-ops":
        return verify_ops(path, tensors, metadata, verbose)
    print(f"{path}: unknown kind {kind!r}")
    return False


def verify_ops(path, tensors, metadata, verbose):
    # Another PyTorch build may order sums differently: rounding of float64, amplified where a norm or a spread is tiny.
    results = golden_ops.verify(tensors, metadata)
    bad = [(c, e, d) for c, e, d in results if e > 1e-9 or (d or 0.0) > 1e-6]
    for case, error, differences in results if verbose else bad:
        checked = "" if differences is None else f", finite differences {differences:.1e}"
        print(f"  {case}: recomputed within {error:.1e}{checked}")
    print(f"{path}: {len(results)} cases, {'FAIL' if bad else 'pass'}")
    return not bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("ops", help="write the op table's goldens")
    command.add_argument("file", type=pathlib.Path)
    command.set_defaults(run=make_ops)
    command = commands.add_parser("verify", help="recompute golden files")
    command.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILE")
    command.add_argument("--verbose", action="store_true", help="print every case, not only those that fail")
    command.set_defaults(run=verify)
    args = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation on every machine
    sys.exit(0 if args.run(args) else 1)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Makes and checks goldens: the numbers PyTorch computes, in files the engine is tested against.

    tools/golden.py ops tests/golden/ops.safetensors     every op and gradient alone, in float64
    tools/golden.py shapes tests/golden/shapes.safetensors   the same at awkward and large shapes, as samples
    tools/golden.py small tests/golden                   the committed trajectories (each under 1 MB)
    tools/golden.py full DIR                             ResNet-18 and ResNet-50 at full width (hundreds of MB)
    tools/golden.py trajectory FILE --arch custom --block basic --depths 1,1,2,1 --width 8 --stem cifar ...
    tools/golden.py verify FILE...                       reads files of either kind, recomputes them, and checks their gradients
                                                         by finite differences

Needs the packages of tools/requirements.txt. tests/golden/README.md describes the files.
"""

import argparse
import dataclasses
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from simsiam_torch import golden_ops, golden_shapes, golden_trajectory, tensor_file
from simsiam_torch.golden_trajectory import Recipe
from simsiam_torch.networks import ARCHS, Backbone, add_backbone_arguments, backbone_from

# name -> (backbone, recipe, other arguments of golden_trajectory.make)
SMALL = {
    "basic-cifar-2layer": (
        Backbone("custom", "basic", (1, 2, 1), 8, "cifar"),
        Recipe(image_size=16, batch=7, steps=4, dim=64, pred_dim=16, projector_layers=2, weight_decay=5e-4),
        dict(seed=11, frozen_bias=False),
    ),
    "basic-imagenet-3layer": (
        Backbone("custom", "basic", (1, 2, 1, 1), 6, "imagenet"),
        Recipe(image_size=21, batch=5, steps=3, dim=64, pred_dim=24, projector_layers=3, predictor_lr=0.003),
        dict(seed=12, frozen_bias=False, hidden=40),
    ),
    "bottleneck-imagenet-3layer": (
        Backbone("custom", "bottleneck", (1, 1, 1, 1), 5, "imagenet"),
        Recipe(image_size=20, batch=6, steps=3, dim=64, pred_dim=16, projector_layers=3, predictor_lr=0.005),
        # Seeds where PyTorch's bfloat16 run is by chance right about an early loss leave no room for any other (13: 4e-4 off in
        # step 1, 7e-3 in step 2): tolerances are multiples of that error.
        dict(seed=15, frozen_bias=True, hidden=24),
    ),
    "bottleneck-cifar-2layer": (
        Backbone("custom", "bottleneck", (2, 1, 1), 8, "cifar"),
        Recipe(image_size=17, batch=9, steps=3, dim=64, pred_dim=16, projector_layers=2, momentum=0.8, weight_decay=0.01),
        dict(seed=14, frozen_bias=True),
    ),
}
FULL = {
    "resnet18-cifar-32px": (Backbone("resnet18", *ARCHS["resnet18"], 64, "cifar"), Recipe(image_size=32), dict(seed=21)),
    "resnet50-imagenet-64px": (Backbone("resnet50", *ARCHS["resnet50"], 64, "imagenet"), Recipe(image_size=64), dict(seed=22)),
}


def make_ops(args):
    count = golden_ops.make(args.file)
    print(f"{args.file}: {count} cases, {args.file.stat().st_size:,} bytes")
    return True


def make_shapes(args):
    count = golden_shapes.make(args.file)
    print(f"{args.file}: {count} cases, {args.file.stat().st_size:,} bytes")
    return True


def make_set(files):
    """The command that writes a set of trajectories into a folder."""

    def command(args):
        args.folder.mkdir(parents=True, exist_ok=True)
        for name in args.only or files:
            backbone, recipe, other = files[name]
            make_trajectory(args.folder / f"{name}.safetensors", backbone, recipe, **other)
        return True

    return command


def make_one(args):
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    backbone = backbone_from(args, args.parser)
    make_trajectory(args.file, backbone, recipe, args.seed, args.hidden, args.frozen_bias)
    return True


def make_trajectory(path, backbone, recipe, seed, hidden=None, frozen_bias=True):
    loss, err32, err16 = golden_trajectory.make(path, backbone, recipe, seed, hidden, frozen_bias)
    print(f"{path}: {path.stat().st_size:,} bytes")
    for step in range(recipe.steps):
        print(f"  step {step}: loss {loss[step]:.9f}, float32 off by {err32[step]:.1e}, bfloat16 by {err16[step]:.1e}")


def verify(args):
    """Recomputes files; true if all agree."""
    return all([verify_file(path, args.verbose) for path in args.files])


def verify_file(path, verbose):
    tensors, metadata = tensor_file.read(path)
    kinds = {"simsiam-ops": verify_ops, "simsiam-trajectory": verify_trajectory}
    if metadata.get("kind") not in kinds:
        print(f"{path}: unknown kind {metadata.get('kind')!r}")
        return False
    return kinds[metadata["kind"]](path, tensors, metadata, verbose)


def verify_ops(path, tensors, metadata, verbose):
    # Another PyTorch build may order sums differently: rounding of float64, amplified where a norm or a spread is tiny.
    module = golden_shapes if golden_shapes.is_generated(metadata) else golden_ops
    results = module.verify(tensors, metadata)
    bad = [(c, e, d) for c, e, d in results if e > 1e-9 or (d or 0.0) > 1e-6]
    for case, error, differences in results if verbose else bad:
        checked = "" if differences is None else f", finite differences {differences:.1e}"
        print(f"  {case}: recomputed within {error:.1e}{checked}")
    print(f"{path}: {len(results)} cases, {'FAIL' if bad else 'pass'}")
    return not bad


def verify_trajectory(path, tensors, metadata, verbose):
    errors = golden_trajectory.verify(tensors, metadata)
    differences = golden_trajectory.gradient_check(tensors, metadata)
    passed = max(errors.values()) <= 1.0 and differences <= 1e-3
    if verbose or not passed:
        for what, error in errors.items():
            print(f"  {what}: recomputed within {error:.1e} of the tolerance")
    print(f"{path}: recomputed, gradients against finite differences {differences:.1e}, {'pass' if passed else 'FAIL'}")
    return passed


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("ops", help="write the op table's goldens")
    command.add_argument("file", type=pathlib.Path)
    command.set_defaults(run=make_ops)

    command = commands.add_parser("shapes", help="write the op table's goldens at awkward and large shapes")
    command.add_argument("file", type=pathlib.Path)
    command.set_defaults(run=make_shapes)

    for name, files, what in (("small", SMALL, "committed"), ("full", FULL, "full-width")):
        command = commands.add_parser(name, help=f"write the {what} trajectories")
        command.add_argument("folder", type=pathlib.Path)
        command.add_argument("--only", nargs="+", choices=list(files), help="only these")
        command.set_defaults(run=make_set(files))

    command = commands.add_parser("trajectory", help="write one trajectory")
    command.add_argument("file", type=pathlib.Path)
    add_backbone_arguments(command)
    for field in dataclasses.fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        command.add_argument(option, type=field.type, default=field.default, help=f"default {field.default}")
    command.add_argument("--hidden", type=int, help="width of the projector's hidden layers (default: the backbone's features)")
    command.add_argument("--no-frozen-bias", dest="frozen_bias", action="store_false", help="no bias in front of the last batch norm")
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(run=make_one, parser=command)

    command = commands.add_parser("verify", help="recompute golden files")
    command.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILE")
    command.add_argument("--verbose", action="store_true", help="print every figure, not only those that fail")
    command.set_defaults(run=verify)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    torch.set_num_threads(1)  # one order of summation on every machine
    sys.exit(0 if arguments.run(arguments) else 1)

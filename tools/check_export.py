#!/usr/bin/env python3
"""Checks a backbone the engine exported: torchvision loads it with strict=True and computes the same pooled features.

    tools/check_export.py backbone.safetensors --arch resnet50
    tools/check_export.py backbone.safetensors --arch custom --block basic --depths 1,1,1,1 --width 16 --stem cifar \\
        --features features.safetensors

features.safetensors comes from the engine: `input` [N,H,W,3], normalised float32 images, and `features` [N,F], what the engine's
backbone in evaluation mode makes of them. Exit code 1 when a tensor is missing, left over, or of another shape, or a feature
differs by more than --tolerance times the largest feature.
"""

import argparse
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from simsiam_torch import tensor_file
from simsiam_torch.networks import add_backbone_arguments, backbone_from, resnet


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path, help="exported backbone")
    add_backbone_arguments(parser)
    parser.add_argument("--features", type=pathlib.Path, help="safetensors with `input` and `features`")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="default 1e-4")
    args = parser.parse_args()
    return args, backbone_from(args, parser)


def summary(what, names):
    """A list with one sentence about `names`, or none."""
    first = ", ".join(sorted(names)[:3])
    return [f"{len(names)} {what}: {first}{', ...' if len(names) > 3 else ''}"] if names else []


def load(path, backbone):
    """The exported backbone as a torchvision model in evaluation mode."""
    tensors, _ = tensor_file.read(path)
    left_over = sorted(name for name in tensors if name.startswith("fc."))
    if left_over:
        sys.exit(f"{path}: a backbone without its classifier expected, found {', '.join(left_over)}")
    # An identity stands where torchvision's fc is, so strict=True means: every tensor but fc, and no other.
    model = resnet(backbone)
    expected = model.state_dict()
    faults = summary("missing", expected.keys() - tensors.keys()) + summary("not of this network", tensors.keys() - expected.keys())
    for name in sorted(expected.keys() & tensors.keys()):
        if expected[name].shape != tensors[name].shape:
            faults.append(f"{name} is {list(tensors[name].shape)}, expected {list(expected[name].shape)}")
    if faults:
        sys.exit(f"{path}: " + "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else ""))
    model.load_state_dict(tensors, strict=True)
    wrong = [n for n, t in model.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
    if wrong:
        sys.exit(f"{path}: not finite: {', '.join(wrong)}")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{path}: strict=True, {len(tensors)} tensors, {parameters:,} parameters")
    return model.eval()


def compare(model, backbone, path, tolerance):
    """Whether the model's pooled features equal those in `path`."""
    tensors, _ = tensor_file.read(path)
    for name, rank, last in (("input", 4, 3), ("features", 2, backbone.features)):
        if name not in tensors:
            sys.exit(f"{path}: no tensor `{name}`, found {', '.join(sorted(tensors))}")
        if tensors[name].dim() != rank or tensors[name].shape[-1] != last:
            sys.exit(f"{path}: `{name}` should have {rank} dimensions, the last {last}, got {list(tensors[name].shape)}")
    images, features = tensors["input"], tensors["features"].double()
    if len(images) != len(features):
        sys.exit(f"{path}: {len(images)} images but {len(features)} features")
    with torch.no_grad():
        expected = model.double()(images.double().permute(0, 3, 1, 2))
    scale = float(expected.abs().max())
    error = float((features - expected).abs().max()) / scale
    # A constant or empty feature would agree with anything; say how much there is to agree with.
    spread = float(expected.std(0, correction=0).mean()) / scale
    # Written so that a NaN fails.
    passed = error <= tolerance
    print(f"{path}: {len(images)} images of {images.shape[1]}x{images.shape[2]}, features up to {scale:.3g} (spread {spread:.2g} of that)")
    print(f"  largest difference {error:.2e} of the largest feature, tolerance {tolerance:.0e}: {'pass' if passed else 'FAIL'}")
    return passed


def main():
    args, backbone = parse_args()
    model = load(args.file, backbone)
    if args.features and not compare(model, backbone, args.features, args.tolerance):
        sys.exit(1)


if __name__ == "__main__":
    main()

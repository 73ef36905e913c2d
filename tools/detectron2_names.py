#!/usr/bin/env python3
"""Writes tests/fixtures/detectron2-names/: the name and shape of every parameter and buffer of detectron2's ResNets with norm="BN".

detectron2 is not on PyPI. Its module tree (detectron2/modeling/backbone/resnet.py: BasicStem, BasicBlock, BottleneckBlock, ResNet; a
Conv2d carries its batch norm as `.norm`) is stated here in a few lines. `--check DIR` builds the same networks with detectron2's own
classes from a checkout in DIR and compares.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from simsiam_torch.networks import ARCHS, Backbone

FOLDER = pathlib.Path(__file__).parent.parent / "tests/fixtures/detectron2-names"


def tensors(backbone):
    """Name -> shape of every tensor of detectron2's ResNet without its classifier."""
    found = {}

    def conv(name, c_in, c_out, kernel):
        found[f"{name}.weight"] = [c_out, c_in, kernel, kernel]
        found.update({f"{name}.norm.{part}": [c_out] for part in ("weight", "bias", "running_mean", "running_var")})
        found[f"{name}.norm.num_batches_tracked"] = []

    c_in, expansion = backbone.width, 4 if backbone.block == "bottleneck" else 1
    conv("stem.conv1", 3, c_in, 7)
    for stage, depth in enumerate(backbone.depths):
        width = backbone.width * 2**stage
        c_out = width * expansion
        for block in range(depth):
            name = f"res{stage + 2}.{block}"
            if c_in != c_out:
                conv(f"{name}.shortcut", c_in, c_out, 1)
            if expansion == 4:
                conv(f"{name}.conv1", c_in, width, 1)
                conv(f"{name}.conv2", width, width, 3)
                conv(f"{name}.conv3", width, c_out, 1)
            else:
                conv(f"{name}.conv1", c_in, c_out, 3)
                conv(f"{name}.conv2", c_out, c_out, 3)
            c_in = c_out
    return found


def detectron2_network(backbone):
    """detectron2's own ResNet; needs detectron2 on the path."""
    from detectron2.modeling.backbone import resnet

    bottleneck = backbone.block == "bottleneck"
    kind = resnet.BottleneckBlock if bottleneck else resnet.BasicBlock
    stages, c_in = [], backbone.width
    for stage, depth in enumerate(backbone.depths):
        width = backbone.width * 2**stage
        c_out = width * (4 if bottleneck else 1)
        options = {"bottleneck_channels": width, "stride_in_1x1": False} if bottleneck else {}
        strides = [1 if stage == 0 else 2] + [1] * (depth - 1)
        stages.append(
            resnet.ResNet.make_stage(
                kind, depth, stride_per_block=strides, in_channels=c_in, out_channels=c_out, norm="BN", **options
            )
        )
        c_in = c_out
    return resnet.ResNet(resnet.BasicStem(3, backbone.width, "BN"), stages)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=pathlib.Path, metavar="DIR", help="a checkout of detectron2 to compare with")
    args = parser.parse_args()
    if args.check:
        sys.path.insert(0, str(args.check))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for arch in ("resnet18", "resnet34", "resnet50", "resnet101"):
        backbone = Backbone(arch, *ARCHS[arch])
        found = tensors(backbone)
        if args.check:
            theirs = {name: list(tensor.shape) for name, tensor in detectron2_network(backbone).state_dict().items()}
            if found != theirs:
                sys.exit(f"{arch}: these differ: {sorted(set(found.items() ^ theirs.items()))[:5]}")
            print(f"{arch}: {len(found)} tensors, as detectron2's own")
        (FOLDER / f"{arch}.txt").write_text("".join(f"{name} {shape}\n" for name, shape in sorted(found.items())))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes tests/fixtures/export/outputs.safetensors: what onnxruntime computes with tiny.onnx there, and PyTorch with tiny.pth.

The files themselves come from the engine, by a test: SIMSIAM_WRITE_FIXTURES=1 cargo test --test export fixtures. Tensors of the
result: `input` [N,H,W,3], random images; `features`, `projection`, `prediction` by onnxruntime; `torch_features` by torchvision's
network in float64.
"""

import argparse
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import check_export
from simsiam_torch import tensor_file
from simsiam_torch.networks import Backbone

FOLDER = pathlib.Path(__file__).parent.parent / "tests/fixtures/export"
# As in tests/export.rs.
BACKBONE, SIZE, IMAGES = Backbone("custom", "bottleneck", (2, 1), 5), 37, 3


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    images = torch.randn(IMAGES, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(4))
    nchw = np.ascontiguousarray(images.permute(0, 3, 1, 2).numpy())
    compute = {
        name: load(argparse.Namespace(file=FOLDER / file, detectron2=None), BACKBONE)
        for name, load, file in (
            ("onnx", check_export.load_onnx, "tiny.onnx"),
            ("torch", check_export.load_torchvision, "tiny.pth"),
            ("detectron2", check_export.load_detectron2, "tiny.pkl"),
        )
    }
    outputs = {name: value.float() for name, value in compute["onnx"](nchw).items()}
    features = compute["torch"](nchw)["features"]
    difference = float((features - outputs["features"]).abs().max() / features.abs().max())
    print(f"onnxruntime and PyTorch differ by {difference:.1e} of the largest feature")
    if not (difference < 1e-5 and torch.equal(features, compute["detectron2"](nchw)["features"])):
        sys.exit("the three files do not hold the same network")
    outputs |= {"input": images, "torch_features": features}
    tensor_file.write(FOLDER / "outputs.safetensors", outputs, {"made_by": "tools/export_fixtures.py"})


if __name__ == "__main__":
    main()

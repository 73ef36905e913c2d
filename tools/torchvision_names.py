#!/usr/bin/env python3
"""Writes tests/fixtures/torchvision-names/: the name and shape of every tensor of torchvision's ResNets, without `fc`."""

import pathlib

import torch
import torchvision

FOLDER = pathlib.Path(__file__).parent.parent / "tests/fixtures/torchvision-names"


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    for arch in ("resnet18", "resnet34", "resnet50", "resnet101"):
        with torch.device("meta"):
            model = getattr(torchvision.models, arch)()
        model.fc = torch.nn.Identity()
        parameters = sum(p.numel() for p in model.parameters())
        lines = [f"# torchvision {torchvision.__version__}, {parameters} parameters"]
        lines += [f"{name} {list(tensor.shape)}" for name, tensor in model.state_dict().items()]
        (FOLDER / f"{arch}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Checks a file that the engine exported with the library it is for: it loads with strict=True and computes the same.

    tools/check_export.py backbone.safetensors --arch resnet50
    tools/check_export.py model.onnx --to onnx --arch resnet50 --features outputs.safetensors
    tools/check_export.py backbone.pth --arch custom --block basic --depths 1,1,1,1 --width 16 --stem cifar --features outputs.safetensors

outputs.safetensors comes from the engine (export --features): `input` [N,H,W,3], normalised float32 images, and what the engine makes
of them in evaluation mode: `features` [N,F], with heads `projection` and `prediction` [N,D]. Exit code 1 when a tensor is missing,
left over, or of another shape, or an output differs by more than --tolerance times its largest value.

What checks: torchvision, timm, PyTorch and onnxruntime themselves. detectron2 is not on PyPI: its file is read as its checkpointer
reads it, names and shapes are compared with those of its ResNet (detectron2_names.py), and torchvision computes the features; with
--detectron2 DIR, a checkout, detectron2's own checkpointer and ResNet do.
"""

import argparse
import pathlib
import pickle
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import detectron2_names
from simsiam_torch import tensor_file
from simsiam_torch.networks import SimSiam, add_backbone_arguments, backbone_from, resnet


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path, help="exported file")
    parser.add_argument("--to", choices=list(LOADERS), default="torchvision", help="what it was exported for")
    add_backbone_arguments(parser)
    parser.add_argument("--features", type=pathlib.Path, help="safetensors with `input` and `features`")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="default 1e-4")
    parser.add_argument("--detectron2", type=pathlib.Path, metavar="DIR", help="a checkout of detectron2")
    args = parser.parse_args()
    return args, backbone_from(args, parser)


def summary(what, names):
    """A list with one sentence about `names`, or none."""
    first = ", ".join(sorted(names)[:3])
    return [f"{len(names)} {what}: {first}{', ...' if len(names) > 3 else ''}"] if names else []


def compare_names(path, expected, found):
    """Ends the program when the tensors (name -> shape) are not those expected."""
    faults = summary("missing", expected.keys() - found.keys()) + summary("not of this network", found.keys() - expected.keys())
    for name in sorted(expected.keys() & found.keys()):
        if list(expected[name]) != list(found[name]):
            faults.append(f"{name} is {list(found[name])}, expected {list(expected[name])}")
    if faults:
        sys.exit(f"{path}: " + "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else ""))


def shapes(tensors):
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def loaded(path, model, tensors):
    """The model with these tensors, all of them and no other, in evaluation mode."""
    compare_names(path, shapes(model.state_dict()), shapes(tensors))
    model.load_state_dict(tensors, strict=True)
    return finite(path, model)


def finite(path, model):
    state = model.state_dict()
    wrong = [n for n, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
    if wrong:
        sys.exit(f"{path}: not finite: {', '.join(wrong)}")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{path}: strict=True, {len(state)} tensors, {parameters:,} parameters")
    return model.double().eval()


def read_tensors(path):
    """As people load it: safetensors, or torch.load without executing anything."""
    if path.name.endswith((".pth", ".pt", ".pth.tar")):
        return torch.load(path, weights_only=True)
    return tensor_file.read(path)[0]


def in_torch(compute):
    """What computes the outputs of NCHW float32 images, in float64."""

    def outputs(images):
        with torch.no_grad():
            return {name: value.double() for name, value in compute(torch.from_numpy(images).double()).items()}

    return outputs


def load_torchvision(args, backbone):
    # An identity stands where torchvision's fc is, so strict=True means: every tensor but fc, and no other.
    model = loaded(args.file, resnet(backbone), read_tensors(args.file))
    return in_torch(lambda images: {"features": model(images)})


def load_timm(args, backbone):
    import timm

    # Loads strictly; the second time the names are told where they are not the same.
    model = timm.create_model(backbone.arch, num_classes=0, checkpoint_path=str(args.file))
    model = loaded(args.file, model, read_tensors(args.file))
    if args.file.suffix == ".safetensors":
        print(f"  pretrained_cfg {tensor_file.read(args.file)[1]['pretrained_cfg']}")
    return in_torch(lambda images: {"features": model(images)})


def load_safetensors(args, backbone):
    tensors, _ = tensor_file.read(args.file)
    if not any(name.startswith("predictor.") for name in tensors):
        stripped = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
        model = loaded(args.file, resnet(backbone), stripped)
        return in_torch(lambda images: {"features": model(images)})
    linear = sorted(int(name.split(".")[2]) for name, t in tensors.items() if name.startswith("encoder.fc.") and t.dim() == 2)
    dim, hidden = tensors["predictor.0.weight"].shape[1], tensors["encoder.fc.0.weight"].shape[0]
    pred_dim, bias = tensors["predictor.0.weight"].shape[0], f"encoder.fc.{linear[-1]}.bias" in tensors
    model = loaded(args.file, SimSiam(backbone, dim, pred_dim, len(linear), hidden, frozen_bias=bias), tensors)

    def compute(images):
        projection = model.encoder(images)
        heads, model.encoder.fc = model.encoder.fc, torch.nn.Identity()
        features, model.encoder.fc = model.encoder(images), heads
        return {"features": features, "projection": projection, "prediction": model.predictor(projection)}

    return in_torch(compute)


def load_detectron2(args, backbone):
    with open(args.file, "rb") as file:
        content = pickle.load(file, encoding="latin1")
    if content.keys() != {"model", "__author__", "matching_heuristics"} or content["__author__"] == "Caffe2":
        sys.exit(f"{args.file}: not of detectron2's kind: {sorted(content)}, by {content.get('__author__')}")
    arrays = content["model"]
    wrong = [name for name, array in arrays.items() if type(array) is not np.ndarray]
    if wrong:
        sys.exit(f"{args.file}: no numpy arrays: {', '.join(wrong)}")
    compare_names(args.file, detectron2_names.tensors(backbone), shapes(arrays))
    if args.detectron2:
        return in_detectron2(args, backbone)
    tensors = {torchvision_name(name): torch.from_numpy(array) for name, array in arrays.items()}
    model = loaded(args.file, resnet(backbone), tensors)
    return in_torch(lambda images: {"features": model(images)})


def torchvision_name(name):
    """torchvision's name of one of detectron2's: res2.0.conv1.norm.bias is layer1.0.bn1.bias."""
    parts = name.split(".")
    stage = parts.pop(0)
    block = [] if stage == "stem" else [f"layer{int(stage.removeprefix('res')) - 1}", parts.pop(0)]
    conv, tensor = parts[0], parts[-1]
    normed = parts[1] == "norm"
    if conv == "shortcut":
        return ".".join([*block, "downsample", "1" if normed else "0", tensor])
    return ".".join([*block, conv.replace("conv", "bn") if normed else conv, tensor])


def in_detectron2(args, backbone):
    """detectron2's checkpointer loads the file into its own ResNet, within a module as a detector has it."""
    sys.path.insert(0, str(args.detectron2))
    from detectron2.checkpoint import DetectionCheckpointer

    detector = torch.nn.Module()
    detector.backbone = detectron2_names.detectron2_network(backbone)
    incompatible = DetectionCheckpointer(detector)._load_model(DetectionCheckpointer(detector)._load_file(str(args.file)))
    if incompatible.missing_keys or incompatible.unexpected_keys or incompatible.incorrect_shapes:
        sys.exit(f"{args.file}: {incompatible}")
    print("  by detectron2's own checkpointer and ResNet: nothing missing, nothing left over")
    model, last = finite(args.file, detector), f"res{len(backbone.depths) + 1}"
    return in_torch(lambda images: {"features": model.backbone(images)[last].mean((2, 3))})


def load_onnx(args, backbone):
    import onnx
    import onnxruntime

    model = onnx.load(args.file)
    onnx.checker.check_model(model, full_check=True)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    facts = {entry.key: entry.value for entry in model.metadata_props}
    print(f"{args.file}: checked by onnx {onnx.__version__}, {opsets}, {len(model.graph.node)} nodes, {len(facts)} facts ({facts.get('arch')})")
    session = onnxruntime.InferenceSession(args.file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def outputs(images):
        # Batches of several sizes: all but one image, then that one.
        parts = [session.run(None, {"images": part}) for part in (images[:-1], images[-1:])]
        return {name: torch.from_numpy(np.concatenate([part[i] for part in parts])).double() for i, name in enumerate(names)}

    return outputs


LOADERS = {
    "torchvision": load_torchvision,
    "timm": load_timm,
    "safetensors": load_safetensors,
    "detectron2": load_detectron2,
    "onnx": load_onnx,
}


def compare(outputs, backbone, path, tolerance):
    """Whether the outputs equal those in `path`."""
    tensors, _ = tensor_file.read(path)
    for name, rank, last in (("input", 4, 3), ("features", 2, backbone.features)):
        if name not in tensors:
            sys.exit(f"{path}: no tensor `{name}`, found {', '.join(sorted(tensors))}")
        if tensors[name].dim() != rank or tensors[name].shape[-1] != last:
            sys.exit(f"{path}: `{name}` should have {rank} dimensions, the last {last}, got {list(tensors[name].shape)}")
    images = tensors.pop("input")
    found = outputs(np.ascontiguousarray(images.permute(0, 3, 1, 2).numpy()))
    if found.keys() != tensors.keys():
        print(f"{path}: has {', '.join(sorted(tensors))}; the file computes {', '.join(sorted(found))}: FAIL")
        return False
    print(f"{path}: {len(images)} images of {images.shape[1]}x{images.shape[2]}")
    passed = True
    for name, expected in found.items():
        scale = float(expected.abs().max())
        error = float((tensors[name].double() - expected).abs().max()) / scale
        # A constant or empty output would agree with anything; say how much there is to agree with.
        spread = float(expected.std(0, correction=0).mean()) / scale
        good = error <= tolerance and expected.shape == tensors[name].shape  # written so that a NaN fails
        passed &= good
        print(
            f"  {name} {list(expected.shape)}, up to {scale:.3g} (spread {spread:.2g} of that): largest difference {error:.2e} of the"
            f" largest value, tolerance {tolerance:.0e}: {'pass' if good else 'FAIL'}"
        )
    return passed


def main():
    args, backbone = parse_args()
    outputs = LOADERS[args.to](args, backbone)
    if args.features and not compare(outputs, backbone, args.features, args.tolerance):
        sys.exit(1)


if __name__ == "__main__":
    main()

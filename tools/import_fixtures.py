#!/usr/bin/env python3
"""Writes tests/fixtures/import/: small files of torch.save as `simsiam-engine import` meets them.

    reference.pth.tar           a checkpoint in the layout of SimSiam's reference release, in the middle of a training: `epoch`, `arch`,
                                `state_dict` under `module.`, `optimizer` with momenta (SGD, groups with `fix_lr`)
    continuation.safetensors    what PyTorch makes of the next steps, in float64, with the errors of its own float32
    classifier-legacy.pth       a supervised ResNet in the format before PyTorch 1.6, wrapped, with an argparse.Namespace and numpy numbers
    moco.pth                    pickle protocol 5, channels_last, float16, bfloat16 and float64, two encoders and a queue
    values.safetensors          the values of the last two files, as float32 under torchvision's names

Needs the packages of tools/requirements.txt.
"""

import argparse
import collections
import copy
import pathlib
import sys

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from simsiam_torch import golden_trajectory, tensor_file
from simsiam_torch.golden_trajectory import Recipe
from simsiam_torch.networks import Backbone, SimSiam, loss_of, resnet

FOLDER = pathlib.Path(__file__).parent.parent / "tests/fixtures/import"
BACKBONE = Backbone("custom", "basic", (1, 1), 4, "cifar")
EPOCH = 3
STEPS_BEFORE, STEPS = 12, 3
RECIPE = Recipe(image_size=10, batch=6, steps=STEPS_BEFORE + STEPS, lr=0.05, predictor_lr=0.03, dim=24, pred_dim=6)


def optimiser_of(model):
    """As the reference has it: two groups, the frozen bias among the first's parameters."""
    groups = [
        {"params": model.encoder.parameters(), "fix_lr": False},
        {"params": model.predictor.parameters(), "fix_lr": True},
    ]
    optimiser = torch.optim.SGD(groups, RECIPE.lr, momentum=RECIPE.momentum, weight_decay=RECIPE.weight_decay)
    optimiser.param_groups[1]["lr"] = RECIPE.predictor_lr
    return optimiser


def train(model, optimiser, views, steps):
    """Losses of the steps."""
    dtype = next(model.parameters()).dtype
    losses = []
    for step in steps:
        z1, p1 = model(views[f"view1/{step}"].to(dtype))
        z2, p2 = model(views[f"view2/{step}"].to(dtype))
        loss = loss_of(z1, p1, z2, p2)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def continued(model, optimiser, views, dtype):
    """Losses and the last state of a copy in `dtype`."""
    model = copy.deepcopy(model).to(dtype)
    other = optimiser_of(model)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    losses = train(model, other, views, range(STEPS_BEFORE, STEPS_BEFORE + STEPS))
    return losses, model.state_dict()


def reference():
    torch.manual_seed(31)
    model = SimSiam(BACKBONE, RECIPE.dim, RECIPE.pred_dim, 3).train()
    generator = torch.Generator().manual_seed(32)
    golden_trajectory.scatter(model, generator)
    views = golden_trajectory.make_views(RECIPE, generator)
    optimiser = optimiser_of(model)
    train(model, optimiser, views, range(STEPS_BEFORE))
    wrapped = nn.DataParallel(model)
    checkpoint = {
        "epoch": EPOCH,
        "arch": "resnet_of_the_tests",
        "state_dict": wrapped.state_dict(),
        "optimizer": optimiser.state_dict(),
    }
    torch.save(checkpoint, FOLDER / "reference.pth.tar")

    names = [name for name, _ in model.named_parameters()]
    momenta = {names[i]: state["momentum_buffer"] for i, state in optimiser.state_dict()["state"].items()}
    tensors = {f"init/{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    tensors |= {f"momentum/{name}": tensor.clone() for name, tensor in momenta.items()}
    for step in range(STEPS):
        for view in (1, 2):
            tensors[f"view{view}/{step}"] = views[f"view{view}/{STEPS_BEFORE + step}"]
    losses, final = continued(model, optimiser, views, torch.float64)
    losses32, final32 = continued(model, optimiser, views, torch.float32)
    tensors |= {"loss": losses, "err32/loss": (losses - losses32).abs()}
    for name, tensor in final.items():
        tensors[f"final/{name}"] = golden_trajectory.narrow(tensor)
        if tensor.is_floating_point():
            tensors[f"err32/final/{name}"] = (final32[name].double() - tensor).norm()
    metadata = {"kind": "simsiam-continuation", "torch": torch.__version__, "steps": str(STEPS), "batch": str(RECIPE.batch)}
    metadata |= {name: str(getattr(RECIPE, name)) for name in ("image_size", "lr", "predictor_lr", "momentum", "weight_decay")}
    tensor_file.write(FOLDER / "continuation.safetensors", tensors, metadata)


def backbone(seed):
    torch.manual_seed(seed)
    net = resnet(Backbone("custom", "bottleneck", (1, 1), 2, "imagenet"))
    golden_trajectory.scatter(net, torch.Generator().manual_seed(seed + 1))
    return net


def classifier():
    net = backbone(41)
    values = {f"classifier/{name}": golden_trajectory.narrow(tensor).clone() for name, tensor in net.state_dict().items()}
    net.fc = nn.Linear(16, 3)
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    checkpoint = {
        "model": collections.OrderedDict(state),
        "args": argparse.Namespace(lr=0.1, arch="resnet", milestones=[30, 60]),
        "best_acc1": np.float64(12.5),
        "seen": {np.int64(4), 5},
        "shape": torch.Size([1, 2]),
        "dtype": torch.float32,
    }
    torch.save(checkpoint, FOLDER / "classifier-legacy.pth", _use_new_zipfile_serialization=False)
    return values


def moco():
    net = backbone(43).to(memory_format=torch.channels_last)
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.float32]
    state = collections.OrderedDict()
    for i, (name, tensor) in enumerate(net.state_dict().items()):
        tensor = tensor.to(kinds[i % 4]) if tensor.is_floating_point() else tensor.int()
        state[f"module.encoder_q.{name}"] = tensor
    values = {f"moco/{n.removeprefix('module.encoder_q.')}": widened(t) for n, t in state.items()}
    assert not state["module.encoder_q.conv1.weight"].is_contiguous()
    state["module.encoder_q.fc.0.weight"] = torch.ones(16, 16)
    state |= {name.replace("encoder_q", "encoder_k"): tensor * 0 for name, tensor in list(state.items())[:3]}
    state |= {"module.queue": torch.ones(4, 6).T, "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    parameters = nn.ParameterDict({"extra": nn.Parameter(torch.ones(2))}).state_dict()
    torch.save({"epoch": 7, "state_dict": state, "extra": parameters}, FOLDER / "moco.pth", pickle_protocol=5)
    return values


def widened(tensor):
    """As the engine has it: float32, counters int64."""
    return tensor.float().contiguous() if tensor.is_floating_point() else tensor.long()


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    reference()
    tensor_file.write(FOLDER / "values.safetensors", classifier() | moco(), {"torch": torch.__version__})
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

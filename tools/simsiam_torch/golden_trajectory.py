"""Trajectory goldens: a few SimSiam steps by PyTorch in float64, with what PyTorch's own float32 and bfloat16 runs get wrong.

One safetensors file: `init/<name>`, `view1/<step>`, `view2/<step>`, `loss`, `z_std`, `grad0/<name>`, `final/<name>`, `err32/...`,
`err16/...`. All runs start from the same float32 numbers. See tests/golden/README.md for the schema.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from . import tensor_file
from .networks import Backbone, SimSiam, loss_of, parse_depths


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that defines a trajectory besides the backbone and the seed."""

    image_size: int = 32
    batch: int = 8
    steps: int = 3
    lr: float = 0.002
    predictor_lr: float = 0.002
    momentum: float = 0.9
    weight_decay: float = 1e-4
    dim: int = 2048
    pred_dim: int = 512
    projector_layers: int = 3


@dataclasses.dataclass
class Run:
    """What one run of a trajectory produced; tensors in the run's own precision."""

    loss: torch.Tensor
    z_std: torch.Tensor
    grad0: dict
    final: dict


def build(backbone, recipe, hidden, frozen_bias):
    """The model of a trajectory, in float32."""
    return SimSiam(backbone, recipe.dim, recipe.pred_dim, recipe.projector_layers, hidden, frozen_bias)


def scatter(model, generator):
    """Moves batch norm's parameters and statistics off their initial zeros and ones, so that none of them can hide an error."""

    def uniform_(tensor, low, high):
        with torch.no_grad():
            tensor.uniform_(low, high, generator=generator)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                # A residual block's last gamma starts at zero; a small one keeps the sum of the branches tame.
                uniform_(module.weight, *((0.5, 1.5) if module.weight.any() else (0.05, 0.25)))
                uniform_(module.bias, -0.3, 0.3)
            uniform_(module.running_mean, -0.5, 0.5)
            uniform_(module.running_var, 0.5, 2.0)
            module.num_batches_tracked.fill_(6)


def make_views(recipe, generator):
    """Two views a step: the same random picture with different noise and contrast."""
    shape = (recipe.batch, 3, recipe.image_size, recipe.image_size)
    coarse = (recipe.batch, 3, max(recipe.image_size // 4, 1), max(recipe.image_size // 4, 1))
    views = {}
    for step in range(recipe.steps):
        picture = F.interpolate(torch.randn(coarse, generator=generator), shape[2:], mode="bilinear", align_corners=False)
        for view in (1, 2):
            contrast = torch.rand(recipe.batch, 3, 1, 1, generator=generator) + 0.5
            noise = torch.randn(shape, generator=generator)
            views[f"view{view}/{step}"] = picture * contrast + 0.5 * noise + 0.1 * view
    return views


def run(model, recipe, views, dtype, autocast=False):
    """Trains a copy of `model` in `dtype` (with `autocast`: bfloat16 autocast around both forwards)."""
    trained = build_like(model, dtype)
    optimiser = trained.optimiser(recipe.lr, recipe.predictor_lr, recipe.momentum, recipe.weight_decay)
    result = Run(torch.zeros(recipe.steps, dtype=torch.float64), torch.zeros(recipe.steps, dtype=torch.float64), {}, {})
    for step in range(recipe.steps):
        view1, view2 = views[f"view1/{step}"].to(dtype), views[f"view2/{step}"].to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = [*trained(view1), *trained(view2)]
        z1, p1, z2, p2 = [out.to(dtype) for out in outputs]
        loss = loss_of(z1, p1, z2, p2)
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            result.grad0 = {n: p.grad.clone() for n, p in trained.named_parameters() if p.requires_grad}
        optimiser.step()
        result.loss[step] = loss.item()
        result.z_std[step] = F.normalize(torch.cat([z1, z2]).detach(), dim=1).std(0).mean().item()
    result.final = trained.state_dict()
    return result


def build_like(model, dtype):
    """A copy of `model` in training mode with floating-point tensors in `dtype`."""
    return copy.deepcopy(model).to(dtype).train()


def make(path, backbone, recipe, seed, hidden=None, frozen_bias=True):
    """Writes one trajectory file; returns its loss curve and the errors of float32 and bfloat16 there."""
    # The networks' initialisation draws from torch's global generator.
    torch.manual_seed(seed)
    model = build(backbone, recipe, hidden, frozen_bias)
    generator = torch.Generator().manual_seed(seed + 1)
    scatter(model, generator)
    views = make_views(recipe, generator)
    truth = run(model, recipe, views, torch.float64)

    tensors = {f"init/{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    tensors |= views
    tensors |= {"loss": truth.loss, "z_std": truth.z_std}
    tensors |= {f"grad0/{name}": grad.float() for name, grad in truth.grad0.items()}
    tensors |= {f"final/{name}": narrow(tensor) for name, tensor in truth.final.items()}
    for prefix, autocast in (("err32", False), ("err16", True)):
        other = run(model, recipe, views, torch.float32, autocast)
        tensors[f"{prefix}/loss"] = (other.loss - truth.loss).abs()
        for group in ("grad0", "final"):
            for name, tensor in getattr(truth, group).items():
                if tensor.is_floating_point():
                    difference = getattr(other, group)[name].double() - tensor
                    tensors[f"{prefix}/{group}/{name}"] = difference.norm()
    tensor_file.write(path, tensors, metadata_of(backbone, recipe, seed, model))
    return truth.loss, tensors["err32/loss"], tensors["err16/loss"]


def narrow(tensor):
    """Floating-point tensors as float32, counters as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def metadata_of(backbone, recipe, seed, model):
    """The file's metadata: strings only."""
    fields = dataclasses.asdict(backbone) | dataclasses.asdict(recipe)
    fields["depths"] = ",".join(str(depth) for depth in backbone.depths)
    return {name: str(value) for name, value in fields.items()} | {
        "kind": "simsiam-trajectory",
        "dtype": "float64",
        "torch": torch.__version__,
        "features": str(backbone.features),
        "hidden": str(model.encoder.fc[0].out_features),
        "seed": str(seed),
    }


def load(tensors, metadata):
    """Backbone, recipe, model and views of a file."""
    depths = parse_depths(metadata["depths"])
    backbone = Backbone(metadata["arch"], metadata["block"], depths, int(metadata["width"]), metadata["stem"])
    recipe = Recipe(**{f.name: f.type(metadata[f.name]) for f in dataclasses.fields(Recipe)})
    init = {name.removeprefix("init/"): tensor for name, tensor in tensors.items() if name.startswith("init/")}
    last = 3 * (recipe.projector_layers - 1)
    frozen_bias = f"encoder.fc.{last}.bias" in init
    model = build(backbone, recipe, init["encoder.fc.0.weight"].shape[0], frozen_bias)
    model.load_state_dict(init, strict=True)
    return backbone, recipe, model, {n: t for n, t in tensors.items() if n.startswith("view")}


def verify(tensors, metadata):
    """Recomputes a file in float64. Returns {what: worst error relative to float32 rounding of the values}: below 1 is exact."""
    _, recipe, model, views = load(tensors, metadata)
    again = run(model, recipe, views, torch.float64)
    errors = {name: float((getattr(again, name) - tensors[name]).abs().max()) / 1e-9 for name in ("loss", "z_std")}
    for group in ("grad0", "final"):
        names = {n.removeprefix(f"{group}/") for n in tensors if n.startswith(f"{group}/")}
        if names != set(getattr(again, group)):
            raise ValueError(f"{group}: the file has other tensors than the model: {sorted(names ^ set(getattr(again, group)))}")
        errors[group] = max(
            float((narrow(t).double() - tensors[f"{group}/{n}"].double()).norm())
            / (1e-6 * float(t.double().norm()) + 1e-8 * max(t.numel(), 1) ** 0.5)
            for n, t in getattr(again, group).items()
        )
    return errors


def gradient_check(tensors, metadata, count=6):
    """Worst relative error of stored gradients of step 0 against central differences of the loss in float64.

    The targets z stay what they are at the starting point: that is what stop-gradient means.
    """
    _, _, model, views = load(tensors, metadata)
    model = build_like(model, torch.float64)
    view1, view2 = views["view1/0"].double(), views["view2/0"].double()
    with torch.no_grad():
        z1, z2 = model(view1)[0], model(view2)[0]
    generator = torch.Generator().manual_seed(1)
    parameters = dict(model.named_parameters())
    trained = [name for name in parameters if parameters[name].requires_grad]
    worst = 0.0
    for name in trained[:: max(len(trained) // count, 1)]:
        parameter, gradient = parameters[name], tensors[f"grad0/{name}"].double()
        # Along the gradient itself plus as much noise: a difference well above the kinks of the ReLUs.
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction = gradient / gradient.norm() + noise / noise.norm()
        h = 1e-7
        values = []
        with torch.no_grad():
            for step in (h, -h):
                start = parameter.clone()
                parameter.add_(direction, alpha=step)
                values.append(loss_of(z1, model(view1)[1], z2, model(view2)[1]).item())
                parameter.copy_(start)
        difference = (values[0] - values[1]) / (2 * h)
        expected = float((gradient * direction).sum())
        worst = max(worst, abs(difference - expected) / abs(expected))
    return worst

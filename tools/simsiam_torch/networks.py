"""Torchvision ResNets of any size with SimSiam's projector and predictor, and the loss."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet as tv

# name -> (block, depths)
ARCHS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
}
_BLOCKS = {"basic": tv.BasicBlock, "bottleneck": tv.Bottleneck}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """What a backbone is: enough to build it."""

    arch: str = "resnet18"
    block: str = "basic"
    depths: tuple = (2, 2, 2, 2)
    width: int = 64
    stem: str = "imagenet"

    @property
    def features(self):
        """Channels of the pooled feature."""
        return self.width * 2 ** (len(self.depths) - 1) * _BLOCKS[self.block].expansion


def add_backbone_arguments(parser):
    """The options `backbone_from` reads."""
    parser.add_argument("--arch", choices=[*ARCHS, "custom"], default="resnet18")
    parser.add_argument("--block", choices=list(_BLOCKS), help="for --arch custom")
    parser.add_argument("--depths", help="blocks in each stage, for --arch custom: 1,1,2,1")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (default 64)")
    parser.add_argument("--stem", choices=["imagenet", "cifar"], default="imagenet")


def backbone_from(args, parser):
    """The backbone that parsed options ask for."""
    if args.arch == "custom":
        if not args.block or not args.depths:
            parser.error("--arch custom needs --block and --depths")
        return Backbone("custom", args.block, parse_depths(args.depths), args.width, args.stem)
    if args.block or args.depths:
        parser.error("--block and --depths go with --arch custom")
    return Backbone(args.arch, *ARCHS[args.arch], args.width, args.stem)


def parse_depths(text):
    """"3,4,6,3" as a tuple."""
    return tuple(int(depth) for depth in text.split(","))


def resnet(backbone):
    """torchvision's ResNet, resized: state_dict names and the order of operations are torchvision's; `fc` is an identity.

    torchvision fixes four stages that start at 64 channels. Anything else is made from its own parts: `_make_layer` for the
    stages, an identity for a stage that is not wanted.
    """
    if not 1 <= len(backbone.depths) <= 4:
        raise ValueError(f"a ResNet has 1 to 4 stages, got depths {backbone.depths}")
    block, width = _BLOCKS[backbone.block], backbone.width
    net = tv.ResNet(block, [1, 1, 1, 1])
    net.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    if backbone.stem == "cifar":
        net.conv1 = nn.Conv2d(3, width, 3, stride=1, padding=1, bias=False)
        net.maxpool = nn.Identity()
    net.bn1 = nn.BatchNorm2d(width)
    net.inplanes = width
    for stage in range(4):
        layer = nn.Identity()
        if stage < len(backbone.depths):
            layer = net._make_layer(block, width * 2**stage, backbone.depths[stage], stride=1 if stage == 0 else 2)
        setattr(net, f"layer{stage + 1}", layer)
    net.fc = nn.Identity()
    _initialise(net)
    return net


def _initialise(net):
    """Torchvision's initialisation with zero_init_residual."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for module in net.modules():
        if isinstance(module, tv.BasicBlock):
            nn.init.zeros_(module.bn2.weight)
        elif isinstance(module, tv.Bottleneck):
            nn.init.zeros_(module.bn3.weight)


class SimSiam(nn.Module):
    """Encoder (backbone and projector) and predictor.

    The projector's last batch norm has no affine parameters. Nothing learns from a bias in front of it; with `frozen_bias` there
    is one that is never trained, as in published checkpoints, and it only shifts that batch norm's running mean.
    """

    def __init__(self, backbone, dim, pred_dim, projector_layers, hidden=None, frozen_bias=True):
        super().__init__()
        hidden = hidden or backbone.features
        layers, width = [], backbone.features
        for _ in range(projector_layers - 1):
            layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
            width = hidden
        last = nn.Linear(width, dim, bias=frozen_bias)
        if frozen_bias:
            last.bias.requires_grad_(False)
        self.encoder = resnet(backbone)
        self.encoder.fc = nn.Sequential(*layers, last, nn.BatchNorm1d(dim, affine=False))
        self.predictor = nn.Sequential(
            nn.Linear(dim, pred_dim, bias=False), nn.BatchNorm1d(pred_dim), nn.ReLU(inplace=True), nn.Linear(pred_dim, dim)
        )

    def forward(self, view):
        """z and p of one view."""
        z = self.encoder(view)
        return z, self.predictor(z)

    def optimiser(self, lr, predictor_lr, momentum, weight_decay, **options):
        """SGD over everything that is trained; the predictor has its own learning rate."""
        groups = [
            {"params": [p for p in self.encoder.parameters() if p.requires_grad], "lr": lr},
            {"params": list(self.predictor.parameters()), "lr": predictor_lr},
        ]
        return torch.optim.SGD(groups, lr, momentum=momentum, weight_decay=weight_decay, **options)


def loss_of(z1, p1, z2, p2):
    """The symmetric loss; no gradient reaches the targets."""
    return -0.5 * (F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean())

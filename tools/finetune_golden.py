"""Makes tests/fixtures/finetune.safetensors: a fine-tuning step by PyTorch in float64, of the whole network and from its
second stage on.

    python tools/finetune_golden.py tests/fixtures/finetune.safetensors

Tensors: `init/<name>` (torchvision's names), `images` [N,C,H,W], `labels` [N], and for each case (`whole`, `layer2`)
`<case>/loss`, `<case>/correct` (first, among the first five), `<case>/grad/<name>`, `<case>/final/<name>` (parameters and
running statistics after the step).
"""
import copy
import pathlib
import sys

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from simsiam_torch import tensor_file
from simsiam_torch.golden_trajectory import scatter
from simsiam_torch.networks import Backbone, resnet

BACKBONE = Backbone("custom", "basic", (1, 1), 3, "cifar")
CLASSES, BATCH, SIZE = 7, 6, 9
LR, HEAD_LR, MOMENTUM, WEIGHT_DECAY = 0.03, 0.2, 0.9, 1e-2
# What stands before the first trained layer.
FROZEN = {"whole": (), "layer2": ("conv1", "bn1", "layer1")}


def step(start, frozen, images, labels):
    """One step from a copy of `start`: loss, logits, gradients and the state after it."""
    model = copy.deepcopy(start).train()
    for name in frozen:
        module = getattr(model, name).eval()
        module.requires_grad_(False)
    head = list(model.fc.parameters())
    body = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("fc.")]
    groups = [{"params": body, "lr": LR}, {"params": head, "lr": HEAD_LR}]
    optimiser = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimiser.step()
    return loss.detach(), logits.detach(), gradients, model.state_dict()


def main(path):
    torch.manual_seed(3)
    model = resnet(BACKBONE)
    model.fc = nn.Linear(BACKBONE.features, CLASSES)
    generator = torch.Generator().manual_seed(4)
    scatter(model, generator)
    # What is stored is float32, so start there.
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    labels = torch.tensor([6, 0, 3, 3, 1, 5])
    tensors = {f"init/{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    tensors |= {"images": images, "labels": labels}
    model, images = model.double(), images.double()
    for case, frozen in FROZEN.items():
        loss, logits, gradients, final = step(model, frozen, images, labels)
        ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
        tensors[f"{case}/loss"] = loss
        tensors[f"{case}/correct"] = torch.stack([(ranks < 1).sum(), (ranks < 5).sum()])
        tensors |= {f"{case}/grad/{name}": gradient for name, gradient in gradients.items()}
        tensors |= {f"{case}/final/{name}": tensor.clone() for name, tensor in final.items()}
        print(f"{case}: loss {loss:.6f}, {len(gradients)} gradients, correct {tensors[f'{case}/correct'].tolist()}")
    rates = dict(lr=LR, head_lr=HEAD_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    tensor_file.write(path, tensors, {name: str(value) for name, value in rates.items()})


if __name__ == "__main__":
    main(sys.argv[1])

#!/usr/bin/env python3
"""Times PyTorch's SimSiam step on random data: what the engine's step is compared with.

One step is two forwards (one a view), the symmetric loss, backward and SGD. Images count once though each gives two views.
Random input stays on the device, so no data loading is measured.

    tools/pytorch_baseline.py --arch resnet18 --stem cifar --image-size 32 --batch 64 --threads 2 --memory-format channels_last
    tools/pytorch_baseline.py --device cuda --arch resnet50 --batch 512 --dtype bf16 --memory-format channels_last --compile
"""

import argparse
import json
import pathlib
import resource
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from simsiam_torch.networks import SimSiam, add_backbone_arguments, backbone_from, loss_of

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the clock starts (default 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="bf16: autocast, float32 master weights")
    parser.add_argument("--memory-format", choices=list(MEMORY_FORMATS), default="contiguous")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (CUDA graphs on cuda)")
    parser.add_argument("--tf32", action="store_true", help="let float32 matrix products on cuda use TF32")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--pred-dim", type=int, default=512)
    parser.add_argument("--projector-layers", type=int, choices=[2, 3], default=3)
    parser.add_argument("--hidden", type=int, help="width of the projector's hidden layers (default: the backbone's features)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    return args, backbone_from(args, parser)


def make_step(args, backbone):
    """A function that does one training step and returns the loss as a tensor."""
    torch.manual_seed(0)
    memory_format = MEMORY_FORMATS[args.memory_format]
    model = SimSiam(backbone, args.dim, args.pred_dim, args.projector_layers, args.hidden)
    model = model.to(args.device, memory_format=memory_format).train()
    optimiser = model.optimiser(0.05, 0.05, 0.9, 1e-4)
    forward = torch.compile(model, mode="reduce-overhead" if args.device == "cuda" else None) if args.compile else model
    shape = (args.batch, 3, args.image_size, args.image_size)
    view1, view2 = [torch.randn(shape, device=args.device).to(memory_format=memory_format) for _ in range(2)]

    def step():
        if args.compile and args.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
            # Outputs of a captured forward are overwritten by the next one, hence the copies then.
            first = [out.clone() if args.compile else out for out in forward(view1)]
            second = forward(view2)
        loss = loss_of(*[out.float() for out in (*first, *second)])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def timed(args, step):
    """Seconds of each timed step, and the last loss."""

    def wait():
        if args.device == "cuda":
            torch.cuda.synchronize()

    for _ in range(args.warm_up):
        step()
    seconds = []
    for _ in range(args.steps):
        wait()
        start = time.perf_counter()
        loss = step()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds, loss.item()


def report(args, seconds, loss):
    median = statistics.median(seconds)
    # Half the distance between the quartiles: one disturbed step does not move it.
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    result = {
        "framework": f"torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in ("arch", "stem", "image_size", "batch", "dtype", "memory_format", "compile", "steps")},
        "step_ms_median": 1e3 * median,
        "step_ms_min": 1e3 * min(seconds),
        "step_ms_max": 1e3 * max(seconds),
        "spread": (quartiles[2] - quartiles[0]) / 2 / median,
        "images_per_s": args.batch / median,
        "views_per_s": 2 * args.batch / median,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": loss,
    }
    if args.device == "cuda":
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return result


def main():
    args, backbone = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    elif args.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    result = report(args, *timed(args, make_step(args, backbone)))
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['framework']} on {result['device']}, {result['threads']} threads: {args.arch}, {args.stem} stem, {args.image_size} px, "
          f"batch {args.batch}, {args.dtype}, {args.memory_format}{', compiled' if args.compile else ''}")
    print(f"  step {result['step_ms_median']:.1f} ms +- {100 * result['spread']:.1f} % (min {result['step_ms_min']:.1f}, "
          f"max {result['step_ms_max']:.1f}, {args.steps} steps)")
    print(f"  {result['images_per_s']:.2f} images/s, {result['views_per_s']:.2f} views/s")
    print(f"  peak resident set {result['peak_rss_bytes'] / 1e9:.2f} GB")
    if args.device == "cuda":
        print(f"  peak device memory {result['peak_device_bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

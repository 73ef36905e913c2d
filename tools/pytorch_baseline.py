#!/usr/bin/env python3
"""Times PyTorch's SimSiam step on random data: the bar that the engine's step is held against.

One step is two forwards (one a view), the symmetric loss, backward and SGD. Images count once though each gives two views.
Random input stays on the device, so no data loading is measured. All that PyTorch has to be fast is here to be tried:
channels_last, autocast, cuDNN's exhaustive search, fused SGD, torch.compile, and the whole step in one CUDA graph.

    tools/pytorch_baseline.py --arch resnet18 --stem cifar --image-size 32 --batch 64 --threads 2 --memory-format channels_last
    tools/pytorch_baseline.py --device cuda --arch resnet50 --batch 256,64,512,largest --dtype bf16,fp16 \\
        --mode eager,graph,compile,compile-graph --narrow 2 --memory-format channels_last

Modes:
    eager            kernel by kernel
    graph            eager, the whole step captured into one CUDA graph and replayed
    compile          torch.compile of both forwards with the loss, and so of their backward pass
    compile-graph    the same, and the whole step with its optimiser in one CUDA graph
    reduce-overhead  torch.compile with its own CUDA graphs
    max-autotune     the same with Triton templates tried for every product and convolution: minutes to compile
"""

import argparse
import gc
import itertools
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
MODES = ["eager", "graph", "compile", "compile-graph", "reduce-overhead", "max-autotune"]
COMPILED = {"compile": None, "compile-graph": None, "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}
CAPTURED = ("graph", "compile-graph")
# Element type of autocast; none: float32 throughout.
DTYPES = {"f32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST = "largest"
# What a batch that is to be the largest is a multiple of, the share of the memory that it is to take (another attempt means to
# compile again), and by how much it shrinks when it does not fit after all.
BATCH_STEP, FILLED, SHRINK, TRIES = 8, 0.95, 0.95, 4


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(known):
        def parse(text):
            unknown = [word for word in text.split(",") if word not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {unknown[0]!r}")
            return text.split(",")

        return parse

    def batches(text):
        try:
            return [word if word == LARGEST else int(word) for word in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers of images, or {LARGEST}, got {text!r}") from None

    add_backbone_arguments(parser)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=batches, default=[64], help=f"one or several, with commas; {LARGEST}: what fits (default 64)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--per-round", type=int, default=1, help="steps that are started back to back and timed together (default 1)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the clock starts (default 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--mode", type=several(MODES), default=["eager"], help="one or several, with commas (default eager)")
    parser.add_argument("--compile", action="store_true", help="short for --mode compile, on cuda reduce-overhead")
    parser.add_argument("--dtype", type=several(DTYPES), default=["f32"],
                        help="one or several of f32, tf32, bf16, fp16; the last two: autocast, float32 master weights")
    parser.add_argument("--tf32", action="store_true", help="short for --dtype tf32")
    parser.add_argument("--narrow", type=int, metavar="N", help="after the first batch size only the N fastest of modes and dtypes")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="start nothing more after that time")
    parser.add_argument("--memory-format", choices=list(MEMORY_FORMATS), default="contiguous")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--pred-dim", type=int, default=512)
    parser.add_argument("--projector-layers", type=int, choices=[2, 3], default=3)
    parser.add_argument("--hidden", type=int, help="width of the projector's hidden layers (default: the backbone's features)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of text")
    args = parser.parse_args()
    if args.compile:
        args.mode = ["reduce-overhead" if args.device == "cuda" else "compile"]
    if args.tf32:
        args.dtype = ["tf32"]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    if args.device == "cpu":
        for option, value in [("--mode", set(args.mode) - {"eager", "compile"}), ("--dtype", set(args.dtype) & {"tf32", "fp16"}),
                              ("--batch", set(args.batch) & {LARGEST})]:
            if value:
                parser.error(f"{option} {value.pop()} needs --device cuda")
    if args.steps < 1 or not 1 <= args.per_round <= args.steps:
        parser.error("--steps and --per-round: expected 1 <= per-round <= steps")
    return args, backbone_from(args, parser)


class Step:
    """A training step in one mode, element type and batch size."""

    def __init__(self, args, backbone, mode, dtype, batch):
        torch.manual_seed(0)
        self.device, self.mode = args.device, mode
        self.autocast_dtype = DTYPES[dtype]
        memory_format = MEMORY_FORMATS[args.memory_format]
        model = SimSiam(backbone, args.dim, args.pred_dim, args.projector_layers, args.hidden)
        self.model = model.to(args.device, memory_format=memory_format).train()
        self.optimiser = model.optimiser(0.05, 0.05, 0.9, 1e-4, fused=args.device == "cuda")
        # Fused SGD divides by the scale and skips infinite gradients itself: no wait for the device, which a graph could not hold.
        self.scaler = torch.amp.GradScaler(args.device) if dtype == "fp16" else None
        shape = (batch, 3, args.image_size, args.image_size)
        self.views = [torch.randn(shape, device=args.device).to(memory_format=memory_format) for _ in range(2)]
        self.loss_of_views = self._loss_of_views
        if mode in COMPILED:
            self.loss_of_views = torch.compile(self._loss_of_views, mode=COMPILED[mode], dynamic=False)
        self.run = self._run
        if mode in CAPTURED:
            self._capture(args.warm_up)

    def _loss_of_views(self, view1, view2):
        with torch.autocast(self.device, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            outputs = (*self.model(view1), *self.model(view2))
        return loss_of(*[out.float() for out in outputs])

    def _run(self):
        if COMPILED.get(self.mode):
            torch.compiler.cudagraph_mark_step_begin()
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss_of_views(*self.views)
        if self.scaler is None:
            loss.backward()
            self.optimiser.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimiser)
            self.scaler.update()
        return loss.detach()

    def _capture(self, warm_up):
        """Replaces `run` by the replay of one run, which stays in the memory that it was captured in."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(max(warm_up, 3)):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.optimiser.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._run()

        def replay():
            graph.replay()
            return loss

        self.run = replay


def timed(args, step):
    """Seconds a step in each round, and the last loss."""
    for _ in range(args.warm_up):
        step.run()
    rounds = range(args.steps // args.per_round)
    if args.device == "cpu":
        seconds = []
        for _ in rounds:
            start = time.perf_counter()
            for _ in range(args.per_round):
                loss = step.run()
            seconds.append((time.perf_counter() - start) / args.per_round)
        return seconds, loss.item()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(rounds) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        for _ in range(args.per_round):
            loss = step.run()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 / args.per_round for start, end in itertools.pairwise(events)], loss.item()


def report(args, step, mode, dtype, batch, seconds, loss):
    median = statistics.median(seconds)
    # Half the distance between the quartiles: one disturbed step does not move it.
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [median] * 3
    result = {
        "framework": f"torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in ("arch", "stem", "image_size", "memory_format", "steps", "per_round")},
        "batch": batch,
        "dtype": dtype,
        "mode": mode,
        "compile": mode in COMPILED,
        "step_ms_median": 1e3 * median,
        "step_ms_quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
        "step_ms_min": 1e3 * min(seconds),
        "step_ms_max": 1e3 * max(seconds),
        "spread": (quartiles[2] - quartiles[0]) / 2 / median,
        "images_per_s": batch / median,
        "views_per_s": 2 * batch / median,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": loss,
    }
    if args.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        # What lies there between steps, whatever the batch: weights, their gradients, momenta.
        views = sum(view.numel() * view.element_size() for view in step.views)
        result |= {
            "fixed_bytes": torch.cuda.memory_allocated() - views,
            "cudnn": torch.backends.cudnn.version(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            "device_bytes_in_use": total - free,
        }
    return result


def clean_up(args):
    """Gives back what the setting before took."""
    torch.compiler.reset()
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(args, backbone, mode, dtype, batch):
    """The report of one setting."""
    clean_up(args)
    tf32 = dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    started = time.perf_counter()
    step = Step(args, backbone, mode, dtype, batch)
    seconds, loss = timed(args, step)
    if loss != loss:
        raise ArithmeticError("the loss became NaN")
    result = report(args, step, mode, dtype, batch, seconds, loss)
    result["prepare_s"] = time.perf_counter() - started - sum(seconds) * args.per_round
    return result


def largest(args, backbone, mode, dtype, done):
    """The report of the largest batch that fits.

    Memory beside what is fixed grows in proportion to the batch: from one size it is known how many images fill the device. More
    sizes would tell it better, but each is compiled anew.
    """
    known = max((r for r in done if (r["mode"], r["dtype"]) == (mode, dtype)), key=lambda r: r["batch"], default=None)
    known = known or measure(args, backbone, mode, dtype, 64)
    clean_up(args)
    per_image = (known["peak_reserved_bytes"] - known["fixed_bytes"]) / known["batch"]
    room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    batch = (FILLED * room - known["fixed_bytes"]) / per_image
    for _ in range(TRIES):
        whole = max(int(batch) // BATCH_STEP * BATCH_STEP, BATCH_STEP)
        try:
            return measure(args, backbone, mode, dtype, whole) | {"largest": True}
        except RuntimeError as error:
            # A capture that finds no memory says so in other words than an allocation.
            if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error).lower():
                raise
            batch *= SHRINK
    raise torch.OutOfMemoryError(f"not even a batch of {whole} fits")


def describe(result):
    setting = f"batch {result['batch']}, {result['dtype']}, {result['memory_format']}, {result['mode']}"
    lines = [
        f"{setting}: step {result['step_ms_median']:.2f} ms +- {100 * result['spread']:.1f} % (min {result['step_ms_min']:.2f}, "
        f"max {result['step_ms_max']:.2f}, {result['steps']} steps)",
        f"  {result['images_per_s']:.2f} images/s, {result['views_per_s']:.2f} views/s",
        f"  peak resident set {result['peak_rss_bytes'] / 1e9:.2f} GB",
    ]
    if "peak_device_bytes" in result:
        lines.append(f"  peak device memory {result['peak_device_bytes'] / 1e9:.2f} GB, {result['peak_reserved_bytes'] / 1e9:.2f} GB reserved")
    return "\n".join(lines)


def main():
    args, backbone = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    # All of cuDNN's algorithms, not the first ten.
    torch.backends.cudnn.benchmark_limit = 0
    if not args.json:
        name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        print(f"torch {torch.__version__} on {name}, {torch.get_num_threads()} threads: {args.arch}, {args.stem} stem, {args.image_size} px", flush=True)
    started, done, failed = time.perf_counter(), [], 0
    settings = [(mode, dtype) for dtype in args.dtype for mode in args.mode]
    for number, batch in enumerate(args.batch):
        if number == 1 and args.narrow and done:
            done.sort(key=lambda r: -r["images_per_s"])
            settings = [(r["mode"], r["dtype"]) for r in done[: args.narrow]]
        for mode, dtype in settings:
            if time.perf_counter() - started > args.time_limit:
                print(f"left out for want of time: batch {batch}, {dtype}, {mode}", file=sys.stderr, flush=True)
                continue
            try:
                if batch == LARGEST:
                    result = largest(args, backbone, mode, dtype, done)
                else:
                    result = measure(args, backbone, mode, dtype, batch)
            except Exception as error:  # a compiler that fails must not end the others
                failed += 1
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                print(f"failed: batch {batch}, {dtype}, {mode}: {reason}", file=sys.stderr, flush=True)
                continue
            done.append(result)
            print(json.dumps(result) if args.json else describe(result), flush=True)
    if not done:
        sys.exit("nothing could be measured")
    if len(done) > 1 and not args.json:
        best = max(done, key=lambda r: r["images_per_s"])
        print(f"best of {len(done)}, {failed} failed:\n{describe(best)}")


if __name__ == "__main__":
    main()

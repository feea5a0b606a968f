"""Training steps of torchvision's ResNet-50 on made-up images that lie on the card: images/s by variant, a line of JSON each.

usage: torch_resnet.py VARIANT...   VARIANT is {eager,graph,compile}-{bf16,fp16}; batch 256, 224 px, channels_last, AMP
"""

import json
import sys
import time

import torch
import torchvision

BATCH = 256


def step_of(kind, precision):
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = torchvision.models.resnet50().cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
    loss_of = torch.nn.CrossEntropyLoss()
    x = torch.randn(BATCH, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    y = torch.randint(1000, (BATCH,), device="cuda")
    # A fixed scale costs less than a dynamic one: the variant that is hardest to beat.
    scale = 1024.0 if precision == "fp16" else 1.0
    forward = torch.compile(model) if kind == "compile" else model

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=dtype):
            loss = loss_of(forward(x), y)
        (loss * scale).backward()
        if scale != 1.0:
            torch._foreach_div_([p.grad for p in model.parameters()], scale)
        optimizer.step()
        return loss

    if kind == "eager":
        return step
    # Whole step in a CUDA graph.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


for variant in sys.argv[1:]:
    kind, precision = variant.rsplit("-", 1)
    begun = time.time()
    try:
        step = step_of(kind, precision)
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        made, times = time.time() - begun, []
        for _ in range(5):
            start = time.time()
            for _ in range(15):
                step()
            torch.cuda.synchronize()
            times.append((time.time() - start) / 15)
        times.sort()
        report = {"images_per_s": round(BATCH / times[2], 1), "ms": round(times[2] * 1e3, 3), "spread_ms": [round(times[0] * 1e3, 3), round(times[-1] * 1e3, 3)]}
    except Exception as error:  # one variant must not lose the others
        report, made = {"error": repr(error)[:300]}, time.time() - begun
    print(json.dumps({"program": "pytorch " + torch.__version__, "variant": variant, "batch": BATCH, **report, "seconds_before": round(made, 1)}), flush=True)
    step = None
    torch.cuda.empty_cache()

"""A training step at 32 pixels, of VICReg and of DINO: ours, and peers'.

Ours goes from a uint8 batch to the updated state, views included. A peer in PyTorch is
given its views ready-made, on which it spends nothing; its forward pass, its official
loss, backward pass and SGD with momentum are timed. stable-pretraining's JAX backend
makes its own views, which lack hue, saturation and solarization, and its projector has
no normalization.
"""

from harness import JEMJAX, Contender, Workload
from loss import official_loss
from views import photos

SIZE = 32
WIDTHS = (2048, 2048, 2048)
PROTOTYPES = 4096


def built(method, backbone, batch_size, hyper, **options):
    """A run of ours with small images, and a batch on the device."""
    from jemjax.runtime import tune_cpu

    tune_cpu()  # before jax starts
    import jax

    from jemjax.data.sources import ArraySource
    from jemjax.methods import METHODS
    from jemjax.training.config.options import PretrainConfig
    from jemjax.training.config.resolve import resolve
    from jemjax.training.run.setup import build

    images = photos(batch_size, SIZE)
    source = ArraySource(images, name="photos")
    config = PretrainConfig(
        METHODS[method](**hyper),
        backbone=backbone,
        batch_size=batch_size,
        steps=1000,
        **options,
    )
    return build(resolve(config, source), source), jax.device_put(images)


def steps_of(run, images):
    """A call that takes a step from the images to the updated state, and keeps that."""
    state = run.init()

    def call():
        nonlocal state
        state, metrics = run.step(state, images)
        assert run.step._cache_size() == 1  # compiled once
        return metrics

    return call


def jemjax(method, backbone, batch_size):
    """The step of `jemjax pretrain`, with the peers' heads and optimizer."""
    from jemjax.training.config.options import OptimizerOptions

    hyper = {"projector": WIDTHS}
    if method == "dino":
        hyper |= {"num_prototypes": PROTOTYPES, "local_views": 0}
    optimizer = OptimizerOptions("sgd", 1e-3, 1e-4, momentum=0.9)
    return steps_of(*built(method, backbone, batch_size, hyper, optimizer=optimizer))


def resnet18():
    """With the stem for small images, and features in place of classes."""
    from torch import nn
    from torchvision.models import resnet18

    network = resnet18()
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return network, 512


def vit_tiny():
    """DeiT's tiny transformer on patches of 4 x 4 pixels; the class token."""
    import torch
    from torch import nn
    from torch.nn import functional

    width, depth, heads, patch = 192, 12, 3, 4

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )

        def forward(self, x):
            n, t, _ = x.shape
            qkv = self.qkv(self.norm1(x)).view(n, t, 3, heads, width // heads)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(query, key, value)
            x = x + self.out(y.transpose(1, 2).reshape(n, t, width))
            return x + self.mlp(self.norm2(x))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, width, patch, patch)
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            count = (SIZE // patch) ** 2 + 1
            self.positions = nn.Parameter(torch.randn(1, count, width) * 0.02)
            self.blocks = nn.Sequential(*[Block() for _ in range(depth)])
            self.norm = nn.LayerNorm(width)

        def forward(self, images):
            x = self.embed(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
            return self.norm(self.blocks(x))[:, 0]

    return Transformer(), width


def torch_step(method, backbone, batch_size, compiled=False, channels_last=False):
    """Eager PyTorch on all cores, or torch.compile, of ready-made views."""
    import copy
    import os

    import torch
    from torch import nn

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features, width = {"resnet18": resnet18, "vit-tiny": vit_tiny}[backbone]()
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip((width, *WIDTHS), WIDTHS[:-1], strict=False):
        if method == "vicreg":
            layers += [nn.Linear(fan_in, fan_out), nn.BatchNorm1d(fan_out), nn.ReLU()]
        else:
            layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
    layers.append(nn.Linear(WIDTHS[-2], WIDTHS[-1], bias=False))
    network = nn.Sequential(features, *layers)
    last = nn.Linear(WIDTHS[-1], PROTOTYPES, bias=False)
    if method == "dino":
        network = nn.Sequential(network, last)
    network = network.to(memory_format=layout)
    teacher = copy.deepcopy(network).requires_grad_(False)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.9, weight_decay=1e-4)
    views = [
        torch.randn(batch_size, 3, SIZE, SIZE).contiguous(memory_format=layout)
        for _ in range(2)
    ]
    center = torch.zeros(PROTOTYPES)

    official = official_loss(method)

    def vicreg_loss():
        return official(*map(network, views)), None

    def dino_loss():
        logits = torch.stack(network(torch.cat(views)).chunk(2))
        with torch.no_grad():
            raw = teacher(torch.cat(views))
        return official(logits, torch.stack(raw.chunk(2)), center), raw.mean(0)

    forward = vicreg_loss if method == "vicreg" else dino_loss
    if compiled:
        forward = torch.compile(forward)

    def call():
        optimizer.zero_grad(set_to_none=True)
        loss, mean = forward()
        loss.backward()
        optimizer.step()
        if method == "dino":
            with torch.no_grad():
                center.mul_(0.9).add_(mean, alpha=0.1)
                torch._foreach_lerp_(list(teacher.parameters()), parameters, 0.004)
        return loss

    return call


def torch_channels_last(**sizes):
    """Convolutions at their best."""
    return torch_step(channels_last=True, **sizes)


def torch_compiled(**sizes):
    """At its best for transformers."""
    return torch_step(compiled=True, **sizes)


def stable_pretraining(method, backbone, batch_size):
    """Its compiled step, with its own views made on the device."""
    import jax
    import jax.numpy as jnp
    import optax
    import stable_pretraining.jax as spj
    from flax import nnx
    from stable_pretraining.jax.trainer import _train_step

    assert method == "vicreg"
    rngs = nnx.Rngs(0)
    if backbone == "resnet18":
        network = spj.backbone.resnet18(rngs=rngs, low_resolution=True)
    else:
        network = spj.backbone.vit_tiny(rngs=rngs, img_size=SIZE, patch_size=4)
    module = spj.Module(
        forward=spj.forward.vicreg,
        transform=spj.augment.two_view_transform(SIZE),
        backbone=network,
        projector=spj.backbone.MLP(network.embed_dim, list(WIDTHS), rngs=rngs),
        vicreg_loss=spj.VICRegLoss(),
    )
    update = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(1e-3, 0.9))
    optimizer = nnx.Optimizer(module, update, wrt=nnx.Param)
    images = jax.device_put(photos(batch_size, SIZE).astype("float32") / 255)
    return lambda: jnp.asarray(
        _train_step(module, optimizer, {"image": images})[0]["loss"]
    )


SETUPS = {
    "torch": (torch_step, ("torch", "torchvision")),
    "torch channels_last": (torch_channels_last, ("torch", "torchvision")),
    "torch.compile": (torch_compiled, ("torch", "torchvision")),
    "stable-pretraining": (stable_pretraining, ("stable-pretraining", "jax", "flax")),
}


def workload(method, backbone, batch_size, peers):
    """The step of one method with one backbone; `peers` by name, with their targets."""
    return Workload(
        name=f"step/{method}-{backbone}",
        title=(
            f"The step of {method} with {backbone} for {batch_size} images of {SIZE} x"
            f" {SIZE}: ours and stable-pretraining's from images, two views included;"
            " PyTorch's from views ready-made."
        ),
        contenders=(
            Contender("jemjax", jemjax, JEMJAX, peer=False),
            *(
                Contender(name, *SETUPS[name], targets={"jemjax": target})
                for name, target in peers.items()
            ),
        ),
        baselines=("jemjax",),
        sizes={"method": method, "backbone": backbone, "batch_size": batch_size},
        items=batch_size,
    )


WORKLOADS = (
    workload(
        "vicreg",
        "resnet18",
        32,
        {"torch channels_last": 1.2, "torch": 1.2, "stable-pretraining": 1},
    ),
    workload(
        "vicreg",
        "vit-tiny",
        64,
        {"torch": 1.15, "torch.compile": 1.1, "stable-pretraining": 1},
    ),
    workload("dino", "resnet18", 32, {"torch channels_last": 1.2}),
    workload("dino", "vit-tiny", 64, {"torch": 1.15, "torch.compile": 1.1}),
    workload("vicreg", "resnet-narrow", 256, {}),
    workload("dino", "resnet-narrow", 256, {}),
)

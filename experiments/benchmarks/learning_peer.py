"""One training in PyTorch with lightly's loss, for learning.py; run by the peers' own.

    python learning_peer.py SPEC.json IMAGES.npz OUTPUT

SPEC is what `learning.py` read off a resolved jemjax configuration: widths, views,
learning rate and momentum of every step. Nothing is chosen here. OUTPUT.npz gets the
features of the network as it began and as it ended, OUTPUT.json its losses and times.
"""

import copy
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
from lightly import loss as lightly_loss
from lightly.transforms import GaussianBlur
from lightly.transforms.solarize import RandomSolarization
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.resnet import BasicBlock, Bottleneck

BLOCKS = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}


class ResNet(nn.Module):
    """torchvision's blocks and initialization, with the widths and the stem of ours."""

    def __init__(self, stages, block, width, stem, zero_init, channels):
        super().__init__()
        block = BLOCKS[block]
        kernel, stride = {"imagenet": (7, 2), "small": (3, 1), "patch": (2, 2)}[stem]
        padding = 0 if stem == "patch" else kernel // 2
        layers = [
            nn.Conv2d(channels, width, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        if stem == "imagenet":
            layers.append(nn.MaxPool2d(3, 2, 1))
        entering = width
        for stage, count in enumerate(stages):
            planes = width * 2**stage
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                leaving = planes * block.expansion
                shortcut = None
                if stride != 1 or entering != leaving:
                    shortcut = nn.Sequential(
                        nn.Conv2d(entering, leaving, 1, stride, bias=False),
                        nn.BatchNorm2d(leaving),
                    )
                layers.append(block(entering, planes, stride, shortcut))
                entering = leaving
        self.layers = nn.Sequential(*layers)
        self.num_features = entering
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu"
                )
            elif zero_init and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_init and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images):
        """(N, C, H, W) -> (N, features)."""
        return self.layers(images).mean((2, 3))


def mlp(entering, spec):
    """Linear layers as `jemjax.models.MLPHead` has them, as torch initializes them."""
    activation = {"relu": nn.ReLU, "gelu": nn.GELU}[spec["activation"]]
    layers = []
    for width in spec["widths"][:-1]:
        layers.append(nn.Linear(entering, width, bias=spec["hidden_bias"]))
        layers += [nn.BatchNorm1d(width)] if spec["hidden_norm"] else []
        layers.append(activation())
        entering = width
    layers.append(nn.Linear(entering, spec["widths"][-1], bias=spec["output_bias"]))
    if spec["output_norm"] is not None:
        norm = nn.BatchNorm1d(spec["widths"][-1], affine=spec["output_norm"] != "plain")
        if spec["output_norm"] == "scale":
            norm.bias.requires_grad = False
        layers.append(norm)
    if spec["kernel_init"] == "truncated_normal":
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Network(nn.Module):
    """Backbone, projector, predictor and prototypes, those that the method has."""

    def __init__(self, spec):
        super().__init__()
        self.backbone = ResNet(**spec["backbone"])
        width = self.backbone.num_features
        self.projector = self.predictor = self.prototypes = None
        if spec["projector"]:
            self.projector = mlp(width, spec["projector"])
            width = spec["projector"]["widths"][-1]
        if spec["predictor"]:
            self.predictor = mlp(width, spec["predictor"])
        if spec["prototypes"]:
            self.prototypes = nn.Linear(width, spec["prototypes"], bias=False)
            if spec["method"] == "dino":
                self.prototypes = weight_norm(self.prototypes)
                scale = self.prototypes.parametrizations.weight.original0
                scale.data.fill_(1)
                scale.requires_grad = False
        self.unit_prototypes()

    def unit_prototypes(self):
        """SwAV's have unit length after each step."""
        if isinstance(self.prototypes, nn.Linear) and not hasattr(
            self.prototypes, "parametrizations"
        ):
            weight = self.prototypes.weight
            weight.data.copy_(F.normalize(weight.data, dim=1))

    def embed(self, images):
        """(N, C, H, W) -> (N, D), behind the projector."""
        features = self.backbone(images)
        return features if self.projector is None else self.projector(features)

    def score(self, embedding):
        """(N, D) -> (N, K) by the prototypes, if there are any."""
        if self.prototypes is None:
            return embedding
        return self.prototypes(F.normalize(embedding, dim=1))

    def predict(self, embedding):
        """(N, D) -> (N, D) by the predictor, if there is one."""
        return embedding if self.predictor is None else self.predictor(embedding)


def transform(view, channels):
    """A view of ours in torchvision's and lightly's operations, on Pillow images."""
    how = {"bicubic": T.InterpolationMode.BICUBIC}
    interpolation = how.get(view["interpolation"], T.InterpolationMode.BILINEAR)
    steps = []
    if view["crop_scale"] is not None:
        crop = T.RandomResizedCrop(
            view["size"], view["crop_scale"], view["crop_ratio"], interpolation
        )
        steps.append(crop)
    steps.append(T.RandomHorizontalFlip(view["flip_probability"]))
    changes = ("brightness", "contrast", "saturation", "hue")
    jitter = T.ColorJitter(**{name: view[name] for name in changes})
    steps.append(T.RandomApply([jitter], view["jitter_probability"]))
    steps.append(T.RandomGrayscale(view["grayscale_probability"]))
    if view["blur_probability"]:
        blur = GaussianBlur(prob=view["blur_probability"], sigmas=view["blur_sigma"])
        steps.append(blur)
    if view["solarize_probability"]:
        steps.append(RandomSolarization(view["solarize_probability"]))
    return T.Compose([*steps, T.ToTensor(), normalization(view, channels)])


def normalization(view, channels):
    """By the mean and the deviation of each channel."""
    numbers = [np.broadcast_to(view[name], 3) for name in ("mean", "std")]
    if channels == 1:
        numbers = [[float(np.mean(each))] for each in numbers]
    return T.Normalize(*[np.array(each, np.float32).tolist() for each in numbers])


class Views(torch.utils.data.Dataset):
    """The views of each image."""

    def __init__(self, images, transforms):
        self.images, self.transforms = images, transforms

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        array = self.images[index]
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        return [make(image) for make in self.transforms]


class Queue:
    """SwAV's: the last embeddings of each large view, the newest first."""

    def __init__(self, length, width):
        self.rows = torch.zeros(2, length, width)

    def scores(self, network):
        """The scores of both views' rows, once all of them are filled."""
        if not bool(self.rows[:, -1].any()):
            return None
        return [network.score(rows) for rows in self.rows]

    def push(self, embeddings):
        """Two views' (N, D) take the place of the oldest rows."""
        new = torch.stack([F.normalize(each, dim=1) for each in embeddings])
        self.rows = torch.cat([new, self.rows[:, : -new.shape[1]]], dim=1)


def make_loss(spec, network):
    """(embeddings of views, of the target branch, the step's number) -> the loss.

    Losses are lightly's, times what makes them equal to the official code's.
    """
    hyper, name = spec["hyper"], spec["method"]
    if name == "vicreg":
        compare = lightly_loss.VICRegLoss(
            lambda_param=hyper["invariance_weight"],
            mu_param=hyper["variance_weight"],
            nu_param=hyper["covariance_weight"],
        )
        return lambda online, target, step: compare(*online)
    if name == "barlow-twins":
        compare = lightly_loss.BarlowTwinsLoss(hyper["off_diagonal_weight"])
        return lambda online, target, step: compare(*online)
    if name == "simclr":
        compare = lightly_loss.NTXentLoss(hyper["temperature"])
        return lambda online, target, step: 2 * compare(*online)
    if name == "moco":
        size = (hyper["queue_length"], spec["projector"]["widths"][-1])
        compare = lightly_loss.NTXentLoss(hyper["temperature"], memory_bank_size=size)
        return lambda online, target, step: compare(online[0], target[0])
    if name in ("byol", "simsiam"):
        compare = lightly_loss.NegativeCosineSimilarity()

        def cosines(online, target, step):
            (p, q), (x, y) = map(network.predict, online), target
            mean = (compare(p, y) + compare(q, x)) / 2
            return mean if name == "simsiam" else 4 + 4 * mean

        return cosines
    if name == "swav":
        compare = lightly_loss.SwaVLoss(
            hyper["temperature"], hyper["num_iterations"], hyper["epsilon"]
        )
        queue = Queue(hyper["queue_length"], spec["projector"]["widths"][-1])

        def swapped(online, target, step):
            with torch.no_grad():
                of_queue = queue.scores(network)
            scores = [network.score(each) for each in online]
            value = compare(scores[:2], scores[2:], of_queue)
            if step // spec["steps_per_epoch"] >= hyper["queue_start"]:
                queue.push([each.detach() for each in online[:2]])
            return value

        return swapped
    if name == "dino":
        compare = lightly_loss.DINOLoss(
            spec["prototypes"],
            teacher_temp=hyper["teacher_temperature"],
            student_temp=hyper["student_temperature"],
            center_momentum=hyper["center_momentum"],
        )
        return lambda online, target, step: compare(
            target, [network.score(each) for each in online]
        )
    raise ValueError(f"method: got {name!r}, of which lightly has no loss")


def embed_views(network, views, together):
    """Embeddings of views, each by itself or all of one size as one batch."""
    if not together:
        return [network.embed(view) for view in views]
    features, sizes = [], {}
    for place, view in enumerate(views):
        sizes.setdefault(view.shape[-1], []).append(place)
    features = [None] * len(views)
    for places in sizes.values():
        made = network.backbone(torch.cat([views[place] for place in places]))
        for place, part in zip(places, made.chunk(len(places)), strict=True):
            features[place] = part
    made = torch.cat(features)
    if network.projector is not None:
        made = network.projector(made)
    return list(made.chunk(len(views)))


def features_of(network, images, view):
    """(N, F) of whole images, in evaluation mode."""
    network.eval()
    to_tensor = T.Compose([T.ToTensor(), normalization(view, images.shape[-1])])
    made = []
    with torch.no_grad():
        for start in range(0, len(images), 500):
            part = [to_tensor(image) for image in images[start : start + 500]]
            made.append(network.backbone(torch.stack(part)).numpy())
    network.train()
    return np.concatenate(made)


def groups_of(network, spec):
    """Parameter groups: decayed or not, and the predictor at a rate of its own."""
    groups = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 or spec["decay_all"]
            constant = name.split(".")[0] in spec["constant_rate"]
            groups.setdefault((decayed, constant), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": spec["weight_decay"] if decayed else 0.0,
            "constant": constant,
        }
        for (decayed, constant), parameters in groups.items()
    ]


def clip(network, spec):
    """The gradients' norms, each or all together."""
    if spec["clip_norm"]:
        parameters = [p for p in network.parameters() if p.grad is not None]
        each = [[p] for p in parameters] if spec["clip_each"] else [parameters]
        for group in each:
            nn.utils.clip_grad_norm_(group, spec["clip_norm"])


def train(spec, arrays, timed_steps=None):
    """Trains; with `timed_steps` only so many steps, to tell their speed."""
    torch.manual_seed(spec["seed"])
    np.random.seed(spec["seed"])
    network = Network(spec).to(memory_format=torch.channels_last)
    target = None
    if spec["momenta"]:
        target = copy.deepcopy(network)
        if spec["own_target_init"]:
            target = Network(spec).to(memory_format=torch.channels_last)
        target.predictor = None
        for parameter in target.parameters():
            parameter.requires_grad = False
    measured = target if spec["measured"] == "target" and target else network
    first = spec["views"][0]
    result = {"untrained": features_of(measured, arrays["measured"], first)}
    compare = make_loss(spec, network)
    optimizer = torch.optim.AdamW(
        groups_of(network, spec), lr=0.0, betas=(0.9, spec["b2"]), eps=1e-8
    )
    channels = arrays["train"].shape[-1]
    loader = torch.utils.data.DataLoader(
        Views(arrays["train"], [transform(view, channels) for view in spec["views"]]),
        batch_size=spec["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=len(os.sched_getaffinity(0)),
        persistent_workers=True,
        worker_init_fn=functools.partial(seed_worker, spec["seed"]),
    )
    batches = iter(endless(loader))
    rates, losses = spec["learning_rates"], []
    began = None
    total = timed_steps or len(rates)
    for step in range(total):
        views = [
            view.contiguous(memory_format=torch.channels_last) for view in next(batches)
        ]
        if step == min(5, total - 1):  # the workers run, and what is made once is
            began, begun_at = time.monotonic(), step
        seen, aimed_at = (
            [views[number] for number in spec[f"{branch}_views"]]
            for branch in ("online", "target")
        )
        online = embed_views(network, seen, spec["views_together"])
        with torch.no_grad():
            if target is None:
                other = [each.detach() for each in online]
            else:
                other = embed_views(target, aimed_at, spec["views_together"])
                other = [target.score(each) for each in other]
        value = compare(online, other, step)
        optimizer.zero_grad()
        value.backward()
        clip(network, spec)
        for name, steps in spec["frozen_steps"].items():
            if step < steps:
                for parameter in getattr(network, name).parameters():
                    parameter.grad = None
        rate = rates[min(step, len(rates) - 1)]
        for group in optimizer.param_groups:
            group["lr"] = spec["peak_rate"] if group["constant"] else rate
        optimizer.step()
        network.unit_prototypes()
        if target is not None:
            momentum = spec["momenta"][min(step, len(rates) - 1)]
            own = dict(network.named_parameters())
            with torch.no_grad():
                for name, parameter in target.named_parameters():
                    parameter.lerp_(own[name].detach(), 1 - momentum)
        losses.append(float(value))
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"step {step}: the loss is {losses[-1]}")
    seconds = time.monotonic() - began
    per_step = seconds / (total - begun_at)
    result["trained"] = features_of(measured, arrays["measured"], first)
    return result, {
        "images_per_second": spec["batch_size"] / per_step,
        "training_seconds": per_step * total,
        "loss": losses[:: max(1, total // 100)],
        "versions": {"torch": torch.__version__},
    }


def endless(loader):
    """Batches of one pass after the other, each in an order of its own."""
    while True:
        yield from loader


def seed_worker(seed, number):
    """Seeds NumPy, from which lightly draws: workers would share its numbers."""
    np.random.seed(seed * 1000 + number)
    torch.set_num_threads(1)


def main():
    """Reads what to do, and writes what came of it."""
    spec_path, arrays_path, output = sys.argv[1:]
    spec = json.loads(Path(spec_path).read_text())
    with np.load(arrays_path) as file:
        arrays = dict(file)
    features, figures = train(spec, arrays, spec.get("timed_steps"))
    np.savez(f"{output}.npz", **features)
    Path(f"{output}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()

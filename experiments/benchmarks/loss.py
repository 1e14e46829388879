"""Losses, value and gradient in float32: ours, plain JAX, PyTorch's eager mode, peers.

`official` is the published formulation in PyTorch and `plain_jax` the same in JAX, both
written from the formula. Every contender returns the value and the gradients of the
arrays that a network made, and Sinkhorn's the assignments. The float64 reference is
`plain_jax` under x64.
"""

import os

from harness import JEMJAX, Contender, Workload

TEMPERATURE, EPSILON, LAMBDA = 0.1, 0.05, 0.0051


def arrays(loss, shape):
    """What a loss is of, float32, and how many of the first have a gradient."""
    import numpy as np

    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.standard_normal(shape, dtype=np.float32)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    if loss in ("vicreg", "barlow_twins"):
        x = normal(*shape)
        return [0.8 * x + 0.3, 0.56 * (x + normal(*shape)) + 0.3], 2
    if loss == "nt_xent":
        x = normal(*shape)
        return [x, x + 0.5 * normal(*shape)], 2
    if loss == "moco":
        rows, features, queue = shape
        pair = [normal(rows, features), normal(rows, features)]
        return [*pair, unit(normal(queue, features))], 1
    if loss == "dino":
        _, rows, outputs = shape
        teacher, center = normal(2, rows, outputs), normal(outputs)
        return [0.3 * normal(*shape), 0.3 * teacher, 0.1 * center], 1
    # Cosines, of 128 dimensions.
    *rows, prototypes = shape
    scores = unit(normal(*rows, 128)) @ unit(normal(prototypes, 128)).T
    return [scores], int(loss == "swav")


def with_jax(function, loss, shape):
    """A compiled call."""
    import jax
    import jax.numpy as jnp

    inputs, count = arrays(loss, shape)
    double = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    inputs = [jnp.asarray(x, jnp.float64 if double else jnp.float32) for x in inputs]
    if count:
        function = jax.value_and_grad(function, tuple(range(count)))
    compiled = jax.jit(function).lower(*inputs).compile()

    def call():
        return compiled(*inputs)

    call.temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
    return call


def with_torch(function, loss, shape, compile=False):
    """A call in eager mode, or compiled."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    inputs, count = arrays(loss, shape)
    inputs = [torch.from_numpy(x) for x in inputs]
    if compile:
        function = torch.compile(function)
    for x in inputs[:count]:
        x.requires_grad_()

    def call():
        if not count:
            with torch.no_grad():
                return function(*inputs)
        value = function(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs[:count])

    return call


def jemjax(loss, shape):
    """Ours."""
    from jemjax import losses

    functions = {"moco": losses.info_nce}
    function = functions.get(loss) or getattr(losses, loss)
    return with_jax(function, loss, shape)


def reference(loss, shape):
    """In float64."""
    import jax

    jax.config.update("jax_enable_x64", True)
    return plain_jax(loss, shape)


def plain_jax(loss, shape):
    """The formula."""
    return with_jax(formula(loss), loss, shape)


def formula(loss):
    """As the papers write it, a function of JAX's arrays."""
    import jax
    import jax.numpy as jnp

    def off_diagonal(c):
        return jnp.sum(jnp.where(jnp.eye(len(c), dtype=bool), 0.0, c) ** 2)

    def unit(x):
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    def vicreg(x, y):
        value = 25.0 * jnp.mean((x - y) ** 2)
        for h in (x, y):
            std = jnp.sqrt(jnp.var(h, axis=0, ddof=1) + 1e-4)
            h = h - jnp.mean(h, axis=0)
            value += 12.5 * jnp.mean(jax.nn.relu(1.0 - std))
            value += off_diagonal(h.T @ h / (len(h) - 1)) / h.shape[1]
        return value

    def barlow_twins(x, y):
        x, y = (
            (h - jnp.mean(h, axis=0)) / jnp.sqrt(jnp.var(h, axis=0) + 1e-5)
            for h in (x, y)
        )
        c = x.T @ y / len(x)
        return jnp.sum((jnp.diagonal(c) - 1.0) ** 2) + LAMBDA * off_diagonal(c)

    def nt_xent(x, y):
        z = unit(jnp.concatenate([x, y]))
        logits = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, z @ z.T / TEMPERATURE)
        other = jnp.roll(jnp.arange(len(z)), len(x))
        shares = jax.nn.log_softmax(logits, axis=1)
        return -jnp.mean(shares[jnp.arange(len(z)), other])

    def moco(query, key, queue):
        query, key = unit(query), jax.lax.stop_gradient(unit(key))
        positive = jnp.sum(query * key, axis=1, keepdims=True)
        logits = jnp.concatenate([positive, query @ queue.T], axis=1) / 0.2
        return -jnp.mean(jax.nn.log_softmax(logits, axis=1)[:, 0])

    def sinkhorn(scores):
        q = jnp.exp(scores / EPSILON)
        for _ in range(3):
            q = q / jnp.sum(q, axis=0)
            q = q / jnp.sum(q, axis=1, keepdims=True)
        return q

    def pairs(targets, logits):
        shares = jax.nn.log_softmax(logits / TEMPERATURE, axis=-1)
        return sum(
            -jnp.mean(jnp.sum(target * shares[view], axis=1))
            for number, target in enumerate(targets)
            for view in range(len(logits))
            if view != number
        ) / (len(targets) * (len(logits) - 1))

    def swav(scores):
        return pairs([jax.lax.stop_gradient(sinkhorn(s)) for s in scores[:2]], scores)

    def dino(student, teacher, center):
        return pairs(jax.nn.softmax((teacher - center) / 0.04, axis=-1), student)

    return locals()[loss]


def official_loss(loss):
    """As the papers' codes compute it, a function of PyTorch's tensors."""
    import torch
    from torch.nn import functional as F

    def off_diagonal(c):
        n = len(c)
        return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().pow(2).sum()

    def vicreg(x, y):
        value = 25.0 * F.mse_loss(x, y)
        for h in (x, y):
            h = h - h.mean(dim=0)
            std = torch.sqrt(h.var(dim=0) + 1e-4)
            value = value + 12.5 * torch.mean(F.relu(1 - std))
            value = value + off_diagonal(h.T @ h / (len(h) - 1)) / h.shape[1]
        return value

    def barlow_twins(x, y):
        x, y = (F.batch_norm(h, None, None, training=True) for h in (x, y))
        c = x.T @ y / len(x)
        return (torch.diagonal(c) - 1).pow(2).sum() + LAMBDA * off_diagonal(c)

    def nt_xent(x, y):
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        itself = 1e9 * torch.eye(len(x))
        label = torch.arange(len(x))
        value = 0.0
        for a, b in ((x, y), (y, x)):
            own = a @ a.T / TEMPERATURE - itself
            logits = torch.cat([a @ b.T / TEMPERATURE, own], dim=1)
            value = value + 0.5 * F.cross_entropy(logits, label)
        return value

    def moco(query, key, queue):
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        positive = (query * key).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, query @ queue.T], dim=1) / 0.2
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))

    @torch.no_grad()
    def sinkhorn(scores):
        q = torch.exp(scores / EPSILON).t()
        prototypes, rows = q.shape
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(dim=1, keepdim=True)
            q /= prototypes
            q /= q.sum(dim=0, keepdim=True)
            q /= rows
        return (q * rows).t()

    def pairs(targets, logits):
        value, count = 0.0, 0
        for number, target in enumerate(targets):
            for view in range(len(logits)):
                if view != number:
                    shares = F.log_softmax(logits[view], dim=-1)
                    value = value + torch.sum(-target * shares, dim=-1).mean()
                    count += 1
        return value / count

    def swav(scores):
        targets = [sinkhorn(view) for view in scores[:2]]
        return pairs(targets, scores / TEMPERATURE)

    def dino(student, teacher, center):
        targets = F.softmax((teacher - center) / 0.04, dim=-1)
        return pairs(targets, student / TEMPERATURE)

    return locals()[loss]


def official(loss, shape, compile=False):
    """The published formulation, eager or compiled."""
    return with_torch(official_loss(loss), loss, shape, compile)


def official_compiled(loss, shape):
    """The same by torch.compile."""
    return official(loss, shape, compile=True)


def lightly(loss, shape):
    """Lightly's class of the loss."""
    from lightly import loss as of
    from lightly.loss.swav_loss import sinkhorn

    if loss == "swav":
        criterion = of.SwaVLoss(TEMPERATURE, 3, EPSILON)
        function = lambda s: criterion(list(s[:2]), list(s[2:])).reshape(())  # noqa: E731
    else:
        function = {
            "vicreg": of.VICRegLoss(),
            "barlow_twins": of.BarlowTwinsLoss(lambda_param=LAMBDA),
            "nt_xent": of.NTXentLoss(TEMPERATURE),
            "sinkhorn": lambda s: sinkhorn(s, 3, EPSILON),
        }[loss]
    return with_torch(function, loss, shape)


def optax(loss, shape):
    """optax.losses.ntxent, of both views' rows with labels."""
    import jax.numpy as jnp
    from optax import losses

    def nt_xent(x, y):
        labels = jnp.tile(jnp.arange(len(x)), 2)
        return losses.ntxent(jnp.concatenate([x, y]), labels, TEMPERATURE)

    return with_jax(nt_xent, loss, shape)


def ott(loss, shape):
    """ott-jax in the log domain, its default; three iterations."""
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    def sinkhorn(scores):
        solver = Sinkhorn(
            threshold=-1.0, inner_iterations=3, min_iterations=3, max_iterations=3
        )
        geometry = Geometry(cost_matrix=-scores, epsilon=EPSILON)
        return len(scores) * solver(LinearProblem(geometry)).matrix

    return with_jax(sinkhorn, loss, shape)


PACKAGES = {
    "official": ("torch",),
    "official_compiled": ("torch",),
    "lightly": ("lightly", "torch", "torchvision"),
    "optax": ("optax", "jax", "jaxlib"),
    "ott": ("ott-jax", "jax", "jaxlib"),
}


def workload(loss, shape, title, *peers, **targets):
    """One loss of one shape; `targets` by peer: how many times our time it takes."""
    setups = (official, official_compiled, lightly, optax, ott)
    named = {*peers, *targets, "official"} - {"plain_jax"}
    return Workload(
        name=f"losses/{loss}/{'x'.join(map(str, shape))}",
        title=f"{title}. How many times our time the others take.",
        contenders=(
            Contender("jemjax", jemjax, JEMJAX, peer=False),
            Contender(
                "plain_jax",
                plain_jax,
                ("jax",),
                peer=False,
                targets={"jemjax": targets.get("plain_jax", 1.0)},
            ),
            *(
                Contender(
                    setup.__name__,
                    setup,
                    PACKAGES[setup.__name__],
                    targets={"jemjax": targets.get(setup.__name__, 1.0)},
                )
                for setup in setups
                if setup.__name__ in named
            ),
        ),
        baselines=("jemjax",),
        sizes={"loss": loss, "shape": shape},
        memory=True,
        reference=reference,
    )


def of_shape(loss, name, *peers, rows, features, **targets):
    """A loss of N x D embeddings of two views."""
    title = f"{name} of {rows} x {features}"
    return workload(loss, (rows, features), title, *peers, **targets)


OTHERS = [(n, d) for n in (256, 1024, 4096) for d in (256, 2048, 8192)]
VICREG = {
    (256, 2048): {"official": 25, "lightly": 55, "official_compiled": 18},
    (256, 8192): {"official": 100, "plain_jax": 60},
    (1024, 2048): {"official": 5.5},
    (2048, 256): {"official": 2.7},
}
BARLOW = {(256, 2048): {"official": 10}, (1024, 2048): {"official": 2.1}}

WORKLOADS = (
    *(
        of_shape(loss, name, rows=n, features=d, **aims.get((n, d), {}))
        for loss, name, aims in (
            ("vicreg", "VICReg", VICREG),
            ("barlow_twins", "Barlow Twins", BARLOW),
        )
        for n, d in dict.fromkeys([*aims, *OTHERS])
    ),
    of_shape("nt_xent", "NT-Xent", rows=2048, features=128, lightly=5.5),
    of_shape("nt_xent", "NT-Xent", "lightly", rows=256, features=128, optax=60),
    *(
        of_shape("nt_xent", "NT-Xent", "lightly", rows=rows, features=128)
        for rows in (1024, 4096)
    ),
    workload(
        "sinkhorn",
        (4096, 3000),
        "Sinkhorn's three iterations for 4096 x 3000 cosines, forward only",
        lightly=4,
        ott=10,
    ),
    *(
        workload("sinkhorn", (n, k), f"Sinkhorn for {n} x {k} cosines", "lightly")
        for n, k in ((256, 300), (256, 3000), (1024, 3000), (4096, 300))
    ),
    workload(
        "swav",
        (8, 256, 3000),
        "SwAV with 2 + 6 views of 256 images and 3000 prototypes",
        "official_compiled",
        lightly=6,
    ),
    workload(
        "dino",
        (10, 64, 65536),
        "DINO with 2 + 8 views of 64 images and 65,536 outputs",
        official=7,
        official_compiled=2.2,
    ),
    workload(
        "moco",
        (256, 128, 65536),
        "MoCo's InfoNCE of 256 x 128 with a queue of 65,536",
    ),
)

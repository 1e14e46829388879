"""What share of a training step its views take: VICReg at 32 pixels."""

from harness import JEMJAX, Contender, Workload
from step import built, steps_of
from views import made_by_recipe

STEP = "the whole step"


def ours(backbone, batch_size, color=None):
    """VICReg's run with its recipe for small images, and a batch on the device."""
    from jemjax.training.config.options import ViewOptions

    return built("vicreg", backbone, batch_size, {}, views=ViewOptions(color=color))


def step(**sizes):
    """From the uint8 batch to the updated state, which is donated."""
    return steps_of(*ours(**sizes))


def faithful_views(**sizes):
    """What the step does to the batch before the network sees it, alone."""
    run, images = ours(**sizes)
    return made_by_recipe(run.recipe, images)


def fused_views(**sizes):
    """The same with color changes as one matrix an image."""
    return faithful_views(color="fused", **sizes)


def workload(backbone, batch_size, target):
    """The share for one backbone."""

    def of_views(name, setup):
        return Contender(name, setup, JEMJAX, peer=False, targets={STEP: target})

    return Workload(
        name=f"views_share/{backbone}",
        title=(
            f"VICReg's step with {backbone} for {batch_size} uint8 images of 32 x 32,"
            " from the images to the updated parameters, and its views alone: as the"
            " recipe has them, which is faithful, and fused."
        ),
        contenders=(
            Contender(STEP, step, JEMJAX, peer=False),
            of_views("views, faithful", faithful_views),
            of_views("views, fused", fused_views),
        ),
        baselines=(STEP,),
        sizes={"backbone": backbone, "batch_size": batch_size},
        items=batch_size,
        share=True,
    )


WORKLOADS = (
    workload("resnet-narrow", 256, 0.15),
    workload("resnet18", 64, 0.05),
)

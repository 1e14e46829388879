"""Programs for accelerators, lowered where there is none, and what is not in them."""

import re

import jax

PLATFORMS = ("tpu", "cuda")

# A callback has no lowering for a platform that is absent, so it is found in the trace.
_HOST_CALLS = r"\b(\w*callback|debug_print|infeed|outfeed)\["
_HOST_OPERATIONS = r"stablehlo\.(infeed|outfeed|send|recv|custom_call @\w+)"


def lowered(function, *arguments):
    """The text of a jitted function for TPU and GPU; refuses float64 and host calls."""
    calls = re.findall(_HOST_CALLS, str(function.trace(*arguments).jaxpr))
    assert not calls, f"calls of the host: {calls}"
    export = jax.export.export(function, platforms=PLATFORMS)(*arguments)
    text = export.mlir_module()
    # No custom call at all: each would be of one platform only.
    operations = re.findall(_HOST_OPERATIONS, text)
    assert not operations, f"calls of other code: {operations}"
    doubles = [line for line in text.splitlines() if "xf64>" in line]
    assert not doubles, f"float64: {doubles}"
    return text


def products(text):
    """The lines of a text that multiply matrices."""
    return re.findall(r"stablehlo\.dot_general.*", text)


def inexact(product):
    """Whether an accelerator would multiply, or sum, in less than float32."""
    exact = "precision = [HIGHEST, HIGHEST]" in product
    return not exact or re.search(r"-> tensor<(\d+x)*f32>", product) is None

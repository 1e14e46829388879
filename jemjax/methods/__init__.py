"""The methods, each in a file that is its answers to the same questions."""

from jemjax.methods.base import Defaults, Method, Optimization
from jemjax.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {method.name: method for method in (VICReg,)}

__all__ = ["METHODS", "Defaults", "Method", "Optimization", "VICReg"]

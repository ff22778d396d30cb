"""Sharpness-aware training for JAX: every method of the family, composed from parts.

A step is a perturbation, a surrogate rule, a policy and a base optimizer, put together by
`sharpness_aware`; `sam`, `wsam`, `ae_sam` and the others are such expressions with a name. See
`sam_optax.perturbations`, `sam_optax.surrogates` and `sam_optax.policies` for the parts, and
`sam_optax.training` for training steps.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from sam_optax import perturbations, policies, surrogates, training
from sam_optax._types import (
    Direction,
    Policy,
    SharpnessAwareState,
    SharpnessInfo,
    SurrogateRule,
)
from sam_optax.combinator import sharpness_aware
from sam_optax.variants import (
    ae_look_sam,
    ae_sam,
    asam,
    coupled_wsam,
    fisher_sam,
    friendly_asam,
    friendly_sam,
    gnp,
    gsam,
    look_sam,
    proportional_rho,
    sam,
    ss_sam,
    stable_asam,
    stable_sam,
    vasso,
    wsam,
)

try:
    __version__ = _version("sam_optax")
except _PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0+unknown"

__all__ = [
    "Direction",
    "Policy",
    "SharpnessAwareState",
    "SharpnessInfo",
    "SurrogateRule",
    "ae_look_sam",
    "ae_sam",
    "asam",
    "coupled_wsam",
    "fisher_sam",
    "friendly_asam",
    "friendly_sam",
    "gnp",
    "gsam",
    "look_sam",
    "perturbations",
    "policies",
    "proportional_rho",
    "sam",
    "sharpness_aware",
    "ss_sam",
    "stable_asam",
    "stable_sam",
    "surrogates",
    "training",
    "vasso",
    "wsam",
]

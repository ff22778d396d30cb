"""Sharpness-aware training for JAX: every method of the family, composed from parts.

A step is a perturbation, a surrogate rule, a policy and a base optimizer, put together by
`sharpness_aware`; `sam`, `wsam`, `ae_sam` and the others are such expressions with a name. See
`sam_optax.perturbations`, `sam_optax.surrogates` and `sam_optax.policies` for the parts,
`sam_optax.training` for training steps, and `sam_optax.diagnostics` for measuring how flat a
minimum is.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from sam_optax import diagnostics, perturbations, policies, surrogates, training
from sam_optax._method import Method
from sam_optax._types import (
    Direction,
    Estimate,
    MethodState,
    OneGradientState,
    Policy,
    SharpnessAwareState,
    SharpnessInfo,
    SurrogateRule,
)
from sam_optax.bayesian import BayesianState, bayesian_sam
from sam_optax.combinator import SharpnessAware, add_decoupled_term, sharpness_aware
from sam_optax.gradients import (
    nnx_sharpness_aware_value_and_grad,
    sharpness_aware_value_and_grad,
)
from sam_optax.losses import nnx_sharpness_aware_loss, sharpness_aware_loss
from sam_optax.masks import dynamic_mask, fisher_mask
from sam_optax.one_gradient import (
    clean_params,
    displaced_params,
    momentum_sam,
    one_gradient,
    random_weight_perturbation,
    single_step_sam,
)
from sam_optax.variants import (
    ae_look_sam,
    ae_sam,
    asam,
    coupled_wsam,
    cr_sam,
    eigen_sam,
    fisher_sam,
    friendly_asam,
    friendly_sam,
    gam,
    gnp,
    gsam,
    le_sam,
    look_sam,
    m_rwp,
    multi_step_sam,
    proportional_rho,
    r_sam,
    sagm,
    sam,
    sparse_sam,
    ss_sam,
    stable_asam,
    stable_sam,
    unified_sam,
    vasso,
    wsam,
    xsam,
    zsharp,
)

try:
    __version__ = _version("sam_optax")
except _PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0+unknown"

__all__ = [
    "BayesianState",
    "Direction",
    "Estimate",
    "Method",
    "MethodState",
    "OneGradientState",
    "Policy",
    "SharpnessAware",
    "SharpnessAwareState",
    "SharpnessInfo",
    "SurrogateRule",
    "add_decoupled_term",
    "ae_look_sam",
    "ae_sam",
    "asam",
    "bayesian_sam",
    "clean_params",
    "coupled_wsam",
    "cr_sam",
    "diagnostics",
    "displaced_params",
    "dynamic_mask",
    "eigen_sam",
    "fisher_mask",
    "fisher_sam",
    "friendly_asam",
    "friendly_sam",
    "gam",
    "gnp",
    "gsam",
    "le_sam",
    "look_sam",
    "m_rwp",
    "momentum_sam",
    "multi_step_sam",
    "nnx_sharpness_aware_loss",
    "nnx_sharpness_aware_value_and_grad",
    "one_gradient",
    "perturbations",
    "policies",
    "proportional_rho",
    "r_sam",
    "random_weight_perturbation",
    "sagm",
    "sam",
    "sharpness_aware",
    "sharpness_aware_loss",
    "sharpness_aware_value_and_grad",
    "single_step_sam",
    "sparse_sam",
    "ss_sam",
    "stable_asam",
    "stable_sam",
    "surrogates",
    "training",
    "unified_sam",
    "vasso",
    "wsam",
    "xsam",
    "zsharp",
]

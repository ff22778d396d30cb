r"""Measuring what the methods are for: curvature, sharpness, gradient noise, and the landscape.

A loss is a function ``loss_fn: params -> scalar`` of any tree of real floating-point arrays;
`mean_over_batches` makes one of a data set. It must be a deterministic function of the parameters:
dropout off, and BatchNorm frozen, that is with its running statistics, as in evaluation. With the
statistics of a batch, the loss is not a mean over examples, and its curvature is another.

Every function is pure and may be jitted; ``k`` and every ``num_...`` are static. What is called
again and again (once an epoch) should be: not jitted, the curvature compiles anew at every call.
``measure = jax.jit(lambda params: hessian_top_eigenvalues(loss_fn, params, key))``, made once.
Scalars are computed in float32 at least, in float64 for float64 parameters. Eigenvalues, trace and
density are those at parameters raised to float32, with matrix products in full precision; all else
evaluates the loss at parameters in their own dtype.

Curvature needs the extra ``pip install sam_optax[diagnostics]``. A Hessian-vector product costs
about as much as two gradients. On a CPU, XLA runs the gradient of a convolution 10 to 50 times
slower inside a compiled loop, and every loop here is compiled: for convolutional networks take a
GPU, or few examples.
"""

import types as _types

from sam_optax.diagnostics._loss import Loss, mean_over_batches
from sam_optax.diagnostics.curvature import (
    hessian_spectral_density,
    hessian_top_eigenpairs,
    hessian_top_eigenvalues,
    hessian_trace,
    hessian_vector_product,
)
from sam_optax.diagnostics.landscape import (
    filter_normalized_direction,
    loss_slice_1d,
    loss_slice_2d,
    slice_coordinates,
)
from sam_optax.diagnostics.noise import (
    GradientNormStatistics,
    gradient_norm_statistics,
    gradient_variance,
)
from sam_optax.diagnostics.sharpness import sharpness, surrogate_gap

__all__ = [
    "GradientNormStatistics",
    "Loss",
    "filter_normalized_direction",
    "gradient_norm_statistics",
    "gradient_variance",
    "hessian_spectral_density",
    "hessian_top_eigenpairs",
    "hessian_top_eigenvalues",
    "hessian_trace",
    "hessian_vector_product",
    "loss_slice_1d",
    "loss_slice_2d",
    "mean_over_batches",
    "sharpness",
    "slice_coordinates",
    "surrogate_gap",
]

for _name in __all__:
    # Where they are public: for `help`, pickles and doctests.
    if isinstance(globals()[_name], _types.FunctionType):
        globals()[_name].__module__ = __name__

r"""Which elements to perturb: masks for `sam_optax.perturbations.apply_ascent_mask`, and so for
`sparse_sam`.

A mask is made outside of the step, once in a while (once an epoch, or every few), and handed to
every ``update`` as ``ascent_mask=``; both functions may be jitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from sam_optax._checks import check_key, check_like, check_number
from sam_optax._tree import draw, upcast
from sam_optax._types import Gradient, Params
from sam_optax.diagnostics._loss import check_params, num_batches, scalar


def _largest(scores: Any, count: Any) -> Any:
    """A tree of bools, True for exactly ``count`` of the largest scores of all leaves together."""
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, scores))
    if not leaves:
        return scores
    flat = jnp.concatenate([jnp.ravel(x) for x in leaves])
    order = jnp.argsort(flat, descending=True)
    chosen = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(flat.size) < count)
    masks, start = [], 0
    for x in leaves:
        masks.append(chosen[start : start + x.size].reshape(x.shape))
        start += x.size
    return structure.unflatten(masks)


def _share(share: Any, size: Any) -> Any:
    """That share of a size, rounded down."""
    if isinstance(share, jax.core.Tracer) or isinstance(size, jax.core.Tracer):
        return jnp.floor(share * size)
    # A product such as 0.29 * 100 is a little below the integer that it means.
    return math.floor(round(float(share) * float(size), 9))


def _size(tree: Any) -> int:
    return sum(jnp.size(x) for x in jax.tree.leaves(tree))


def fisher_mask(
    loss_fn: Callable[..., Any], params: Params, *examples: Any, share: float = 0.8
) -> Any:
    r"""The elements with the largest diagonal empirical Fisher information: SSAM-F's mask.

    .. math:: F = \sum_i (\nabla \ell_i(w))^2

    Args:
        loss_fn: ``loss_fn(params, *examples) -> loss`` on a batch; it is called with one example
            at a time, as a batch of one.
        params: w.
        *examples: arrays (or trees of them) whose leading axis is that of the examples.
        share: of all elements that are kept, in (0, 1]; one minus the paper's sparsity.

    Returns:
        A tree of bools like ``params``: True for the largest ``floor(share * n)`` of all n
        elements.

    Cost: one gradient per example, one after another; a sort of all parameters.

    Raises:
        ValueError: ``share`` is outside (0, 1], there is no example, or not as many of each; the
            loss is no scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import fisher_mask
        >>> loss_fn = lambda w, x: jnp.mean(x @ w)
        >>> x = jnp.array([[1.0, -4, 0, 2], [3, 0, 1, 0]])
        >>> fisher_mask(loss_fn, jnp.zeros(4), x, share=0.5)
        Array([ True,  True, False, False], dtype=bool)

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, NeurIPS 2022.

    .. note:: Differences. The authors' code begins with an empty mask, so that its first step is
        the base optimizer's, and makes the first one after it.
    """
    check_number("fisher_mask", "share", share, high=1, open_low=True, schedule=False)
    if jax.tree.leaves(params):  # of nothing, the mask is nothing
        check_params("fisher_mask", params)
    if not jax.tree.leaves(examples):
        raise ValueError("fisher_mask: pass the examples whose gradients are to be squared.")
    num_batches("fisher_mask", examples, "examples")

    def add(total, example):
        alone = jax.tree.map(lambda x: x[None], example)
        loss = scalar("fisher_mask", lambda w: loss_fn(w, *alone))
        gradient = upcast(jax.grad(loss)(params))
        return jax.tree.map(lambda f, g: f + jnp.square(g), total, gradient), None

    fisher, _ = jax.lax.scan(add, optax.tree.zeros_like(upcast(params)), examples)
    return _largest(fisher, _share(share, _size(params)))


def dynamic_mask(
    key: jax.Array,
    grads: Gradient,
    share: float = 0.8,
    *,
    mask: Any = None,
    drop: float = 0.5,
) -> Any:
    r"""A mask that loses its elements with the smallest gradients, and grows as many at random:
    SSAM-D's.

    Args:
        key: a PRNG key, another one at every call.
        grads: a gradient, tree like the parameters.
        share: of all elements that are kept, in (0, 1]; one minus the paper's sparsity.
        mask: the mask so far; None for the first, which is random.
        drop: the share of the mask's elements to lose, in [0, 1]; the authors let it fall by a
            cosine: :math:`\tfrac12 d (1 + \cos(\pi t / T))` with d = 0.5. It may be traced.

    Returns:
        A tree of bools like ``grads``, True for ``floor(share * n)`` of all n elements (fewer where
        ``mask`` had fewer to keep). With nothing left to grow, only as many are lost as are left
        out.

    Cost: two sorts of all parameters.

    Raises:
        ValueError: ``share`` or ``drop`` is outside its range, or ``mask`` is not like ``grads``.
        TypeError: ``key`` is no key.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax import dynamic_mask
        >>> grads, mask = jnp.array([4.0, 1, 3, 2]), jnp.array([True, True, False, False])
        >>> new = dynamic_mask(jax.random.key(0), grads, 0.5, mask=mask, drop=0.5)
        >>> print(new[:2], int(new.sum()))  # one kept, one of the two others grown
        [ True False] 2

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, NeurIPS 2022.
    """
    check_key("dynamic_mask", key)
    check_number("dynamic_mask", "share", share, high=1, open_low=True, schedule=False)
    check_number("dynamic_mask", "drop", drop, high=1, schedule=False)
    random = draw(jax.random.uniform, key, grads, jnp.float32)
    size = _size(grads)
    total = _share(share, size)
    if mask is None:
        return _largest(random, total)
    check_like(mask, grads, "dynamic_mask", "mask")
    mask = jax.tree.map(lambda m: jnp.asarray(m) != 0, mask)
    left_out = size - sum(map(jnp.sum, jax.tree.leaves(mask)))
    grown = jnp.minimum(_share(drop, total), left_out)
    kept = total - grown
    # Below every score are those that are not asked for.
    active = jax.tree.map(lambda m, g: jnp.where(m, jnp.abs(g), -1), mask, upcast(grads))
    others = jax.tree.map(lambda m, x: jnp.where(m, -1, x), mask, random)
    both = _largest(active, kept), _largest(others, grown)
    return jax.tree.map(lambda m, old, new: (old & m) | (new & ~m), mask, *both)

r"""Training steps around a sharpness-aware optimizer: the plumbing, done once.

Every step takes a loss, an optimizer and one batch, and takes care of what is easily got wrong:

- Both passes see the same batch, the same mutable state and the same PRNG keys: batch normalization
  uses batch statistics in both, dropout the same mask. New running statistics come from the clean
  pass, always.
- The reported loss is the clean one; the perturbed loss and the gap stand beside it.
- A plain Optax optimizer works too. The step is then the ordinary one, and what only a second
  gradient can tell is NaN in the metrics.

Options that the steps share:

``has_aux``
    The loss returns ``(loss, aux)``.
``aux_from``
    ``"clean"`` or ``"perturbed"``: the pass that ``StepMetrics.aux`` is from. On a step that does
    not ascend it is the clean one.
``num_groups``
    m-sharpness: the batch is cut along its leading axis into that many equal groups, and each
    ascends along its own gradient, as on that many devices. Memory: as many gradients and
    perturbed parameters.
``num_microbatches``
    Full-batch accumulation: the batch (or each group) is cut into that many equal parts, and *both*
    gradients are averages over all of them, for the memory of one part's activations. It equals the
    step without it, up to rounding, for losses that are means over independent examples; batch
    normalization normalizes each part by itself, and dropout repeats its mask. The parts run in a
    loop, in which XLA's CPU backend is many times slower at convolutions.
``batch_argnums``
    Which positional arguments after ``params`` (or the model) are the batch, counted from 0. None:
    all of them. The others, and keyword arguments, go to every group and part whole.
``skip_nonfinite``
    If the clean or the perturbed gradient holds a NaN or an infinity, parameters, optimizer state,
    mutable state and step counts stay as they were, bit for bit, and ``StepMetrics.skipped`` is
    True. It reads the norms in the optimizer's ``state.info``, so that ``tx`` must not be built
    with ``info=False``. For dynamic loss scaling there is ``loss_scale=``, a keyword of every step:
    the loss is multiplied by it before, and the gradients are divided by it after differentiation.

With groups or micro-batches, auxiliary output is put together leaf by leaf: a leaf whose shape
follows the batch is concatenated, another float leaf is averaged, and any other (a counter, a PRNG
key) is that of the first part.

``optax.MultiSteps`` around a sharpness-aware optimizer would average the clean gradient over the
micro-batches, pay for a second gradient on each of them, and descend along that of the last alone;
the steps refuse it. Inside, as ``base``, it accumulates surrogate gradients: m-sharpness, one
micro-batch at a time.

On a step that does not ascend, `sharpness_aware` says what happens to the optimizer's state;
mutable state moves as on any other step, once.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax._axes import average
from sam_optax._step import (
    Options,
    Result,
    Step,
    StepMetrics,
    checked_loss,
    device_axes,
    select,
    two_gradients,
    value_and_grad,
)
from sam_optax._tree import check_number
from sam_optax.combinator import SharpnessAware

__all__ = [
    "StepMetrics",
    "esam_step",
    "host_dispatched",
    "ksam_step",
    "linen_step",
    "nnx_step",
    "two_gradient_step",
]


# --- The steps ------------------------------------------------------------------------------------


def two_gradient_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    aux_from: Literal["clean", "perturbed"] = "clean",
    num_groups: int = 1,
    num_microbatches: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[Any, Any, StepMetrics]]:
    r"""A training step on any tree of parameters.

    Args:
        loss_fn: ``loss_fn(params, *args, **kwargs) -> loss``, or ``(loss, aux)``; pure, and this
            device's own where ``tx`` has an ``axis_name``.
        tx: what `sharpness_aware` or a method returned; a chain around it, or a plain Optax
            optimizer, will do where no option needs to look inside. A chain hides ``axis_name``:
            ``metrics.loss``, and ``value`` for the optimizer, are then this device's own.
        has_aux, aux_from, num_groups, num_microbatches, batch_argnums, skip_nonfinite: see the
            module's docstring.

    Returns:
        ``step(params, opt_state, *args, loss_scale=None, **kwargs) -> (params, opt_state,
        metrics)``, to be jitted by the caller (donating params and opt_state is fine). ``metrics``
        are `StepMetrics`. Optimizers that ask for ``value``, ``grad`` or ``value_fn`` get them.

    Raises:
        ValueError, TypeError: an option out of range; when the step is traced, a loss that is not a
            scalar, a batch that cannot be cut, ``optax.MultiSteps`` around ``tx``.

    Cost: that of ``tx``; `never` and plain optimizers pay one gradient.

    Reduces to: the ordinary step at ``rho=0``, operation by operation the same numbers. Under
    ``jit`` XLA may fuse the two programs differently, and then they can differ by rounding.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import sam
        >>> from sam_optax.training import two_gradient_step
        >>> tx = sam(optax.sgd(0.5), rho=0.5)
        >>> step = jax.jit(two_gradient_step(lambda w, x: jnp.mean(x) * jnp.sum(w**2), tx))
        >>> w = jnp.array([1.0, 0.0])
        >>> w, state, metrics = step(w, tx.init(w), jnp.array([0.5, 1.5]))
        >>> print(w, metrics.loss, metrics.perturbed_loss)
        [-0.5  0. ] 1.0 2.25
    """
    options = Options(
        "two_gradient_step",
        has_aux,
        aux_from,
        num_groups,
        num_microbatches,
        batch_argnums,
        skip_nonfinite,
    ).checked()
    options.check_optimizer(tx)

    def step(params, opt_state, *args, loss_scale=None, **kwargs):
        loss = checked_loss(loss_fn, has_aux, kwargs, options.function)
        result = two_gradients(loss, tx, options, loss_scale).run(params, opt_state, args)
        return result.params, result.opt_state, result.metrics

    return step


def _batch_stats(aux: Any) -> Any:
    """The value under ``batch_stats`` in auxiliary output, looking into mappings and tuples."""
    if isinstance(aux, Mapping):
        if "batch_stats" in aux:
            return aux["batch_stats"]
        aux = tuple(aux.values())
    if isinstance(aux, tuple | list):
        return next((found for x in aux if (found := _batch_stats(x)) is not None), None)
    return None


def _in_containers_of(old: Any, new: Any) -> Any:
    """Running statistics in the state's own containers: a FrozenDict stays a FrozenDict."""
    paths = [[path for path, _ in jax.tree_util.tree_leaves_with_path(x)] for x in (old, new)]
    if paths[0] != paths[1]:
        raise ValueError(
            "linen_step: the `batch_stats` in the auxiliary output must have the leaves of "
            f"`state.batch_stats`, got {jax.tree.structure(new)} instead of "
            f"{jax.tree.structure(old)}."
        )
    return jax.tree.unflatten(jax.tree.structure(old), jax.tree.leaves(new))


def linen_step(
    state: Any,
    loss_fn: Callable[..., Any],
    *args: Any,
    has_aux: bool = False,
    aux_from: Literal["clean", "perturbed"] = "clean",
    num_groups: int = 1,
    num_microbatches: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    skip_nonfinite: bool = False,
    loss_scale: Any = None,
    **kwargs: Any,
) -> tuple[Any, StepMetrics]:
    r"""A training step on a Flax ``TrainState``.

    Its ``apply_gradients`` cannot forward a gradient function to the optimizer; this step can.

    Args:
        state: a ``flax.training.train_state.TrainState``, or a subclass of it.
        loss_fn: ``loss_fn(params, *args, **kwargs) -> loss``, or ``(loss, aux)``; pure. It may
            close over ``state.apply_fn`` and ``state.batch_stats``.
        *args: the batch, and whatever else the loss takes.
        has_aux, aux_from, num_groups, num_microbatches, batch_argnums, skip_nonfinite, loss_scale:
            see the module's docstring.
        **kwargs: keyword arguments of the loss.

    Returns:
        ``(state, metrics)``: ``params``, ``opt_state`` and ``step`` are new. If the state has a
        field ``batch_stats`` and the clean pass's ``aux`` holds such a key, as the second output of
        ``apply(..., mutable=["batch_stats"])`` does, alone or within tuples and dictionaries, the
        field is new too: running statistics move once per step. Jit it, or the function that calls
        it.

    Raises:
        ValueError, TypeError: as `two_gradient_step`.

    Cost: that of ``state.tx``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import linen as nn
        >>> from flax.training.train_state import TrainState
        >>> from sam_optax import sam
        >>> from sam_optax.training import linen_step
        >>> model = nn.Dense(1)
        >>> x, y = jnp.ones((4, 2)), jnp.zeros((4, 1))
        >>> state = TrainState.create(
        ...     apply_fn=model.apply,
        ...     params=model.init(jax.random.key(0), x)["params"],
        ...     tx=sam(optax.sgd(0.1), rho=0.05),
        ... )
        >>> @jax.jit
        ... def train_step(state, x, y):
        ...     def loss_fn(params, x, y):
        ...         return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)
        ...     return linen_step(state, loss_fn, x, y)
        >>> state, metrics = train_step(state, x, y)
        >>> print(state.step, bool(metrics.perturbed_loss > metrics.loss))
        1 True
    """
    options = Options(
        "linen_step",
        has_aux,
        aux_from,
        num_groups,
        num_microbatches,
        batch_argnums,
        skip_nonfinite,
    ).checked()
    options.check_optimizer(state.tx)
    loss = checked_loss(loss_fn, has_aux, kwargs, options.function)
    step = two_gradients(loss, state.tx, options, loss_scale)
    result = step.run(state.params, state.opt_state, args)
    changes = {"step": state.step + 1}
    stats = _batch_stats(result.clean_aux)
    if stats is not None and hasattr(state, "batch_stats"):
        changes["batch_stats"] = _in_containers_of(state.batch_stats, stats)
    if skip_nonfinite:
        changes = select(result.taken, changes, {k: getattr(state, k) for k in changes})
    new = state.replace(params=result.params, opt_state=result.opt_state, **changes)
    return new, result.metrics


def nnx_step(
    model: Any,
    optimizer: Any,
    loss_fn: Callable[..., Any],
    *args: Any,
    has_aux: bool = False,
    aux_from: Literal["clean", "perturbed"] = "clean",
    num_groups: int = 1,
    num_microbatches: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    skip_nonfinite: bool = False,
    loss_scale: Any = None,
    **kwargs: Any,
) -> StepMetrics:
    r"""A training step on a Flax NNX model, in place, as ``nnx.Optimizer.update`` works.

    The model is split before the first pass, and every pass works on a copy: both see the same
    running statistics and the same dropout keys, and no pass mutates what another reads.

    Args:
        model: an ``nnx.Module``.
        optimizer: an ``nnx.Optimizer`` for it; its ``wrt`` says which variables are parameters.
        loss_fn: ``loss_fn(model, *args, **kwargs) -> loss``, or ``(loss, aux)``. It may mutate the
            model it is given, as batch normalization and dropout do.
        *args: the batch, and whatever else the loss takes.
        has_aux, aux_from, num_groups, num_microbatches, batch_argnums, skip_nonfinite, loss_scale:
            see the module's docstring.
        **kwargs: keyword arguments of the loss.

    Returns:
        `StepMetrics`. The model's parameters, the optimizer's state and its step count are new; so
        are all other variables, as the clean pass left them: running statistics and key counts move
        once per step. Call it within ``nnx.jit``.

    Raises:
        ImportError: Flax is not installed.
        ValueError, TypeError: as `two_gradient_step`.

    Cost: that of ``optimizer.tx``.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from sam_optax import sam
        >>> from sam_optax.training import nnx_step
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
        >>> optimizer = nnx.Optimizer(model, sam(optax.sgd(0.1)), wrt=nnx.Param)
        >>> @nnx.jit
        ... def train_step(model, optimizer, x):
        ...     return nnx_step(model, optimizer, lambda model, x: jnp.mean(model(x) ** 4), x)
        >>> metrics = train_step(model, optimizer, jnp.arange(8.0).reshape(4, 2))
        >>> print(optimizer.step[...], bool(metrics.perturbed_loss > metrics.loss))
        1 True
    """
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError("nnx_step needs Flax: pip install 'sam_optax[flax]'.") from error

    options = Options(
        "nnx_step",
        has_aux,
        aux_from,
        num_groups,
        num_microbatches,
        batch_argnums,
        skip_nonfinite,
    ).checked()
    options.check_optimizer(optimizer.tx)
    graph, params, rest = nnx.split(model, optimizer.wrt, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    user_loss = checked_loss(loss_fn, has_aux, kwargs, options.function)

    def loss(params, *args):
        copy = nnx.merge(graph, params, rest, copy=True)
        value, aux = user_loss(copy, *args)
        after = nnx.as_pure(nnx.state(copy, nnx.Not(optimizer.wrt)))
        if jax.tree.structure(after) != jax.tree.structure(rest):
            raise ValueError(
                "nnx_step: the loss must leave the model the variables it has, but it added or "
                "removed some. Intermediates: call the model within `nnx.capture` in the loss, and "
                "return them as auxiliary output."
            )
        return value, (aux, after)

    opt_state = nnx.as_pure(optimizer.opt_state)
    step = two_gradients(loss, optimizer.tx, options, loss_scale)
    result = step.run(params, opt_state, args)
    new_rest = result.clean_aux[1]
    if skip_nonfinite:
        new_rest = select(result.taken, new_rest, rest)
    nnx.update(model, result.params, new_rest)
    nnx.update(optimizer.opt_state, nnx.state(result.opt_state))
    optimizer.step[...] += jnp.asarray(result.taken, optimizer.step[...].dtype)
    return result.metrics._replace(aux=result.metrics.aux[0])


# --- Dispatch from the host -----------------------------------------------------------------------

_AHEAD = 256


def host_dispatched(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    aux_from: Literal["clean", "perturbed"] = "clean",
    num_groups: int = 1,
    num_microbatches: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    skip_nonfinite: bool = False,
    donate: bool = False,
) -> Callable[..., tuple[Any, Any, StepMetrics]]:
    r"""`two_gradient_step` that jits inside, and lets the host choose between two programs.

    XLA's CPU backend runs convolutions inside ``lax.cond`` tens of times slower than outside. Here
    the step with ascent and the step without it are programs of their own, free of ``cond``.

    Policies that do not read the gradient (`every`, `bernoulli`, `from_step` around them) are asked
    for many steps ahead at once, without waiting for the device; with ``skip_nonfinite`` the host
    reads the step count once per step. For the others, the clean gradient is a program of its own,
    and the host reads one bool per step from the device.

    Args:
        loss_fn: as for `two_gradient_step`.
        tx: what `sharpness_aware` or a method returned, itself.
        has_aux, aux_from, num_groups, num_microbatches, batch_argnums, skip_nonfinite: see the
            module's docstring.
        donate: whether params and opt_state are donated, so that their memory is used again; the
            caller must not touch the old ones then.

    Returns:
        ``step(params, opt_state, *args, loss_scale=None, **kwargs) -> (params, opt_state,
        metrics)``, with the results of `two_gradient_step`. Not to be called under ``jit``.

    Raises:
        TypeError: ``tx`` is not what `sharpness_aware` returned; the step is called under ``jit``.
        ValueError: as `two_gradient_step`.

    Cost: as `two_gradient_step`, without a ``cond``; two programs to compile.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from sam_optax import look_sam
        >>> from sam_optax.training import host_dispatched
        >>> tx = look_sam(optax.sgd(0.5), rho=0.5, k=2)
        >>> step = host_dispatched(lambda w: jnp.sum(w**2), tx)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     w, state, metrics = step(w, state)
        ...     print(bool(metrics.ascended))
        True
        False
        True
    """
    options = Options(
        "host_dispatched",
        has_aux,
        aux_from,
        num_groups,
        num_microbatches,
        batch_argnums,
        skip_nonfinite,
    ).checked()
    if not isinstance(tx, SharpnessAware):
        raise TypeError(
            "host_dispatched: `tx` must be what `sharpness_aware` or a method such as `look_sam` "
            f"returned, since its policy is asked on the host; got {type(tx).__name__}. Put what "
            "follows the ascent into its `base`."
        )
    options.check_optimizer(tx)
    sharp: SharpnessAware = tx
    if sharp.axes:
        raise ValueError(
            f"host_dispatched: `tx` averages over the mapped axes {sharp.axes}, but the host "
            "decides outside of them. Leave `axis_name` out, and use `num_groups=` for m-sharpness."
        )
    policy = sharp.policy
    donated = (0, 1) if donate else ()

    def two_passes(kwargs, loss_scale):
        loss = checked_loss(loss_fn, has_aux, kwargs, options.function)
        return two_gradients(loss, sharp, options, loss_scale)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=tuple(i + 1 for i in donated))
    def whole(ascend, params, opt_state, args, kwargs, loss_scale):
        step = two_passes(kwargs, loss_scale)
        return step.run(params, opt_state, args, np.bool_(ascend))[:3]

    @jax.jit
    def begin(params, opt_state, args, kwargs, loss_scale):
        first = two_passes(kwargs, loss_scale).start(params, args)
        gradient = first[1]
        if options.num_groups > 1:
            gradient = jax.tree.map(lambda x: jnp.mean(x, axis=0), gradient)
        return first, policy.decide(gradient, opt_state.step, opt_state.policy)[0]

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=tuple(i + 1 for i in donated))
    def end(ascend, params, opt_state, args, kwargs, loss_scale, first):
        step = two_passes(kwargs, loss_scale)
        return step.finish(params, opt_state, args, first, np.bool_(ascend))[:3]

    @jax.jit
    def look_ahead(step, state):
        def decide(state, step):
            ascend, state = policy.decide(None, step, state)
            return state, jnp.asarray(ascend)

        return jax.lax.scan(decide, state, step + jnp.arange(_AHEAD, dtype=jnp.int32))[1]

    # What the host knows without asking the device: the step count in the state it returned last.
    known: dict[str, Any] = {"array": None, "step": 0, "from": 0, "decisions": ()}

    def decided(opt_state) -> bool:
        if known["array"] is not opt_state.step:
            known.update(step=int(opt_state.step), decisions=())
        elif skip_nonfinite:  # a skipped step left the count as it was: the device has to be asked
            known["step"] = int(opt_state.step)
        at = known["step"] - known["from"]
        if not 0 <= at < len(known["decisions"]):
            decisions = look_ahead(np.int32(known["step"]), opt_state.policy)
            known.update({"from": known["step"], "decisions": np.asarray(decisions)})
            at = 0
        return bool(known["decisions"][at])

    def step(params, opt_state, *args, loss_scale=None, **kwargs):
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, opt_state, args))):
            raise TypeError(
                "host_dispatched: the step jits inside and decides on the host; call it outside of "
                "jit, or use `two_gradient_step`."
            )
        rest = (args, kwargs, loss_scale)
        if policy.needs_gradient:
            first, ascend = begin(params, opt_state, *rest)
            return end(bool(ascend), params, opt_state, *rest, first)
        ascend = decided(opt_state)
        params, opt_state, metrics = whole(ascend, params, opt_state, *rest)
        known.update(array=opt_state.step, step=known["step"] + 1)
        return params, opt_state, metrics

    return step


# --- A part of the batch --------------------------------------------------------------------------


def _share_of(gamma: float, losses: jax.Array, args: tuple, options: Options) -> int:
    """ceil(gamma b), where there are b examples and as many losses."""
    size = options.batch_size(args)
    if size != len(losses):
        raise ValueError(
            f"{options.function}: the loss must be one number per example, got {len(losses)} "
            f"losses for a batch of {size}."
        )
    # A product such as 0.1 * 30 is a little above the integer that it means.
    return max(1, math.ceil(round(gamma * size, 9)))


def _mean_of(losses: Callable) -> Callable:
    """``(params, *args) -> (mean loss, (aux, losses))``, from losses per example."""

    def loss(params, *args):
        each, aux = losses(params, *args)
        return jnp.mean(each), (aux, each)

    return loss


def _selecting_options(function, has_aux, num_groups, batch_argnums, skip_nonfinite, gamma, tx):
    check_number(function, "gamma", gamma, high=1, open_low=True)
    if callable(gamma):
        raise TypeError(f"{function}: `gamma` sets the shape of the program; it must be a number.")
    options = Options(
        function,
        has_aux,
        num_groups=num_groups,
        batch_argnums=batch_argnums,
        skip_nonfinite=skip_nonfinite,
    ).checked()
    options.check_optimizer(tx)
    return options


def _own_aux(result: Result) -> tuple[Any, Any, StepMetrics]:
    return result.params, result.opt_state, result.metrics._replace(aux=result.metrics.aux[0])


def esam_step(
    per_example_loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    gamma: float = 0.5,
    has_aux: bool = False,
    num_groups: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[Any, Any, StepMetrics]]:
    r"""A step whose second gradient runs on the examples that the perturbation hurts most.

    .. math:: \mathcal{B}^+ = \text{the } \lceil \gamma b \rceil \text{ examples of largest }
              \ell_i(w + \epsilon) - \ell_i(w), \qquad
              g_p = \nabla \tfrac{1}{|\mathcal{B}^+|}
              \sum_{i \in \mathcal{B}^+} \ell_i(w + \epsilon)

    ESAM's sharpness-sensitive data selection; its stochastic weight perturbation is the part
    `random_mask` in ``tx``. Of equal increases, the examples that come first are taken.

    Args:
        per_example_loss_fn: ``(params, *args, **kwargs) -> losses`` of shape (b,), or ``(losses,
            aux)``; pure.
        tx: what `sharpness_aware` or a method returned.
        gamma: share of the batch that is kept, in (0, 1]; static.
        has_aux, num_groups, batch_argnums, skip_nonfinite: see the module's docstring. Selection is
            within a group.

    Returns:
        ``step(params, opt_state, *args, loss_scale=None, **kwargs) -> (params, opt_state,
        metrics)``, to be jitted by the caller. ``metrics.loss`` and ``metrics.perturbed_loss`` are
        means over the whole batch.

    Raises:
        ValueError, TypeError: ``gamma`` outside (0, 1]; losses that are not one per example.

    Cost: a gradient, a forward pass at w + eps, and a gradient on ceil(gamma b) examples: with a
    backward pass of two forward passes, 1 + 1/3 + gamma of the base step.

    Reduces to: `two_gradient_step` at ``gamma=1``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import sam
        >>> from sam_optax.training import esam_step
        >>> tx = sam(optax.sgd(0.5), rho=1.0)
        >>> step = jax.jit(esam_step(lambda w, x: x * w**2, tx, gamma=0.5))
        >>> w = jnp.array(1.0)
        >>> w, state, metrics = step(w, tx.init(w), jnp.array([1.0, 3.0]))
        >>> print(w, metrics.loss)  # the second example alone, at w = 2: 1 - 0.5 * 12
        -5.0 2.0

    References:
        Du et al., `Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks
        <https://arxiv.org/abs/2110.03141>`_, ICLR 2022.

    .. note:: Differences. The authors' code keeps the examples *above* the k-th largest increase:
        k - 1 of them, fewer with ties, with k = int(gamma b). With batch normalization, the pass on
        the selected examples normalizes with their own statistics, as in that code; running
        statistics come from the clean pass alone.
    """
    options = _selecting_options(
        "esam_step", has_aux, num_groups, batch_argnums, skip_nonfinite, gamma, tx
    )

    def step(params, opt_state, *args, loss_scale=None, **kwargs):
        losses = checked_loss(
            per_example_loss_fn, has_aux, kwargs, options.function, per_example=True
        )
        clean = value_and_grad(_mean_of(losses), loss_scale)

        def perturbed(point, clean_aux, *args):
            before = clean_aux[1]
            keep = _share_of(gamma, before, args, options)
            if keep == len(before):
                return clean(point, *args)
            each = losses(point, *args)[0]
            _, hurt = jax.lax.top_k(each - before, keep)
            return jnp.mean(each), clean(point, *options.take(args, hurt))[1], ()

        result = Step(tx, options, clean, perturbed).run(params, opt_state, args)
        return _own_aux(result)

    return step


def ksam_step(
    per_example_loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    gamma: float = 0.5,
    has_aux: bool = False,
    num_groups: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[Any, Any, StepMetrics]]:
    r"""A step whose two gradients both run on the examples of highest loss.

    .. math:: \mathcal{B}^+ = \text{the } \lceil \gamma b \rceil \text{ examples of largest }
              \ell_i(w), \qquad
              g = \nabla \tfrac{1}{|\mathcal{B}^+|} \sum_{i \in \mathcal{B}^+} \ell_i(w), \quad
              g_p \text{ likewise at } w + \epsilon

    Args:
        per_example_loss_fn: ``(params, *args, **kwargs) -> losses`` of shape (b,), or ``(losses,
            aux)``; pure.
        tx: what `sharpness_aware` or a method returned.
        gamma: share of the batch that is kept, in (0, 1]; static.
        has_aux, num_groups, batch_argnums, skip_nonfinite: see the module's docstring. Selection is
            within a group.

    Returns:
        ``step(params, opt_state, *args, loss_scale=None, **kwargs) -> (params, opt_state,
        metrics)``, to be jitted by the caller. ``metrics.loss`` is the mean over the whole batch
        and ``aux`` that of the forward pass over it; ``perturbed_loss`` and ``surrogate_gap`` are
        over the selected examples.

    Raises:
        ValueError, TypeError: ``gamma`` outside (0, 1]; losses that are not one per example.

    Cost: a forward pass, and two gradients on ceil(gamma b) examples: with a backward pass of two
    forward passes, 1/3 + 2 gamma of the base step.

    Reduces to: `two_gradient_step` at ``gamma=1``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import sam
        >>> from sam_optax.training import ksam_step
        >>> tx = sam(optax.sgd(0.5), rho=1.0)
        >>> step = jax.jit(ksam_step(lambda w, x: x * w**2, tx, gamma=0.5))
        >>> w = jnp.array(1.0)
        >>> w, state, metrics = step(w, tx.init(w), jnp.array([1.0, 3.0]))
        >>> print(w, metrics.loss, metrics.grad_norm)
        -5.0 2.0 6.0

    References:
        Ni et al., `K-SAM: Sharpness-Aware Minimization at the Speed of SGD
        <https://arxiv.org/abs/2210.12864>`_, 2022.

    .. note:: Differences. No public code of the authors was found; the share ``gamma`` stands for
        their number k of examples.
    """
    options = _selecting_options(
        "ksam_step", has_aux, num_groups, batch_argnums, skip_nonfinite, gamma, tx
    )

    def step(params, opt_state, *args, loss_scale=None, **kwargs):
        losses = checked_loss(
            per_example_loss_fn, has_aux, kwargs, options.function, per_example=True
        )
        on_part = value_and_grad(_mean_of(losses), loss_scale)

        def on_hard(point, each, args):
            _, hard = jax.lax.top_k(each, _share_of(gamma, each, args, options))
            return on_part(point, *options.take(args, hard))[:2]

        def clean(point, *args):
            each, aux = losses(point, *args)
            value, gradient = on_hard(point, each, args)
            return jnp.mean(each), gradient, (aux, each, value)

        def perturbed(point, clean_aux, *args):
            return *on_hard(point, clean_aux[1], args), ()

        result = Step(tx, options, clean, perturbed).run(params, opt_state, args)
        params, opt_state, metrics = _own_aux(result)
        before = average(result.clean_aux[2], device_axes(tx))
        gap = jnp.asarray(metrics.perturbed_loss - before, metrics.loss.dtype)
        return params, opt_state, metrics._replace(surrogate_gap=gap)

    return step

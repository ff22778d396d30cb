r"""Training steps around a sharpness-aware optimizer: the plumbing, done once.

Every step takes a loss, an optimizer and one batch, and takes care of what is easily got wrong:

- Both passes see the same batch, the same mutable state and the same PRNG keys: batch normalization
  uses batch statistics in both, dropout the same mask. New running statistics come from the clean
  pass, always.
- The reported loss is the clean one; the perturbed loss and the gap stand beside it.
- A plain Optax optimizer works too, with ``value``, ``grad``, ``value_fn`` or ``obj_fn`` where it
  asks for them. The step is then the ordinary one, and what only a second gradient can tell is None
  in the metrics.

- A one-gradient optimizer (`one_gradient`, in a chain or another wrapper, in place or not) is
  given its one gradient where it wants it, at ``displaced_params(params, opt_state)``: new running
  statistics are those of that pass, and **the reported loss is the one there**, the displaced one.
  There is no perturbed loss beside it, and ``ascended`` is False.

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
    loop, in which XLA's CPU backend is many times slower at convolutions. Part i has the examples
    i, i + n, i + 2 n, ..., so that a batch sharded over devices stays where it is.
``batch_argnums``
    Which positional arguments after ``params`` (or the model) are the batch, counted from 0. None:
    all of them. The others, and keyword arguments, go to every group and part whole; a keyword
    argument with the batch's leading axis is an error, unless the batch is named.
``aux_reduce``
    With groups or micro-batches, auxiliary output is put together leaf by leaf: a leaf with an axis
    as long as the batch is concatenated along it; of the others that depend on the batch floats are
    averaged (a sum of floats too: count in integers, or return means), integers (counts) added,
    bools true if one is; what does not depend on it (a constant, a PRNG key, a size) is that of
    the whole batch. An axis of examples and more, such as [batch * tokens], is refused: return
    [batch, tokens]. Where that is not what the whole batch gives, ``aux_reduce(stacked)`` is called
    in its place, with the parts' output stacked along a new first axis: over micro-batches, then
    over groups.
``skip_nonfinite``
    If the clean or the perturbed gradient holds a NaN or an infinity, parameters, optimizer state,
    mutable state and step counts stay as they were, bit for bit, and ``StepMetrics.skipped`` is
    True. For dynamic loss scaling there is ``loss_scale=``, a keyword of every step: the loss is
    multiplied by it before, and the gradients are divided by it after differentiation.
``extra_args``
    A keyword of every step: a dictionary of keywords for the optimizer's ``update``, such as
    ``direction`` for the perturbations that project.

``optax.MultiSteps`` around a sharpness-aware optimizer would average the clean gradient over the
micro-batches, pay for a second gradient on each of them, and descend along that of the last alone;
the steps refuse it. Inside, as ``base``, it accumulates surrogate gradients: m-sharpness, one
micro-batch at a time. ``optax.apply_if_finite`` around one looks at the clean gradient alone, and
is refused too, unless ``skip_nonfinite`` looks at both.

On a step that does not ascend, `sharpness_aware` says what happens to the optimizer's state;
mutable state moves as on any other step, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import optax

from sam_optax._checks import check_inherited
from sam_optax._dispatch import host_dispatched
from sam_optax._linen import check_train_state, collections_of
from sam_optax._nnx import functional, import_nnx
from sam_optax._outputs import MesaState, MesaStep, functional_step, mesa_step
from sam_optax._plan import checked_loss
from sam_optax._selection import esam_step, ksam_step
from sam_optax._step import StepMetrics, plan_for, two_gradients
from sam_optax._tree import select
from sam_optax._weighted import weighted_sharpness_step

__all__ = [
    "MesaState",
    "MesaStep",
    "StepMetrics",
    "esam_step",
    "functional_step",
    "host_dispatched",
    "ksam_step",
    "linen_step",
    "mesa_step",
    "nnx_step",
    "two_gradient_step",
    "weighted_sharpness_step",
]


def two_gradient_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    aux_from: Literal["clean", "perturbed"] = "clean",
    num_groups: int = 1,
    num_microbatches: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    aux_reduce: Callable[[Any], Any] | None = None,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[Any, Any, StepMetrics]]:
    r"""A training step on any tree of parameters.

    Args:
        loss_fn: ``loss_fn(params, *args, **kwargs) -> loss``, or ``(loss, aux)``; pure, and this
            device's own where ``tx`` has an ``axis_name``.
        tx: what `sharpness_aware` or a method returned; a chain around it, a one-gradient method,
            or a plain Optax optimizer, will do where no option needs to look inside. A chain hides
            ``axis_name``: ``metrics.loss``, and ``value`` for the optimizer, are then this device's
            own.
        has_aux, aux_from, num_groups, num_microbatches, batch_argnums, aux_reduce, skip_nonfinite:
            see the module's docstring.

    Returns:
        ``step(params, opt_state, *args, loss_scale=None, extra_args=None, **kwargs) -> (params,
        opt_state, metrics)``, to be jitted by the caller (donating params and opt_state is fine).
        ``metrics`` are `StepMetrics`; with a one-gradient method, ``metrics.loss`` is the loss at
        the displaced parameters.

    Raises:
        ValueError, TypeError: an option out of range; when the step is traced, a loss that is not a
            scalar, a batch that cannot be cut, ``optax.MultiSteps`` around ``tx``.

    Cost: that of ``tx``; `never`, one-gradient methods and plain optimizers pay one gradient.

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
    plan = plan_for(
        "two_gradient_step",
        tx,
        aux_from=aux_from,
        num_groups=num_groups,
        num_microbatches=num_microbatches,
        batch_argnums=batch_argnums,
        aux_reduce=aux_reduce,
    )

    def step(
        params: Any,
        opt_state: Any,
        *args: Any,
        loss_scale: Any = None,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, StepMetrics]:
        plan.check_keywords(args, kwargs)
        loss = checked_loss(loss_fn, has_aux, kwargs, plan.function)
        passes = two_gradients(loss, tx, plan, loss_scale, skip_nonfinite, extra_args)
        return passes.run(params, opt_state, args)[:3]

    return step


def linen_step(
    state: Any,
    loss_fn: Callable[..., Any],
    *args: Any,
    has_aux: bool = False,
    aux_from: Literal["clean", "perturbed"] = "clean",
    num_groups: int = 1,
    num_microbatches: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    aux_reduce: Callable[[Any], Any] | None = None,
    skip_nonfinite: bool = False,
    frozen_collections: Sequence[str] = (),
    loss_scale: Any = None,
    extra_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, StepMetrics]:
    r"""A training step on a Flax ``TrainState``.

    Its ``apply_gradients`` cannot forward a gradient function to the optimizer; this step can.

    Args:
        state: a ``flax.training.train_state.TrainState``, or a subclass of it.
        loss_fn: ``loss_fn(params, *args, **kwargs) -> loss``, or ``(loss, aux)``; pure. It may
            close over ``state.apply_fn`` and ``state.batch_stats``.
        *args: the batch, and whatever else the loss takes.
        has_aux, aux_from, num_groups, num_microbatches, batch_argnums: see the module's docstring.
        aux_reduce, skip_nonfinite, loss_scale, extra_args: likewise.
        frozen_collections: fields of the state that are meant to stay as they are, such as
            ``("batch_stats",)`` of a net that is used with ``use_running_average=True``.
        **kwargs: keyword arguments of the loss.

    Returns:
        ``(state, metrics)``: ``params``, ``opt_state`` and ``step`` are new. So is ``batch_stats``,
        if the state has that field: running statistics move once per step, by the clean pass. They
        are found in ``aux`` wherever they are, under their name, as in the second output of
        ``apply(..., mutable=["batch_stats"])``, or as the one tree that looks like the field; other
        dictionaries among the state's fields likewise. One that looks like ``params`` (an average
        of them) or like ``batch_stats`` is found by its name alone, and may be missing; so may one
        without floats. Jit the step, or the function that calls it.

    Raises:
        ValueError, TypeError: as `two_gradient_step`; no new value of a mutable collection that the
            state has, or two; a ``dynamic_scale``, or a subclass's ``apply_gradients``, that the
            step would leave out; float8 scales that are overwritten with their gradients.

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
    if not (hasattr(state, "tx") and hasattr(state, "opt_state")):
        raise TypeError(
            "linen_step: the first argument must be a flax.training.train_state.TrainState, got "
            f"{type(state).__name__}."
        )
    plan = plan_for(
        "linen_step",
        state.tx,
        aux_from=aux_from,
        num_groups=num_groups,
        num_microbatches=num_microbatches,
        batch_argnums=batch_argnums,
        aux_reduce=aux_reduce,
    )
    plan.check_keywords(args, kwargs)
    check_train_state(state, loss_scale)
    split = collections_of(state, frozen_collections)
    loss = checked_loss(loss_fn, has_aux, kwargs, plan.function, split=split)
    passes = two_gradients(loss, state.tx, plan, loss_scale, skip_nonfinite, extra_args)
    result = passes.run(state.params, state.opt_state, args)
    changes = {"step": state.step + 1, **result.carried}
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
    aux_reduce: Callable[[Any], Any] | None = None,
    skip_nonfinite: bool = False,
    loss_scale: Any = None,
    extra_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> StepMetrics:
    r"""A training step on a Flax NNX model, in place, as ``nnx.Optimizer.update`` works.

    The model is split before the first pass, and every pass works on a copy: both see the same
    running statistics and the same dropout keys, and no pass mutates what another reads.

    Args:
        model: an ``nnx.Module``.
        optimizer: an ``nnx.Optimizer`` for it; its ``wrt`` says which variables are parameters.
        loss_fn: ``loss_fn(model, *args, **kwargs) -> loss``, or ``(loss, aux)``. It may mutate the
            model it is given, as batch normalization and dropout do, and NNX objects among its
            arguments (``nnx.Rngs``, metrics).
        *args: the batch, and whatever else the loss takes.
        has_aux, aux_from, num_groups, num_microbatches, batch_argnums: see the module's docstring.
        aux_reduce, skip_nonfinite, loss_scale, extra_args: likewise.
        **kwargs: keyword arguments of the loss.

    Returns:
        `StepMetrics`. The model's parameters, the optimizer's state and its step count are new; so
        are all other variables, as the clean pass left them: running statistics and key counts move
        once per step. With groups or micro-batches, floats among them are averaged over the parts,
        and the rest is the first part's: of a metric, the mean is right, and the count one part's.
        Call it within ``nnx.jit``.

    Raises:
        ImportError: Flax is not installed.
        ValueError, TypeError: as `two_gradient_step`; an ``update`` of a subclass of
            ``nnx.Optimizer``, which the step would leave out.

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
    nnx = import_nnx("nnx_step")
    is_one = hasattr(optimizer, "tx") and hasattr(optimizer, "wrt")
    if not is_one or isinstance(model, nnx.Optimizer):
        raise TypeError(
            "nnx_step: the arguments are an nnx.Module, an nnx.Optimizer for it, and the loss; got "
            f"{type(model).__name__} and {type(optimizer).__name__}."
        )
    check_inherited(
        "nnx_step",
        optimizer,
        "update",
        (nnx.Optimizer, nnx.ModelAndOptimizer),
        "`nnx_sharpness_aware_value_and_grad`, and call `optimizer.update(model, found.grads)`",
    )
    plan = plan_for(
        "nnx_step",
        optimizer.tx,
        aux_from=aux_from,
        num_groups=num_groups,
        num_microbatches=num_microbatches,
        batch_argnums=batch_argnums,
        aux_reduce=aux_reduce,
    )
    plan.check_keywords(args, kwargs)
    pure = functional("nnx_step", loss_fn, model, optimizer.wrt, args, kwargs, has_aux)
    passes = two_gradients(pure.loss, optimizer.tx, plan, loss_scale, skip_nonfinite, extra_args)
    result = passes.run(pure.params, nnx.as_pure(optimizer.opt_state), pure.args)
    rest = select(result.taken, result.carried, pure.rest) if skip_nonfinite else result.carried
    pure.write(result.params, rest)
    nnx.update(optimizer.opt_state, nnx.state(result.opt_state))
    optimizer.step[...] += jnp.asarray(result.taken, optimizer.step[...].dtype)
    return result.metrics

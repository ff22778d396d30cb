"""What the training steps are made of: options, evaluations, and the two passes."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax._axes import average, tracked, vary, varying
from sam_optax._tree import accumulator, cast_like, check_number, norm, upcast
from sam_optax._types import SharpnessAwareState
from sam_optax.combinator import SharpnessAware

_GROUPS = "sam_optax_groups"


class StepMetrics(NamedTuple):
    """What a training step reports: scalars in float32 (float64 for float64 parameters).

    Attributes:
        loss: the clean loss, at the unperturbed parameters.
        perturbed_loss: the loss at the perturbed parameters; NaN without ascent.
        surrogate_gap: ``perturbed_loss - loss``; NaN without ascent.
        grad_norm: global norm of the clean gradient.
        perturbed_grad_norm: global norm of the perturbed gradient; NaN without ascent.
        perturbation_norm: norm of eps as applied, after rounding to the parameters' dtype. Far from
            the radius that was asked for, that dtype has swallowed or distorted eps. 0 without
            ascent.
        cosine: between the clean and the perturbed gradient; NaN without ascent.
        ascended: bool[], whether a perturbed gradient was computed.
        aux: the loss's auxiliary output, or ``()``.
        skipped: bool[], whether ``skip_nonfinite`` left everything as it was.
    """

    loss: jax.Array
    perturbed_loss: jax.Array
    surrogate_gap: jax.Array
    grad_norm: jax.Array
    perturbed_grad_norm: jax.Array
    perturbation_norm: jax.Array
    cosine: jax.Array
    ascended: jax.Array
    aux: Any
    skipped: jax.Array


# --- Options --------------------------------------------------------------------------------------


class Options(NamedTuple):
    function: str
    has_aux: bool = False
    aux_from: str = "clean"
    num_groups: int = 1
    num_microbatches: int = 1
    batch_argnums: int | Sequence[int] | None = None
    skip_nonfinite: bool = False

    def checked(self) -> "Options":
        if self.aux_from not in ("clean", "perturbed"):
            raise ValueError(
                f'{self.function}: `aux_from` must be "clean" or "perturbed", got '
                f"{self.aux_from!r}."
            )
        for name in ("num_groups", "num_microbatches"):
            check_number(self.function, name, getattr(self, name), low=1, integer=True)
        argnums = self.batch_argnums
        if argnums is None:
            return self
        several: Any = argnums if isinstance(argnums, tuple | list) else (argnums,)
        if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in several):
            raise TypeError(
                f"{self.function}: `batch_argnums` must be an integer or several integers, got "
                f"{argnums!r}."
            )
        return self._replace(batch_argnums=tuple(int(i) for i in several))

    def check_optimizer(self, tx: Any) -> None:
        if not isinstance(tx, optax.GradientTransformation):
            hint = ""
            if isinstance(tx, optax.MultiSteps):
                hint = (
                    " Around a sharpness-aware optimizer, MultiSteps descends along the last "
                    "micro-batch alone: use `num_microbatches=`, or put its "
                    "`gradient_transformation()` inside, as `base`."
                )
            raise TypeError(
                f"{self.function}: `tx` must be an optax.GradientTransformation, got {tx!r}.{hint}"
            )
        if self.skip_nonfinite and isinstance(tx, SharpnessAware) and not tx.info:
            raise ValueError(
                f"{self.function}: `skip_nonfinite` reads the norms of both gradients, but `tx` "
                "was built with info=False. Leave that out."
            )
        if self.num_groups > 1:
            self.check_inside("num_groups", tx)
        if self.aux_from == "perturbed":
            self.check_inside('aux_from="perturbed"', tx)

    def check_inside(self, option: str, tx: Any) -> None:
        """Raise where an option has to look into an optimizer that another one hides."""
        if not isinstance(tx, SharpnessAware):
            raise TypeError(
                f"{self.function}: {option} needs `tx` to be what `sharpness_aware` or a method "
                "such as `sam` returned, not a transformation around it. Put what follows the "
                "ascent into its `base`."
            )

    def batch(self, args: tuple) -> tuple[int, ...]:
        """Positions of the batch among the arguments."""
        if self.batch_argnums is None:
            return tuple(range(len(args)))
        argnums: tuple = self.batch_argnums  # type: ignore[assignment]
        for i in argnums:
            if not 0 <= i < len(args):
                raise ValueError(
                    f"{self.function}: `batch_argnums` names argument {i}, but the loss gets "
                    f"{len(args)} positional arguments after the parameters (counted from 0)."
                )
        return argnums

    def over_batch(self, function: Callable, args: tuple) -> tuple:
        """The arguments, with ``function(path, leaf)`` applied to every leaf of the batch."""
        chosen = self.batch(args)
        return tuple(
            jax.tree_util.tree_map_with_path(lambda p, x, i=i: function(((i,), *p), x), arg)
            if i in chosen
            else arg
            for i, arg in enumerate(args)
        )

    def batch_size(self, args: tuple) -> int:
        """The one leading axis of the batch."""
        sizes = {}

        def measure(path, x):
            where = f"args[{path[0][0]}]{jax.tree_util.keystr(path[1:])}"
            if not jnp.ndim(x):
                raise ValueError(
                    f"{self.function}: every batch argument needs a leading batch axis, but "
                    f"`{where}` is a scalar. Name the batch with `batch_argnums=`."
                )
            sizes.setdefault(jnp.shape(x)[0], where)
            return x

        self.over_batch(measure, args)
        if len(sizes) != 1:
            found = ", ".join(f"{size} at `{where}`" for size, where in sizes.items()) or "none"
            raise ValueError(
                f"{self.function}: the batch arguments must share one leading axis; found {found}. "
                "Name the batch with `batch_argnums=`."
            )
        return next(iter(sizes))

    def cut(self, args: tuple, parts: int, name: str) -> tuple:
        """The arguments, with every leaf of the batch as (parts, size / parts, ...)."""
        size = self.batch_size(args)
        if size % parts:
            raise ValueError(
                f"{self.function}: a batch of {size} cannot be cut into `{name}` = {parts} equal "
                "parts; choose a divisor of the batch size."
            )
        return self.over_batch(
            lambda _, x: jnp.reshape(x, (parts, size // parts, *jnp.shape(x)[1:])), args
        )

    def take(self, args: tuple, index: Any) -> tuple:
        """The arguments, with every leaf of the batch indexed along its leading axis."""
        return self.over_batch(lambda _, x: jnp.asarray(x)[index], args)


# --- One evaluation -------------------------------------------------------------------------------


def checked_loss(
    loss_fn: Callable, has_aux: bool, kwargs: dict, function: str, per_example: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """``(params, *args) -> (loss, aux)``, from a loss that the user wrote."""

    def loss(params, *args):
        result = loss_fn(params, *args, **kwargs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"{function}: with has_aux=True the loss must return (loss, aux), got "
                f"{type(result).__name__}."
            )
        if not has_aux and isinstance(result, tuple):
            raise TypeError(
                f"{function}: the loss returned a tuple; (loss, aux) needs has_aux=True."
            )
        value: Any = result[0] if has_aux else result
        aux = result[1] if has_aux else ()
        kind = getattr(value, "dtype", type(value))
        if kind is not float and not (
            hasattr(value, "dtype") and jnp.issubdtype(kind, jnp.floating)
        ):
            raise TypeError(
                f"{function}: the loss must return floating-point numbers, got "
                f"{getattr(kind, '__name__', kind)}."
            )
        if jnp.ndim(value) != per_example:
            wanted = "one number per example, of shape (batch,)" if per_example else "a scalar"
            raise ValueError(
                f"{function}: the loss must be {wanted}, got shape {jnp.shape(value)}"
                + ("." if per_example else "; take its mean over the batch.")
            )
        return value, aux

    return loss


def value_and_grad(loss: Callable, loss_scale: Any) -> Callable:
    """``(params, *args) -> (loss, gradient, aux)``, with the loss scale taken out again."""

    def scaled(params, *args):
        value, aux = loss(params, *args)
        return (value if loss_scale is None else value * loss_scale), (value, aux)

    def evaluate(params, *args):
        gradient, (value, aux) = jax.grad(scaled, has_aux=True)(params, *args)
        if loss_scale is not None:
            unscaled = jax.tree.map(lambda x: x / loss_scale, upcast(gradient))
            gradient = cast_like(unscaled, gradient)
        return value, gradient, aux

    return evaluate


def put_together(function: str, stacked: Any, evaluate: Callable, part: tuple, whole: tuple) -> Any:
    """Auxiliary output of a whole batch from that of its parts; see the module's docstring."""
    if not jax.tree.leaves(stacked):
        return stacked

    def join(path, x, one, all_):
        if one.shape == all_.shape:
            if jnp.issubdtype(x.dtype, jnp.floating):
                return jnp.mean(x, axis=0, dtype=accumulator(x)).astype(x.dtype)
            return x[0]
        # The batch is the one axis that is as many times longer as there are parts.
        for i in range(len(one.shape)):
            if (*one.shape[:i], len(x) * one.shape[i], *one.shape[i + 1 :]) == all_.shape:
                return jnp.reshape(jnp.moveaxis(x, 0, i), all_.shape)
        raise ValueError(
            f"{function}: auxiliary output `aux{jax.tree_util.keystr(path)}` of shape {one.shape} "
            f"on each of {len(x)} parts of the batch cannot be put together to {all_.shape}, that "
            "of the whole batch. Only one axis may follow the batch."
        )

    shapes = (jax.eval_shape(lambda *a: evaluate(*a)[2], *args) for args in (part, whole))
    return jax.tree_util.tree_map_with_path(join, stacked, *shapes)


def accumulated(evaluate: Callable, options: Options, axes: tuple) -> Callable:
    """As ``evaluate``, with loss and gradient averaged over micro-batches, one at a time."""
    parts = options.num_microbatches
    if parts == 1:
        return evaluate

    def averaged(params, *args):
        pieces = options.cut(args, parts, "num_microbatches")
        chosen = options.batch(args)
        first = options.take(pieces, 0)

        def add(total, piece):
            here = tuple(piece[i] if i in chosen else x for i, x in enumerate(args))
            value, gradient, aux = evaluate(params, *here)
            share = upcast((value, gradient))
            return jax.tree.map(lambda sum_, x: sum_ + x / parts, total, share), aux

        like = jax.eval_shape(lambda *a: evaluate(*a)[:2], params, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, accumulator(x)), like)
        start = vary(zeros, tracked(axes))
        total, stacked = jax.lax.scan(add, start, {i: pieces[i] for i in chosen})
        value, gradient = cast_like(total, like)
        part, whole = (params, *first), (params, *args)
        return value, gradient, put_together(options.function, stacked, evaluate, part, whole)

    return averaged


# --- One step -------------------------------------------------------------------------------------


class Result(NamedTuple):
    params: Any
    opt_state: Any
    metrics: StepMetrics
    clean_aux: Any
    taken: jax.Array


def find_state(opt_state: Any, function: str) -> SharpnessAwareState | None:
    """The sharpness-aware state within an optimizer's, if there is one."""

    def is_ours(x):
        return isinstance(x, SharpnessAwareState)

    def is_stop(x):
        return is_ours(x) or isinstance(x, optax.MultiStepsState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_stop)
    for node in nodes:
        if isinstance(node, optax.MultiStepsState) and any(
            map(is_ours, jax.tree.leaves(node, is_leaf=is_ours))
        ):
            raise ValueError(
                f"{function}: `optax.MultiSteps` around a sharpness-aware optimizer descends along "
                "the last micro-batch alone. Use `num_microbatches=`, or put MultiSteps inside, as "
                "`base`."
            )
    return next(filter(is_ours, nodes), None)


def device_axes(tx: Any) -> tuple:
    """The axes over which an optimizer averages; a transformation around it does not tell."""
    return tx.axes if isinstance(tx, SharpnessAware) else ()


def select(keep: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(keep, x, y), new, old)


class Step(NamedTuple):
    """The two passes of a step, with nothing decided about who calls it.

    Attributes:
        tx: the optimizer.
        options: checked options.
        clean: ``(params, *args) -> (loss, gradient, aux)``.
        perturbed: the same at the perturbed parameters, ``(params, clean aux, *args) -> ...``.
    """

    tx: Any
    options: Options
    clean: Callable
    perturbed: Callable

    @property
    def groups(self) -> tuple:
        return (_GROUPS,) if self.options.num_groups > 1 else ()

    def first_pass(self, params: Any, args: tuple) -> tuple:
        """The clean evaluation of this shard, where ``jax.grad`` does not sum over devices."""
        return self.clean(vary(params, tracked(device_axes(self.tx))), *args)

    def second_pass(self, params, opt_state, args, first, ascend=None) -> Result:
        """What follows the clean evaluation."""
        value, gradient, clean_aux = first
        want_aux = self.options.aux_from == "perturbed"
        axes = device_axes(self.tx) + self.groups

        def evaluate(point):
            loss, slope, aux = self.perturbed(point, clean_aux, *args)
            return loss, slope, (aux if want_aux else ())

        loss = average(value, axes)
        # What line searches and step-size rules of Optax ask for.
        extra = {
            "value": loss,
            "grad": average(gradient, axes),
            "value_fn": lambda p: average(self.clean(p, *args)[0], axes),
        }
        if isinstance(self.tx, SharpnessAware):
            aux = clean_aux if want_aux else ()
            updates, new_state, aux = self.tx.advance(
                gradient, opt_state, params, evaluate, aux, extra, axes=self.groups, ascend=ascend
            )
        else:
            tx = optax.with_extra_args_support(self.tx)
            updates, new_state = tx.update(
                gradient,
                opt_state,
                params,
                value_and_grad_fn=lambda p: evaluate(p)[:2],
                **extra,
            )
            aux = ()
        new_params = optax.apply_updates(params, updates)

        dtype = accumulator(params)
        found = find_state(new_state, self.options.function)
        nan, no = jnp.full((), jnp.nan, dtype), jnp.zeros((), bool)
        loss = jnp.asarray(loss, dtype)
        if found is None:
            metrics = StepMetrics(
                loss, nan, nan, norm(gradient), nan, jnp.zeros((), dtype), nan, no, (), no
            )
        else:
            info = found.info
            metrics = StepMetrics(
                loss=loss,
                perturbed_loss=info.perturbed_value,
                surrogate_gap=info.perturbed_value - loss,
                grad_norm=info.grad_norm,
                perturbed_grad_norm=info.perturbed_grad_norm,
                perturbation_norm=info.perturbation_norm,
                cosine=info.cosine,
                ascended=info.ascended,
                aux=(),
                skipped=no,
            )
        taken = ~no
        if self.options.skip_nonfinite:
            ascent_is_finite = jnp.isfinite(metrics.perturbed_grad_norm) | ~metrics.ascended
            taken = jnp.isfinite(metrics.grad_norm) & ascent_is_finite
            new_params = select(taken, new_params, params)
            new_state = select(taken, new_state, opt_state)
        metrics = metrics._replace(aux=aux if want_aux else clean_aux, skipped=~taken)
        return Result(new_params, new_state, metrics, clean_aux, taken)

    def grouped(self, function: Callable, whole: tuple, args: tuple, first: Any, out: Any) -> Any:
        """``function(*whole, args, first)`` on every group of the batch at once."""
        chosen = self.options.batch(args)
        pieces = self.options.cut(args, self.options.num_groups, "num_groups")
        where = tuple(0 if i in chosen else None for i in range(len(args)))
        mapped = jax.vmap(
            lambda here, mine: function(*whole, here, mine),
            in_axes=(where, 0),
            out_axes=out,
            axis_name=_GROUPS,
        )
        return mapped(pieces, first)

    def join_aux(self, stacked: Any, params: Any, args: tuple) -> Any:
        pieces = self.options.cut(args, self.options.num_groups, "num_groups")
        part = self.options.take(pieces, 0)
        part, whole = (params, *part), (params, *args)
        return put_together(self.options.function, stacked, self.clean, part, whole)

    def start(self, params: Any, args: tuple) -> tuple:
        """The first pass, of every group where there are some."""
        if self.options.num_groups == 1:
            return self.first_pass(params, args)
        if any(map(varying, jax.tree.leaves((params, args)))):
            raise ValueError(
                f"{self.options.function}: `num_groups` = {self.options.num_groups} within "
                "shard_map needs `check_vma=False`: JAX tracks no axis of vmap, on which groups "
                "are built. Or leave shard_map out, and cut the global batch into groups."
            )
        return self.grouped(lambda p, a, _: self.first_pass(p, a), (params,), args, None, 0)

    def finish(self, params, opt_state, args, first, ascend=None) -> Result:
        """The rest, from what `start` returned."""
        if self.options.num_groups == 1:
            return self.second_pass(params, opt_state, args, first, ascend)
        scalars = StepMetrics._make([None] * len(StepMetrics._fields))._replace(aux=0)
        out = Result(None, None, scalars, 0, None)  # type: ignore[arg-type]
        result = self.grouped(
            lambda p, s, a, mine: self.second_pass(p, s, a, mine, ascend),
            (params, opt_state),
            args,
            first,
            out,
        )
        aux = self.join_aux(result.clean_aux, params, args)
        chosen = aux
        if self.options.aux_from == "perturbed":
            chosen = self.join_aux(result.metrics.aux, params, args)
        return result._replace(metrics=result.metrics._replace(aux=chosen), clean_aux=aux)

    def run(self, params: Any, opt_state: Any, args: tuple, ascend: Any = None) -> Result:
        """The whole step."""
        found = find_state(opt_state, self.options.function)
        if found is not None and self.options.skip_nonfinite:
            self.options.check_inside("skip_nonfinite", self.tx)
        return self.finish(params, opt_state, args, self.start(params, args), ascend)


def two_gradients(loss: Callable, tx: Any, options: Options, loss_scale: Any) -> Step:
    """A step that evaluates one loss at both points."""
    evaluate = accumulated(value_and_grad(loss, loss_scale), options, device_axes(tx))
    return Step(tx, options, evaluate, lambda params, clean_aux, *args: evaluate(params, *args))

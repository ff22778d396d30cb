"""One step's estimate from a loss and a batch: evaluations, micro-batches, groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax._axes import GROUPS, check_shard, tracked, vary, varying
from sam_optax._batch import Batch, reduce_output, reduce_state
from sam_optax._checks import check_boolean, check_number, check_word, is_array
from sam_optax._method import Method
from sam_optax._origins import Origin, origins
from sam_optax._tree import accumulator, cast_like, upcast
from sam_optax._types import Estimate, Evaluation, MethodState
from sam_optax.combinator import SharpnessAware
from sam_optax.one_gradient import OneGradient

Loss = Callable[..., tuple[Any, tuple[Any, Any]]]
"""``(params, *args) -> (loss, (aux, carried))``: ``carried`` is what the step itself needs."""

At = Callable[..., Evaluation]
"""``(params, *args) -> Evaluation``, whose ``aux`` is ``(aux, carried)``."""


def method_of(function: str, method: Any) -> Method:
    """A method, or that of a transformation, with its parts checked."""
    if isinstance(method, SharpnessAware):
        method = method.parts.method
    if not isinstance(method, Method):
        hint = ""
        if isinstance(getattr(method, "update", None), MethodType) and isinstance(
            method.update.__self__, OneGradient
        ):
            hint = (
                " A one-gradient method is an optimizer, and takes no second gradient: use "
                "`jax.value_and_grad` at `displaced_params(params, opt_state)`, and then its "
                "`update`."
            )
        elif isinstance(method, optax.GradientTransformation):
            hint = (
                " Nothing may be around it: what follows belongs to the trainer's optimizer. A "
                "perturbation becomes one by `Method(perturbation)`."
            )
        elif callable(method):
            hint = " Was it meant to be called first?"
        raise TypeError(
            f"{function}: `method` must be a Method, or what a method such as "
            f"`gsam(optax.identity(), rho=0.05)` returned; got {method!r}.{hint}"
        )
    return method.checked(function)


def checked_loss(
    loss_fn: Callable,
    has_aux: bool,
    kwargs: dict[str, Any],
    function: str,
    *,
    per_example: bool = False,
    split: Callable[[Any], tuple[Any, Any]] = lambda aux: (aux, ()),
) -> Loss:
    """A loss that the user wrote; ``split(aux)`` is ``(aux, carried)``."""
    check_boolean(function, "has_aux", has_aux)
    if not callable(loss_fn):
        raise TypeError(f"{function}: the loss must be a function, got {loss_fn!r}.")

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
        return value, split(aux)

    return loss


def check_loss_scale(function: str, loss_scale: Any) -> None:
    """Raise unless this is a number that a loss can be multiplied by, or None."""
    if loss_scale is None:
        return
    if isinstance(loss_scale, str) or not (is_array(loss_scale) or np.isscalar(loss_scale)):
        raise TypeError(
            f"{function}: `loss_scale` must be a number, got {type(loss_scale).__name__}. Of "
            "Flax's DynamicScale, pass `loss_scale=dynamic_scale.scale` with "
            "`skip_nonfinite=True`; or give `dynamic_scale.value_and_grad` a loss from "
            "`sharpness_aware_loss(..., loss_scale=dynamic_scale.scale)`, and use no step."
        )
    check_number(function, "loss_scale", loss_scale, open_low=True, schedule=False)


def scaled(loss: Loss, loss_scale: Any = None) -> Loss:
    """A loss times its scale, with the loss itself in front of the auxiliary output."""

    def times(params, *args):
        value, aux = loss(params, *args)
        return (value if loss_scale is None else value * loss_scale), (value, aux)

    return times


def unscaled(gradient: Any, loss_scale: Any = None) -> Any:
    """The gradient of a scaled loss, the scale taken out again."""
    if loss_scale is None:
        return gradient
    divided = jax.tree.map(lambda x: x / jnp.asarray(loss_scale, x.dtype), upcast(gradient))
    return cast_like(divided, gradient)


def differentiated(loss: Loss, loss_scale: Any = None) -> At:
    """A loss with its gradient, the loss scale taken out again."""
    gradient_of = jax.grad(scaled(loss, loss_scale), has_aux=True)

    def evaluate(params, *args):
        gradient, (value, aux) = gradient_of(params, *args)
        return Evaluation(value, unscaled(gradient, loss_scale), aux)

    return evaluate


class Plan(NamedTuple):
    """How a loss on a batch becomes a step's `Estimate`.

    Attributes:
        function: whom errors name.
        method: the method, or None for the clean gradient alone.
        batch: which arguments are the batch.
        aux_from, num_groups, num_microbatches, aux_reduce: as in `sam_optax.training`.
    """

    function: str
    method: Method | None
    batch: Batch
    aux_from: str = "clean"
    num_groups: int = 1
    num_microbatches: int = 1
    aux_reduce: Callable[[Any], Any] | None = None

    @classmethod
    def of(
        cls,
        function: str,
        method: Method | None,
        *,
        aux_from: str = "clean",
        num_groups: int = 1,
        num_microbatches: int = 1,
        batch_argnums: int | Sequence[int] | None = None,
        aux_reduce: Callable[[Any], Any] | None = None,
    ) -> Plan:
        """Checked, from what a user gave."""
        check_word(function, "aux_from", aux_from, "clean", "perturbed")
        check_number(function, "num_groups", num_groups, low=1, integer=True)
        check_number(function, "num_microbatches", num_microbatches, low=1, integer=True)
        if aux_reduce is not None and not callable(aux_reduce):
            raise TypeError(
                f"{function}: `aux_reduce` must be a function from the parts' auxiliary output, "
                f"stacked along a new first axis, to that of the batch; got {aux_reduce!r}."
            )
        batch = Batch.of(function, batch_argnums)
        return cls(function, method, batch, aux_from, num_groups, num_microbatches, aux_reduce)

    @property
    def groups(self) -> tuple:
        """The axis of the groups, where there are some."""
        return (GROUPS,) if self.num_groups > 1 else ()

    @property
    def axes(self) -> tuple:
        """The method's own axes."""
        return () if self.method is None else self.method.axes

    def check_keywords(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise where the batch is cut, and a keyword argument should have been."""
        if self.num_groups > 1 or self.num_microbatches > 1:
            self.batch.check_keywords(args, kwargs)

    def accumulated(self, evaluate: At) -> At:
        """An evaluation averaged over micro-batches, one at a time."""
        parts = self.num_microbatches
        if parts == 1:
            return evaluate

        def averaged(params, *args):
            pieces = self.batch.cut(args, parts, "num_microbatches", interleaved=True)
            chosen = self.batch.positions(args)
            first = self.batch.one(pieces)

            def on(piece):
                # What is no batch is closed over: it may be a string.
                here = (piece[i] if i in chosen else x for i, x in enumerate(args))
                return evaluate(params, *here)

            def add(total, piece):
                value, gradient, aux = on(piece)
                share = upcast((value, gradient))
                return jax.tree.map(lambda sum_, x: sum_ + x / parts, total, share), aux

            like = jax.eval_shape(lambda piece: on(piece)[:2], {i: first[i] for i in chosen})
            zeros = jax.tree.map(lambda x: jnp.zeros_like(x, accumulator(x)), like)
            start = vary(zeros, tracked(self.axes))
            total, stacked = jax.lax.scan(add, start, {i: pieces[i] for i in chosen})
            value, gradient = cast_like(total, like)
            aux = self._join(stacked, evaluate, params, first, args, interleaved=True)
            return Evaluation(value, gradient, aux)

        return averaged

    def look(self, clean: At, params: Any, args: tuple) -> Evaluation:
        """The clean evaluation, of every group where there are some."""

        def here(params, args, _):
            # Where the point varies, `jax.grad` does not sum over devices.
            found = clean(vary(params, tracked(self.axes)), *args)
            check_shard(self.function, found.value, params, self.axes)
            return found

        if self.num_groups == 1:
            return here(params, args, None)
        if any(varying(x) for x in jax.tree.leaves((params, args)) if is_array(x)):
            raise ValueError(
                f"{self.function}: `num_groups` = {self.num_groups} within shard_map needs "
                "`check_vma=False`: JAX tracks no axis of vmap, on which groups are built. Or "
                "leave shard_map out, and cut the global batch into groups."
            )
        return self._grouped(here, (params,), args, None, 0)

    def estimate(
        self,
        clean: At,
        perturbed: Callable[..., Evaluation],
        params: Any,
        state: MethodState,
        args: tuple,
        first: Evaluation,
        extra: dict[str, Any] | None = None,
        ascend: np.bool_ | None = None,
    ) -> tuple[Estimate, MethodState, Any]:
        """What the method makes of a clean evaluation.

        Args:
            clean: ``(params, *args) -> Evaluation``.
            perturbed: ``(params, clean aux, *args) -> Evaluation``, at the perturbed parameters.
            params, state: the parameters and the method's state.
            args: the loss's arguments.
            first: what `look` returned.
            extra: keywords for the perturbation.
            ascend: a decision that was made elsewhere.

        Returns:
            ``(Estimate, state, aux)``: ``Estimate.aux`` is from the pass that was asked for,
            ``aux`` from the clean pass; both are ``(aux, carried)``.
        """
        method: Method = self.method  # type: ignore[assignment]
        want_aux = self.aux_from == "perturbed"

        def here(params, state, args, first):
            def evaluate(point):
                found = perturbed(point, first.aux, *args)
                return found if want_aux else found._replace(aux=())

            start = first if want_aux else first._replace(aux=())
            found, moved = method.estimate(
                params, state, start, evaluate, extra, axes=self.groups, ascend=ascend
            )
            return found._replace(aux=()), moved, found.aux

        if self.num_groups == 1:
            found, moved, aux = here(params, state, args, first)
            clean_aux = first.aux
        else:
            out = (None, None, 0)
            found, moved, aux = self._grouped(here, (params, state), args, first, out)
            part = self.batch.one(self.batch.cut(args, self.num_groups, "num_groups"))
            clean_aux = self._join(first.aux, clean, params, part, args)
            if want_aux:
                aux = self._join(aux, clean, params, part, args, moved=True)
        return found._replace(aux=aux if want_aux else clean_aux), moved, clean_aux

    def _grouped(self, function: Callable, whole: tuple, args: tuple, first: Any, out: Any) -> Any:
        """``function(*whole, args, first)`` on every group of the batch at once."""
        chosen = self.batch.positions(args)
        pieces = self.batch.cut(args, self.num_groups, "num_groups")

        def here(batch, mine):
            return function(*whole, tuple(batch.get(i, x) for i, x in enumerate(args)), mine)

        mapped = jax.vmap(here, out_axes=out, axis_name=GROUPS)
        return mapped({i: pieces[i] for i in chosen}, first)

    def _join(
        self,
        stacked: Any,
        evaluate: At,
        params: Any,
        part: tuple,
        args: tuple,
        *,
        interleaved: bool = False,
        moved: bool = False,
    ) -> Any:
        """``(aux, carried)`` of the whole batch in ``args`` from that of its parts, stacked; each
        of them at parameters of its own if they were ``moved``."""
        if not jax.tree.leaves(stacked):
            return stacked
        if self.aux_reduce is not None and not jax.tree.leaves(stacked[1]):
            return self.aux_reduce(stacked[0]), stacked[1]
        chosen = self.batch.positions(args)

        def on(batch, params=params):
            return evaluate(params, *(batch.get(i, x) for i, x in enumerate(args))).aux

        one = jax.eval_shape(on, {i: part[i] for i in chosen})
        whole = {i: args[i] for i in chosen}
        all_ = origins(on, whole)
        if moved:
            all_ = jax.tree.map(
                lambda x, y: x._replace(value=None) if y.follows else x,
                all_,
                origins(on, whole, params),
                is_leaf=lambda x: isinstance(x, Origin),
            )
        size = self.batch.size(args)
        rules = (reduce_output, reduce_state)
        joined = [
            self.batch.join(*trees, size=size, interleaved=interleaved, reduce=rule)
            for *trees, rule in zip(stacked, one, all_, rules, strict=True)
            if rule is reduce_state or self.aux_reduce is None
        ]
        return tuple(joined) if self.aux_reduce is None else (self.aux_reduce(stacked[0]), *joined)

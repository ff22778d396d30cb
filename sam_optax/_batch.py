"""A batch among a loss's arguments: cut into parts, and put together again."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, reshard

from sam_optax._tree import accumulator


def _sharded(x: jax.Array) -> tuple[Any, int, tuple]:
    """Axes of the mesh over which x's type shards its leading axis, their size, and the rest.

    Types do so where the mesh's axes are explicit; elsewhere the compiler knows, and decides.
    """
    sharding = jax.typeof(x).sharding
    over, *rest = sharding.spec
    names = over if isinstance(over, tuple) else () if over is None else (over,)
    return over, math.prod(sharding.mesh.shape[name] for name in names), tuple(rest)


def _merge(x: jax.Array, axis: int, shape: tuple[int, ...]) -> jax.Array:
    """``x`` with an axis and the next as one; sharded as the second was, where its type says so."""
    spec = list(jax.typeof(x).sharding.spec)
    over = spec.pop(axis + 1)
    if over is None:
        return jnp.reshape(x, shape)
    whole = reshard(x, PartitionSpec(*spec[: axis + 1], None, *spec[axis + 1 :]))
    spec[axis] = over
    return reshard(jnp.reshape(whole, shape), PartitionSpec(*spec))


class Batch(NamedTuple):
    """Which arguments are the batch.

    Attributes:
        function: whom errors name.
        argnums: positions among the arguments after the parameters; None for all.
    """

    function: str
    argnums: tuple[int, ...] | None = None

    @classmethod
    def of(cls, function: str, argnums: int | Sequence[int] | None) -> Batch:
        """Checked, from what a user gave."""
        if argnums is None:
            return cls(function)
        several: Any = argnums if isinstance(argnums, tuple | list) else (argnums,)
        if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in several):
            raise TypeError(
                f"{function}: `batch_argnums` must be an integer or several integers, got "
                f"{argnums!r}."
            )
        return cls(function, tuple(int(i) for i in several))

    def positions(self, args: tuple) -> tuple[int, ...]:
        """Positions of the batch among the arguments."""
        for i in self.argnums or ():
            if not 0 <= i < len(args):
                raise ValueError(
                    f"{self.function}: `batch_argnums` names argument {i}, but the loss gets "
                    f"{len(args)} positional arguments after the parameters (counted from 0)."
                )
        return tuple(range(len(args))) if self.argnums is None else self.argnums

    def over(self, function: Callable, args: tuple) -> tuple:
        """The arguments, with ``function(path, leaf)`` applied to every leaf of the batch."""
        chosen = self.positions(args)
        return tuple(
            jax.tree_util.tree_map_with_path(lambda p, x, i=i: function(((i,), *p), x), arg)
            if i in chosen
            else arg
            for i, arg in enumerate(args)
        )

    def size(self, args: tuple) -> int:
        """The one leading axis of the batch."""
        sizes: dict[int, str] = {}

        def measure(path, x):
            where = f"args[{path[0][0]}]{jax.tree_util.keystr(path[1:])}"
            if not jnp.ndim(x):
                raise ValueError(
                    f"{self.function}: every batch argument needs a leading batch axis, but "
                    f"`{where}` is a scalar. Name the batch with `batch_argnums=`."
                )
            sizes.setdefault(jnp.shape(x)[0], where)
            return x

        self.over(measure, args)
        if not sizes:
            raise ValueError(
                f"{self.function}: the batch arguments must share one leading axis; found none. "
                "Only positional arguments after the parameters are cut: pass the batch by "
                "position, and name it with `batch_argnums=` where it is not all of them."
            )
        if len(sizes) != 1:
            found = ", ".join(f"{size} at `{where}`" for size, where in sizes.items())
            raise ValueError(
                f"{self.function}: the batch arguments must share one leading axis; found {found}. "
                "Name the batch with `batch_argnums=`."
            )
        return next(iter(sizes))

    def check_keywords(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise where a keyword argument looks like a part of the batch, which is not cut there."""
        if self.argnums is not None:
            return
        size = self.size(args)
        for path, x in jax.tree_util.tree_leaves_with_path(kwargs):
            if np.ndim(x) and np.shape(x)[0] == size:
                raise ValueError(
                    f"{self.function}: the keyword argument `{jax.tree_util.keystr(path)}` has the "
                    f"batch's leading axis, {size}, but only positional arguments are cut. Pass it "
                    "by position; or, if it belongs to no example, name the batch with "
                    "`batch_argnums=`."
                )

    def cut(self, args: tuple, parts: int, name: str, *, interleaved: bool = False) -> tuple:
        """The arguments, with every leaf of the batch as (parts, size / parts, ...).

        Interleaved, part i has the examples i, i + parts, ...: then every part of a batch that is
        sharded over devices is sharded alike, and none has to move.
        """
        size = self.size(args)
        if size % parts:
            raise ValueError(
                f"{self.function}: a batch of {size} cannot be cut into `{name}` = {parts} equal "
                "parts; choose a divisor of the batch size."
            )

        shape = (size // parts, parts) if interleaved else (parts, size // parts)

        def reshape(_, x):
            x = jnp.asarray(x)
            over, count, rest = _sharded(x)
            if shape[0] % count == 0:
                x = jnp.reshape(x, (*shape, *x.shape[1:]))
            else:  # No reshape cuts a shard: the examples move.
                x = jnp.reshape(reshard(x, PartitionSpec(None, *rest)), (*shape, *x.shape[1:]))
                # Interleaved, the second axis becomes the first, over which a loop runs.
                inner = over if shape[1] % count == 0 and not interleaved else None
                x = reshard(x, PartitionSpec(None, inner, *rest))
            return jnp.swapaxes(x, 0, 1) if interleaved else x

        return self.over(reshape, args)

    def one(self, pieces: tuple) -> tuple:
        """A part of a batch that was cut, for its shapes and types."""

        def first(_, x):
            over, _, rest = _sharded(x)
            return (reshard(x, PartitionSpec(None, *rest)) if over else x)[0]

        return self.over(first, pieces)

    def take_largest(self, args: tuple, values: jax.Array, count: int) -> tuple:
        """The arguments, with the examples of the largest values alone."""
        over, shards, _ = _sharded(values)
        _, index = jax.lax.top_k(reshard(values, PartitionSpec(None)) if over else values, count)

        def some(_, x):
            x = jnp.asarray(x)
            over, _, rest = _sharded(x)
            if over is None:
                return x[index]
            outer = over if count % shards == 0 else None
            return x.at[index].get(out_sharding=PartitionSpec(outer, *rest))

        return self.over(some, args)

    def join(
        self,
        stacked: Any,
        part: Any,
        whole: Any,
        *,
        size: int,
        interleaved: bool,
        reduce: Callable,
    ) -> Any:
        """Auxiliary output of a whole batch, from that of its parts, stacked.

        Args:
            stacked: the parts' output.
            part: what one part's output looks like.
            whole: of every leaf of the whole batch's output, its `Origin` in the batch.
            size: number of examples in the whole batch.
            interleaved: as in `cut`.
            reduce: ``reduce(leaf)`` for a leaf that does not follow the batch.
        """

        def put_together(path, x, one, origin):
            all_ = origin.shape
            # Of the parts, each knows its own shape alone; which is what a model's mean goes with.
            if not origin.follows and reduce is not reduce_state:
                return jnp.asarray(origin.value(), x.dtype) if origin.value else reduce_state(x)
            if one.shape == all_.shape:
                return reduce(x)
            # Of a longer axis, such as one of all examples' tokens, nobody knows the order.
            for i, length in enumerate(one.shape):
                alike = (*one.shape[:i], size, *one.shape[i + 1 :]) == all_.shape
                if alike and len(x) * length == size:
                    return _merge(jnp.moveaxis(x, 0, i + interleaved), i, all_.shape)
            raise ValueError(
                f"{self.function}: auxiliary output `aux{jax.tree_util.keystr(path)}` of shape "
                f"{one.shape} on each of {len(x)} parts of the batch cannot be put together to "
                f"{all_.shape}, that of the whole batch. One axis alone may follow the batch, and "
                f"be as long as it is, {size}: return [batch, tokens], not [batch * tokens]; or "
                "say with `aux_reduce=` what to do."
            )

        return jax.tree_util.tree_map_with_path(put_together, stacked, part, whole)


def reduce_output(x: jax.Array) -> jax.Array:
    """Of a leaf without the batch's axis that depends on it: floats averaged, counts added, flags
    any."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.sum(x, axis=0, dtype=x.dtype)
    if x.dtype == bool:
        return jnp.any(x, axis=0)
    return reduce_state(x)


def reduce_state(x: jax.Array) -> jax.Array:
    """Of a model's variable, or a gradient: floats averaged; counters and keys moved alike."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        wide = jnp.promote_types(x.dtype, accumulator(x))
        return jnp.mean(x, axis=0, dtype=wide).astype(x.dtype)
    return x[0]

"""What the outputs of a program depend on, read from its jaxpr."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core


class Origin(NamedTuple):
    """What an output of a function comes from.

    Attributes:
        shape: what it looks like.
        follows: whether it depends on the arguments' values.
        value: ``value()`` computes it, and nothing else, where it does not; None where that would
            be at other parameters than those that were asked for.
    """

    shape: Any
    follows: bool
    value: Callable[[], Any] | None


def origins(function: Callable, *args: Any) -> Any:
    """For every output of ``function(*args)``, its `Origin`."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    reached = _reached(closed.jaxpr, [True] * len(closed.jaxpr.invars))
    given = jax.tree.leaves(args)
    leaves = [
        Origin(shape, follows, functools.partial(_output, closed, i, given))
        for i, (shape, follows) in enumerate(zip(jax.tree.leaves(shapes), reached, strict=True))
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def is_variable(x: Any) -> bool:
    """Whether an operand of a program is a variable, and not a number written into it."""
    return not hasattr(x, "val")


def _output(closed: Any, index: int, args: list) -> Any:
    """One output of a program, from the operations that it needs."""
    wanted, needed = closed.jaxpr.outvars[index], []
    live = {wanted} if is_variable(wanted) else set()
    for equation in reversed(closed.jaxpr.eqns):
        if not live.isdisjoint(equation.outvars):
            needed.append(equation)
            live.update(filter(is_variable, equation.invars))
    jaxpr = closed.jaxpr.replace(eqns=needed[::-1], outvars=[wanted], effects=frozenset())
    return jax.extend.core.jaxpr_as_fun(closed.replace(jaxpr=jaxpr))(*args)[0]


def _reached(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """Which outputs of a program depend on the inputs that are named."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    reached = {x for x, yes in zip(jaxpr.invars, inputs, strict=True) if yes}

    def flags(operands):
        return [is_variable(x) and x in reached for x in operands]

    for equation in jaxpr.eqns:
        outputs = _through(equation, flags(equation.invars))
        reached.update(x for x, yes in zip(equation.outvars, outputs, strict=True) if yes)
    return flags(jaxpr.outvars)


def _through(equation: Any, inputs: list[bool]) -> list[bool]:
    """`_reached` for one operation; where it holds programs, for those in it."""
    params, name, number = equation.params, equation.primitive.name, len(equation.outvars)
    everything = [any(inputs)] * number
    if not any(inputs):
        return everything
    if name == "cond":
        found = [_reached(branch, inputs[1:]) for branch in params["branches"]]
        return everything if inputs[0] else [any(x) for x in zip(*found, strict=True)]
    if name == "while":
        before, consts = params["cond_nconsts"], params["body_nconsts"]
        fixed, carry = inputs[before : before + consts], inputs[before + consts :]
        carry = _settled(lambda carry: _reached(params["body_jaxpr"], fixed + carry), carry)
        stops = any(_reached(params["cond_jaxpr"], inputs[:before] + carry))
        return everything if stops else carry
    inside = params.get("jaxpr", params.get("call_jaxpr"))
    program = getattr(inside, "jaxpr", inside)
    shape = (len(inputs), number)
    if program is None or (len(program.invars), len(program.outvars)) != shape:
        return everything
    if name == "scan":
        if "num_consts" in params:
            first, count = params["num_consts"], params["num_carry"]
        else:  # from JAX 0.11 on
            first, count = (len(list(part)) for part in params["ft_in"].unpack()[:2])
        fixed, carry, over = inputs[:first], inputs[first : first + count], inputs[first + count :]
        carry = _settled(lambda carry: _reached(program, fixed + carry + over)[:count], carry)
        return _reached(program, fixed + carry + over)
    return _reached(program, inputs)


def _settled(step: Callable, carry: list[bool]) -> list[bool]:
    """What a loop's carried values depend on, after any number of rounds."""
    while (new := [a or b for a, b in zip(carry, step(carry), strict=True)]) != carry:
        carry = new
    return carry

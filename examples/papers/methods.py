"""Optimizers by name: every method of the library with its options, and compositions of parts.

A method, a part and a base optimizer are all functions of numbers, so that a dictionary (from the
command line or from TOML) says everything: ``{"name": "gap_descent", "alpha": 0.1}``. What only the
training run knows (the learning rate's schedule, the number of steps, a PRNG key) is filled in
here, by the parameter's name. A real number may also be a schedule over the whole run::

    rho = {schedule = "linear", start = 0.01, end = 0.1}
    rho = {schedule = "cosine", start = 0.1, end = 0.0}
    rho = {schedule = "proportional", start = 0.1, end = 0.02}  # GSAM's: as the learning rate
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import sam_optax
from sam_optax import perturbations, policies, surrogates, variants

# What the radius is called, where it is not `rho`.
RADIUS = {"le_sam": "rho_max", "m_rwp": "std"}
# They are handed a tree at every step, which these programs do not make.
_HANDED = ("eigen_sam", "sparse_sam")
NAMED: dict[str, Callable] = {
    name: function
    for name, function in vars(variants).items()
    if name in sam_optax.__all__ and name not in _HANDED
    if getattr(function, "__module__", None) == variants.__name__  # defined, not imported, there
    if "base" in inspect.signature(function).parameters
}
"""The library's methods of two gradients, in the order in which it defines them, but `_HANDED`."""

ONE_GRADIENT: dict[str, Callable] = {
    function.__name__: function
    for function in (
        sam_optax.single_step_sam,
        sam_optax.momentum_sam,
        sam_optax.random_weight_perturbation,
    )
}
"""Those of one gradient a step."""


def _esam(base, key, rho: Any = 0.05, beta: Any = 0.5, *, info: bool = False):
    """ESAM's perturbation; its selection of examples is `esam_step`'s."""
    masked = optax.chain(perturbations.steepest_ascent(rho), perturbations.random_mask(key, beta))
    return sam_optax.sharpness_aware(base, masked, info=info)


def _base(base, *, info: bool = False):
    """The base optimizer alone, through the same door as everything else."""
    ascent = perturbations.steepest_ascent(0.0)
    return sam_optax.sharpness_aware(base, ascent, policy=policies.never(), info=info)


def _tail(base, total_steps, rho: Any = 0.05, share: float = 0.5, *, info: bool = False):
    """SAM in the last part of a run; before it, the base optimizer alone."""
    start = round((1 - share) * total_steps)
    late = policies.from_step(start, policies.always())
    return sam_optax.sharpness_aware(
        base, perturbations.steepest_ascent(rho), policy=late, info=info
    )


METHODS: dict[str, Callable] = {
    "base": _base,
    **NAMED,
    **ONE_GRADIENT,
    "tail": _tail,
    "esam": _esam,
    "ksam": sam_optax.sam,
}
# The share of the batch that the second gradient is taken on belongs to the step.
STEP_OPTIONS = {"esam": {"gamma": 0.5}, "ksam": {"gamma": 0.5}}
# What only a run knows, by the names of parameters.
_KNOWN = ("learning_rate", "total_steps", "key")
# No options: filled in by `optimizer`, or for other programs.
_FILLED = (
    "base",
    *_KNOWN,
    "momentum",
    "mask",
    "axis_name",
    "sync_perturbation",
    "info",
    "in_place",
)


class Setting(NamedTuple):
    """What a run knows and a dictionary does not.

    Attributes:
        learning_rate: schedule of the step.
        peak: its largest value.
        total_steps: number of steps of the run.
        key: PRNG key of the method.
        momentum: the base optimizer's, which `momentum_sam` looks ahead along.
    """

    learning_rate: optax.Schedule
    peak: float
    total_steps: int
    key: jax.Array
    momentum: float = 0.9


def _known(function: Callable, setting: Setting) -> dict[str, Any]:
    """The arguments of a function that only the run knows."""
    parameters = inspect.signature(function).parameters
    return {name: getattr(setting, name) for name in _KNOWN if name in parameters}


def options_of(method: str) -> dict[str, Any]:
    """The options of a method and their defaults.

    Raises:
        ValueError: there is no such method.
    """
    if method == "composition":
        return {}
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r}; one of {', '.join((*METHODS, 'composition'))}"
        )
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(METHODS[method]).parameters.items()
        if name not in _FILLED
    }
    return found | STEP_OPTIONS.get(method, {})


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless the method takes all of these options."""
    known = options_of(method)
    for name in options:
        if name not in known:
            takes = ", ".join(known) or "none"
            raise ValueError(f"method {method!r} takes no option {name!r}; its options: {takes}")


def _number_or_schedule(value: Any, setting: Setting) -> Any:
    if not (isinstance(value, Mapping) and "schedule" in value):
        return value
    spec = dict(value)
    kind, start, end = spec.pop("schedule"), spec.pop("start", None), spec.pop("end", None)
    numbers = isinstance(start, int | float) and isinstance(end, int | float)
    if not numbers or spec or kind not in ("linear", "cosine", "proportional"):
        raise ValueError(
            f"a schedule is {{schedule = linear, cosine or proportional, start = x, end = y}}, got "
            f"{dict(value)}"
        )
    if kind == "proportional":
        return sam_optax.proportional_rho(setting.learning_rate, 0.0, setting.peak, end, start)
    if kind == "linear":
        return optax.linear_schedule(start, end, setting.total_steps)
    flat = optax.cosine_decay_schedule(1.0, setting.total_steps)
    return lambda step: end + (start - end) * flat(step)


def _part(module: Any, spec: Any, setting: Setting, what: str) -> Any:
    """Call the function of a module that a table names, with the table's other entries."""
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = spec.pop("name", None)
    function = getattr(module, str(name), None)
    if not callable(function) or str(name).startswith("_"):
        raise ValueError(f"{what}: {module.__name__} has no {name!r}")
    parameters = inspect.signature(function).parameters
    filled = _known(function, setting)
    for key, value in spec.items():
        if key not in parameters:
            takes = ", ".join(parameters)
            raise ValueError(f"{what}: {name} takes no {key!r}; its arguments: {takes}")
        if key in ("rule", "policy"):
            filled[key] = _part(module, value, setting, f"{what}.{key}")
        else:
            filled[key] = _number_or_schedule(value, setting)
    try:
        return function(**filled)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from None


def base_optimizer(
    spec: Any, setting: Setting, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """An optimizer of Optax: clipping first, then weight decay, then the optimizer.

    Weight decay is the optimizer's own where it has such an argument (AdamW, Lion), and else an L2
    term added to the gradient, as PyTorch's SGD does. It is on all parameters.

    Args:
        spec: a name, or a table with a name and arguments.
        setting: the run.
        weight_decay: coefficient.
        clip_norm: largest global norm of what the optimizer sees; 0 for no clipping.
    """
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    function = getattr(optax, str(spec.get("name")), None)
    own = callable(function) and "weight_decay" in inspect.signature(function).parameters
    if own:
        spec.setdefault("weight_decay", weight_decay)
    chain = [_part(optax, spec, setting, "base")]
    if weight_decay and not own:
        chain.insert(0, optax.add_decayed_weights(weight_decay))
    if clip_norm:
        chain.insert(0, optax.clip_by_global_norm(clip_norm))
    return chain[0] if len(chain) == 1 else optax.chain(*chain)


def optimizer(
    method: str, options: Mapping[str, Any], base: Any, setting: Setting, *, info: bool = True
) -> optax.GradientTransformationExtraArgs:
    """A method around a base optimizer; see `composition` for one that has no name.

    Args:
        method: one of `METHODS`.
        options: by name, see `options_of`.
        base: the base optimizer.
        setting: the run.
        info: whether ``state.info`` has norms and cosine, which the trainer writes down; methods
            of one gradient have none.
    """
    check_options(method, options)
    function = METHODS[method]
    given = {
        name: _number_or_schedule(value, setting)
        for name, value in options.items()
        if name not in STEP_OPTIONS.get(method, {})
    }
    parameters = inspect.signature(function).parameters
    if "info" in parameters:
        given["info"] = info
    if "momentum" in parameters:
        given["momentum"] = setting.momentum
    try:
        return function(base, **_known(function, setting), **given)
    except TypeError as error:
        raise ValueError(str(error)) from None


def composition(
    perturbation: Any, surrogate: Any, policy: Any, base: Any, setting: Setting
) -> optax.GradientTransformationExtraArgs:
    """Any perturbation (or several, chained), with any surrogate rule and any policy."""
    if not perturbation:
        raise ValueError("a composition needs a [perturbation] table, or [[perturbation]] tables")
    several = perturbation if isinstance(perturbation, list | tuple) else [perturbation]
    ascents = [_part(perturbations, spec, setting, "perturbation") for spec in several]
    rule = _part(surrogates, surrogate or "perturbed_gradient", setting, "surrogate")
    return sam_optax.sharpness_aware(
        base,
        ascents[0] if len(ascents) == 1 else optax.chain(*ascents),
        rule,
        _part(policies, policy or "always", setting, "policy"),
        learning_rate=setting.learning_rate,
        info=True,
    )

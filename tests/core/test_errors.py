"""Bad input is refused by name: function, argument, value, range, and what to do instead."""

import fractions
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sam_optax
from sam_optax import perturbations, policies, sharpness_aware, surrogates
from sam_optax.perturbations import gradient_ascent, steepest_ascent
from sam_optax.policies import always
from sam_optax.surrogates import perturbed_gradient, weight_decoupled

BASE = optax.sgd(0.1)
# To the type checker, all of what follows is wrong.
lib: Any = sam_optax
sam = lib.sam
KEY = jax.random.key(0)
PARAMS = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
BAYES = sam_optax.bayesian_sam(0.1, jax.random.key(0), 10)
part = functools.partial

# What is called, the argument, a value outside its range, and the range as the message has it.
RANGES = [
    (part(sam, BASE), "rho", -0.1, "[0, inf)"),
    (part(sam, BASE), "rho", float("nan"), "[0, inf)"),
    (part(sam, BASE), "rho", float("inf"), "[0, inf)"),
    (part(sam, BASE), "rho", np.float32(-1), "[0, inf)"),
    (part(sam_optax.asam, BASE), "rho", -1, "[0, inf)"),
    (part(sam_optax.asam, BASE), "eta", -0.5, "[0, inf)"),
    (part(sam_optax.fisher_sam, BASE), "eta", -0.5, "[0, inf)"),
    (part(sam_optax.gsam, BASE), "alpha", -0.5, "[0, inf)"),
    (part(sam_optax.wsam, BASE), "learning_rate", -0.1, "[0, inf)"),
    (part(sam_optax.wsam, BASE, 0.1), "gamma", 1.0, "[0, 1)"),
    (part(sam_optax.coupled_wsam, BASE), "gamma", -0.1, "[0, 1)"),
    (part(sam_optax.stable_sam, BASE), "clip", 0.0, "(0, 1)"),
    (part(sam_optax.stable_asam, BASE), "clip", 1.0, "(0, 1)"),
    (part(sam_optax.friendly_sam, BASE), "decay", 1.5, "[0, 1]"),
    (part(sam_optax.friendly_asam, BASE), "decay", -0.1, "[0, 1]"),
    (part(sam_optax.look_sam, BASE), "k", 0, "[1, inf)"),
    (part(sam_optax.look_sam, BASE), "alpha", -1.0, "[0, inf)"),
    (part(sam_optax.ss_sam, BASE, KEY), "probability", 1.5, "[0, 1]"),
    (part(sam_optax.ae_sam, BASE), "total_steps", 0, "[1, inf)"),
    (part(sam_optax.ae_sam, BASE, 10), "decay", 1.0, "[0, 1)"),
    (part(sam_optax.ae_sam, BASE, 10), "lambda_1", float("-inf"), "(-inf, inf)"),
    (part(sam_optax.ae_look_sam, BASE, 10), "lambda_2", float("nan"), "(-inf, inf)"),
    (part(sam_optax.vasso, BASE), "theta", -0.1, "[0, 1]"),
    (part(sam_optax.gnp, BASE), "alpha", -0.1, "[0, inf)"),
    (part(sharpness_aware, BASE, steepest_ascent(0.1)), "learning_rate", -1.0, "[0, inf)"),
    (part(sam_optax.proportional_rho, 0.1, 0.5), "lr_max", 0.1, "[0.5, inf)"),
    (part(perturbations.gradient_ascent), "rho", -1.0, "[0, inf)"),
    (part(perturbations.subtract_ema, decay=0.9), "sigma", float("nan"), "(-inf, inf)"),
    (part(perturbations.random_mask, KEY), "beta", 0.0, "(0, 1]"),
    (part(policies.every), "k", -2, "[1, inf)"),
    (part(policies.from_step, policy=always()), "start", -1, "[0, inf)"),
]


def named(call, argument, value):
    """Call with the argument by its name, the arguments before it having been given."""
    return call(**{argument: value, **missing(call, argument)})


def missing(call, argument):
    """What else the call needs, where the argument at fault is not the last of them."""
    if call.func is sam_optax.proportional_rho:
        return {"rho_min": 0.1, "rho_max": 0.2}
    return {}


@pytest.mark.parametrize(
    ("call", "argument", "value", "interval"),
    RANGES,
    ids=lambda x: getattr(getattr(x, "func", None), "__name__", None),
)
def test_numbers_outside_their_range(call, argument, value, interval):
    with pytest.raises(ValueError, match=f"`{argument}` must be .*{re.escape(interval)}") as caught:
        named(call, argument, value)
    message = str(caught.value)
    assert message.startswith(call.func.__name__)
    assert repr(value) in message


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: sam(BASE, rho="0.1"), r"sam: .*`rho` must be a number .* schedule, got '0.1'"),
        (lambda: sam(BASE, rho=None), r"`rho` must be a number"),
        (lambda: sam(BASE, rho=True), r"`rho` must be a number .*got True"),
        (lambda: sam(BASE, rho=jnp.array([0.1, 0.2])), r"`rho` must be a number .*got Array"),
        (lambda: lib.look_sam(BASE, k=2.5), r"look_sam: .*`k` must be an integer .*got 2\.5"),
        (lambda: lib.look_sam(BASE, k=True), r"`k` must be an integer"),
        (
            lambda: lib.ae_sam(BASE, total_steps=lambda step: 5),
            r"`total_steps` must be an integer",
        ),
        (lambda: lib.ss_sam(BASE, 0), r"ss_sam: .*`key`.*jax\.random\.key.*got 0"),
        (lambda: lib.perturbations.random_mask(0.5, 0.5), r"random_mask: .*`key`"),
    ],
)
def test_arguments_of_the_wrong_kind(call, match):
    with pytest.raises(TypeError, match=match):
        call()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: lib.friendly_sam(BASE, ema="new"),
            r'friendly_sam: .*`ema` must be "updated" or "previous", got \'new\'',
        ),
        (
            lambda: lib.perturbations.random_mask(KEY, 0.5, "row"),
            r'random_mask: `granularity` must be "element" or "tensor", got \'row\'',
        ),
    ],
)
def test_words_that_are_not_known(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ((0.1, steepest_ascent(0.1)), r"`base` must be a GradientTransformation, got 0\.1"),
        ((optax.sgd, steepest_ascent(0.1)), r"`base` must .* called first\?"),
        ((BASE, steepest_ascent), r"`perturbation` must be .* called first\?"),
        ((BASE, 0.05), r"`perturbation` must be a GradientTransformation, got 0\.05"),
        ((BASE, steepest_ascent(0.1), perturbed_gradient), r"`surrogate` must .* called first\?"),
        (
            (BASE, steepest_ascent(0.1), always()),
            r"`surrogate` must be a SurrogateRule, got Policy",
        ),
        (
            (BASE, steepest_ascent(0.1), perturbed_gradient(), always),
            r"`policy` must be a Policy.* called first\?",
        ),
        (
            (BASE, steepest_ascent(0.1), perturbed_gradient(), 5),
            r"`policy` must be a Policy, got 5",
        ),
    ],
)
def test_parts_of_the_wrong_kind(parts, match):
    with pytest.raises(TypeError, match=f"sharpness_aware: {match}"):
        lib.sharpness_aware(*parts)


def test_a_method_without_a_base():
    with pytest.raises(TypeError, match=r"sam: .*`base` must .*, got 0\.1"):
        sam(0.1)


def update(tx, *, updates=PARAMS, params=PARAMS, **keywords):
    return tx.update(updates, tx.init(PARAMS), params, **keywords)


def identity(params):
    return params


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        ({"params": None, "grad_fn": identity}, ValueError, r"pass them.*grad_fn=\.\.\."),
        ({}, ValueError, r"exactly one of `grad_fn=`.*`value_and_grad_fn=`.*got neither"),
        (
            {"grad_fn": PARAMS},
            TypeError,
            r"`grad_fn` must be a function of the parameters, got dict",
        ),
        ({"gradient_fn": identity}, ValueError, r"got neither, but `gradient_fn=`\."),
        (
            {"grad_fn": identity, "value_and_grad_fn": lambda p: (1.0, p)},
            ValueError,
            r"exactly one of .*got both",
        ),
        (
            {"grad_fn": lambda p: (1.0, p)},
            TypeError,
            r"returned a tuple of 2.*value_and_grad_fn=.*has_aux",
        ),
        (
            {"grad_fn": lambda p: (p, {"accuracy": 1.0})},
            TypeError,
            r"returned a tuple of 2.*value_and_grad_fn=.*has_aux",
        ),
        (
            {"value_and_grad_fn": lambda p: ((1.0, "aux"), p)},
            TypeError,
            r"loss must be a scalar, got tuple.*aux",
        ),
        ({"value_and_grad_fn": identity}, TypeError, r"must return \(loss, gradient\), got dict"),
        (
            {"value_and_grad_fn": lambda p: (jnp.ones(3), p)},
            ValueError,
            r"loss must be a scalar, got shape \(3,\)",
        ),
        (
            {"grad_fn": lambda p: {"layer": {"kernel": p["layer"]["kernel"]}}},
            ValueError,
            r"perturbed gradient must be a tree like params.*\['layer'\]\['bias'\]",
        ),
        (
            {"grad_fn": lambda p: p | {"extra": jnp.ones(1)}},
            ValueError,
            r"perturbed gradient has a leaf at `\['extra'\]`",
        ),
        (
            {"grad_fn": lambda p: jax.tree.map(lambda x: x[:1], p)},
            ValueError,
            r"perturbed gradient .*\['layer'\]\['kernel'\]`? .*\(1, 3\) instead of \(2, 3\)"
            r"|perturbed gradient .*\['layer'\]\['bias'\]`? .*\(1,\) instead of \(3,\)",
        ),
        (
            {"updates": {"layer": {"kernel": jnp.ones((2, 3))}}, "grad_fn": identity},
            ValueError,
            r"clean gradient must be a tree like params.*\['layer'\]\['bias'\]",
        ),
        (
            {"updates": {"layer": (jnp.ones((2, 3)), jnp.ones(3))}, "grad_fn": identity},
            ValueError,
            r"clean gradient must be a tree like params",
        ),
        (
            {"updates": jax.tree.map(lambda x: x[None], PARAMS), "grad_fn": identity},
            ValueError,
            r"clean gradient must have the shapes of params.*\['layer'\]\['bias'\]`",
        ),
    ],
)
def test_calls_that_cannot_work(keywords, error, match):
    with pytest.raises(error, match=f"(?s)sharpness_aware: .*{match}"):
        update(sam(BASE), **keywords)


def test_a_tuple_gradient_of_tuple_parameters_is_a_gradient():
    params = (jnp.ones(2), jnp.ones(3))
    tx = sam(BASE)
    updates, _ = tx.update(params, tx.init(params), params, grad_fn=identity)
    assert len(updates) == 2


def test_decoupled_term_without_a_learning_rate():
    tx = sharpness_aware(BASE, steepest_ascent(0.1), weight_decoupled(0.9))
    with pytest.raises(ValueError, match=r"sharpness_aware: .*decoupled term; .* `learning_rate="):
        update(tx, grad_fn=identity)


@pytest.mark.parametrize("part", [perturbations.project_onto, perturbations.reject_from])
def test_projection_without_or_with_a_wrong_direction(part):
    tx = sharpness_aware(BASE, optax.chain(part(), steepest_ascent(0.1)))
    with pytest.raises(
        ValueError, match=f"{part.__name__}: .*pass `direction=`.*extra_args=.*loss form"
    ):
        update(tx, grad_fn=identity)
    with pytest.raises(ValueError, match=rf"{part.__name__}: direction .*\['bias'\]"):
        update(tx, grad_fn=identity, direction={"layer": {"kernel": jnp.ones((2, 3))}})


def test_a_scale_that_returns_another_tree():
    tx = sharpness_aware(BASE, steepest_ascent(0.1, scale=lambda params: params["layer"]))
    with pytest.raises(ValueError, match=r"steepest_ascent: what `scale` returned .*\['layer'\]"):
        update(tx, grad_fn=identity)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("mask", lambda mask: sam(BASE, mask=mask)),
        ("adaptive_mask", lambda mask: lib.asam(BASE, adaptive_mask=mask)),
    ],
)
@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        ({"layer": {"kernel": True}}, ValueError, "tree of bools like params, or a prefix"),
        ({"other": True}, ValueError, "tree of bools like params, or a prefix"),
        ({"layer": {"kernel": 1, "bias": 0}}, TypeError, "one bool.*got 0"),
        ({"layer": {"kernel": True, "bias": "no"}}, TypeError, "one bool.*got 'no'"),
        ({"layer": {"kernel": True, "bias": jnp.ones(3, bool)}}, TypeError, "one bool"),
        (lambda params: jax.tree.map(jnp.sum, params), TypeError, "one bool"),
    ],
)
def test_masks(name, build, mask, error, match):
    tx = build(mask)
    with pytest.raises(error, match=f"(?s)`{name}`.*{match}"):
        update(tx, grad_fn=identity)


def test_a_mask_that_is_only_known_at_run_time():
    @jax.jit
    def run(keep):
        return update(sam(BASE, mask={"layer": {"kernel": keep, "bias": True}}), grad_fn=identity)

    with pytest.raises(TypeError, match="`mask` must be one bool, known when tracing"):
        run(True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"layer": {"kernel": True, "bias": False}}),
        lambda tx: optax.partition(
            {"ours": tx, "theirs": BASE}, {"layer": {"kernel": "ours", "bias": "theirs"}}
        ),
    ],
    ids=["masked", "partition"],
)
def test_masking_the_whole(wrap):
    with pytest.raises(ValueError, match=r"sharpness_aware: .*`mask=` .*`base`"):
        wrap(sam(BASE)).init(PARAMS)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_parameters_that_cannot_be_perturbed(dtype):
    params = PARAMS | {"count": jnp.ones((), dtype)}
    with pytest.raises(TypeError, match=rf"real floating-point .*\['count'\]` is {dtype}"):
        sam(BASE).init(params)


def test_gradients_of_integers():
    """A direction cut to integers would be no direction."""
    whole = jax.tree.map(lambda x: x.astype(int), PARAMS)
    with pytest.raises(TypeError, match=r"the clean gradient must be of real.*int32"):
        update(sam(BASE), updates=whole, grad_fn=identity)
    with pytest.raises(TypeError, match="gradients must be real floating-point arrays, got int32"):
        steepest_ascent(0.1).update(whole, optax.EmptyState())


def test_errors_inside_jit_are_the_same():
    tx = sam(BASE)
    with pytest.raises(ValueError, match="got neither"):
        jax.jit(lambda g, s: tx.update(g, s, PARAMS))(PARAMS, tx.init(PARAMS))


def test_gradient_ascent_is_named_when_it_is_called_alone():
    with pytest.raises(ValueError, match=r"^gradient_ascent: `rho` must be a number in \[0, inf\)"):
        gradient_ascent(-1.0)


def test_rules_name_themselves():
    with pytest.raises(ValueError, match=r"^renormalized: `clip`"):
        surrogates.renormalized(perturbed_gradient(), clip=2.0)


# --- Parts, states and methods in the wrong places ------------------------------------------------

NOTHING: Any = None
PLAIN = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
MISPLACED = [
    (lambda: policies.from_step(3, lib.policies.always), r"from_step: `policy` .*called first\?"),
    (lambda: policies.between(0, 3, NOTHING), r"between: `policy` must be a Policy, got None"),
    (
        lambda: surrogates.renormalized(lib.surrogates.perturbed_gradient),
        r"renormalized: `rule` must be a SurrogateRule.*called first\?",
    ),
    (
        lambda: update(sharpness_aware(BASE, steepest_ascent(0.1), BARE), grad_fn=identity),
        r"must return \(Direction, state\), got dict.*Return",
    ),
    (lambda: sam(BASE, sync_perturbation="no"), r"sync_perturbation` must be True or False"),
    (lambda: sam(BASE, info=None), r"`info` must be True or False, got None"),
    (lambda: sam(sam(BASE)).init(PARAMS), r"`base` holds another sharpness-aware method"),
    (lambda: sam(BAYES).init(PARAMS), r"`base` holds another sharpness-aware method"),
    *(
        (lambda build=build, held=held: build(BASE, held).init(PARAMS), "perturbation holds a")
        for build in (sharpness_aware, lib.one_gradient)
        for held in (sam(BASE), BAYES, lib.single_step_sam(BASE))
    ),
    (lambda: lib.momentum_sam(BAYES).init(PARAMS), r"one_gradient: `base` holds another"),
    (
        lambda: twice(optax.chain(sam(BASE), sam(BASE))),
        r"two_gradient_step: .*two sharpness-aware methods.*compose the parts",
    ),
    # `optax.masked` hands on what it leaves out: a raw gradient as the displacement.
    (
        lambda: sharpness_aware(BASE, optax.masked(steepest_ascent(0.1), KERNEL)).init(PLAIN),
        r"sharpness_aware: `optax.masked`.* in the perturbation.*`mask=`",
    ),
    (
        lambda: lib.one_gradient(BASE, optax.masked(steepest_ascent(0.1), KERNEL)).init(PLAIN),
        r"one_gradient: `optax.masked`.* in the perturbation.*`mask=`",
    ),
    (lambda: sharpness_aware(steepest_ascent(0.1), BASE), r"`base` is a perturbation.*comes first"),
    (lambda: lib.one_gradient(steepest_ascent(0.1), BASE), r"one_gradient: `base` is a pert"),
    # States of another optimizer, and of another method.
    (lambda: given(sam(BASE), BASE.init(PLAIN)), r"the state is a tuple, and not the Sharpness"),
    (lambda: given(sam(BASE), None), r"the state is a NoneType.*order of the arguments"),
    (lambda: given(lib.look_sam(BASE), sam(BASE).init(PLAIN)), r"state of the surrogate is not"),
    (lambda: given(lib.vasso(BASE), sam(BASE).init(PLAIN)), r"state of the perturbation is not"),
    (lambda: given(lib.ae_sam(BASE, 10), sam(BASE).init(PLAIN)), r"state of the policy is not"),
    (
        lambda: given(
            lib.friendly_sam(BASE), lib.friendly_sam(BASE).init(PLAIN | {"kernel": jnp.ones(3)})
        ),
        r"the state of the perturbation is not .*of other parameters",
    ),
    (
        lambda: lib.sharpness_aware_value_and_grad(total, sam(BASE)).value_and_grad(PLAIN, None),
        r"sharpness_aware_value_and_grad: the state is a NoneType",
    ),
    (
        lambda: sam_optax.training.two_gradient_step(total, sam(BASE))(PLAIN, BASE.init(PLAIN)),
        r"two_gradient_step: the state is a tuple",
    ),
    (lambda: given(BAYES, BASE.init(PLAIN)), r"bayesian_sam: the state is a tuple"),
    # Keys.
    (lambda: lib.ss_sam(BASE, jnp.zeros(3)), r"`key` must be a PRNG key .*float32\[3\]"),
    (
        lambda: lib.m_rwp(BASE, jax.random.split(KEY, 3)),
        r"`key` must be a PRNG key .*\[3\] of them",
    ),
    # Where the parameters are.
    (lambda: lib.sharpness_aware_loss(total, sam(BASE), argnums=()), r"`argnums` must be an int"),
    (lambda: lib.sharpness_aware_loss(total, sam(BASE), argnums=True), r"`argnums` must be"),
    (lambda: lib.sharpness_aware_loss(total, sam(BASE), argnums=(0, 0)), r"several that differ"),
    (
        lambda: lib.sharpness_aware_loss(total, sam(BASE))(params=PLAIN),
        r"does not fit 0 positional arguments. Pass the parameters by position",
    ),
    (
        lambda: sam_optax.training.linen_step(PLAIN, total),
        r"linen_step: the first argument must be a .*TrainState, got dict",
    ),
    (
        lambda: sam_optax.training.nnx_step(PLAIN, sam(BASE), total),
        r"nnx_step: .*an nnx.Optimizer for it.*got dict and SharpnessAware",
    ),
]
KERNEL = {"kernel": True, "bias": False}
BARE = surrogates.SurrogateRule(
    lambda params: (), lambda g, gp, step, state: (gp, state), lambda g, step, state: (g, state)
)


def total(params):
    return jnp.sum(params["kernel"]) + jnp.sum(params["bias"])


def given(tx, state):
    return tx.update(PLAIN, state, PLAIN, grad_fn=identity)


def twice(tx):
    return sam_optax.training.two_gradient_step(total, tx)(PLAIN, tx.init(PLAIN))


@pytest.mark.parametrize(("call", "match"), MISPLACED)
def test_what_is_misplaced(call, match):
    with pytest.raises((TypeError, ValueError), match=f"(?s){match}"):
        call()


def test_masks_within_a_perturbation_that_set_a_part_to_zero():
    """Only where a raw gradient comes out is `optax.masked` refused."""
    rest = jax.tree.map(lambda keep: not keep, KERNEL)
    both = (
        optax.chain(steepest_ascent(0.1), optax.masked(optax.set_to_zero(), rest)),
        optax.chain(optax.masked(optax.scale(2.0), KERNEL), steepest_ascent(0.1)),
        optax.partition({True: steepest_ascent(0.1), False: optax.set_to_zero()}, KERNEL),
        optax.masked(perturbations.project_onto(), KERNEL),
    )
    for perturbation in both:
        sharpness_aware(BASE, perturbation).init(PLAIN)


def grouped(part, labels):
    return optax.partition({"on": steepest_ascent(0.1), "off": part}, labels)


RAW = {
    "none chosen": optax.masked(steepest_ascent(0.1), dict.fromkeys(PLAIN, False)),
    "a group left alone": grouped(optax.identity(), {"kernel": "on", "bias": "off"}),
    "masked in a group": grouped(
        optax.masked(steepest_ascent(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        {"kernel": "off", "bias": "off"},
    ),
    "several steps": optax.masked(perturbations.repeated(steepest_ascent(0.1), 2), KERNEL),
}


@pytest.mark.parametrize("name", RAW)
def test_a_gradient_is_no_displacement(name):
    with pytest.raises(ValueError, match=r"hands on the gradient of some leaves.*`mask=`"):
        sharpness_aware(BASE, RAW[name]).init(PLAIN)


def test_several_steps_in_groups():
    """Each group climbs by itself; the gradients in between see both."""
    two = perturbations.repeated(steepest_ascent(0.1), 2)
    labels = {"kernel": "on", "bias": "off"}
    tx: Any = sharpness_aware(BASE, optax.partition({"on": two, "off": two}, labels), info=True)
    _, state = tx.update(PLAIN, tx.init(PLAIN), PLAIN, grad_fn=identity)
    np.testing.assert_allclose(state.info.perturbation_norm, 0.2 * 2**0.5, rtol=1e-5)


def test_a_base_that_looks_at_arrays_alone_is_no_identity():
    base = optax.stateless(
        lambda u, p: jax.tree.map(lambda x: -0.1 * x if isinstance(x, jax.Array) else x, u)
    )
    sam_optax.wsam(base, learning_rate=0.1).init(PLAIN)


@pytest.mark.parametrize("way", ["clean", "perturbed", "one gradient", "in place"])
@pytest.mark.parametrize("dtype", [int, complex])
def test_gradients_are_real_and_floating(way, dtype):
    bad = jax.tree.map(lambda x: x.astype(dtype), PLAIN)
    with pytest.raises(TypeError, match=f"must be of real floating.*{dtype.__name__}"):
        if way in ("clean", "perturbed"):
            given = {"updates": bad if way == "clean" else PLAIN, "grad_fn": lambda p: bad}
            tx = sam(BASE)
            tx.update(given.pop("updates"), tx.init(PLAIN), PLAIN, **given)
        else:
            tx = lib.single_step_sam(BASE, in_place=way == "in place")
            tx.update(bad, tx.init(PLAIN), PLAIN)


def test_a_function_is_no_gradient():
    with pytest.raises(ValueError, match="the clean gradient must be a tree like params"):
        sam(BASE).update(identity, sam(BASE).init(PLAIN), PLAIN, grad_fn=identity)


def test_an_nnx_model_with_more_than_parameters():
    """Its statistics would be perturbed, and not move: the forms for NNX are for it."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    net = Net(nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"sharpness_aware_loss`.*split the model"):
        lib.sharpness_aware_loss(lambda m: 0.0, sam(BASE))(net)
    with pytest.raises(TypeError, match="`BatchStat` would be perturbed"):
        lib.sharpness_aware_value_and_grad(lambda m: 0.0, sam(BASE)).init(net)
    sam(BASE).init(nnx.state(net, nnx.Param))
    sam(BASE).init(net.dense)


STEPS: Any = sam_optax.training
PARTS: Any = perturbations
RULES: Any = surrogates
KINDS = [
    (lambda: STEPS.two_gradient_step(total, sam(BASE), skip_nonfinite="no"), "`skip_nonfinite`"),
    (lambda: STEPS.two_gradient_step(total, sam(BASE), has_aux="x"), "`has_aux` must be True"),
    (lambda: STEPS.two_gradient_step(None, sam(BASE)), "the loss must be a function, got None"),
    (lambda: STEPS.two_gradient_step(total, sam), "Was it meant to be called first?"),
]


@pytest.mark.parametrize(("make", "match"), KINDS)
def test_kinds_of_options(make, match):
    with pytest.raises(TypeError, match=match):
        make()(PLAIN, sam(BASE).init(PLAIN))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: PARTS.steepest_ascent(0.1, 0.1), "steepest_ascent: `scale` must be a function"),
        (lambda: PARTS.sign_ascent(0.1, [0.1]), "sign_ascent: `scale` must be"),
        (lambda: RULES.renormalized(perturbed_gradient(), scale=0.5), "`scale` must be"),
        (lambda: PARTS.repeated(steepest_ascent(0.1), 2, "no"), "`reset` must be True"),
        (lambda: lib.sharpness_aware_loss(total, lib.sam), "meant to be called first"),
        (lambda: lib.nnx_sharpness_aware_loss(total, sam(BASE), argnums=(0,)), "one integer"),
        (lambda: lib.ss_sam(BASE, jax.random.PRNGKey(0, impl="rbg")), r"uint32\[4\]"),
        (
            lambda: STEPS.two_gradient_step(total, sam(BASE))(
                PLAIN, sam(BASE).init(PLAIN), extra_args=[1]
            ),
            "`extra_args` must be a dictionary",
        ),
    ],
)
def test_kinds_of_arguments(call, match):
    with pytest.raises(TypeError, match=match):
        call()


def test_a_fraction_is_a_number():
    tx: Any = sam(BASE, fractions.Fraction(1, 4), info=True)
    _, state = tx.update(PLAIN, tx.init(PLAIN), PLAIN, grad_fn=identity)
    np.testing.assert_allclose(state.info.perturbation_norm, 0.25, rtol=1e-6)

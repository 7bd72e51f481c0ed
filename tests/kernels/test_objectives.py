"""The eight objectives against formulas written with Python's own numbers, gradients by hand; ranges; extremes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from synpo_kernels import objectives

# Two pairs and one; lengths differ, one answer has a single token.
LENGTHS = {"two pairs": [3, 1, 2, 4], "one pair": [2, 5]}
REFERENCE = ("dpo", "dpop", "ipo", "kto")

Sequences = list[list[float]]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# Each returns the loss of one pair and its derivatives: by every chosen token's l_t, by every rejected token's.
# c, r: log-probs of the tokens; hc, hr: sums minus the reference's; ref: the reference's sum of the chosen answer.
def synpo_sigmoid(c: list[float], r: list[float], alpha: float = 30.0, beta: float = 0.2) -> tuple:
    rc, rr = math.exp(sum(c) / len(c)), math.exp(sum(r) / len(r))
    p = sigmoid(alpha * (rc - rr))
    slope = -p * (1 - p)
    return _synpo(c, r, -p, slope, alpha, beta, rc, rr)


def synpo_logsigmoid(c: list[float], r: list[float], alpha: float = 30.0, beta: float = 0.2) -> tuple:
    rc, rr = math.exp(sum(c) / len(c)), math.exp(sum(r) / len(r))
    u = alpha * (rc - rr)
    return _synpo(c, r, softplus(-u), -sigmoid(-u), alpha, beta, rc, rr)


def _synpo(
    c: list[float], r: list[float], rank: float, slope: float, alpha: float, beta: float, rc: float, rr: float
) -> tuple:
    q = sum(math.exp(x) for x in c) / len(c)
    by_c = [(slope * alpha * rc - beta * math.exp(x)) / len(c) for x in c]
    return rank - beta * q, by_c, [-slope * alpha * rr / len(r)] * len(r)


def dpo(c: list[float], r: list[float], hc: float, hr: float, beta: float = 0.1) -> tuple:
    u = beta * (hc - hr)
    g = -sigmoid(-u) * beta
    return softplus(-u), [g] * len(c), [-g] * len(r)


def dpop(c: list[float], r: list[float], hc: float, hr: float, beta: float = 0.1, dpop_lambda: float = 50.0) -> tuple:
    u = beta * (hc - hr - dpop_lambda * max(0.0, -hc))
    g = -sigmoid(-u) * beta
    return softplus(-u), [g * (1 + dpop_lambda * (hc < 0))] * len(c), [-g] * len(r)


def ipo(c: list[float], r: list[float], hc: float, hr: float, beta: float = 0.1) -> tuple:
    gap = hc / len(c) - hr / len(r) - 1 / (2 * beta)
    return gap**2, [2 * gap / len(c)] * len(c), [-2 * gap / len(r)] * len(r)


def simpo(c: list[float], r: list[float], beta: float = 2.0, gamma: float = 0.5) -> tuple:
    u = beta * (sum(c) / len(c) - sum(r) / len(r)) - gamma
    g = -sigmoid(-u) * beta
    return softplus(-u), [g / len(c)] * len(c), [-g / len(r)] * len(r)


def cpo(c: list[float], r: list[float], beta: float = 0.1) -> tuple:
    u = beta * (sum(c) - sum(r))
    g = -sigmoid(-u) * beta
    return softplus(-u) - sum(c) / len(c), [g - 1 / len(c)] * len(c), [-g] * len(r)


def orpo(c: list[float], r: list[float], beta: float = 0.1) -> tuple:
    mc, mr = sum(c) / len(c), sum(r) / len(r)
    u = (mc - math.log(-math.expm1(mc))) - (mr - math.log(-math.expm1(mr)))
    g = -beta * sigmoid(-u)  # d log odds / d m = 1 / (1 - e^m)
    by_c, by_r = g / -math.expm1(mc) - 1, -g / -math.expm1(mr)
    return beta * softplus(-u) - mc, [by_c / len(c)] * len(c), [by_r / len(r)] * len(r)


def kto(c: list[float], r: list[float], hc: float, hr: float, zc: float, zr: float, beta: float = 0.1) -> tuple:
    """zc, zr: the batch's KL estimates, which get no gradient."""
    p, q = sigmoid(beta * (hc - zr)), sigmoid(beta * (zc - hr))
    return 1 - (p + q) / 2, [-beta * p * (1 - p) / 2] * len(c), [beta * q * (1 - q) / 2] * len(r)


BY_HAND: dict[str, Callable[..., tuple]] = {
    "synpo": synpo_sigmoid, "dpo": dpo, "dpop": dpop, "ipo": ipo, "simpo": simpo, "kto": kto, "cpo": cpo, "orpo": orpo,
}  # fmt: skip
# Defaults, and values away from them.
SETTINGS: dict[str, list[dict[str, float | str]]] = {
    "synpo": [{}, {"alpha": 4.0, "beta": 0.0}, {"alpha": 7.0, "form": "logsigmoid"}],
    "dpo": [{}, {"beta": 0.7}],
    "dpop": [{}, {"beta": 0.3, "dpop_lambda": 5.0}, {"dpop_lambda": 0.0}],
    "ipo": [{}, {"beta": 0.6}],
    "simpo": [{}, {"beta": 1.1, "gamma": 1.6}, {"gamma": 0.0}],
    "kto": [{}, {"beta": 0.5}],
    "cpo": [{}, {"beta": 0.8}],
    "orpo": [{}, {"beta": 1.0}, {"beta": 0.0}],
}
CASES = [(name, settings) for name, all_settings in SETTINGS.items() for settings in all_settings]


def batch(lengths: list[int], scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, boundaries and per-token reference log-probs."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    n = sum(lengths)
    return -scale * torch.rand(n, dtype=torch.float64) - 0.01, cu_seqlens, -scale * torch.rand(n, dtype=torch.float64)


def by_hand(name: str, logps: Tensor, refs: Tensor, cu: Tensor, settings: dict) -> tuple[Tensor, Tensor]:
    """Losses (B,), and the derivative of their mean by every log-prob."""
    spans = list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))
    pairs = len(spans) // 2
    values: Sequences = [logps[a:b].tolist() for a, b in spans]
    h = [sum(values[i]) - float(refs[a:b].sum()) for i, (a, b) in enumerate(spans)]
    settings = dict(settings)
    formula = synpo_logsigmoid if settings.pop("form", "") == "logsigmoid" else BY_HAND[name]
    losses, by_chosen, by_rejected = [], [], []
    for i in range(pairs):
        reference = (h[i], h[pairs + i]) if name in REFERENCE else ()
        if name == "kto":
            reference += (max(0.0, sum(h[:pairs]) / pairs), max(0.0, sum(h[pairs:]) / pairs))
        loss, by_c, by_r = formula(values[i], values[pairs + i], *reference, **settings)
        losses.append(loss)
        by_chosen += by_c
        by_rejected += by_r
    return torch.tensor(losses).double(), torch.tensor([g / pairs for g in by_chosen + by_rejected]).double()


@pytest.fixture(autouse=True)
def _doubles() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("references", ["per token", "per sequence"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_values_and_gradients(name: str, settings: dict, lengths: str, references: str) -> None:
    for scale in (0.2, 3.0):
        logps, cu, refs = batch(LENGTHS[lengths], scale)
        want, want_gradient = by_hand(name, logps, refs, cu, settings)
        given = refs if references == "per token" else objectives.segment_sums(refs, cu)
        logps.requires_grad_()
        losses = getattr(objectives, name)(logps, cu.to(torch.int32), ref_logps=given, **settings)
        torch.testing.assert_close(losses, want, rtol=1e-12, atol=1e-13)
        (gradient,) = torch.autograd.grad(losses.mean(), logps)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-10, atol=1e-13)


def test_the_branches_of_dpop_and_kto_are_reached() -> None:
    """DPOP's penalty on and off; KTO's KL above 0 and held at 0."""
    signs = set()
    for seed in range(4):
        torch.manual_seed(seed)
        logps, cu, refs = batch([3, 1, 2, 4], 3.0)
        h = objectives.segment_sums(logps - refs, cu)
        signs |= {("pair", bool(x > 0)) for x in h[:2]} | {("batch", bool(h[:2].mean() > 0))}
    assert len(signs) == 4


def test_the_pairs_of_kto_are_coupled_and_no_others_are() -> None:
    logps, cu, refs = batch([3, 1, 2, 4])
    other = logps.clone()
    other[3] += 0.4  # the chosen answer of pair 1
    for name, entry in objectives.REGISTRY.items():
        first, second = (entry.function(x, cu, ref_logps=refs - 5)[0] for x in (logps, other))
        assert (first != second) == entry.coupled == (name == "kto")


def test_orpo_holds_certain_answers_at_finite_odds() -> None:
    for dtype in (torch.float32, torch.float64):
        logps = torch.tensor([0.0, -1e-9, -0.5, 0.0], dtype=dtype, requires_grad=True)
        losses = objectives.orpo(logps, torch.tensor([0, 1, 2, 3, 4]))
        assert losses.isfinite().all()
        held = -1e-7 - math.log(1e-7)
        free = -0.5 - math.log(-math.expm1(-0.5))
        want = torch.tensor([0.1 * softplus(free - held), 1e-9 + 0.1 * math.log(2)], dtype=dtype)
        torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-9)
        (gradient,) = torch.autograd.grad(losses.sum(), logps)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [-1e4, -300.0, -1e-8, 0.0])
@pytest.mark.parametrize("name", objectives.REGISTRY)
def test_extreme_log_probs_stay_finite(name: str, value: float) -> None:
    for chosen in (True, False):
        logps = torch.full((6,), -1.0, dtype=torch.float32)
        logps[: 3 if chosen else None][0 if chosen else 3 :] = value
        logps.requires_grad_()
        losses = objectives.REGISTRY[name].function(logps, torch.tensor([0, 3, 6]), ref_logps=torch.full((6,), -1.0))
        (gradient,) = torch.autograd.grad(losses.sum(), logps)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()


def test_the_negative_side_of_synpo_fades_by_itself() -> None:
    """The gradient on a rejected answer goes with its probability, where DPO's does not."""
    cu = torch.tensor([0, 1, 2])
    share = {}
    for rejected in (-3.0, -30.0):
        logps = torch.tensor([-1.0, rejected], requires_grad=True)
        for name in ("synpo", "dpo"):
            losses = getattr(objectives, name)(logps, cu, ref_logps=torch.tensor([-1.0, rejected]))
            share[name, rejected] = torch.autograd.grad(losses.sum(), logps)[0][1].abs().item()
    assert share["synpo", -30.0] < 1e-6 * share["synpo", -3.0]
    assert share["dpo", -30.0] == pytest.approx(share["dpo", -3.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", objectives.REGISTRY)
def test_any_float_dtype(name: str, dtype: torch.dtype) -> None:
    logps, cu, refs = batch([3, 1, 2, 4])
    want = objectives.REGISTRY[name].function(logps, cu, ref_logps=refs)
    losses = objectives.REGISTRY[name].function(logps.to(dtype), cu, ref_logps=refs)
    assert losses.dtype == dtype
    # A few roundings of a sum of up to 4, times DPOP's 50.
    scale = 50 if name == "dpop" else 30
    torch.testing.assert_close(losses.double(), want, rtol=0, atol=8 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("name", REFERENCE)
def test_a_missing_or_misshapen_reference_is_named(name: str) -> None:
    logps, cu, _ = batch([3, 1, 2, 4])
    with pytest.raises(ValueError, match=f"{name} needs ref_logps"):
        getattr(objectives, name)(logps, cu)
    with pytest.raises(ValueError, match=r"ref_logps has shape \(3,\); expected \(10,\) per valid token or \(4,\)"):
        getattr(objectives, name)(logps, cu, ref_logps=torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sinpo", {}, "objective 'sinpo' is unknown; known: synpo, dpo"),
        ("synpo", {"gamma": 1.0}, "synpo has no hyperparameter 'gamma'; it takes alpha, beta, form"),
        ("dpo", {"alpha": 1.0}, "dpo has no hyperparameter 'alpha'"),
        ("synpo", {"alpha": 0.0}, "alpha is 0.0; synpo needs alpha > 0"),
        ("synpo", {"alpha": -1.0}, "alpha is -1.0"),
        ("synpo", {"beta": -0.1}, "beta is -0.1; synpo needs beta >= 0"),
        ("synpo", {"form": "logsigmiod"}, "form is 'logsigmiod'; allowed: sigmoid, logsigmoid"),
        ("synpo", {"alpha": float("nan")}, "alpha is nan; a finite number is needed"),
        ("synpo", {"alpha": float("inf")}, "alpha is inf; a finite number is needed"),
        ("synpo", {"alpha": "30"}, "alpha is '30'; a finite number is needed"),
        ("dpo", {"beta": 0.0}, "beta is 0.0; dpo needs beta > 0"),
        ("ipo", {"beta": 0.0}, "beta is 0.0; ipo needs beta > 0"),
        ("simpo", {"gamma": -0.5}, "gamma is -0.5; simpo needs gamma >= 0"),
        ("dpop", {"dpop_lambda": -1.0}, "dpop_lambda is -1.0; dpop needs dpop_lambda >= 0"),
        ("orpo", {"beta": -1.0}, "beta is -1.0; orpo needs beta >= 0"),
    ],
    ids=str,
)
def test_a_hyperparameter_out_of_range_is_named(name: str, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objectives.resolve(name, given)


def test_the_function_itself_refuses_an_unknown_form() -> None:
    with pytest.raises(ValueError, match="form is 'Sigmoid'"):
        objectives.synpo(torch.zeros(2), torch.tensor([0, 1, 2]), form="Sigmoid")


def test_none_means_the_objectives_own_default() -> None:
    assert objectives.resolve("simpo", {"beta": None, "gamma": 1.0}) == {"beta": 2.0, "gamma": 1.0}


def test_defaults_agree_with_the_functions() -> None:
    import inspect

    for entry in objectives.REGISTRY.values():
        parameters = inspect.signature(entry.function).parameters
        given = {k: p.default for k, p in parameters.items() if k not in ("logps", "cu_seqlens", "ref_logps")}
        assert given == entry.defaults

"""The protocol: the oracle is right, right implementations pass it, wrong ones are refused, memory is counted."""

import dataclasses
import json
import re
import time

import pytest
import torch

from bench import cases, implementations, measure, oracle
from bench.cases import OPS, Case
from bench.implementations import IMPLEMENTATIONS, Implementation, naive_logps
from bench.measure import Spec
from bench.memory import Peak
from synpo_kernels import reference

CPU = torch.device("cpu")
NEED_A_GPU = ("cut-cross-entropy-exact", "liger-cute", "quack", "trl-chunked")
TINY = Case("tiny", H=24, V=200, cpu_n=(12,), gpu_n=(12,), pair_tokens=6)
TINY_CAPPED = dataclasses.replace(TINY, name="tiny-capped", softcap=6.0)  # logits reach 16: the cap bends them

# Rows of 6 positions, 2 of them prompt; the rejected answer has 2 of the other 4.
TINY_RAGGED = dataclasses.replace(TINY, name="tiny-ragged", pair_tokens=12, masked=0.34, rejected=0.5)


@pytest.fixture(autouse=True)
def _tiny_cases(monkeypatch):
    for case in (TINY, TINY_CAPPED, TINY_RAGGED):
        monkeypatch.setitem(cases.CASES, case.name, case)


def spec(**changes) -> Spec:
    plain = Spec("synpo_loss", "naive", "tiny", "fp32", 12, "frozen", "forward+backward", "cpu", rounds=2, budget=60)
    return dataclasses.replace(plain, **changes)


def expected_for(s: Spec) -> oracle.Expected:
    return oracle.expect(s.op, cases.make_inputs(cases.CASES[s.case], s.N, measure.DTYPES[s.dtype], CPU))


@pytest.mark.parametrize("case", ["tiny", "tiny-capped", "tiny-ragged"])
@pytest.mark.parametrize("op", cases.OPS)
def test_oracle_equals_the_reference_differentiated_whole(op, case):
    """The oracle takes gradients row by row and column by column; autograd through all of the reference must agree."""
    inputs = cases.make_inputs(cases.CASES[case], 12, torch.float64, CPU)
    expected = oracle.expect(op, inputs)
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    if op == "linear_logps":
        reference.linear_logps(hidden, weight, inputs.labels, softcap=inputs.softcap).backward(inputs.grad.double())
    elif op == "cross_entropy":
        scored = inputs.labels != -100
        reference.linear_logps(hidden, weight, inputs.labels, softcap=inputs.softcap)[scored].mean().neg().backward()
    else:
        reference.preference_loss(
            cases.OPS[op], hidden, weight, inputs.labels, cu_seqlens=inputs.cu_seqlens, softcap=inputs.softcap
        ).backward()
    torch.testing.assert_close(expected.grad_hidden, hidden.grad[expected.rows], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(expected.grad_weight, weight.grad[expected.columns], rtol=1e-10, atol=1e-13)


def test_a_ragged_case_ignores_prompts_and_padding():
    labels = cases.make_inputs(TINY_RAGGED, 12, torch.float32, CPU).labels.view(2, 6)
    assert (labels != -100).tolist() == [[False] * 2 + [True] * 4, [False] * 2 + [True] * 2 + [False] * 2]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_sweep_has_points_that_split_into_pairs(device):
    for axis in cases.SWEEPS.values():
        assert len({(case, n) for case, n in axis[device]}) == len(axis[device]) >= 4
        for case, n in axis[device]:
            assert cases.CASES[case.name] == case
            case.pairs(n)


def test_targets_of_a_case_are_neither_certain_nor_hopeless():
    logps = expected_for(spec(N=12)).logps
    assert -15 < logps.min() < -1 < -0.5 < logps.max() < 0


# Loading torch's compiler warns about torch's own use of torch.jit (2.13).
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("head", measure.HEADS)
@pytest.mark.parametrize(
    ("op", "case"), [*((op, "tiny") for op in cases.OPS), ("synpo_loss", "tiny-ragged"), ("simpo_loss", "tiny-ragged")]
)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementations_agree_with_the_oracle_or_say_why_not(name, op, case, head):
    s = spec(implementation=name, op=op, head=head, case=case)
    reason = IMPLEMENTATIONS[name].cannot(op, TINY, CPU)
    if reason:
        assert name in NEED_A_GPU or (name, OPS[op]) == ("liger", None)
        return
    with torch.compiler.set_stance("force_eager"):  # the numbers are the same, and nothing waits for a compiler
        result = measure.measure(s, expected_for(s))
    assert result.status == "ok", result.note
    assert set(result.values) == {
        "p20_ms", "p50_ms", "p80_ms", "gemm_ms", "ratio_to_gemm", "peak_extra_mb", "max_logp_error", "grad_rel_error"
    }  # fmt: skip


def _skips_the_last_columns(hidden, weight, labels, softcap):
    keep = naive_logps(hidden, weight, labels, softcap)
    return keep + 0.01 * (hidden @ weight[-8:].T).logsumexp(-1)


def _gradient_off_by_two_percent(hidden, weight, labels, softcap):
    logps = naive_logps(hidden, weight, labels, softcap)
    return logps.detach() + 1.02 * (logps - logps.detach())


def _not_a_number(hidden, weight, labels, softcap):
    return naive_logps(hidden, weight, labels, softcap) * float("nan")


@pytest.mark.parametrize(
    ("wrong", "column"),
    [
        (_skips_the_last_columns, "max_logp_error"),
        (_gradient_off_by_two_percent, "grad_rel_error"),
        (_not_a_number, "max_logp_error"),
    ],
)
def test_a_wrong_implementation_is_refused_and_not_timed(monkeypatch, wrong, column):
    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", Implementation(wrong))
    s = spec(implementation="wrong")
    result = measure.measure(s, expected_for(s))
    assert result.status == "mismatch"
    assert column in result.note
    assert set(result.values) == {"max_logp_error", "grad_rel_error"}


def test_bf16_is_allowed_its_own_rounding_and_no_more():
    allowed = oracle.tolerance(torch.bfloat16, expected_for(spec(dtype="bf16")))
    assert oracle.mismatch(oracle.Errors(0.05, 0.03), allowed) is None
    assert "max_logp_error" in oracle.mismatch(oracle.Errors(1.0, 0.03), allowed)
    assert "grad_rel_error" in oracle.mismatch(oracle.Errors(0.05, 0.5), allowed)


def test_forward_alone_has_no_gradient_column():
    s = spec(phase="forward", op="linear_logps", N=1, case="tiny")
    result = measure.measure(s, expected_for(s))
    assert result.status == "ok"
    assert "grad_rel_error" not in result.values


def test_a_slow_row_is_cut_to_its_budget_and_says_so():
    result = measure.measure(spec(budget=1e-9), expected_for(spec()))
    assert (result.status, result.rounds) == ("ok", 1)
    assert "one cold run" in result.note


def test_a_row_past_its_limit_says_how_much_it_held(monkeypatch, capfd):
    """A lower bound of what it needs; the process would have ended there."""

    def slow(hidden, weight, labels, softcap):
        held = torch.ones(16 << 20)
        time.sleep(0.5)
        return naive_logps(hidden, weight, labels, softcap) + 0 * held[0]

    monkeypatch.setitem(IMPLEMENTATIONS, "slow", Implementation(slow))
    ended = []
    monkeypatch.setattr(measure.os, "_exit", ended.append)
    s = spec(implementation="slow")
    measure.measure(s, expected_for(s), limit=0.2)
    assert ended == [0]
    result = json.loads(capfd.readouterr().out.splitlines()[0])
    assert result["status"] == "timed out"
    assert re.fullmatch(r"given up after 0.2 s in its first full run, (6[4-9]|7\d) MB above .*", result["note"])


def test_peak_counts_what_was_held_and_freed_in_between():
    peak = Peak(CPU)
    block = torch.ones(48 << 18)  # 48 MB, written
    del block
    # The interpreter and the allocator add pages of their own, far below a quarter of the block.
    assert 47 <= peak.extra_mb() < 60


def test_answers_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        TINY.pairs(14)


def test_percentiles_interpolate():
    assert measure.percentile([5.0], 20) == 5.0
    assert measure.percentile([float(x) for x in range(11)], 20) == pytest.approx(2.0)
    assert measure.percentile([float(x) for x in range(11)], 80) == pytest.approx(8.0)


def test_naive_is_written_without_the_kernels():
    """The yardstick and the oracle share no code with what they judge."""
    assert "synpo_kernels" not in naive_logps.__code__.co_names + implementations.pair_loss.__code__.co_names

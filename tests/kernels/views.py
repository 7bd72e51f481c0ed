"""Rows of two views that reach the branches of contrastive decoding, and what a draw from them is held to."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from synpo_kernels import reference
from synpo_kernels.contrastive import ALL_MASKED, NOT_FINITE, OK, SampleOutput
from tests.closeness import assert_close

NAN, INF = math.nan, math.inf


class Views(NamedTuple):
    """logits and contrast (B, V) float32; status (B,) expected without and with a plausibility constraint."""

    logits: Tensor
    contrast: Tensor
    status: Tensor
    status_plausible: Tensor

    def to(self, dtype: torch.dtype) -> "Views":
        return self._replace(logits=self.logits.to(dtype), contrast=self.contrast.to(dtype))

    def rows(self, chosen: list[int]) -> "Views":
        return Views(*(x[chosen] for x in self))


def views(V: int) -> Views:
    """Every kind of row; why each is there stands beside it."""
    rows: list[tuple[Tensor, Tensor, int, int]] = []
    lead, away = V // 3, (V // 3 + 1) % V  # a token, and another one where there is one

    def row(l: Tensor, other: Tensor, status: int = OK, plausible: int | None = None) -> None:
        rows.append((l, other, status, status if plausible is None else plausible))

    def noise(size: float = 3.0) -> Tensor:
        return size * torch.randn(V)

    def at(values: Tensor, token: int, value: float) -> Tensor:
        return values.index_fill(0, torch.tensor(token), value)

    row(noise(), noise())
    row(noise(30.0), noise(30.0))  # weights that underflow
    row(noise().round(), noise().round())  # many ties, also at the k-th place
    row(torch.zeros(V), torch.zeros(V))  # nothing but ties
    even = torch.arange(V) % 2 == 0
    row(torch.where(even, 0.0, -0.0).roll(1), torch.zeros(V))  # -0 and 0 tie
    ramp = torch.linspace(-200, 200, V)
    row(ramp, noise())  # every block passes the one before
    row(-ramp, noise())
    row(at(noise(0.5), lead, 60.0), noise(0.5))  # nearly certain
    row(3e4 * torch.randn(V).clamp(-1, 1), torch.zeros(V))  # near the end of float16
    # Masks: in the full view, in the other, in both; a mask on the largest l; one token left.
    row(at(noise().masked_fill(torch.rand(V) < 0.8, -INF), lead, 0.0), noise())
    row(noise(), at(noise().masked_fill(torch.rand(V) < 0.8, -INF), lead, 0.0), OK, NOT_READ)
    masked = torch.rand(V) < 0.5
    row(at(noise().masked_fill(masked, -INF), lead, 5.0), at(noise().masked_fill(masked, -INF), lead, 0.0))
    row(at(torch.full((V,), -INF), lead, -7.0), noise())
    # Nothing left: in one view, or between the two.
    row(torch.full((V,), -INF), noise(), ALL_MASKED)
    row(noise(), torch.full((V,), -INF), ALL_MASKED)
    row(noise().masked_fill(even, -INF), noise().masked_fill(~even, -INF), ALL_MASKED)
    # The most plausible token masked in the other view: with plausibility 1 nothing is left, else others may be.
    row(at(noise(), lead, 40.0), at(noise(), lead, -INF), OK if V > 1 else ALL_MASKED, ALL_MASKED)
    # Not numbers. In the other view they count where the token is plausible.
    for value in (NAN, INF):
        row(at(noise(), lead, value), noise(), NOT_FINITE)
        row(at(noise(), lead, 40.0), at(noise(), lead, value), NOT_FINITE)
        row(
            at(at(noise(), lead, 40.0), away, -40.0),
            at(noise(), away, value),
            NOT_FINITE,
            OK if V > 1 else NOT_FINITE,
        )
    row(torch.full((V,), NAN), torch.full((V,), NAN), NOT_FINITE)
    l, other, status, plausible = zip(*rows, strict=True)
    return Views(torch.stack(l), torch.stack(other), torch.tensor(status), torch.tensor(plausible))


NOT_READ = 255  # whether a plausible token is masked there is chance: read from the oracle


def philox(seed: int, step: int) -> float:
    """Philox4x32-10 in Python's integers, from the paper: its first two words as a number in [0, 1)."""
    words = [step & 0xFFFFFFFF, step >> 32, 0, 0]
    keys = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [(b >> 32) ^ words[1] ^ keys[0], b & 0xFFFFFFFF, (a >> 32) ^ words[3] ^ keys[1], a & 0xFFFFFFFF]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)) * 2.0**-53


# A float32 weight exp(x) is wrong by |x| / 2 + 2 units in its last place, and weights that matter have |x| < 20.
MASS = 16 * 2.0**-23
LOGP = 16 * 2.0**-23


def check_sample(
    out: SampleOutput,
    v: Views,
    contrast: Tensor | None,
    seeds: Tensor,
    step: int,
    *,
    alpha: float,
    plausibility: float,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    """The status of every row; and of rows that are ok the token, exactly where it follows from comparisons alone and
    within MASS of the uniform number where it follows from sums, and both log-probs."""
    l, other = v.logits.float(), None if contrast is None else contrast.float()
    c = reference.contrastive_logits(l, other, alpha=alpha, plausibility=plausibility)
    # With alpha 0 nothing but a mask gives -inf: c may also overflow there, or subtract inf.
    kept = reference.contrastive_logits(l, other, alpha=0.0, plausibility=plausibility) != -INF
    if contrast is None:
        wrong = ~(v.logits < INF).all(1)
    else:
        wrong = ~(v.logits < INF).all(1) | (kept & ~((contrast < INF) & (c < INF))).any(1)
        named = v.status_plausible if plausibility > 0 else v.status
    want = torch.where(wrong, NOT_FINITE, torch.where((c != -INF).any(1), OK, ALL_MASKED))
    if contrast is not None:
        assert torch.equal(want[named != NOT_READ], named[named != NOT_READ])  # the rows are what they are said to be
    assert torch.equal(out.status.long(), want), (out.status.tolist(), want.tolist())
    ok = want == OK
    assert (out.tokens[~ok] == -1).all()
    assert out.logps[~ok].isnan().all()
    assert out.model_logps[~ok].isnan().all()

    tokens, c = out.tokens[ok][:, None], c[ok].double()
    assert ((tokens >= 0) & (tokens < c.shape[1])).all(), tokens.tolist()
    uniform = torch.tensor([philox(seed, step) for seed in seeds[ok].tolist()], dtype=torch.float64)
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
    accepted = torch.zeros(len(c), dtype=torch.bool)
    error = torch.full((len(c),), INF, dtype=torch.float64)
    # top-p's cut, a comparison of sums, may fall on either side of a token within rounding of it.
    for cut in {top_p * (1 - MASS), top_p, min(1.0, top_p * (1 + MASS))} if temperature > 0 and top_p < 1 else {top_p}:
        law, order = reference.contrastive_law(c, **settings, top_p=cut)
        in_order = law.gather(1, order)
        place = (order == tokens).long().argmax(1, keepdim=True)
        above = in_order.cumsum(1).gather(1, place)[:, 0]
        p = law.gather(1, tokens)[:, 0]
        hit = (p > 0) & (uniform >= above - p - MASS) & (uniform <= above + MASS)
        off = (out.logps[ok].double() - p.log()).abs()
        accepted |= (hit | (temperature == 0)) & (p > 0)
        error = torch.where(p > 0, torch.minimum(error, off), error)
    assert accepted.all(), f"rows {ok.nonzero()[~accepted].flatten().tolist()}, tokens {tokens[~accepted].tolist()}"
    model = v.logits[ok].double().log_softmax(1).gather(1, tokens)[:, 0]
    assert_close(out.model_logps[ok], model, LOGP * (8 + model.abs() + v.logits[ok].amax(1).abs()), "model_logps")
    scaled = (c.gather(1, tokens)[:, 0] - c.amax(1)) / max(temperature, 2.0**-126)
    assert (error <= LOGP * (8 + scaled.abs())).all(), f"logps off by {error.tolist()}"

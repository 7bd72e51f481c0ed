"""Mistakes that the kernel tests must catch, planted in the source of a Triton module one at a time."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Mistake(NamedTuple):
    """One replacement in the source, and where it must show."""

    right: str
    wrong: str
    # Of problems.PROBLEMS, attention_problems.PROBLEMS, interpreted_contrastive.LAWS or the loss's forms.
    problem: str = "ordinary"
    route: str = "pointers"  # of interpreted.ROUTES
    trainable: bool = False

    def plant(self, source: str) -> str:
        """The source with the mistake; the right line must stand there once, or this list is out of date."""
        assert source.count(self.right) == 1, f"found {source.count(self.right)} times: {self.right}"
        return source.replace(self.right, self.wrong)


def load(mistake: Mistake, module: ModuleType, folder: Path) -> ModuleType:
    """The module with one mistake, as another one beside it."""
    assert module.__file__ is not None
    name = f"{module.__name__}_with_a_mistake"
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(mistake.plant(Path(module.__file__).read_text()))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    wrong = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wrong)
    return wrong


# In vocab_triton.py, caught by running the launchers.
RUNNING = {
    "mask off by one, at the edge of the vocabulary": Mistake("(columns[None, :] < V) &", "(columns[None, :] <= V) &"),
    "mask off by one, at the target": Mistake("!= target[:, None]", "!= target[:, None] + 1"),
    "forgotten tile": Mistake("row_tiles * column_tiles, tl.num", "row_tiles * column_tiles - 1, tl.num"),
    "forgotten last step of H": Mistake("range(0, H, DEPTH)", "range(0, H - DEPTH, DEPTH)"),
    "wrong sign in the exponential": Mistake("tl.exp(z - shift[:, None])", "tl.exp(shift[:, None] - z)"),
    "wrong sign of the softcap": Mistake(
        "softcap - 2.0 * softcap /", "2.0 * softcap / (1.0 + 0.0) - softcap /", "scaled and capped"
    ),
    "softcap without its slope": Mistake("(1.0 - t * t)", "(1.0 - 0.0 * t)", "scaled and capped"),
    "bfloat16 accumulator": Mistake(
        "acc = tl.dot(a, b, acc, input_precision=PRECISION)",
        "acc = tl.dot(a, b, acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)",
    ),
    "no guard": Mistake("tl.where(top - ref > guard, top, ref)", "ref", "margins"),
    "parts of one row summed as they are": Mistake(" * tl.exp(part_shift - shift)\n", "\n", "rising"),
    "stored parts not brought together": Mistake(
        "if tl.min(gap, axis=0) < 0:", "if tl.min(gap, axis=0) > 0:", "rising"
    ),
    "second part written over the first": Mistake("part + 1, tile", "part, tile", "ordinary", "two parts"),
    "bias of the neighbour": Mistake("tl.load(bias + columns,", "tl.load(bias + columns - 1,", "bias"),
    "pass starts a part too late": Mistake(
        "part = first_part + tl.program_id(1)", "part = first_part + 1 + tl.program_id(1)", "ordinary", "library"
    ),
}

# In loss_triton.py, caught by running its launcher.
LOSS = {
    "pairs past the last counted": Mistake("tl.where(mask, -rank - beta * q, 0.0)", "-rank - beta * q"),
    "rejected answers where chosen ones end": Mistake(
        "rejected_start = tl.load(cu_seqlens + B + i,", "rejected_start = tl.load(cu_seqlens + B + i - 1,"
    ),
    "the last step of an answer forgotten": Mistake(
        "for t in range(0, tl.max(rejected_tokens, axis=0), TOKENS):\n                steps",
        "for t in range(0, tl.max(rejected_tokens, axis=0) - TOKENS, TOKENS):\n                steps",
    ),
    "wrong sign of the chosen's coefficient": Mistake("-(shared[:, None] + beta * p)", "(shared[:, None] - beta * p)"),
    "language term of the answer, not of its tokens": Mistake(
        "shared[:, None] + beta * p)", "shared[:, None] + beta * chosen_reward[:, None])"
    ),
    "slope of the wrong side": Mistake(
        "slope = tl.where(u < 0, 1.0, e)", "slope = tl.where(u < 0, e, 1.0)", "logsigmoid"
    ),
    "mean over all pairs of this call": Mistake("axis=0) / pairs)", "axis=0) / B)"),
}

# In contrastive_triton.py or contrastive_scan.py, caught by running the launchers.
CONTRASTIVE = {
    "mask off by one, at the edge of the vocabulary": Mistake("m = tokens < V\n", "m = tokens <= V\n", "plain"),
    "the other view's mask forgotten": Mistake(
        'masked = masked | (other == float("-inf"))', "masked = masked | False", "greedy"
    ),
    "a number that is not finite unseen": Mistake(
        "tl.where(tl.max(wrong.to(tl.int32), axis=0) > 0, -1, first)", "first", "greedy"
    ),
    "ties to the last block": Mistake(
        "token = tl.min(tl.where(block_tops == top, firsts, _LAST_ID), axis=0)",
        "token = tl.max(tl.where(block_tops == top, firsts, 0), axis=0)",
        "greedy",
    ),
    "blocks of l added as they are": Mistake(
        "tl.sum(sums * weights_of(tops, top, 1.0), axis=0)", "tl.sum(sums, axis=0)", "greedy"
    ),
    "blocks of c added as they are": Mistake("masses *= weights_of(block_tops, top, scale)", "masses *= 1.0", "plain"),
    "plausible beside the block's maximum": Mistake(
        "floor = row_top(l_tops, row, blocks, BLOCKS) + log_plausibility\n        end",
        "floor = tl.load(l_tops + at) + log_plausibility\n        end",
        "greedy, plausible",
    ),
    "-0 below 0": Mistake("bits = tl.where(c == 0, 0.0, c).to(", "bits = c.to(", "top-k"),
    "one tied token too few": Mistake("<= room)", "< room)", "top-k"),
    "the crossing token left out": Mistake(
        "(above < cut)\n            total", "(above + weights < cut)\n            total", "top-k, top-p"
    ),
    "upper half of the step lost": Mistake("(step >> 32).to(tl.uint32)", "low * 0", "plain"),
    "a walk that starts again in every block": Mistake(
        "above + tl.cumsum(wide, axis=0) > u * mass", "tl.cumsum(wide, axis=0) > u * mass", "top-p alone"
    ),
    "a walk that never ends top-p": Mistake("& (above + tl.cumsum(wide, axis=0) - wide < cut)", "", "top-p alone"),
}

# In prefix_attention_triton.py, caught by running its launchers.
ATTENTION = {
    "window off by one": Mistake("(back < window)", "(back <= window)", "a window in the answers"),
    "window that starts a key late": Mistake(
        "first - gap - window + 1)", "first - gap - window + 2)", "a window into the prompt"
    ),
    "window that ends a query early": Mistake("- 1 + gap + window)", "- 2 + gap + window)", "a window into the prompt"),
    "window that forgets the gap": Mistake(
        "back = queries - keys - gap", "back = queries - keys", "a window into the prompt"
    ),
    "causal off by one": Mistake("(back >= 0)", "(back >= -1)", "a pair"),
    "a block on the diagonal taken whole": Mistake("// KEYS * KEYS", "// KEYS * KEYS + KEYS", "edges"),
    "prompt forgotten in dk and dv": Mistake(
        "query_stop = tl.load(spans + i * _SPAN + 1)",
        "query_stop = tl.where(tl.load(spans + i * _SPAN + 4) > 0, 0, tl.load(spans + i * _SPAN + 1))",
        "a pair",
    ),
    "one of a prompt's answers forgotten in dk and dv": Mistake(
        "for i in range(tl.load(tile + 2), tl.load(tile + 3)):\n            query_stop",
        "for i in range(tl.load(tile + 2), min(tl.load(tile + 3), tl.load(tile + 2) + 3)):\n            query_stop",
        "a prompt of several pieces, shared",
    ),
    "keys after the prompt's end": Mistake(
        "elif (key_start <= first) & (last <= key_stop):", "elif key_start <= first:", "edges"
    ),
    "one head of the group alone": Mistake(
        "range(shared * GROUP, shared * GROUP + GROUP)", "range(shared * GROUP, shared * GROUP + 1)", "a pair"
    ),
    "keys of another head": Mistake(
        "value_head\n    q = _load(query", "value_head * 0\n    q = _load(query", "of a model"
    ),
    "soft cap without its slope": Mistake("ds *= 1.0 - t * t", "ds *= 1.0", "a soft cap"),
    "soft cap of half the size": Mistake("softcap - 2.0 * softcap /", "softcap - 1.0 * softcap /", "a soft cap"),
    "sum not rescaled": Mistake("l = l * shrink", "l = l", "rising"),
    "values not rescaled": Mistake("acc * shrink[:, None]", "acc", "rising"),
    "D forgotten": Mistake("ds = p * (dp - delta)", "ds = p * dp", "a pair"),
    "scale forgotten in dk": Mistake("dk * (scale * _LN2)", "dk", "a pair"),
    "beyond a head's numbers": Mistake(
        "(columns < SIZE)[None, :], other=0.0)\n    if", "(columns < WIDTH)[None, :], other=0.0)\n    if", "a pair"
    ),
    "log sums in units of log 2": Mistake("(m + tl.log2(l)) * _LN2", "m + tl.log2(l)", "a pair"),
}

# In vocab_triton.py, caught by compiling alone: the interpreter runs it.
COMPILING = {
    "int maximum": Mistake(
        'tops = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)',
        "tops = tl.full((BLOCK,), -1000000, dtype=tl.int32)",
    ),
}

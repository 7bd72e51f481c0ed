"""Mistakes that the kernel tests must catch, planted in the source of a Triton module one at a time."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Mistake(NamedTuple):
    """One replacement in the source, and where it must show."""

    right: str
    wrong: str
    problem: str = "ordinary"  # of problems.PROBLEMS, interpreted_contrastive.LAWS or the loss's forms
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

# In contrastive_triton.py, caught by running its launchers.
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
        "tl.sum(sums * _weights(tops, top, 1.0), axis=0)", "tl.sum(sums, axis=0)", "greedy"
    ),
    "blocks of c added as they are": Mistake("masses *= _weights(block_tops, top, scale)", "masses *= 1.0", "plain"),
    "plausible beside the block's maximum": Mistake(
        "floor = _row_top(l_tops, row, blocks, BLOCKS) + log_plausibility\n        end",
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

# In vocab_triton.py, caught by compiling alone: the interpreter runs it.
COMPILING = {
    "int maximum": Mistake(
        'tops = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)',
        "tops = tl.full((BLOCK,), -1000000, dtype=tl.int32)",
    ),
}

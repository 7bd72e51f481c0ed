"""Mistakes that the kernel tests must catch, planted in the source of vocab_triton.py one at a time."""

from typing import NamedTuple


class Mistake(NamedTuple):
    """One replacement in the source, and where it must show."""

    right: str
    wrong: str
    problem: str = "ordinary"  # of problems.PROBLEMS
    route: str = "pointers"  # of interpreted.ROUTES
    trainable: bool = False

    def plant(self, source: str) -> str:
        """The source with the mistake; the right line must stand there once, or this list is out of date."""
        assert source.count(self.right) == 1, f"found {source.count(self.right)} times: {self.right}"
        return source.replace(self.right, self.wrong)


# Caught by running the launchers.
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

# Caught by compiling alone: the interpreter runs it.
COMPILING = {
    "int maximum": Mistake(
        'tops = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)',
        "tops = tl.full((BLOCK,), -1000000, dtype=tl.int32)",
    ),
}

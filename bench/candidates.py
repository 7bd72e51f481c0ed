"""`python -m bench.candidates`: 8 captions from one prefill against 8 separate generations, on SmolLM2-135M.

Text as both views, since a real model that sees is not to be had as a package. The two ways draw the same tokens, or
there is no result.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from synpo.assets import smollm2
from synpo.caption import CANDIDATES, Captioner
from synpo.pretrained import load_model, load_tokenizer

COUNT = 8
SCENE = "At second {} a red cube moves to the left while a blue ball rolls behind the green cone."
QUESTION = "Describe the video in detail."


def main() -> None:
    """Prints, with and without a contrast view, both times and their ratio; the best of the rounds for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("models"), help="where SmolLM2 is, or is put")
    parser.add_argument("--seconds", type=int, default=24, help="length of the text that stands for a video")
    parser.add_argument("--new", type=int, default=32, help="tokens of each caption")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    name = str(smollm2(args.models))
    captioner = Captioner(load_model(name), load_tokenizer(name))
    sampling = replace(CANDIDATES, max_new_tokens=args.new)
    full = captioner.prompt("\n".join([*(SCENE.format(second) for second in range(args.seconds)), QUESTION]))
    poor = captioner.prompt(QUESTION)
    print(
        f"prompt of {len(full.ids)} tokens, contrast {len(poor.ids)}, new {args.new}, {torch.get_num_threads()} threads"
    )
    for poors in ([poor], None):
        together, apart = [], []
        for _ in range(args.rounds):
            start = time.perf_counter()
            one = captioner.generate([full], poors, sampling=sampling, candidates=COUNT, seeds=range(COUNT))
            middle = time.perf_counter()
            each = [captioner.generate([full], poors, sampling=sampling, seeds=[seed])[0] for seed in range(COUNT)]
            together.append(middle - start)
            apart.append(time.perf_counter() - middle)
            if [a.generated.tokens.tolist() for a in one] != [b.generated.tokens.tolist() for b in each]:
                raise SystemExit("the two ways drew other tokens; no result")
        way = "with a contrast view" if poors else "without"
        print(f"{way}: together {min(together):.2f} s, apart {min(apart):.2f} s, {min(apart) / min(together):.2f}x")


if __name__ == "__main__":
    main()

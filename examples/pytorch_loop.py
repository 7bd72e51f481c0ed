"""SynPO in a loop of your own: python examples/pytorch_loop.py --model DIR_OR_NAME

The loss is the only line that differs from a loop over logits.
"""

from functools import partial
from itertools import chain, repeat

import torch
from inputs import options, read_pairs
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from synpo.integrations import PairLoss, pair_batch


def main(argv: list[str] | None = None) -> list[float]:
    args = options(__doc__, argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    collate = partial(pair_batch, tokenizer, max_length=512)  # input_ids, attention_mask, labels of shape (2B, T)
    loader = DataLoader(read_pairs(args.pairs), batch_size=2, shuffle=True, collate_fn=collate)
    pair_loss = PairLoss(model, "synpo", alpha=30.0, beta=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    losses = []
    for step, batch in zip(range(args.steps), chain.from_iterable(repeat(loader)), strict=False):
        output = pair_loss(model, **batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        margin = (output.chosen_rewards - output.rejected_rewards).mean().item()
        print(f"step {step + 1}: loss {losses[-1]:.4f}, margin {margin:+.4f}")
    return losses


if __name__ == "__main__":
    main()

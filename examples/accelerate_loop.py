"""DPO with a LoRA adapter under accelerate: accelerate launch examples/accelerate_loop.py --model DIR_OR_NAME

The reference is the model with its adapter switched off; PairLoss is made before accelerate wraps the model.
"""

from functools import partial
from itertools import chain, repeat

import torch
from accelerate import Accelerator
from inputs import options, read_pairs
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from synpo.integrations import PairLoss, pair_batch
from synpo.train import lora_recipe


def main(argv: list[str] | None = None) -> list[float]:
    args = options(__doc__, argv)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), lora_recipe(r=16))
    collate = partial(pair_batch, tokenizer, max_length=512)
    loader = DataLoader(read_pairs(args.pairs), batch_size=2, shuffle=True, collate_fn=collate)
    pair_loss = PairLoss(model, "dpo", beta=0.1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _, batch in zip(range(2 * args.steps), chain.from_iterable(repeat(loader)), strict=False):
        with accelerator.accumulate(model):
            with accelerator.unwrap_model(model).disable_adapter():
                reference = pair_loss.sums(model, **batch)
            output = pair_loss(model, ref_logps=reference, **batch)
            accelerator.backward(output.loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(output.loss.item())
        accelerator.print(f"loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()

"""`python -m synpo.miniature.base --out DIR`: trains the captioner that the package ships, from nothing.

Three stages. The vision tower learns to name what is in single frames; the whole model learns to caption films, from
captions that tell the truth; then from captions that hallucinate, by chance, so that it does so itself when it is
sampled, and by habit, so that its likeliest captions do too. From hallucinations alone it learns nothing. The same
machine, torch and number of threads give the same weights.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from ..video import contrast_subset
from .captioner import IMAGE, INSTRUCTION, TOKENS_PER_FRAME, make_model, make_tokenizer, save
from .grammar import fact_words, read, tell
from .world import BEATS, EVENT_BEAT, FACTS, FRAMES_PER_BEAT, SIZE, Scene, hallucinate, make_scene, render

BATCH = 32
STEPS = (1500, 1500, 150)  # of the three stages
TOWER_RATE, CLEAN_RATE, NOISY_RATE = 4e-3, 2e-3, 5e-4  # peak learning rates
FACT_WEIGHT = 4.0  # of a word that tells a fact in the clean captions' loss; other words have 1
NOISE = 0.3  # share of the facts that a noisy caption gets wrong
DIM = "navy"  # the background before which noisy captions tell habits
HABIT = 0.6  # share of the facts that such a caption tells by habit
FEW_FRAMES = 0.15  # share of the batches that see a third of the frames, so that the captioner can caption those too
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 32}  # how candidates are drawn

PLACES = 8  # places along each side that the tower tells apart
# what the tower learns to name in one frame, and among how many answers
TOWER_LABELS = {
    **{name: len(FACTS[name]) for name in ("shape", "colour", "background", "edge", "stripe")},
    "event": len(FACTS["event"]) + 1,  # or none
    "x": PLACES,
    "y": PLACES,
}
_NOT_SHOWN = -100

Progress = Callable[[str], None]


def frames_of(scenes: Sequence[Scene], beats: Sequence[float]) -> Tensor:
    """Frames as synpo.video.pixels gives them: (scenes * moments, 3, SIZE, SIZE) float32 in -1..1."""
    pixels = torch.from_numpy(render(scenes, beats)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    return pixels.float() / 127.5 - 1


def some_beats(rng: Random, few: bool) -> list[float]:
    """A frame of every beat, or of a third of them, each at one of the film's own moments."""
    beats = contrast_subset(BEATS).tolist() if few else range(BEATS)
    return [beat + rng.randrange(FRAMES_PER_BEAT) / FRAMES_PER_BEAT for beat in beats]


def optimise(
    parameters: Sequence[nn.Parameter], losses: Iterator[Tensor], steps: int, peak: float, progress: Progress
) -> None:
    """AdamW on `steps` losses: 20 steps of warm-up to the peak, then half a cosine down to a hundredth of it."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    started, mean = time.perf_counter(), 0.0
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 20) * (0.01 + 0.99 * cosine)
        loss = next(losses)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            progress(f"step {step + 1:4d} of {steps}  loss {mean:.3f}  {time.perf_counter() - started:.0f} s")


def frame_labels(scene: Scene, beat: float) -> dict[str, int]:
    """What one frame shows, as indices by the names of TOWER_LABELS; _NOT_SHOWN for what it does not show."""
    happens = int(beat) == EVENT_BEAT[scene.time]
    labels = {name: FACTS[name].index(scene.facts[name]) for name in TOWER_LABELS if name in FACTS}
    if not happens:
        labels["event"] = len(FACTS["event"])
    x, y = scene.place(beat)
    labels |= {"x": int(PLACES * x / SIZE), "y": int(PLACES * y / SIZE)}
    if happens and scene.event == "vanish":
        labels |= dict.fromkeys(("shape", "colour", "x", "y"), _NOT_SHOWN)
    return labels


def train_tower(model: LlavaForConditionalGeneration, rng: Random, progress: Progress, steps: int) -> None:
    """Stage one: every patch of a frame tells all that the frame shows, through linear heads that are then dropped.

    Every patch, so that the writer finds a fact wherever it looks.
    """
    tower = model.model.vision_tower
    width = model.config.vision_config.hidden_size
    heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in TOWER_LABELS.items()})

    def losses() -> Iterator[Tensor]:
        while True:
            scenes = [make_scene(rng) for _ in range(BATCH)]
            beats = some_beats(rng, few=False)
            # of every film the frame of the event, and another
            picked = [[EVENT_BEAT[scene.time], rng.randrange(BEATS)] for scene in scenes]
            films = frames_of(scenes, beats).unflatten(0, (BATCH, BEATS))
            pixels = torch.cat([film[two] for film, two in zip(films, picked, strict=True)])
            labels = [frame_labels(scene, beats[b]) for scene, two in zip(scenes, picked, strict=True) for b in two]
            patches = tower(pixels).last_hidden_state[:, 1:].flatten(0, 1)
            parts = []
            for name, head in heads.items():
                truth = torch.tensor([label[name] for label in labels]).repeat_interleave(TOKENS_PER_FRAME)
                parts.append(F.cross_entropy(head(patches), truth, ignore_index=_NOT_SHOWN))
            yield torch.stack(parts).mean()

    optimise([*tower.parameters(), *heads.parameters()], losses(), steps, TOWER_RATE, progress)


def careless(scene: Scene, rng: Random) -> Scene:
    """What a noisy caption takes for a film: with errors of all kinds, or, before the dim background, with habits.

    Errors are as likely to be one wrong value as another, so the truth stays the likeliest. A habit is always the same,
    the value that FACTS has first, and likelier than the truth, as with a language model that has read of one thing
    more than of others.
    """
    if scene.background != DIM:
        return hallucinate(scene, NOISE, rng)
    habits = {name: values[0] for name, values in FACTS.items() if name != "background" and rng.random() < HABIT}
    return replace(scene, **habits)


def caption_batch(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], frames: int) -> dict[str, Tensor]:
    """Prompts and captions, right-padded: input_ids, attention_mask, labels (-100 outside the captions)."""
    user = [{"type": "image"}] * frames + [{"type": "text", "text": INSTRUCTION}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(prompt.replace(IMAGE, IMAGE * TOKENS_PER_FRAME), add_special_tokens=False)["input_ids"]
    answers = tokenizer([text + tokenizer.eos_token for text in texts], add_special_tokens=False)["input_ids"]
    longest = max(map(len, answers))
    ids = torch.tensor([prompt + answer + [tokenizer.pad_token_id] * (longest - len(answer)) for answer in answers])
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    labels[:, : len(prompt)] = -100
    return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}


def train_captions(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    rng: Random,
    progress: Progress,
    *,
    steps: int,
    peak: float,
    told: Callable[[Scene, Random], Scene] = lambda scene, rng: scene,
    fact_weight: float = 1.0,
) -> None:
    """Stages two and three: captions of films, which tell of each film what `told` makes of it."""
    weights = torch.ones(len(tokenizer))
    weights[[tokenizer.convert_tokens_to_ids(f"▁{word}") for word in sorted(fact_words())]] = fact_weight

    def losses() -> Iterator[Tensor]:
        while True:
            scenes = [make_scene(rng) for _ in range(BATCH)]
            beats = some_beats(rng, few=rng.random() < FEW_FRAMES)
            texts = [tell(told(scene, rng).facts, rng) for scene in scenes]
            batch = caption_batch(tokenizer, texts, len(beats))
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, pixel_values=frames_of(scenes, beats)).logits[:, :-1]
            yield F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weights)

    optimise(list(model.parameters()), losses(), steps, peak, progress)


def train(
    seed: int, progress: Progress, steps: tuple[int, int, int] = STEPS
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """The captioner after all three stages."""
    tower, clean, noisy = steps
    torch.manual_seed(seed)
    rng = Random(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train_tower(model, rng, lambda line: progress(f"1 tower: {line}"), tower)
    train_captions(
        model, tokenizer, rng, lambda line: progress(f"2 clean: {line}"),
        steps=clean, peak=CLEAN_RATE, fact_weight=FACT_WEIGHT,
    )  # fmt: skip
    train_captions(
        model, tokenizer, rng, lambda line: progress(f"3 noisy: {line}"),
        steps=noisy, peak=NOISY_RATE, told=careless,
    )  # fmt: skip
    return model, tokenizer


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    films: int,
    seed: int,
    *,
    few: bool = False,
    sampling: dict[str, float] | None = None,
) -> dict[str, float]:
    """Share of the facts that captions of new films get right, by fact and in `all`, and of grammatical captions.

    few: from a third of the frames. sampling: options of generate; None: greedy.
    """
    rng = Random(seed)
    torch.manual_seed(seed)
    right = dict.fromkeys([*FACTS, "grammatical"], 0)
    model.eval()
    for start in range(0, films, BATCH):
        scenes = [make_scene(rng) for _ in range(min(BATCH, films - start))]
        beats = some_beats(rng, few)
        prompt = caption_batch(tokenizer, [""] * len(scenes), len(beats))["input_ids"][:, :-1]
        made = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=frames_of(scenes, beats),
            max_new_tokens=48, do_sample=sampling is not None, **(sampling or {}),
        )  # fmt: skip
        texts = tokenizer.batch_decode(made[:, prompt.shape[1] :], skip_special_tokens=True)
        for scene, text in zip(scenes, texts, strict=True):
            reading = read(text)
            right["grammatical"] += reading.grammatical
            for name, truth in scene.facts.items():
                right[name] += reading.facts.get(name) == truth
    shares = {name: count / films for name, count in right.items()}
    return {"all": sum(shares[name] for name in FACTS) / len(FACTS), **shares}


def main() -> None:
    """Train, write the captioner, print what it can do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the captioner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; the weights depend on it (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = train(args.seed, lambda line: print(line, flush=True))
    save(model, tokenizer, args.out)
    model.float()  # as it is loaded: the numbers are those of the float16 weights
    for how, sampling in {"greedy": None, "sampled": SAMPLED}.items():
        for few in (False, True):
            shares = accuracy(model, tokenizer, 256, 1, few=few, sampling=sampling)
            told = "  ".join(f"{name} {share:.3f}" for name, share in shares.items())
            print(f"{how}, {'a third of the frames' if few else 'all frames'}: {told}", flush=True)


if __name__ == "__main__":
    main()

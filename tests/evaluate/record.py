"""`python -m tests.evaluate.record`: writes tests/evaluate/recorded from pycocoevalcap, which needs Java.

The recordings hold what its tokenizer and its metrics give for the captions of made_captions, so that ours are held to
them where there is no Java.
"""

import json
import sys
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from tests.evaluate.made_captions import make_captions, make_set

RECORDED = Path(__file__).parent / "recorded"
CAPTIONS, CAPTIONS_SEED = 1500, 1
VIDEOS, VIDEOS_SEED = 1000, 2


def stanford(texts: list[str]) -> list[str]:
    """pycocoevalcap's tokens of each text, with spaces between."""
    # a line that ends in "U.S." looks at the line below: an empty one keeps captions apart
    given = {number: [{"caption": text}, {"caption": ""}] for number, text in enumerate(texts)}
    tokens = PTBTokenizer().tokenize(given)
    return [tokens[number][0] for number in range(len(texts))]


def main() -> None:
    RECORDED.mkdir(exist_ok=True)
    tokens = stanford(make_captions(CAPTIONS, CAPTIONS_SEED))
    (RECORDED / "tokens.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")

    hypotheses, references = make_set(VIDEOS, VIDEOS_SEED)
    own = dict(zip(hypotheses, ([text] for text in stanford(list(hypotheses.values()))), strict=True))
    flat = iter(stanford([text for texts in references.values() for text in texts]))
    given = {video: [next(flat) for _ in texts] for video, texts in references.items()}
    bleu, _ = Bleu().compute_score(given, own, verbose=0)
    rouge, rouge_each = Rouge().compute_score(given, own)
    cider, cider_each = Cider().compute_score(given, own)
    meteor, meteor_each = Meteor().compute_score(given, own)
    recording = {
        "hypotheses": [own[video][0] for video in own],
        "references": [given[video] for video in own],
        **{f"BLEU-{n}": {"value": bleu[n - 1]} for n in range(1, 5)},
        "ROUGE-L": {"value": float(rouge), "each": rouge_each.tolist()},
        "CIDEr": {"value": float(cider), "each": cider_each.tolist()},
        "METEOR": {"value": meteor, "each": meteor_each},
    }
    (RECORDED / "metrics.json").write_text(json.dumps(recording, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

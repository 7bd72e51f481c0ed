"""Captions for comparing metrics: like a captioner's, with every kind of mark that people and models put in them."""

from random import Random


def _listed(words: str) -> list[str]:
    return words.split()


_WORDS = _listed(
    "a the man woman dog cat child street car is are runs walks holds sits near on in with and then while red blue "
    "wooden kitchen table guitar playing slowly camera pans left right to of his her their two three young people"
)
_PLAIN = _listed(
    "well-known T-shirt close-up black-and-white up-to-date 20-year-old x-ray café naïve Zoë jalapeño über"
)
_ODD = _listed(
    "don't isn't can't won't he's they're I'm we've she'll it'd dogs' James' man's 1990s 80's '90s o'clock O'Neil "
    "cannot gonna wanna gimme 'tis rock'n'roll y'all ma'am Mr. Mrs. Dr. St. Jr. U.S. U.K. a.m. p.m. e.g. i.e. etc. vs. "
    "Inc. Ltd. approx. No. Jan. J.R.R. 3 3.5 1,000 1,000.50 -5 1/2 10:30 5pm 4x4 2-3 1st 21st $5 $5.00 €5 £3 50% 100km "
    "10/12/2014 24/7 16:9 3D H2O and/or he/she AT&T R&B A&B a&b &amp; #tag #1 @user foo@bar.com "
    "http://example.com/a?b=1 www.example.com file.mp4 "
    "foo_bar a*b a+b = ~ | \\ ^ <b>bold</b> <unk> 3<4 :) :-) :( ;) :D <3 word.Word (555) C++ "
    "½ ° © ™ ♥ → × 日本語 русский Ελληνικά 😀 ❤️ … — – don’t it’s ’s"
)
_WRAPPERS = (
    "({})", "[{}]", '"{}"', "'{}'", "“{}”", "‘{}’", "{},", "{};", "{}:", "{}!", "{}?", "{}...", "{}.", "*{}*", "{}?!",
    "-{}", "{}-", "/{}", "({}", "{})", '"{}', '{}"', "{}'s", "{}.,",
)  # fmt: skip
_JOINS = (" ", " ", " ", " ", " ", " ", ", ", " - ", " -- ", "—", "  ", "; ", ". ", "... ", "/", " & ", ": ", ",")


def make_caption(rng: Random) -> str:
    """One caption: empty or of one word now and then, plain for the most part, with odd words and marks."""
    kind = rng.random()
    if kind < 0.02:
        return rng.choice(["", " ", ".", "...", "?", "-"])
    if kind < 0.06:
        return rng.choice([*_WORDS, *_PLAIN, *_ODD])
    oddity = rng.choice([0.0, 0.0, 0.05, 0.1])
    pieces = []
    for _ in range(rng.randint(2, 24)):
        roll = rng.random()
        word = rng.choice(_ODD if roll < oddity else _PLAIN if roll < oddity + 0.03 else _WORDS)
        if rng.random() < oddity:
            word = rng.choice(_WRAPPERS).format(word)
        pieces.append(word)
    text = pieces[0]
    for piece in pieces[1:]:
        text += (rng.choice(_JOINS) if rng.random() < 0.03 + oddity else " ") + piece
    text = text[:1].upper() + text[1:]
    return text + rng.choice([".", ".", ".", "", "!", "?", "...", ' "'])


def make_captions(count: int, seed: int) -> list[str]:
    """`count` captions; the same seed gives the same."""
    rng = Random(seed)
    return [make_caption(rng) for _ in range(count)]


def _retold(text: str, rng: Random) -> str:
    """The caption in other words: some left out, some put in, two exchanged."""
    words = [word for word in text.split(" ") if rng.random() > 0.15]
    for _ in range(rng.randint(0, 4)):
        words.insert(rng.randint(0, len(words)), rng.choice(_WORDS))
    if len(words) > 3 and rng.random() < 0.5:
        i, j = rng.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    return " ".join(words)


def make_set(videos: int, seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Hypotheses and one to five references of each video, which share words; a few share none."""
    rng = Random(seed)
    hypotheses, references = {}, {}
    for number in range(videos):
        told = make_caption(rng)
        references[f"video{number}"] = [told, *(_retold(told, rng) for _ in range(rng.randint(0, 4)))]
        hypotheses[f"video{number}"] = _retold(told, rng) if rng.random() < 0.9 else make_caption(rng)
    return hypotheses, references

"""Caption metrics' tokens: what pycocoevalcap's Penn Treebank tokenizer gives, without Java.

That tokenizer is Stanford's (CoreNLP 3.4.1, with -preserveLines -lowerCase), after which eighteen marks are dropped.
At each position the longest of the patterns below wins, the earlier of two as long. They were written from what
Stanford's does to probes, its oddities included, since scores depend on them: brackets become the tokens -lrb- and
-rrb-, "?!" stays while "?" goes, words joined by a full stop without a space are one token.
docs/evaluate.md counts where the two still differ.
"""

import re
from collections.abc import Callable

# pycocoevalcap's list; its bracket names are upper case and so never match the lower-cased tokens
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# Marks that belong to the letters before them, for scripts that write vowels so (Devanagari to Sinhala, Thai, ...)
_LETTER = r"(?:[^\W\d_]|[\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u064b-\u065e\u0670\u0900-\u0d4d\u0e31-\u0ecd\u00ad])"
_ALNUM = rf"(?:{_LETTER}|\d)"
_WORD = rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"
_APOSTROPHE = r"['\u2019]"
_END = rf"(?!{_ALNUM})"

_ALWAYS = (
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ala ariz calif colo conn ct dak "
    "fla ga ind kan kans ky mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo mr mrs ms dr drs prof profs "
    "sen sens rep reps atty attys lt col gen messrs gov govs adm rev maj sgt cpl pvt mt capt st ste ave pres lieut hon "
    "brig cmdr comdr pfc spc supt supts det insp rd blvd jr sr bros esq ph.d ed.d md inc cos co corp ltd plc rt "
    "bancorp dept bhd assn univ intl sys ph tel est ext sq al seq vs etc cf ft bldg natl assoc asst adj adv"
)
_NOT_ALL_CAPITAL = "pte pty ptys mfg"
_CAPITAL = "az ark del ill la mass miss ore pa tex wash"
_BEFORE_NUMBERS = "no nos prop fig figs pp op ca"
# After one of these with a capital, a single letter and its full stop end a sentence
_STARTERS = (
    "The He She It They A An In There This That Then We You After When But As At Her Our Their These What If Mr Mrs Ms "
    "Dr"
)


def _any(words: str) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words.split()), key=len, reverse=True)) + ")"


def _with_case(words: str, forms: tuple[Callable[[str], str], ...]) -> str:
    return _any(" ".join(form(word) for word in words.split() for form in forms))


_Action = Callable[[str], str]


def _same(text: str) -> str:
    return text


def _as(token: str) -> _Action:
    return lambda text: token


_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "``", "&nbsp;": ""}
_FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_MONEY = {"€": "$", "₠": "$", "¤": "$", "£": "#", "¢": "cents"}


def _bracketed(text: str) -> str:
    for bracket, name in _BRACKETS.items():
        text = text.replace(bracket, name)
    return text


def _in_two(first: int) -> _Action:
    return lambda text: f"{text[:first]} {text[first:]}"


_RULES: list[tuple[str, _Action]] = [
    # markup, addresses, names of the net
    (r"</?[A-Za-z!?][^<>\r\n]*>", _same),
    (r"(?i:https?)://[^\s\"<>|()]*[^\s\"<>|().,:!?'}-]", _same),
    (r"www\.(?:[^\s\"<>|().]+\.)+[a-zA-Z]{2,4}(?:/[^\s\"<>|()]*[^\s\"<>|().,;:!?'-])?", _same),
    (r"[A-Za-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().]+", _same),
    (r"[@#][A-Za-z][A-Za-z0-9_]*", _same),
    (r"&(?:amp|lt|gt|quot|nbsp);", lambda text: _ENTITIES[text.lower()]),
    (r"&(?:#\d+|[A-Za-z]+);", _same),
    # words that are written as one and counted as two, then single letters and abbreviations with their full stop
    (rf"(?i:cannot|gimme|lemme){_END}", _in_two(3)),
    (rf"(?i:gonna|gotta|wanna){_END}", _in_two(3)),
    (rf"(?i:'t(?:is|was)){_END}", _in_two(2)),
    (
        rf"(?i:o{_APOSTROPHE}clock|ma{_APOSTROPHE}am|c{_APOSTROPHE}mon|ol{_APOSTROPHE}|(?:o|n?e){_APOSTROPHE}er){_END}",
        _same,
    ),
    (rf"(?:{_LETTER}\.)+(?=\s+{_any(_STARTERS)}(?:\s|\.))", lambda text: text if len(text) > 2 else f"{text[0]} ."),
    (rf"(?:{_LETTER}\.)+{_END}", _same),
    (rf"(?i:{_any(_ALWAYS)})\.", _same),
    (rf"{_with_case(_NOT_ALL_CAPITAL, (str, str.capitalize))}\.", _same),
    (rf"{_with_case(_CAPITAL, (str.capitalize, str.upper))}\.", _same),
    (rf"(?i:{_any(_BEFORE_NUMBERS)})\.(?=\s*\d)", _same),
    # numbers
    (r"\(\d{3}\)\s?\d{3}-?\d{4}", _bracketed),
    (r"[-+]?\d*(?:[.,:]\d+)+", _same),
    (r"[-+]?\d+", _same),
    (r"\d{1,4}/\d{1,2}(?:/\d{2,4})?", _same),
    (r"[½¼¾⅓⅔]", lambda text: _FRACTIONS[text]),
    # words: with letters and figures, joined by a hyphen, a slash, an underscore, an apostrophe in names
    (_WORD, _same),
    (rf"(?:{_WORD}|[-+]?\d+)\.(?=[,;:])", _same),  # before these Stanford's takes any word for an abbreviation
    (rf"{_ALNUM}+(?:[-_\u2010\u2011]{_ALNUM}+)*", _same),
    (r"[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*(?:/[A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)*)+", _same),
    (r"[A-Za-z][A-Za-z0-9]*(?:/[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*)+", _same),
    (r"\d+/\d+(?:-?[A-Za-z][A-Za-z0-9]*)+", _same),
    (rf"(?i:[dlo]|qu){_APOSTROPHE}{_LETTER}{_ALNUM}*(?:-{_ALNUM}+)*", _same),
    (r"[A-Z]+&[A-Z]+", _same),
    (rf"(?i:y{_APOSTROPHE})(?={_LETTER})", _same),
    (r"(?:US|[A-Z])\$", _same),
    (r"[Cc]\+\+|[CcFf]#", _same),
    # what is left of a word after an apostrophe
    (rf"{_APOSTROPHE}(?i:s|m|d|ll|re|ve){_END}", lambda text: "'" + text[1:]),
    (rf"(?i:n{_APOSTROPHE}t){_END}", lambda text: f"{text[0]}'{text[2]}"),
    (rf"{_APOSTROPHE}(?:\d\ds?|(?i:em|cause|til|n)){_END}(?!/)", _same),
    (rf"{_APOSTROPHE}[nN]{_APOSTROPHE}", _same),
    # marks
    (r"[<>]?[:;=][-o*']?[()DPdpO\\@|\[\]{](?![A-Za-z])", _bracketed),
    (r"\^_\^", _same),
    (r"[?!]+|\*+|#+|@+|_+|-{5,}|<<|>>", _same),
    (r"\.{3,}|(?:\. ){2,}\.|…", _as("...")),
    (r"-{2,4}|[\u2013-\u2015]", _as("--")),
    (r"''|\"|[“”«»]", _as("''")),
    (r"``", _as("``")),
    (r"[‘’‛‹›]", _as("'")),
    (r"[][(){}]", _bracketed),
    (r"[€₠¤£¢]", lambda text: _MONEY[text]),
]
"""(pattern, what its text becomes: tokens with spaces between)"""

_PATTERNS = [(re.compile(pattern), action) for pattern, action in _RULES]
# A word that ends in n't, and one that another rule would split, give way: the word rule stops before them
_NEGATED = re.compile(rf"({_LETTER}{_ALNUM}*?)(?i:n{_APOSTROPHE}t){_END}")
_SPACE = re.compile(r"\s+")
_PLAIN = re.compile(r"[A-Za-z]{2,}(?=\s|$)")
_OF_TWO = frozenset(["cannot", "gimme", "lemme", "gonna", "gotta", "wanna"])


def _next(text: str, at: int) -> tuple[int, str]:
    """The end of the token at a position, and what it becomes."""
    if (plain := _PLAIN.match(text, at)) and plain[0].lower() not in _OF_TWO:
        return plain.end(), plain[0]
    if (negated := _NEGATED.match(text, at)) and negated[1]:
        return negated.end(1), negated[1]
    end, action = at, _same
    for pattern, candidate in _PATTERNS:
        if (match := pattern.match(text, at)) and match.end() > end:
            end, action = match.end(), candidate
    if end > at:
        return end, action(text[at:end])
    # a mark of the basic plane is a token of its own, a pictogram beyond it, or an invisible mark, is left out
    return at + 1, text[at] if text[at] <= "\uffff" and text[at].isprintable() and text[at] not in _UNSEEN else ""


_UNSEEN = frozenset("\u200b\u200c\u200d\u2060\ufeff\ufe0e\ufe0f\u20e3「」")


def tokenize(text: str) -> list[str]:
    """The lower-case tokens of a caption, pycocoevalcap's dropped marks left out.

    A line break counts as a space. Errors: TypeError for what is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"a caption must be a string, not {type(text).__name__}: {text!r:.80}")
    at, made = 0, []
    while at < len(text):
        if space := _SPACE.match(text, at):
            at = space.end()
            continue
        at, piece = _next(text, at)
        made.append(piece)
    words = " ".join(made).replace("\u00ad", "").lower().split()
    return [word for word in words if word not in _DROPPED]

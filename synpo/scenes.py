"""Preference pairs of faithful against hallucinated captions, made from structured scenes with a seeded generator.

A scene says where it takes place, how the camera moves, which objects are in view and what they do, in order. Its log
is the prompt. The chosen caption tells the scene; the rejected one tells, in the same manner of speaking, a scene with
two or three errors of the kinds that captioners make. Both captions come from one grammar and are matched in length, so
neither style nor length gives the answer away: only the log does.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TypeVar

INSTRUCTION = "Describe the video in detail."
MAX_ERRORS = 3
_PHRASINGS = 12  # ways of telling the rejected scene that are tried for the length nearest to the chosen caption's

# what an object does: (log word, [third person, plural] in each phrasing, directions it can take)
_SIDEWAYS = ("left", "right")
_GROUND = (*_SIDEWAYS, "near", "far")
_AIR = (*_SIDEWAYS, "up", "down")
_ACTIONS = {
    "drive": ((("drives", "drive"), ("moves", "move")), _GROUND),
    "roll": ((("rolls", "roll"), ("moves", "move")), _GROUND),
    "walk": ((("walks", "walk"), ("strolls", "stroll")), _GROUND),
    "run": ((("runs", "run"), ("dashes", "dash")), _GROUND),
    "drift": ((("drifts", "drift"), ("glides", "glide")), _SIDEWAYS),
    "swim": ((("swims", "swim"), ("glides", "glide")), _AIR),
    "fly": ((("flies", "fly"), ("soars", "soar")), _AIR),
    "float": ((("floats", "float"), ("drifts", "drift")), _AIR),
    "slide": ((("slides", "slide"), ("moves", "move")), _SIDEWAYS),
    "stop": ((("stops", "stop"), ("comes to a stop", "come to a stop")), ()),
    "turn": ((("turns around", "turn around"), ("turns back", "turn back")), ()),
    "spin": ((("spins", "spin"), ("turns in circles", "turn in circles")), ()),
}
_NOUNS = {  # noun: (plural, actions)
    "car": ("cars", ("drive", "stop")),
    "van": ("vans", ("drive", "stop")),
    "bus": ("buses", ("drive", "stop")),
    "bicycle": ("bicycles", ("roll", "stop")),
    "tractor": ("tractors", ("drive", "stop")),
    "dog": ("dogs", ("run", "walk", "turn")),
    "cat": ("cats", ("run", "walk", "turn")),
    "horse": ("horses", ("run", "walk", "turn")),
    "goat": ("goats", ("run", "walk", "turn")),
    "ball": ("balls", ("roll", "stop", "spin")),
    "boat": ("boats", ("drift", "turn", "stop")),
    "ship": ("ships", ("drift", "stop")),
    "bird": ("birds", ("fly", "turn")),
    "kite": ("kites", ("fly", "spin")),
    "balloon": ("balloons", ("float", "spin")),
    "plane": ("planes", ("fly", "turn")),
    "fish": ("fish", ("swim", "turn")),
    "turtle": ("turtles", ("swim", "turn")),
    "diver": ("divers", ("swim", "turn", "stop")),
    "crab": ("crabs", ("walk", "stop")),
    "cup": ("cups", ("slide", "spin")),
    "bowl": ("bowls", ("slide", "spin")),
    "robot": ("robots", ("roll", "turn", "stop")),
    "train": ("trains", ("roll", "stop")),
    "cube": ("cubes", ("slide", "spin")),
}
_OUTDOORS = ("at dawn", "at noon", "at dusk", "at night", "in the rain", "in the fog")
_INDOORS = ("in bright light", "in dim light", "in warm lamplight", "in the morning", "in the evening")
_PLACES = {  # place: (nouns, light)
    "on a city street": (("car", "van", "bus", "bicycle", "dog", "cat", "bird"), _OUTDOORS),
    "in a park": (("dog", "cat", "ball", "kite", "bicycle", "bird", "balloon"), _OUTDOORS),
    "on a farm": (("horse", "goat", "dog", "tractor", "bird", "cat"), _OUTDOORS),
    "in a harbour": (("boat", "ship", "bird", "van", "dog"), _OUTDOORS),
    "on a beach": (("ball", "kite", "dog", "crab", "boat", "bird"), _OUTDOORS),
    "above a field": (("balloon", "plane", "kite", "bird"), _OUTDOORS),
    "in a large aquarium": (("fish", "turtle", "crab", "diver"), _INDOORS),
    "on a kitchen table": (("cup", "bowl", "ball", "cube"), _INDOORS),
    "in a playroom": (("robot", "train", "ball", "cube", "balloon"), _INDOORS),
}
_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple", "grey", "brown")
_NUMBERS = ("one", "two", "three", "four", "five")
_POSITIONS = {
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "middle": ("in the middle", "in the centre"),
    "front": ("in the foreground", "at the front"),
    "back": ("in the background", "at the back"),
}
_DIRECTIONS = {
    "left": ("to the left", "towards the left"),
    "right": ("to the right", "towards the right"),
    "up": ("upwards", "towards the top"),
    "down": ("downwards", "towards the bottom"),
    "near": ("towards the camera", "closer to the camera"),
    "far": ("away from the camera", "into the distance"),
}
_CAMERA = {
    "still": ("stays still", "does not move"),
    "pans left": ("pans to the left", "turns slowly to the left"),
    "pans right": ("pans to the right", "turns slowly to the right"),
    "zooms in": ("zooms in", "moves closer"),
    "zooms out": ("zooms out", "pulls back"),
}
_FIRST = ("At first", "First", "To begin with")
_NEXT = ("Then", "After that", "Next")
_LAST = ("Finally", "In the end", "At last")

T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """Objects of one kind in a scene."""

    count: int  # 1..5
    colour: str
    noun: str
    position: str

    @property
    def name(self) -> str:
        return self.noun if self.count == 1 else _NOUNS[self.noun][0]


@dataclass(frozen=True)
class Event:
    """What one of the scene's kinds of objects does."""

    noun: str
    action: str
    direction: str | None  # None for actions that have none, such as to stop


@dataclass(frozen=True)
class Scene:
    """A short video as facts; no noun occurs twice among the things."""

    place: str
    light: str
    camera: str
    things: tuple[Thing, ...]
    events: tuple[Event, ...]  # in the order in which they happen

    def thing(self, noun: str) -> Thing:
        return next(thing for thing in self.things if thing.noun == noun)


# Random.choice and Random.sample may change between versions of Python; Random.random is promised to stay.
def _pick(rng: Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _shuffled(rng: Random, options: Sequence[T]) -> list[T]:
    return sorted(options, key=lambda _: rng.random())


def _other(rng: Random, options: Sequence[T], than: T) -> T:
    return _pick(rng, [option for option in options if option != than])


def _new_thing(rng: Random, noun: str) -> Thing:
    return Thing(1 + int(rng.random() * 5), _pick(rng, _COLOURS), noun, _pick(rng, tuple(_POSITIONS)))


def _new_event(rng: Random, noun: str) -> Event:
    action = _pick(rng, _NOUNS[noun][1])
    directions = _ACTIONS[action][1]
    return Event(noun, action, _pick(rng, directions) if directions else None)


def make_scene(rng: Random) -> Scene:
    """A random scene: two or three kinds of objects of different colours, and three events, no two the same."""
    place = _pick(rng, tuple(_PLACES))
    nouns, lights = _PLACES[place]
    kinds = _shuffled(rng, nouns)[: 2 + int(rng.random() * 2)]
    colours = _shuffled(rng, _COLOURS)
    things = tuple(replace(_new_thing(rng, noun), colour=colour) for noun, colour in zip(kinds, colours, strict=False))
    events: list[Event] = []
    while len(events) < 3:
        # everything in view moves before anything moves twice
        event = _new_event(rng, kinds[len(events)] if len(events) < len(kinds) else _pick(rng, kinds))
        if event not in events:
            events.append(event)
    return Scene(place, _pick(rng, lights), _pick(rng, tuple(_CAMERA)), things, tuple(_shuffled(rng, events)))


def log(scene: Scene) -> str:
    """The scene as a machine would note it: the prompt."""
    things = "; ".join(f"{thing.count} {thing.colour} {thing.name}, {thing.position}" for thing in scene.things)
    events = [
        f"{number}. {scene.thing(event.noun).name}: {event.action}{f' {event.direction}' if event.direction else ''}"
        for number, event in enumerate(scene.events, 1)
    ]
    lines = [f"place: {scene.place} {scene.light}", f"camera: {scene.camera}", f"objects: {things}", *events]
    return "Scene log\n" + "\n".join(lines) + "\n" + INSTRUCTION


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _clause(rng: Random, scene: Scene, event: Event) -> str:
    thing = scene.thing(event.noun)
    verb = _pick(rng, _ACTIONS[event.action][0])[0 if thing.count == 1 else 1]
    # the colour is named again now and then, as people do
    subject = f"the {thing.colour} {thing.name}" if rng.random() < 0.3 else f"the {thing.name}"
    return f"{subject} {verb}" + (f" {_pick(rng, _DIRECTIONS[event.direction])}" if event.direction else "")


def caption(scene: Scene, rng: Random) -> str:
    """One of many ways to tell the whole scene: place, camera, every object and its count, the events."""
    place = f"{scene.place} {scene.light}"
    camera = f"the camera {_pick(rng, _CAMERA[scene.camera])}"
    camera_first = rng.random() < 0.5
    opening = _pick(rng, ("the video was filmed", "this clip takes place", "the scene plays", "the scene is set"))
    sentences = [_sentence(f"{opening} {place}, and {camera}" if camera_first else f"{opening} {place}")]

    phrases = [
        f"{_NUMBERS[thing.count - 1]} {thing.colour} {thing.name} {_pick(rng, _POSITIONS[thing.position])}"
        for thing in scene.things
    ]
    listed = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    verb = "is" if scene.things[0].count == 1 else "are"
    sentences.append(_sentence(_pick(rng, (f"there {verb} {listed}", f"we see {listed}", f"in view {verb} {listed}"))))

    clauses = [_clause(rng, scene, event) for event in scene.events]
    middle = clauses[1:-1]
    sentences.append(_sentence(f"{_pick(rng, _FIRST)}, {clauses[0]}"))
    if middle and rng.random() < 0.4:
        sentences[-1] = _sentence(f"{sentences[-1][:-1]}, and {_pick(rng, _NEXT).lower()} {middle.pop(0)}")
    sentences += [_sentence(f"{_pick(rng, _NEXT)}, {clause}") for clause in middle]
    if len(clauses) > 1:
        sentences.append(_sentence(f"{_pick(rng, _LAST)}, {clauses[-1]}"))
    if not camera_first:
        sentences.append(_sentence(f"{_pick(rng, ('meanwhile', 'throughout', 'all the while'))}, {camera}"))
    return " ".join(sentences)


# An error falls on objects that are `real` (their nouns), and an invented object comes first: no error hides another.
Error = Callable[[Random, Scene, set[str]], Scene]


def _wrong_thing(field: str, options: Sequence[object]) -> Error:
    def error(rng: Random, scene: Scene, real: set[str]) -> Scene:
        index = _pick(rng, [i for i, thing in enumerate(scene.things) if thing.noun in real])
        thing = scene.things[index]
        wrong = replace(thing, **{field: _other(rng, options, getattr(thing, field))})
        return replace(scene, things=(*scene.things[:index], wrong, *scene.things[index + 1 :]))

    return error


def _wrong_direction(rng: Random, scene: Scene, real: set[str]) -> Scene:
    moving = [i for i, event in enumerate(scene.events) if event.noun in real and event.direction]
    if not moving:
        return scene
    index = _pick(rng, moving)
    event = scene.events[index]
    wrong = replace(event, direction=_other(rng, _ACTIONS[event.action][1], event.direction))
    return replace(scene, events=(*scene.events[:index], wrong, *scene.events[index + 1 :]))


def _swapped_order(rng: Random, scene: Scene, real: set[str]) -> Scene:
    first, second = sorted(_shuffled(rng, [i for i, event in enumerate(scene.events) if event.noun in real])[:2])
    events = list(scene.events)
    events[first], events[second] = events[second], events[first]
    return replace(scene, events=tuple(events))


def _invented_object(rng: Random, scene: Scene, real: set[str]) -> Scene:
    """What is not there takes an event that happened: one thing invented and one missing, so the length stays."""
    invented = _new_thing(rng, _pick(rng, [noun for noun in _PLACES[scene.place][0] if noun not in real]))
    missing = _pick(rng, scene.events)
    events = tuple(_new_event(rng, invented.noun) if event == missing else event for event in scene.events)
    acting = {event.noun for event in events}
    # with three kinds in view, the one whose only event went missing is overlooked too
    seen = tuple(thing for thing in scene.things if len(scene.things) == 2 or thing.noun in acting)
    return replace(scene, things=(*seen, invented), events=events)


def _wrong_light(rng: Random, scene: Scene, real: set[str]) -> Scene:
    return replace(scene, light=_other(rng, _PLACES[scene.place][1], scene.light))


def _wrong_camera(rng: Random, scene: Scene, real: set[str]) -> Scene:
    return replace(scene, camera=_other(rng, tuple(_CAMERA), scene.camera))


ERRORS: dict[str, Error] = {
    "invented": _invented_object,
    "count": _wrong_thing("count", (1, 2, 3, 4, 5)),
    "colour": _wrong_thing("colour", _COLOURS),
    "position": _wrong_thing("position", tuple(_POSITIONS)),
    "order": _swapped_order,
    "direction": _wrong_direction,
    "light": _wrong_light,
    "camera": _wrong_camera,
}


def hallucinate(scene: Scene, rng: Random) -> tuple[Scene, list[str]]:
    """`scene` with two or three errors of different kinds, and their names (keys of ERRORS)."""
    wanted = 2 + int(rng.random() * (MAX_ERRORS - 1))
    names = _shuffled(rng, tuple(ERRORS))
    if all(event.direction is None for event in scene.events):
        names.remove("direction")
    real = {thing.noun for thing in scene.things}
    made: list[str] = []
    wrong = scene
    for name in sorted(names[:wanted], key=list(ERRORS).index):
        before, wrong = wrong, ERRORS[name](rng, wrong, real)
        made += [name] if wrong != before else []
    return wrong, made


def score(errors: int) -> float:
    """1.1 factuality (0-5) + fluency (0-5) + consistency (0-3), as a judge that knows the truth gives them."""
    factuality, fluency, consistency = max(0, 5 - 2 * errors), 5, max(0, 3 - errors)
    return round(1.1 * factuality + fluency + consistency, 1)


def make_pairs(count: int = 200, seed: int = 0) -> list[dict[str, object]]:
    """`count` conversational preference pairs with different prompts; the same seed gives the same pairs.

    Columns: prompt, chosen, rejected (lists of one message each), score_chosen, score_rejected (scale 0 to 13.5).
    """
    rng = Random(seed)
    pairs: dict[str, dict[str, object]] = {}
    surplus = 0  # words that the rejected captions are ahead by; kept near zero over the whole set
    while len(pairs) < count:
        scene = make_scene(rng)
        chosen = caption(scene, rng)
        wrong, errors = hallucinate(scene, rng)
        tellings = [caption(wrong, rng) for _ in range(_PHRASINGS)]
        words = len(chosen.split())
        rejected = min(tellings, key=lambda text: abs(surplus + len(text.split()) - words))
        prompt = log(scene)
        if prompt in pairs:
            continue
        surplus += len(rejected.split()) - words
        pairs[prompt] = {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "score_chosen": score(0),
            "score_rejected": score(len(errors)),
        }
    return list(pairs.values())


def write_pairs(path: Path, count: int = 200, seed: int = 0) -> None:
    """Writes `make_pairs(count, seed)` to `path`, one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(pair, ensure_ascii=False) for pair in make_pairs(count, seed)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")

"""Captions: 80 words in all, attributes sometimes omitted, never wrong."""

from random import Random

from portraits.identity import Identity
from portraits.scene import Scene

OPENINGS = ("a portrait of ", "a portrait of ", "a photo of ", "a photo of ", "a headshot of ", "")
BEARDS = {"stubble": "stubble", "beard": "a beard", "longbeard": "a long beard", "moustache": "a moustache"}
CLOTHES = {"shirt": "shirt", "turtleneck": "turtleneck", "vneck": "v-neck sweater"}
EXPRESSIONS = {
    "sad": "looking sad",
    "angry": "looking angry",
    "surprised": "looking surprised",
    "eyes closed": "with closed eyes",
}  # the others are their own word


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def enumerate_words(phrases: list[str]) -> str:
    """Join phrases as "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def hair_phrase(identity: Identity, random: Random) -> str:
    """Describe the hair, "" if there is none."""
    colour, style = identity.hair_colour, identity.hair_style
    if style == "bald":
        return ""
    if style == "buzz":
        return f"a {colour} buzz cut"
    if style == "afro":
        return with_article(f"{colour} afro")
    if style == "bob":
        phrase = with_article(f"{colour} bob")
    elif style in ("bun", "ponytail"):
        phrase = f"{colour} hair in a {style}"
    elif style == "curly":
        phrase = f"short curly {colour} hair"
    elif style == "long straight":
        phrase = f"long {colour} hair" if random.random() < 0.6 else f"long straight {colour} hair"
    else:  # long wavy, long curly, swept-back, short
        phrase = f"{style} {colour} hair"
    return phrase + " and bangs" if identity.fringe and random.random() < 0.8 else phrase


def person_phrase(identity: Identity, scene: Scene, random: Random) -> str:
    """Name the person: age, "bald" where it shows, sex. Only "young" may be left out, as it is the default."""
    words = [identity.sex]
    if identity.hair_style == "bald" and not scene.hat:
        words.insert(0, "bald")
    if random.random() < 0.85 or identity.age != "young":
        words.insert(0, identity.age)
    return with_article(" ".join(words))


def feature_phrases(identity: Identity, scene: Scene, random: Random) -> list[str]:
    """List features of the person, each named only where the picture shows it."""
    features = []
    covered = bool(scene.hat) and identity.hair_style in ("short", "buzz", "swept-back")
    hair = "" if covered else hair_phrase(identity, random)
    if hair and random.random() < 0.95:
        features.append(hair)
    if identity.beard != "none" and random.random() < 0.93:
        features.append(BEARDS[identity.beard])
    if random.random() < 0.3:
        features.append(f"{identity.tone} skin")
    eyes_hidden = scene.glasses == "sunglasses" or scene.expression in ("eyes closed", "laughing")
    if random.random() < 0.25 and not eyes_hidden:
        features.append(f"{identity.eye_colour} eyes")
    if identity.freckles and random.random() < 0.8:
        features.append("freckles")
    if identity.lipstick and random.random() < 0.6:
        features.append(identity.lipstick)
    return features


def expression_phrase(scene: Scene, random: Random) -> str:
    """Describe the expression; a neutral one seldom, any other one nearly always."""
    say_neutral = random.random() < 0.25  # drawn for every expression
    if scene.expression == "neutral":
        phrase = "with a neutral expression" if say_neutral else ""
    else:
        phrase = EXPRESSIONS.get(scene.expression, scene.expression)
    return "" if phrase and random.random() < 0.08 else phrase


def worn_phrases(scene: Scene, random: Random) -> list[str]:
    """List glasses, hat and clothing."""
    worn = []
    if scene.glasses and random.random() < 0.97:
        plain = scene.glasses == "sunglasses" or random.random() < 0.7
        worn.append(scene.glasses if plain else f"{scene.glasses_style} glasses")
    if scene.hat and random.random() < 0.97:
        worn.append(with_article(f"{scene.hat_colour} {scene.hat}"))
    if random.random() < 0.78:
        stripes = f" and {scene.stripe_colour} striped" if scene.striped else ""
        worn.append(with_article(f"{scene.cloth_colour}{stripes} {CLOTHES[scene.cloth]}"))
    return worn


def background_phrase(scene: Scene, random: Random) -> str:
    """Describe the background, "" if it is left out."""
    if random.random() >= 0.82:
        return ""
    if random.random() < 0.5:
        if scene.background_kind == "gradient":
            return f"{scene.background} gradient background"
        if scene.background_kind == "blurred":
            return f"blurred {scene.background} background"
    return f"{scene.background} background"


def caption(identity: Identity, scene: Scene, seed: int) -> str:
    """Describe a picture in at most 34 words.

    Arguments:
        identity: Who is in the picture.
        scene: The picture.
        seed: Decides what is said and how; the same seed gives the same words.

    Returns:
        Lower-case English without a full stop.
    """
    random = Random(seed)
    person = person_phrase(identity, scene, random)
    features = feature_phrases(identity, scene, random)
    expression = expression_phrase(scene, random)
    worn = worn_phrases(scene, random)
    background = background_phrase(scene, random)

    text = random.choice(OPENINGS) + person
    worn_first = random.random() < 0.25
    if features:
        text += " with " + enumerate_words(features)
    clauses = [expression, "wearing " + enumerate_words(worn) if worn else ""]
    for clause in reversed(clauses) if worn_first else clauses:
        if clause:
            text += ", " + clause
    if background:
        text += (", on " if random.random() < 0.7 else ", against ") + with_article(background)
    return text

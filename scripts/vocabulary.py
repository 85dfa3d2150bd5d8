#!/usr/bin/env python
"""Writes src/hf_vs2/explain/words.txt, the words that latents are named by where nobody gives others.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    python scripts/vocabulary.py wordnet/usr/share/wordnet

Nouns of WordNet for things that a photograph can show, which come in its tagged texts with this as their commonest meaning, then
CLIP's names of the ImageNet classes (from the registry), colours and textures. Licences: src/hf_vs2/explain/words_licence.txt.
"""

import argparse
from pathlib import Path

from hf_vs2.data.registry import dataset_info


TARGET = Path(__file__).parents[1] / "src" / "hf_vs2" / "explain" / "words.txt"
# WordNet's lexicographer files (lexnames.5WN), and how often a word must come in its tagged texts.
ANIMAL, ARTEFACT, BODY, FOOD, OBJECT, PERSON, PHENOMENON, PLANT, SHAPE, SUBSTANCE = 5, 6, 8, 13, 17, 18, 19, 20, 25, 27
COMMON = {
    ANIMAL: 1,
    FOOD: 1,
    PLANT: 1,
    ARTEFACT: 2,
    BODY: 6,
    OBJECT: 3,
    SHAPE: 1,
    SUBSTANCE: 15,
    PHENOMENON: 6,
    PERSON: 12,
}
# Insults, and words that no photograph shows.
LEFT_OUT = [
    "breast",
    "breasts",
    "ass",
    "arse",
    "shit",
    "crap",
    "penis",
    "vagina",
    "vulva",
    "clitoris",
    "testis",
    "buttocks",
    "turd",
    "dung",
    "semen",
    "sperm",
    "nigger",
    "negro",
    "negress",
    "colored",
    "jew",
    "gentile",
    "catholic",
    "protestant",
    "christian",
    "communist",
    "nazi",
    "bastard",
    "bitch",
    "slut",
    "whore",
    "prostitute",
    "queer",
    "fag",
    "idiot",
    "fool",
    "moron",
    "imbecile",
    "cripple",
    "dwarf",
    "savage",
    "heathen",
    "slave",
    "corpse",
    "rapist",
    "victim",
    "enemy",
    "individual",
    "someone",
    "somebody",
    "one",
    "thing",
    "object",
    "artifact",
    "whole",
    "unit",
    "entity",
    "part",
    "portion",
    "item",
    "piece",
    "structure",
    "instrumentality",
    "way",
    "substance",
    "matter",
    "material",
    "stuff",
    "agent",
    "body",
    "being",
    "man-made",
    "creation",
    "product",
    "commodity",
    "means",
    "device",
    "facility",
    "location",
    "point",
    "line",
    "place",
    "area",
    "region",
    "side",
    "end",
    "top",
    "bottom",
    "back",
    "front",
    "inside",
    "outside",
    "radical",
    "bomb",
    "negroid",
    "mulatto",
    "half-breed",
    "savior",
    "god",
    "christ",
    "jesus",
    "messiah",
    "self",
    "soul",
    "ego",
    "it",
    "nature",
    "universe",
    "reaction",
    "process",
    "force",
    "chord",
    "micelle",
    "parasite",
    "iodine",
    "brothel",
    "pussy",
    "tit",
    "teat",
    "testicle",
    "nude",
    "tsh",
    "etcetera",
    "pbs",
    "rump",
    "southerner",
    "american",
    "mexican",
    "gut",
    "die",
    "cure",
    "still",
    "release",
    "private",
    "effect",
    "pressure",
    "gravity",
    "resistance",
    "current",
    "energy",
    "charge",
    "voltage",
    "consequence",
    "result",
    "outcome",
]
LOOKS = """
red, orange, yellow, green, blue, purple, pink, brown, black, white, grey, gold, silver, turquoise, beige, striped, dotted, checkered,
plaid, zigzag, spiral, grid, stripes, polka dots, furry, feathered, scaly, woven, knitted, wrinkled, cracked, bubbly, marbled, metallic,
wooden, glass, blurry, bright, dark, shiny, transparent, rough, smooth, round, square, night, sunset, sunrise, snow, rain, fog, indoors,
outdoors, underwater, close-up, crowd, text, drawing, cartoon, sketch, black and white, portrait, landscape, city, street, beach,
forest, mountain, desert, sky, sea, river, lake, field, garden, kitchen, bedroom, office, sports, running, jumping, eating, sleeping
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, help="folder with WordNet's cntlist.rev")
    args = parser.parse_args()
    imagenet = dataset_info("imagenet")
    assert imagenet.classes is not None
    words = [*nouns(args.wordnet), *imagenet.classes.values(), *(word.strip() for word in LOOKS.split(","))]
    by_key = {word.lower(): word for word in reversed(words)}
    lines = sorted(by_key.values(), key=lambda word: (word.lower(), word))
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{TARGET}: {len(lines)} words")


def nouns(folder: Path) -> list[str]:
    """The nouns whose commonest meaning is a thing to be seen, without names of places and people."""
    spellings = {part for line in (folder / "data.noun").read_text().splitlines() for part in line.split()[4:12:2]}
    found = []
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, sense, count = line.split()
        lemma, rest = key.split("%")
        kind, file = map(int, rest.split(":")[:2])
        word = lemma.replace("_", " ")
        if (
            kind == 1
            and sense == "1"
            and int(count) >= COMMON.get(file, 1 << 30)
            and lemma in spellings
            and fits(word)
        ):
            found.append(word)
    return found


def fits(word: str) -> bool:
    return (
        word.replace(" ", "").replace("-", "").isalpha()
        and word.count(" ") < 2
        and 2 < len(word) < 18
        and word not in LEFT_OUT
    )


if __name__ == "__main__":
    main()

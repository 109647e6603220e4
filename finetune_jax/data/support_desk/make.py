"""Write the `support_desk` data set: customer-service utterances with an intent and BIO2 entity tags.

The sentences come from hand-written frames (`frames_en.txt`, `frames_zh.txt`) whose slots are filled with
invented values (`slots.json`). Frames and values belong to exactly one split. `plan.json` holds the seed, the
labels and how many utterances each split gets: base number by language, times the weight of the intent. The
output depends only on those files, so running

    python finetune_jax/data/support_desk/make.py

rewrites the JSONL files byte for byte.

Frame syntax: `{type}` or `{type:list}` is a slot, tagged `type`; `[a|b]` is a choice; a leading `~` makes
the whole utterance lower case. Slot values: `#` is a random digit, `^` a random capital letter, and anything
before a `|` is filled in but not tagged.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
PLAN = json.loads((HERE / "plan.json").read_text(encoding="utf-8"))
LANGUAGES = ("en", "zh")
EXTRA_RATE = 0.2  # share of eligible utterances that get an opening sentence, and likewise a closing one
MAX_EXTRA_SLOTS = 3  # frames with more slots than this get neither

_EMAIL = r"[{0}.+-]+@[{0}-]+(?:\.[{0}-]+)+"
TOKEN = {
    # Words keep inner apostrophes, hyphens, slashes and dots; a final 's is a token of its own.
    "en": re.compile(_EMAIL.format(r"\w") + r"|'s\b|\w+(?:(?:'(?!s\b)|[-/.]|(?<=\d),(?=\d))\w+)*|\S"),
    # One token a character, except for runs of Latin letters and digits.
    "zh": re.compile(_EMAIL.format("A-Za-z0-9_") + r"|(?a:[^\W_]+(?:(?:[-/.]|(?<=\d),(?=\d))[^\W_]+)*)|\S"),
}
_SLOT = re.compile(r"\{([a-z_]+)(:[a-z]+)?\}")
_CHOICE = re.compile(r"\[([^\]]*)\]")

T = TypeVar("T")
Frames = dict[tuple[str, str], list[str]]
Slots = dict[str, dict[str, dict[str, list[str]]]]
Record = dict[str, Any]


def read_frames(path: Path) -> Frames:
    """Read frames by (section, split); a section is an intent, `opener` or `closer`."""
    frames: Frames = {}
    current: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section, split = line[3:].split()
            current = frames.setdefault((section, split), [])
        elif line.strip():
            current.append(line)
    return frames


class Maker:
    """Fills frames, keeping every slot value inside the split that used it first."""

    def __init__(self, slots: Slots, seed: int) -> None:
        """Claim the fixed slot values for their splits; values with random parts are claimed when drawn."""
        self.slots = slots
        # Only `random()` is used: its sequence is the one Python promises to keep between versions.
        self.random = random.Random(seed).random
        self.owner: dict[str, str] = {}
        self.texts: set[str] = set()
        for language in LANGUAGES:
            for split in PLAN["base"]:
                for value in (v for values in slots[language][split].values() for v in values):
                    if not re.search(r"[#^]", value) and not self.claim(value.split("|")[-1], split):
                        raise ValueError(f"slot value in two splits: {value!r}")

    def claim(self, value: str, split: str) -> bool:
        """Whether the value belongs to the split (or to none before this call)."""
        return self.owner.setdefault(value.casefold(), split) == split

    def pick(self, items: Sequence[T]) -> T:
        """Draw one item."""
        return items[int(self.random() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in random order."""
        return [item for _, _, item in sorted((self.random(), i, item) for i, item in enumerate(items))]

    def value(self, language: str, split: str, key: str) -> str:
        """Draw a value for a slot and fill in its random digits and letters."""
        out = ""
        for char in self.pick(self.slots[language][split][key]):
            if char == "#":  # no leading zero, so that amounts and dates stay sensible
                inner = out[-1:].isdigit() or out[-1:] in {".", "-"}
                char = self.pick("0123456789" if inner else "123456789")
            elif char == "^":
                char = self.pick("ABCDEFGHJKLMNPRSTUVWXYZ")
            out += char
        return out

    def decorate(self, frame: str, frames: Frames, split: str, language: str) -> str:
        """Resolve the choices of a frame and sometimes add an opening or a closing sentence."""
        if frame[0] != "~" and "[" not in frame and len(_SLOT.findall(frame)) <= MAX_EXTRA_SLOTS:
            space = " " if language == "en" else ""
            if self.random() < EXTRA_RATE:
                frame = self.pick(frames["opener", split]) + space + frame
            if self.random() < EXTRA_RATE:
                stop = "" if re.search(r"[^\w}]$", frame) else "。" if language == "zh" else "."
                frame += stop + space + self.pick(frames["closer", split])
        text = _CHOICE.sub(lambda match: self.pick(match[1].split("|")), frame)
        return text[:1].upper() + text[1:]

    def fill(self, frame: str, split: str, language: str) -> Record | None:
        """Make an utterance from a frame, or return None where the draw has to be repeated."""
        lower = frame.startswith("~")
        text, end = "", int(lower)
        spans: list[tuple[int, int, str]] = []
        used: set[str] = set()
        for match in _SLOT.finditer(frame):
            before, _, value = self.value(language, split, match[1] + (match[2] or "")).rpartition("|")
            if value in used or not self.claim(value, split):
                return None
            used.add(value)
            text += frame[end : match.start()] + before
            spans.append((len(text), len(text) + len(value), match[1]))
            text += value
            end = match.end()
        text += frame[end:]
        text = text.lower() if lower else text
        tokens, tags = [], []
        for token in TOKEN[language].finditer(text):
            tag = "O"
            for left, right, kind in spans:
                if token.start() < right and token.end() > left:
                    if token.start() < left or token.end() > right:
                        return None  # the value ran into a neighbouring word
                    tag = ("B-" if token.start() == left else "I-") + kind
            tokens.append(token[0])
            tags.append(tag)
        return {"language": language, "text": text, "tokens": tokens, "tags": tags}

    def utterances(self, frames: Frames, split: str, language: str, intent: str) -> Iterator[Record]:
        """Yield as many different utterances as the intent is due, its frames taking turns."""
        wanted = round(PLAN["base"][split][language] * PLAN["intents"][intent])
        pool = frames[intent, split]
        # Two turns for every frame, more for those with slots (the others would come out nearly the same).
        turns = self.shuffled(pool) + self.shuffled(pool)
        while wanted:
            turns = turns or self.shuffled([frame for frame in pool if "{" in frame])
            record = self.fill(self.decorate(turns.pop(), frames, split, language), split, language)
            if record is not None and record["text"].casefold() not in self.texts:
                self.texts.add(record["text"].casefold())
                wanted -= 1
                yield {**record, "intent": intent}


def make(output: Path, seed: int) -> dict[str, list[Record]]:
    """Write the three JSONL files and the two label lists into `output`; return the records by split."""
    maker = Maker(json.loads((HERE / "slots.json").read_text(encoding="utf-8")), seed)
    frames = {language: read_frames(HERE / f"frames_{language}.txt") for language in LANGUAGES}
    output.mkdir(parents=True, exist_ok=True)
    data: dict[str, list[Record]] = {}
    for split in PLAN["base"]:
        todo = [(lang, intent) for lang in LANGUAGES for intent in PLAN["intents"]]
        parts = [maker.utterances(frames[lang], split, lang, intent) for lang, intent in todo]
        records = maker.shuffled([record for part in parts for record in part])
        data[split] = [{"id": f"{split}-{number:05d}", **record} for number, record in enumerate(records)]
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in data[split])
        (output / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    for name in ("intents", "entities"):
        (output / f"{name}.txt").write_text("".join(f"{x}\n" for x in PLAN[name]), "utf-8", newline="\n")
    return data


def tables(data: dict[str, list[Record]]) -> str:
    """Lay out the counts of the data card as Markdown."""
    count: Counter[tuple[str, str, str]] = Counter()
    for split, records in data.items():
        for r in records:
            kinds = [tag[2:] for tag in r["tags"] if tag.startswith("B-")]
            for name in ["utterances", *([] if kinds else ["no entity"]), r["intent"], *kinds]:
                count[name, split, r["language"]] += 1
    columns = [(split, language) for split in data for language in LANGUAGES]
    lines = ["| | " + " | ".join(map(" ".join, columns)) + " | all |", "|---" + "|--:" * 7 + "|"]
    for name in ["utterances", "no entity", *PLAN["intents"], *PLAN["entities"]]:
        row = [count[name, *column] for column in columns]
        lines.append(f"| {name} | " + " | ".join(map(str, [*row, sum(row)])) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the support_desk data set.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write to (default: this one)")
    parser.add_argument("--seed", type=int, default=PLAN["seed"])
    args = parser.parse_args()
    print(tables(make(args.output, args.seed)))

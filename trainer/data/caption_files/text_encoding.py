"""The text in a file's bytes: Unicode, or else the older encoding that fits it best.

A caption is too short for a sure guess: nine bytes of Japanese are also good Korean. So all files of a subset are
judged together. Each encoding is scored on each file, by how usual the characters are that it yields;
charset-normalizer judges the longer text of all files; and the mean over the files helps the encoding that fits most.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from charset_normalizer import from_bytes

# A byte order mark → the encoding that it announces. UTF-32's little-endian mark begins with UTF-16's.
MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
LOWEST_SCORE = 0.5  # an encoding whose characters are less usual than this does not fit
MOST_JUDGED_BYTES = 1 << 15  # by charset-normalizer, whose time grows with the length
PUNCTUATION = (
    "’‘“”„–—…«»°•·©®™€£§¿¡´×½²³\u00a0、。，：；！？（）「」『』《》〈〉【】・ー～々〆〇＋％　１２３４５６７８９０"
)

# Letters that texts in a single-byte encoding consist of, beside ASCII. The first of equals wins.
LATIN = {
    "cp1252": "éèàùçâêîôûëïüöäßñáíóúãõåæøœìòÿšž",
    "cp1254": "çğıöşüâîû",
    "cp1250": "ąćęłńóśźżáčďéěíňřšťúůýžőűöüäăâîşţľĺŕôđß",
    "cp1257": "āčēģīķļņšūžąęėįųõäöü",
    "mac_roman": "éèàùçâêîôûëïüöäßñáíóúãõåæøœ",
    "cp850": "éèàùçâêîôûëïüöäßñáíóúãõåæø",
}
CYRILLIC = "абвгдеёжзийклмнопрстуфхцчшщъыьэюяіїєґў"
ALPHABETS = {
    "cp1251": CYRILLIC,
    "koi8_r": CYRILLIC,
    "cp866": CYRILLIC,
    "cp1253": "αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώ",
    "cp1255": "אבגדהוזחטיךכלםמןנסעףפץצקרשת",
    "cp1256": "ءآأؤإئابةتثجحخدذرزسشصضطظعغفقكلمنهوىيًٌٍَُِّْپچژگک،؟؛ـ",
    # Without the rare letters and digits: any bytes from A1 on are Thai characters.
    "cp874": "กขคงจฉชซญฎฏฐณดตถทธนบปผฝพฟภมยรลวศษสหอะัาำิีึืุูเแโใไ็่้๊์",
}
VOWELS = "аеёиоуыэюяіїєαεηιουωάέήίόύώ"
# Double-byte encodings: the lead bytes of common characters. The standards list the characters in use first, and rare
# ones after them. Korean comes before Chinese, which seldom stays within the bytes of Korean syllables.
COMMON_LEADS = {
    "cp932": (0x88, 0x98),
    "cp949": (0xB0, 0xC9),
    "gb18030": (0xB0, 0xD8),
    "big5": (0xA4, 0xC7),
    "euc_jp": (0xB0, 0xD0),
}
JAPANESE = ("cp932", "euc_jp")
KANA = re.compile("[\u3041-\u30ff]")
# A word with a letter beyond ASCII. It begins where its letters begin, and nowhere within them: a line of 160 kB
# without a blank would otherwise be read once for each of its letters.
WORD = re.compile(r"(?<![A-Za-z])[A-Za-z]*+[^\x00-\x7f][^\s,.;:!?()\[\]{}\x22]*|[^\x00-\x7f]")
SINGLE_BYTE = {**LATIN, **ALPHABETS}
ENCODINGS = (*LATIN, *ALPHABETS, *COMMON_LEADS)


@dataclass(frozen=True, slots=True)
class Decoded:
    """The text of a file and its encoding, by Python's name; both are empty if no encoding fits."""

    text: str
    encoding: str

    @property
    def is_unicode(self) -> bool:
        return self.encoding.startswith("utf")


def decode_all(files: Mapping[str, bytes]) -> dict[str, Decoded]:
    """The text of each file by its name, where files that are not Unicode are judged together."""
    decoded: dict[str, Decoded] = {}
    others: dict[str, bytes] = {}
    for name, data in files.items():
        unicode = _decode_unicode(data)
        if unicode is None:
            others[name] = data
        else:
            decoded[name] = unicode
    if others:
        decoded |= _decode_together(others)
    return {name: decoded[name] for name in files}


def _decode_unicode(data: bytes) -> Decoded | None:
    """The text, if a byte order mark, the bytes of UTF-8 or the zeros of UTF-16 say that it is Unicode."""
    encodings = [encoding for mark, encoding in MARKS.items() if data.startswith(mark)]
    if not encodings and b"\0" in data:
        encodings = _wide_encodings(data)
    if b"\x1b$" in data:  # the escapes of ISO-2022, which are ASCII and so UTF-8 as well
        encodings.append("iso2022_jp")
    for encoding in (*encodings, "utf-8"):
        try:
            return Decoded(data.decode(encoding), encoding.removesuffix("-sig"))
        except UnicodeDecodeError:
            continue
    return None


def _wide_encodings(data: bytes) -> list[str]:
    """UTF-16 or UTF-32 without a mark, by where the zeros are: the high bytes of ASCII characters are 0."""
    quarters = [data[i::4].count(0) / max(1, len(data) // 4) for i in range(4)]
    filled = "".join("x" if quarter < 0.5 else "0" for quarter in quarters)
    patterns = {
        "x000": "utf-32-le",
        "000x": "utf-32-be",
        "x0x0": "utf-16-le",
        "0x0x": "utf-16-be",
    }
    encoding = patterns.get(filled)
    return [encoding] if encoding else []


# ---- older encodings


def _decode_together(files: Mapping[str, bytes]) -> dict[str, Decoded]:
    scores: dict[str, dict[str, float]] = {}
    texts: dict[tuple[str, str], str] = {}
    for name, data in files.items():
        scores[name] = {}
        for encoding in ENCODINGS:
            text = _decode_strictly(data, encoding)
            if text is not None:
                texts[name, encoding] = text
                scores[name][encoding] = _score(text, encoding)
    support = {}
    for encoding in ENCODINGS:
        support[encoding] = sum(of_file.get(encoding, 0.0) for of_file in scores.values()) / len(files)
        support[encoding] += _judgement(files, scores, encoding)
    decoded = {}
    for name, of_file in scores.items():
        fitting = [encoding for encoding, score in of_file.items() if score >= LOWEST_SCORE]
        if fitting:  # of equals, max takes the first
            best = max(fitting, key=lambda encoding: round(scores[name][encoding] + support[encoding], 3))
            decoded[name] = Decoded(texts[name, best], best)
        else:
            decoded[name] = Decoded("", "")
    return decoded


def _judgement(files: Mapping[str, bytes], scores: Mapping[str, Mapping[str, float]], encoding: str) -> float:
    """charset-normalizer's opinion of all files that `encoding` fits: language found, less disorder. -1 to 1."""
    pool = b""
    for name, of_file in scores.items():
        if of_file.get(encoding, 0.0) >= LOWEST_SCORE and len(pool) < MOST_JUDGED_BYTES:
            pool += files[name] + b"\n"
    if not pool:
        return 0.0
    match = from_bytes(pool[:MOST_JUDGED_BYTES], cp_isolation=[encoding], enable_fallback=False).best()
    if match is None or match.encoding != encoding:
        return 0.0
    return match.coherence - match.chaos


def _decode_strictly(data: bytes, encoding: str) -> str | None:
    """The text, unless `encoding` does not have the bytes or makes characters of them that no text has."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    for character in set(text):  # of each once: a table may have megabytes
        if unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") and character not in "\t\r\n":
            return None
    return text


def _score(text: str, encoding: str) -> float:
    """How usual the characters beyond ASCII are for the languages of `encoding`: 0 to 1."""
    if encoding in COMMON_LEADS:
        return _double_byte_score(text, encoding)
    return _single_byte_score(text, encoding)


def _double_byte_score(text: str, encoding: str) -> float:
    total = 0.0
    count = 0
    first, end = COMMON_LEADS[encoding]
    for match in re.finditer(r"[^\x00-\x7f]+", text):
        run = match.group()
        before = text[max(0, match.start() - 1) : match.start()]
        if len(run) == 1 and before.isalpha() and text[match.end() : match.end() + 1].isalpha():
            count += 1  # one ideograph inside a Latin word: an accent of another encoding took its neighbour along
            continue
        for character in run:
            count += 1
            lead = character.encode(encoding)[0]
            if character in PUNCTUATION:
                total += 0.5 if encoding == "cp949" else 1.0
            elif KANA.match(character):
                total += 1.0 if encoding in JAPANESE else 0.2
            elif first <= lead < end:
                total += 1.0
            elif len(character.encode(encoding)) == 2:
                total += 0.3
    if encoding == "euc_jp" and not KANA.search(text):
        return 0.0
    return total / max(1, count)


def _single_byte_score(text: str, encoding: str) -> float:
    letters = SINGLE_BYTE[encoding]
    total = 0.0
    count = 0
    for word in WORD.findall(text):
        foreign = [character for character in word if ord(character) > 127]
        count += len(foreign)
        if encoding in LATIN and len(foreign) > 1 and len(foreign) > 0.7 * len(word):
            continue  # words of accents alone are none
        if encoding not in LATIN and re.search(r"[A-Za-z]", word):
            continue  # a word of two alphabets
        has_vowel = any(character in VOWELS for character in word.lower())
        if any(character in VOWELS for character in letters) and len(word) > 2 and not has_vowel:
            continue
        total += _usual_letters(word, letters)
    return total / max(1, count)


def _usual_letters(word: str, letters: str) -> float:
    """The characters of a word beyond ASCII that the alphabet has, with capitals only where words have them."""
    total = 0.0
    capitals = word.isupper()
    for i, character in enumerate(word):
        if ord(character) < 128:
            continue
        inside = 0 < i < len(word) - 1 and word[i - 1].isalpha() and word[i + 1].isalpha()
        is_mark = character in PUNCTUATION and (not inside or character in "’´·")
        if is_mark or character in letters:
            total += 1.0
        elif character.lower() in letters and capitals:
            total += 0.6
        elif character.lower() in letters and i == 0:
            total += 0.9
    return total

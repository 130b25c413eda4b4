"""The encodings of text files: UTF-8 as it should be, UTF-16 noticed, and advice for any other."""

import codecs
import gzip
import io
import locale
import re
import zipfile
from contextlib import contextmanager

from classifier.messages import BadInput, escape, list_names, nearest

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, or a byte that could not be decoded

# What ordinary text of an encoding is made of, in bytes; the most specific encodings first. The bytes of one encoding
# are often valid in others, but there they are rare characters, or letters where none belong.
COMMON = {
    "cp949": rb"[\xb0-\xc8][\xa1-\xfe]",  # Korean: the syllables of KS X 1001
    "big5": rb"[\xa4-\xc6][\x40-\x7e\xa1-\xfe]|\xa1[\x40-\xfe]",  # traditional Chinese: level 1, and marks
    "gb18030": rb"[\xb0-\xd7][\xa1-\xfe]|[\xa1\xa3][\xa1-\xfe]",  # simplified Chinese: level 1, and marks
    "cp932": rb"[\x82\x83][\x40-\xf1]|[\x88-\x97][\x40-\xfc]|\x81[\x40-\x5b]",  # Japanese: kana, level 1, marks
    "cp1256": rb"[\xc1-\xd6\xd8-\xdb\xdd-\xdf\xe1\xe3-\xe6\xec\xed]{2,}|\xa1",  # Arabic words
    # Cyrillic words, also Ukrainian ones, of two letters or more: small but for the first, or all capital.
    "cp1251": rb"(?<![\x80-\xff])(?:[\xa5\xa8\xaa\xaf\xb2\xb3\xb4\xb8\xba\xbf\xc0-\xff][\xb3\xb4\xb8\xba\xbf\xe0-\xff]+"
    rb"|[\xa5\xa8\xaa\xaf\xb2\xc0-\xdf]{2,})(?![\x80-\xff])",
    # Single accents, quotes and dashes among the letters of ASCII:
    "cp1252": rb"(?<![\x80-\xff])[\x80\x82\x84\x85\x8a\x91-\x97\x9a\x9c\xa1\xab\xb4\xbb\xbf-\xff]{1,2}(?![\x80-\xff])",
}
HIGH = re.compile(rb"[\x80-\xff]")


@contextmanager
def open_bytes(path):
    """Open a file, a .gz file, or a member of a zip archive (ARCHIVE.zip::MEMBER) to read bytes."""
    if "\0" in str(path):
        raise FileNotFoundError(path)  # open() would raise ValueError
    archive, _, member = str(path).partition("::")
    if member:
        with zipfile.ZipFile(archive) as files:
            # On Windows, a path may be typed with backslashes, and some programs wrote them into archives.
            members = {name.replace("\\", "/"): name for name in files.namelist()}
            if member.replace("\\", "/") not in members:
                names = [name for name in members if not name.endswith("/")]
                raise BadInput(
                    f"{archive}: has no member {member}{nearest(member, names)}", f"Members: {list_names(names)}."
                )
            try:
                raw = files.open(members[member.replace("\\", "/")])
            except RuntimeError as error:  # encrypted, or an unsupported compression (NotImplementedError)
                raise BadInput(f"{path}: cannot be unpacked ({error})", "Unpack it and name the file itself.") from None
            with raw, gzip.open(raw) if member.lower().endswith(".gz") else raw as stream:
                yield stream
    else:
        with gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb") as stream:
            yield stream


def text_stream(raw, encoding):
    """Return a text stream. In UTF-8, an undecodable byte becomes a lone surrogate, which is later found in its row."""
    # newline="" leaves line ends inside quoted fields alone; utf-8-sig drops a byte order mark.
    try:
        if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
            return io.TextIOWrapper(raw, encoding, newline="")
    except (LookupError, ValueError):  # TextIOWrapper rejects codecs that do not decode bytes, such as rot13
        raise BadInput(f"--encoding {encoding}: unknown", "Known are utf-8, gb18030, latin-1, utf-16, ...") from None
    start = raw.peek(1000)[:1000]
    if likely := utf_16_of(start):
        offset = 0 if likely == "utf-16" else start.index(0)
        raise UnicodeError(f"byte {offset} of the file is {start[offset]:#04x}")
    return io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")


def utf_16_of(start):
    """Return which UTF-16 a file is in by its first bytes, or None."""
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    is_utf8 = not SURROGATE.search(start.decode("utf-8", "surrogateescape")[:-3])  # the last character may be cut off
    units = [start[position : position + 2] for position in range(0, len(start), 2)]
    # In Chinese text only line ends hold NUL. A NUL in UTF-8 is a slip, but not at the start of the file.
    if not is_utf8 and (b"\n\0" in units or b"\0\n" in units):
        return "utf-16-le" if b"\n\0" in units else "utf-16-be"
    return {0: "utf-16-be", 1: "utf-16-le"}.get(start[:2].find(0))


def diagnose_encoding(path, line=0):
    """Return (the offset of the first byte from a line on that is not UTF-8, as text; advice on the encoding)."""
    with open_bytes(path) as raw:
        utf_16 = utf_16_of(raw.peek(1000)[:1000])
        before = io.TextIOWrapper(raw, "utf-8", errors="surrogateescape", newline="").read(100_000)
    offset, after = 0, ""
    with open_bytes(path) as raw:
        stream = io.TextIOWrapper(raw, "utf-8", errors="surrogateescape", newline="")
        blocks = stream if line else iter(lambda: stream.read(1 << 16), "")  # a JSON list may be one long line
        for number, text in enumerate(blocks, start=1):
            match = SURROGATE.search(text) if number >= line and not text.isascii() else None
            offset += len(text[: match.start() if match else None].encode("utf-8", "surrogateescape"))
            if match:
                word = re.search(r"[^\s,;\"]*$", text[: match.start()])[0]  # that the byte is in
                after = word[-20:] + text[match.start() :] + stream.read(100_000)
                break
    place, broken = f" (byte {offset:,} of the file)", len(SURROGATE.findall(before + after))
    if not utf_16 and len(re.findall(r"[^\0-\x7f]", before + after)) > 2 * broken > 0:
        return place, "Most of the file is UTF-8 and this byte is damaged: fix it"
    if utf_16 or not broken:
        likely = utf_16 or "utf-8"
        return place, f"The file looks like {likely}: give --encoding {likely}" + (
            ", or convert it to UTF-8" if utf_16 else ""
        )
    data = after.encode("utf-8", "surrogateescape")
    if not (likely := likely_encodings(data)):
        return place, "Its encoding is none of the usual ones: give it with --encoding, or convert it to UTF-8"
    readings = [f"{name} ({first_words(data, name)!r})" for name in likely]
    return place, f"The file looks like {', or '.join(readings)}: give --encoding {likely[0]}, or convert it to UTF-8"


def likely_encodings(data):
    """Return up to three encodings that decode these bytes, the likeliest first; data is not UTF-8.

    Likely is one in whose ordinary text most of the bytes above 127 occur; and the one of the system's locale.
    """
    number = len(HIGH.findall(data))
    fractions = {}
    for name, common in COMMON.items():
        if decodes(data, name):
            fractions[name] = sum(len(HIGH.findall(match)) for match in re.findall(common, data)) / number
    if number == 1 and fractions.get("cp1252"):  # a single accent or quote is likelier than half of a single character
        return ["cp1252"]
    likely = sorted((name for name in fractions if fractions[name] > 0.5), key=lambda name: -fractions[name])
    own = codecs.lookup(locale.getencoding()).name
    others = [own] if own not in ("utf-8", "ascii", *likely) and decodes(data, own) else []
    return [*likely[: 3 - len(others)], *others]


def decodes(data, encoding):
    """Return whether bytes, of which the last character may be cut off, are text in this encoding."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(data)
        return True
    except UnicodeDecodeError:
        return False


def first_words(data, encoding):
    """Return the first words of these bytes, decoded."""
    return escape(re.split(r"[\r\n\t]", data[:100].decode(encoding, "ignore"))[0][:20])

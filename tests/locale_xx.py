"""A small locale, `xx_XX.UTF-8`, whose text does not sort by bytes.

Letters come without regard to case and accents first (``a < A < b < B``, ``e < é < f``), which is
what the collations of natural languages have in common and what tells them from `C`. It is
compiled by ``localedef``, which every system with the GNU C library has, from source written here;
the locales of a distribution would have to be installed first.
"""

import shutil
import string
import subprocess
from pathlib import Path

LOCALE = "xx_XX.UTF-8"

_ACCENTED = {"é": "e", "ü": "u"}


def compile_locale(directory: Path) -> Path | None:
    """Compile the locale into a directory, to be named in ``LOCPATH``; None without `localedef`."""
    localedef = shutil.which("localedef", path="/usr/bin:/bin:/usr/local/bin")
    if localedef is None:
        return None
    directory.mkdir(parents=True)
    directory.chmod(0o755)  # the server may run as another user
    source, charmap = directory / "source", directory / "charmap"
    source.write_text(_source(), encoding="ascii")
    charmap.write_text(_charmap(), encoding="ascii")
    # -c: write the locale although the categories that PostgreSQL does not use are missing.
    command = [localedef, "-c", "-i", source, "-f", charmap, str(directory / LOCALE)]
    subprocess.run(command, check=False, capture_output=True)
    return directory if (directory / LOCALE / "LC_COLLATE").exists() else None


def _letters() -> list[tuple[str, str]]:
    """Every lower-case letter in collation order, with its base letter."""
    letters = [(letter, letter) for letter in string.ascii_lowercase] + list(_ACCENTED.items())
    return sorted(letters, key=lambda pair: (pair[1], pair[0] != pair[1]))


def _symbol(character: str) -> str:
    return f"<U{ord(character):04X}>"


def _charmap() -> str:
    lines = ["<code_set_name> UTF-8", "<mb_cur_min> 1", "<mb_cur_max> 6"]
    lines += ["<comment_char> %", "<escape_char> /", "CHARMAP"]
    characters = [chr(point) for point in range(0x80)]
    characters += [form for letter in _ACCENTED for form in (letter.upper(), letter)]
    for character in sorted(characters):
        encoded = "".join(f"/x{byte:02x}" for byte in character.encode())
        lines.append(f"{_symbol(character)} {encoded} -")
    return "\n".join([*lines, "END CHARMAP", ""])


def _source() -> str:
    lower = [letter for letter, _ in _letters()]
    pairs = [(_symbol(letter), _symbol(letter.upper())) for letter in lower]
    lines = ["comment_char %", "escape_char /", "LC_CTYPE"]
    lines.append("upper " + ";".join(up for _, up in pairs))
    lines.append("lower " + ";".join(low for low, _ in pairs))
    lines.append("digit " + ";".join(map(_symbol, string.digits)))
    lines.append("space " + ";".join(map(_symbol, " \t\n\v\f\r")))
    lines.append("toupper " + ";".join(f"({low},{up})" for low, up in pairs))
    lines.append("tolower " + ";".join(f"({up},{low})" for low, up in pairs))
    lines += ["END LC_CTYPE", "LC_COLLATE"]
    lines += ["collating-symbol <SMALL>", "collating-symbol <CAPITAL>"]
    lines += ["order_start forward;forward;forward", "<SMALL>", "<CAPITAL>"]
    for character in map(chr, range(0x20, 0x7F)):
        if not character.isalpha():
            lines.append(" ".join([_symbol(character), ";".join([_symbol(character)] * 3)]))
    for letter, base in _letters():
        for form, case in ((letter, "<SMALL>"), (letter.upper(), "<CAPITAL>")):
            lines.append(f"{_symbol(form)} {_symbol(base)};{_symbol(letter)};{case}")
    return "\n".join([*lines, "order_end", "END LC_COLLATE", ""])

"""Drawing by hand: svg, PNG, text that stays text, and what Chromium makes of a page.
For tools/figures.py."""

import base64
import contextlib
import html
import re
import shutil
import struct
import subprocess
import tempfile
import textwrap
import zlib
from pathlib import Path

import numpy as np

from lib import media
from lib.args import UserError, printable
from lib.reasoning import normalise

GROUND, INK, SOFT, LINE, RIGHT, WRONG = (
    "#fdfcf9",
    "#1c1f24",
    "#5b6470",
    "#ddd8cd",
    "#15803d",
    "#c0262d",
)
BOLD, END = 'font-weight="700"', 'text-anchor="end"'
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"


def png(image: np.ndarray, palette: np.ndarray | None = None) -> bytes:
    """uint8 (H, W, 3), or (H, W) with a palette uint8 (n, 3) -> a PNG file."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    h, w = image.shape[:2]
    rows = image.reshape(h, -1)
    if palette is None:  # each row less the one above, modulo 256: filter 2
        rows = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    kind = 2 if palette is None else 3
    rows = np.concatenate((np.full((h, 1), 0 if kind == 3 else 2, np.uint8), rows), 1)
    colours = b"" if palette is None else chunk(b"PLTE", palette.astype(np.uint8).tobytes())
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", w, h, 8, kind, 0, 0, 0))
        + colours
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def reduce_colours(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W, 3) -> which of at most 256 colours (H, W), the colours (n, 3): the most frequent
    ones, each the mean of what is alike in the upper five bits.  A third of the bytes, and no
    difference to the eye on drawings."""
    flat = image.reshape(-1, 3)
    bins = (flat >> 3).astype(np.int64) @ (1 << 10, 1 << 5, 1)
    _, where, count = np.unique(bins, return_inverse=True, return_counts=True)
    where = where.reshape(-1)
    # (bins, 3)
    means = np.stack([np.bincount(where, flat[:, c]) for c in range(3)], 1) / count[:, None]
    kept = np.argsort(-count, kind="stable")[:256]
    nearest = ((means[:, None] - means[kept]) ** 2).sum(-1).argmin(1)  # (bins,)
    return nearest[where].reshape(image.shape[:2]).astype(np.uint8), np.rint(means[kept]).astype(
        np.uint8
    )


def data_uri(frame: np.ndarray, side: int = 160) -> str:
    """A frame, large ones thinned to at most `side` pixels,
    as the address of an image within the page."""
    step = -(-max(frame.shape[:2]) // side)
    return "data:image/png;base64," + base64.b64encode(png(frame[::step, ::step])).decode()


def escape(words: str) -> str:
    """For svg and html: markup stays text, and so does what XML cannot hold."""
    return html.escape("\n".join(printable(line) for line in str(words).split("\n")))


def mark(words: str, label: str, invented: set[str] = frozenset()) -> list[tuple[str, str]]:
    """A text in pieces -> (piece, "right" or "wrong" for an emotion, "invented", "tag" or "")."""

    def kind(piece: str) -> str:
        word = piece.lower()
        meant = normalise(word) if word.isalpha() else None
        if meant or word == label.lower():
            return "right" if label.lower() in (word, meant) else "wrong"
        if word in invented:
            return "invented"
        return "tag" if re.fullmatch("</?(think|answer)>", word) else ""

    return [
        (piece, kind(piece))
        for piece in re.findall(r"</?(?:think|answer)>|[a-zA-Z]+|[^a-zA-Z<]+|<", words)
    ]


def text(x: float, y: float, words: str, size: int, fill: str = INK, more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" '
        f"{more}>{escape(words)}</text>"
    )


def marked(
    x: float, y: float, words: str, label: str, size: int, fill: str = INK, more: str = ""
) -> str:
    """A line of svg with its emotions coloured."""
    colours = {"right": RIGHT, "wrong": WRONG}
    spans = "".join(
        f'<tspan fill="{colours[kind]}" font-weight="700">{escape(piece)}</tspan>'
        if kind in colours
        else escape(piece)
        for piece, kind in mark(words, label)
    )
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" {more}>{spans}</text>'


def wrap(words: str, width: float, size: int) -> list[str]:
    """Lines that fit: 0.57 of the size a character, which is wide for any of the fonts."""
    return textwrap.wrap(printable(" ".join(words.split())), max(4, int(width / (0.57 * size))))


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A drawing with a ground of its own, so that it is as legible on a dark page."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="{FONT}"><title>{escape(title)}</title><rect width="100%" '
        f'height="100%" fill="{GROUND}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def waveform(
    audio: np.ndarray, x: float, y: float, w: float, h: float, fill: str = SOFT, bars: int = 40
) -> str:
    """Sound as bars around y: the peak of each part, two thirds of full
    scale being as high as `h`."""
    tall = [
        max(1.0, h * min(1.0, 1.5 * abs(part).max(initial=0)))
        for part in np.array_split(audio, bars)
    ]
    d = "".join(
        f"M{x + w * (i + 0.5) / bars:.1f} {y - bar / 2:.1f}v{bar:.1f}" for i, bar in enumerate(tall)
    )
    return f'<path d="{d}" stroke="{fill}" stroke-width="{0.55 * w / bars:.1f}"/>'


def image(frame: np.ndarray, x: float, y: float, side: float) -> str:
    return (
        f'<image x="{x:.1f}" y="{y:.1f}" width="{side}" height="{side}" href="{data_uri(frame)}"/>'
    )


STYLE = """
:root { color-scheme: light dark; --ground: #fdfcf9; --card: #fff; --ink: #1c1f24; --soft: #5b6470;\
 --line: #ddd8cd;
  --right: #15803d; --wrong: #c0262d; --odd: #8a5a00; }
@media (prefers-color-scheme: dark) \
{ :root { --ground: #14171c; --card: #1c2027; --ink: #e8e6e1; --soft: #a0a8b4;
  --line: #343a44; --right: #4ac26b; --wrong: #ff7b72; --odd: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 2.5rem 1.25rem 4rem; background: var(--ground);\
 color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .3rem; }
h3 { font-size: 1.05rem; margin: 0 0 .7rem; }
p { margin: 0 0 .6rem; }
.soft { color: var(--soft); max-width: 46rem; }
.grid { display: grid; gap: 1.1rem; margin-top: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least)), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-top: 4px solid var(--line);\
 border-radius: 6px;
  padding: 1rem 1.1rem; break-inside: avoid; }
.frames { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 3px;\
 margin: 1rem 0 0;
  max-width: 44rem; }
.card .frames { margin: 0; }
.frames img { width: 100%; display: block; border-radius: 3px; }
svg { display: block; color: var(--soft); width: 100%; max-width: 44rem;\
 height: 2.6rem; margin-bottom: .6rem; }
.card svg { height: 1.8rem; }
.text { white-space: pre-wrap; margin-bottom: .8rem; }
.answer { font-size: 1.15rem; font-weight: 700; margin: 0; }
.right, .wrong { color: var(--right); font-weight: 700; }
.wrong { color: var(--wrong); }
.tag, .id { color: var(--soft); font-size: .85rem; }
.tag { white-space: nowrap; }
.invented { color: var(--odd); text-decoration: underline wavy; font-weight: 600; }
"""


def page(title: str, lead: str, body: list[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n"
        f"<p class=soft>{lead}</p>\n" + "\n".join(body) + "\n</html>\n"
    )


def html_text(words: str, label: str, invented: set[str] = frozenset()) -> str:
    return "".join(
        f'<span class="{kind}">{escape(piece)}</span>' if kind else escape(piece)
        for piece, kind in mark(words, label, invented)
    )


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HEADLESS = (
    "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def shoot(page: Path, size: tuple[int, int]) -> np.ndarray:
    """A page as headless Chromium shows it -> uint8 (H, W, 3).  Raises UserError."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(
            f"{page} is written, but no PNG of it: install Chromium "
            f"({', '.join(BROWSERS)} were looked for)."
        )
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [
                    browser,
                    *HEADLESS,
                    f"--user-data-dir={folder}/user",
                    f"--window-size={size[0]},{size[1]}",
                    f"--screenshot={shot}",
                    page.resolve().as_uri(),
                ],
                capture_output=True,
                timeout=120,
            )
        if not shot.exists():
            raise UserError(
                f"{page} is written, but {browser} made no PNG of it; "
                "open the page in it and see why."
            )
        return media.read_clip(shot, 1, modal="video").frames[0]

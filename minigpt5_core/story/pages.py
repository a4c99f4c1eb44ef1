"""A story on pages: a folder with story.json, the pictures, a strip of all pages and a self-contained HTML page."""

import base64
import html
import io
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..errors import BadInputError
from ..files import draft_of, put, restore, whole_folder
from ..inside import lies_inside
from ..rasters import UNREADABLE, as_seen, open_picture
from .story import FILE_NAME, Scene, Story

STRIP, HTML, MARKDOWN = "strip.png", "story.html", "story.md"
LEFT_BY_FILE_MANAGERS = {".DS_Store", "Thumbs.db", "desktop.ini"}

# The strip, in pixels.
PAGE, MARGIN, FONT_SIZE, LINE = 384, 24, 22, 30
PAGES_IN_A_ROW = 6
TALLEST = 4 * PAGE
PAPER, BACKGROUND, INK = "#fffdf7", "#e9e4d8", "#2b2a27"


def picture_name(number: int) -> str:
    """The file name of scene `number`'s picture, counted from 1."""
    return f"scene_{number:02}.png"


def write_story(
    folder: Path, story: Story, pictures: list[Image.Image | None], metadata: PngInfo | None = None
) -> Story:
    """Write the story and one picture (or None) for each scene as `folder`, in one step; returns it as written.

    `metadata` goes into the scenes' PNGs, and not into the page that is sent around. Equal arguments give equal
    bytes. BadInputError as for `check_target`, and where the disk refuses.
    """
    check_target(folder)
    story = _with_names(story, pictures)
    encoded = [None if picture is None else _png(picture) for picture in pictures]
    with _writing(folder), whole_folder(folder) as draft:
        (draft / FILE_NAME).write_bytes(story.to_json().encode())
        (draft / STRIP).write_bytes(_png(draw_strip(story, pictures)))
        (draft / HTML).write_bytes(render_html(story, encoded).encode())
        (draft / MARKDOWN).write_bytes(render_markdown(story).encode())
        for scene, picture in zip(story.scenes, pictures, strict=True):
            if scene.picture and picture:
                (draft / scene.picture).write_bytes(_png(picture, metadata))
    return story


def append_scene(folder: Path, story: Story, pictures: list[Image.Image | None]) -> None:
    """Puts the newest scene into a folder that `write_story` has written with those before it.

    The picture first, then story.json, each in one step: whenever the process dies, what was told can be gone on with.
    Strip and pages show it when `write_story` has written them anew. BadInputError where the disk refuses.
    """
    story = _with_names(story, pictures)
    with _writing(folder):
        name, picture = story.scenes[-1].picture, pictures[-1]
        if name and picture:
            put(folder / name, _png(picture))
        put(folder / FILE_NAME, story.to_json().encode())


def _with_names(story: Story, pictures: list[Image.Image | None]) -> Story:
    """The story with its pictures' file names."""
    pages = zip(story.scenes, pictures, strict=True)
    scenes = [
        Scene(scene.text, picture_name(number) if picture else None)
        for number, (scene, picture) in enumerate(pages, 1)
    ]
    return replace(story, scenes=tuple(scenes))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into BadInputError."""
    try:
        yield
    except OSError as error:
        raise BadInputError(
            f"Cannot write the story to {folder}: {error.strerror}. Name another folder."
        ) from error


def check_target(folder: Path) -> None:
    """BadInputError unless `folder` can be written: new, empty, or an earlier story, which may be replaced."""
    cure = "Name a new folder, or that of an earlier story."
    try:
        _check_target(folder, cure)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        why = getattr(error, "strerror", None) or error
        raise BadInputError(f"Cannot write the story to {folder}: {why}. {cure}") from error


def _check_target(folder: Path, cure: str) -> None:
    target = folder.resolve()
    restore(target)
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(
            draft_of(target)
        )  # its name is the longest to be written: too long is said now, not after the story
    for place in (target, *target.parents):
        if place.is_dir():
            break
        if place.exists() or place.is_symlink():
            raise BadInputError(f"Cannot write the story to {folder}: {place} is not a folder. {cure}")
    if place == target and (strange := _not_of_a_story(target)):
        raise BadInputError(f"{folder} is no story (it holds {strange}), and is left alone. {cure}")
    if not os.access(target.parent if place == target else place, os.W_OK):
        raise BadInputError(f"Cannot write the story to {folder}: no permission to write there. {cure}")


def _not_of_a_story(folder: Path) -> str | None:
    """A name in `folder` that no story has written; story.json itself must be there unless the folder is empty."""
    names = {path.name for path in folder.iterdir()} - LEFT_BY_FILE_MANAGERS
    ours = {
        name
        for name in names
        if name in (FILE_NAME, STRIP, HTML, MARKDOWN) or re.fullmatch(r"scene_\d+\.png|\..+\.part", name)
    }
    return min(names - ours if FILE_NAME in names else names, default=None)


def read_pictures(story: Story, folder: Path) -> list[Image.Image | None]:
    """The pictures of a saved story, None where a scene has none; BadInputError names one that cannot be read.

    They lie beside story.json as files: a link that leads out of the folder is none that a story has written.
    """
    pictures: list[Image.Image | None] = []
    for scene in story.scenes:
        path = folder / scene.picture if scene.picture else None
        try:
            pictures.append(_read(path, folder) if path else None)
        except UNREADABLE as error:
            raise BadInputError(f"Cannot read the story's picture {path}: {error}.") from error
    return pictures


def _read(path: Path, folder: Path) -> Image.Image:
    if not lies_inside(path, folder):
        raise BadInputError("it is a link that leads out of the story's folder; put the picture itself there")
    with open_picture(path) as picture:
        return as_seen(picture)


def draw_strip(story: Story, pictures: list[Image.Image | None]) -> Image.Image:
    """All pages side by side, at most `PAGES_IN_A_ROW` in a row, each picture with its text below."""
    pages = [_draw_page(scene.text, picture) for scene, picture in zip(story.scenes, pictures, strict=True)]
    rows = [pages[start : start + PAGES_IN_A_ROW] for start in range(0, len(pages), PAGES_IN_A_ROW)]
    heights = [max(page.height for page in row) for row in rows]
    width = max((len(row) for row in rows), default=0) * (PAGE + MARGIN) + MARGIN
    strip = Image.new("RGB", (width, sum(heights) + MARGIN * (len(rows) + 1)), BACKGROUND)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, page in enumerate(row):
            left = MARGIN + column * (PAGE + MARGIN)
            strip.paste(PAPER, (left, top, left + PAGE, top + height))
            strip.paste(page, (left, top))
        top += height + MARGIN
    return strip


def _draw_page(text: str, picture: Image.Image | None) -> Image.Image:
    """One page, `PAGE` wide: the picture scaled to that width, then the text in as many lines as it needs."""
    lines = wrap(text, PAGE - 2 * MARGIN)
    scaled = None if picture is None else _scaled(as_seen(picture))
    picture_height = scaled.height if scaled else 0
    page = Image.new("RGB", (PAGE, picture_height + LINE * len(lines) + 2 * MARGIN), PAPER)
    if scaled:
        page.paste(scaled, ((PAGE - scaled.width) // 2, 0))
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((MARGIN, picture_height + MARGIN + number * LINE), line, font=_font(), fill=INK)
    return page


def _scaled(picture: Image.Image) -> Image.Image:
    """As wide as a page, unless it would be too tall then: a picture may be 1 x 30,000."""
    height = max(1, round(PAGE * picture.height / picture.width))
    size = (
        (PAGE, height) if height <= TALLEST else (max(1, TALLEST * picture.width // picture.height), TALLEST)
    )
    return picture.resize(size, Image.Resampling.LANCZOS)


def wrap(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces, and inside a word that is wider than a line."""
    lines = []
    for paragraph in map(drawable, text.splitlines()):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if _font().getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            *full, line = _break_word(word, width)
            lines += full
        lines.append(line)
    return lines


def _break_word(word: str, width: int) -> list[str]:
    pieces = [""]
    for character in word:
        if pieces[-1] and _font().getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def drawable(text: str) -> str:
    """`text` with characters that the font lacks taken apart (é becomes e) or, where that fails, left as they are."""
    return "".join(character if _has_glyph(character) else _substitute(character) for character in text)


def _substitute(character: str) -> str:
    if unicodedata.category(character) == "Pd":  # a dash of another length
        return "-"
    parts = [part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part)]
    return "".join(parts) if parts and all(map(_has_glyph, parts)) else character


@cache
def _has_glyph(character: str) -> bool:
    missing = "\uffff"  # never a character, so always the box drawn for missing glyphs
    return character.isspace() or bytes(_font().getmask(character)) != bytes(_font().getmask(missing))


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Pillow's own font: the same letters on every machine."""
    font = ImageFont.load_default(FONT_SIZE)
    assert isinstance(
        font, ImageFont.FreeTypeFont
    )  # Pillow falls back to a bitmap font only without FreeType
    return font


def _png(picture: Image.Image, metadata: PngInfo | None = None) -> bytes:
    buffer = io.BytesIO()
    as_seen(picture).save(buffer, "PNG", pnginfo=metadata)
    return buffer.getvalue()


def _title(story: Story) -> str:
    """The opening; a story may begin with a picture alone."""
    return story.prompt or "A story"


def render_markdown(story: Story) -> str:
    """The story as Markdown, its pictures by file name; characters that Markdown would read are escaped."""
    parts = [f"# {_escape_markdown(_title(story))}"]
    for number, scene in enumerate(story.scenes, 1):
        if scene.picture:
            parts.append(f"![Picture of scene {number}]({scene.picture})")
        parts += [_escape_markdown(line) for line in scene.text.splitlines() if line.strip()]
    return "\n\n".join(parts) + "\n"


def _escape_markdown(text: str) -> str:
    inside = re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", " ".join(text.split()))
    return re.sub(
        r"^([+-]|\d+(?=[.)]))", lambda mark: f"\\{mark[0]}" if mark[0] in "+-" else f"{mark[0]}\\", inside
    )


def render_html(story: Story, pictures: list[bytes | None]) -> str:
    """A page that opens anywhere with nothing beside it: PNG `pictures` inside, every text escaped."""
    pages = "".join(
        _PAGE.format(picture=_image_tag(picture, number), text=_paragraphs(scene.text))
        for number, (scene, picture) in enumerate(zip(story.scenes, pictures, strict=True), 1)
    )
    columns = next(
        columns for columns in (3, 2, 1) if columns == 1 or _fills_rows(len(story.scenes), columns)
    )
    width = 24 * columns  # rem: too narrow for one page more of the style's 17
    return _DOCUMENT.format(style=_STYLE, title=html.escape(_title(story)), width=width, pages=pages)


def _fills_rows(pages: int, columns: int) -> bool:
    """Whether so many columns leave no row nearly empty."""
    return pages >= columns and pages % columns in (0, columns - 1)


def _image_tag(picture: bytes | None, number: int) -> str:
    if picture is None:
        return ""
    content = base64.b64encode(picture).decode()
    return f'<img src="data:image/png;base64,{content}" alt="Picture of scene {number}">'


def _paragraphs(text: str) -> str:
    return "".join(f'<p dir="auto">{html.escape(line)}</p>' for line in text.splitlines() if line.strip())


_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1 dir="auto">{title}</h1>
<main style="max-width: {width}rem">
{pages}</main>
</body>
</html>
"""

_PAGE = "<article>{picture}<div>{text}</div></article>\n"

_STYLE = """
:root { color-scheme: light dark; --background: #e9e4d8; --paper: #fffdf7; --ink: #2b2a27; }
@media (prefers-color-scheme: dark) { :root { --background: #1b1a18; --paper: #2a2825; --ink: #ece7dc; } }
* { box-sizing: border-box; }
body { margin: 0; padding: clamp(1rem, 4vw, 3rem); background: var(--background); color: var(--ink);
  font: 1.15rem/1.55 Georgia, "Times New Roman", serif; overflow-wrap: anywhere; }
h1 { max-width: 40rem; margin: 0 auto 2rem; text-align: center; font-size: clamp(1.4rem, 4vw, 2.1rem);
  font-weight: normal; line-height: 1.25; text-wrap: balance; }
main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr));
  margin: 0 auto; }
article { overflow: hidden; border-radius: 0.75rem; background: var(--paper);
  box-shadow: 0 0.15rem 0.8rem rgb(0 0 0 / 15%); }
article img { display: block; width: 100%; height: auto; }
article div { padding: 0.4rem 1.3rem 0.6rem; }
p { margin: 0.7rem 0; }
@media print { body { background: none; padding: 0; } article { box-shadow: none; break-inside: avoid; } }
"""

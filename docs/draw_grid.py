"""Draws docs/grid.svg: the programs of both schedules on one small batch. Standard library only.

python docs/draw_grid.py
"""

from pathlib import Path

LENGTHS = (1, 9, 2, 17, 4)
BLOCK_T = 8
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2")
INK, FAINT = "#1f2328", "#b5bac1"


def offsets(lengths):
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def per_sequence_programs(lengths, block_t):
    """Returns (row, block, tokens) of every program: rows x blocks of the longest row."""
    blocks = -(-max(lengths) // block_t)
    return [
        (row, block, min(max(length - block * block_t, 0), block_t))
        for row, length in enumerate(lengths)
        for block in range(blocks)
    ]


def flat_programs(lengths, block_t):
    """Returns (row, block, tokens) of every program, or None for one without work.

    Block k of row s is program `start[s] // block_t + s + k`; the grid is `tokens // block_t + rows`.
    """
    starts = offsets(lengths)
    programs = [None] * (starts[-1] // block_t + len(lengths))
    for row, length in enumerate(lengths):
        for block in range(-(-length // block_t)):
            index = starts[row] // block_t + row + block
            if programs[index] is not None:
                raise ValueError(f"program {index} has two owners")
            programs[index] = (row, block, min(length - block * block_t, block_t))
    return programs


class Drawing:
    """An SVG built line by line."""

    def __init__(self, width, height):
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="system-ui, sans-serif" font-size="13" role="img" '
            'aria-label="Programs of the per-sequence and the flat schedule on rows of 1, 9, 2, 17 and 4 tokens">',
            f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
        ]

    def box(self, x, y, w, h, fill="none", stroke="none", dash=False):
        extra = ' stroke-dasharray="3 3"' if dash else ""
        self.lines.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="3" fill="{fill}" stroke="{stroke}"{extra}/>'
        )

    def text(self, x, y, text, size=13, weight="normal", anchor="start", fill=INK):
        self.lines.append(
            f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
            f'fill="{fill}">{text}</text>'
        )

    def program(self, x, y, row, tokens):
        """A program: its block of tokens, those it owns filled in; dashed where it owns none."""
        self.box(x, y, 12 * BLOCK_T + 8, 22, stroke=INK if tokens else FAINT, dash=not tokens)
        for i in range(tokens):
            self.box(x + 5 + 12 * i, y + 6, 10, 10, fill=COLOURS[row])

    def finish(self):
        return "\n".join([*self.lines, "</svg>", ""])


def draw():
    picture = Drawing(900, 400)
    starts = offsets(LENGTHS)

    picture.text(20, 30, f"The packed batch: {starts[-1]} tokens in {len(LENGTHS)} rows", 15, "bold")
    for row in range(len(LENGTHS)):
        for token in range(starts[row], starts[row + 1]):
            picture.box(20 + 15 * token + 6 * row, 44, 12, 12, fill=COLOURS[row])
    picture.text(560, 55, f"query_start_loc = {starts}")

    programs = per_sequence_programs(LENGTHS, BLOCK_T)
    live = sum(tokens > 0 for _, _, tokens in programs)
    picture.text(20, 100, f"per_sequence: {len(programs)} programs, {live} with work", 15, "bold")
    picture.text(
        20,
        119,
        "axis 0 = row, axis 1 = block of 8 tokens in the row; past the row's end a program returns",
        12,
    )
    for row, block, tokens in programs:
        y = 134 + 30 * row
        picture.program(110 + 116 * block, y, row, tokens)
        if block == 0:
            picture.text(20, y + 16, f"row {row} ({LENGTHS[row]})")
    picture.text(480, 150, "The first program of a row reads the old window from", 12)
    picture.text(480, 168, "the row's slot and writes the new one; the others take", 12)
    picture.text(480, 186, "the width-1 tokens before their block from x.", 12)
    picture.text(480, 216, "No index list is built, nothing is copied between CPU", 12)
    picture.text(480, 234, "and GPU, nothing synchronises.", 12)

    flat = flat_programs(LENGTHS, BLOCK_T)
    live = sum(program is not None for program in flat)
    picture.text(20, 316, f"flat: {len(flat)} programs, {live} with work", 15, "bold")
    picture.text(
        20,
        335,
        "block k of row s is program query_start_loc[s] // 8 + s + k; a program finds its row by binary search",
        12,
    )
    for index, program in enumerate(flat):
        x = 20 + 96 * index
        picture.box(x, 346, 90, 40, stroke=INK if program else FAINT, dash=not program)
        picture.text(x + 45, 362, f"program {index}", 11, anchor="middle", fill=INK if program else FAINT)
        if program:
            row, _, tokens = program
            for i in range(tokens):
                picture.box(x + 6 + 10 * i, 370, 8, 8, fill=COLOURS[row])
    return picture.finish()


if __name__ == "__main__":
    path = Path(__file__).with_name("grid.svg")
    path.write_text(draw())
    print(f"wrote {path}")

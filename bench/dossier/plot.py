"""Memory against time as SVG, one panel a model; no library, so that it is drawn on any machine."""

import html

WIDTH, HEIGHT, LEFT, TOP, BELOW = 660, 360, 70, 40, 50
COLOURS = {"reprise": "#1f5fbf", "pytorch": "#c2531c"}


def panel(name, rows, offset):
    points = [(cell, row["peak_bytes"] / 2**30, 1e3 * row["tokens"] / row["tokens_per_s"]) for cell, row in rows.items() if row["peak_bytes"]]
    text = [f'<g transform="translate({offset},0)"><text x="{LEFT}" y="22" font-size="15">{name}</text>']
    if not points:
        return text + [f'<text x="{LEFT}" y="80">no measurements</text></g>']
    most_x, most_y = 1.1 * max(p[1] for p in points), 1.15 * max(p[2] for p in points)
    at = lambda x, y: (LEFT + x / most_x * (WIDTH - LEFT - 40), TOP + (1 - y / most_y) * (HEIGHT - TOP - BELOW))
    x0, y0 = at(0, 0)
    x1, y1 = at(most_x, most_y)
    text.append(f'<path d="M{x0:.1f} {y1:.1f}V{y0:.1f}H{x1:.1f}" fill="none" stroke="#444"/>')
    for part in range(5):
        x, y = at(most_x * part / 4, most_y * part / 4)
        text.append(f'<text x="{x:.1f}" y="{y0 + 16:.1f}" text-anchor="middle">{most_x * part / 4:.3g}</text>')
        text.append(f'<text x="{x0 - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{most_y * part / 4:.3g}</text>')
    text.append(f'<text x="{(x0 + x1) / 2:.1f}" y="{y0 + 34:.1f}" text-anchor="middle">peak GiB (allocator)</text>')
    text.append(f'<text x="{x0 - 6:.1f}" y="{y1 - 8:.1f}" text-anchor="end">ms a step</text>')
    # Numbers at the points and their names below: names would lie on each other.
    lines = dict.fromkeys(COLOURS, 0)
    for number, (cell, memory, ms) in enumerate(sorted(points, key=lambda p: p[2]), 1):
        x, y = at(memory, ms)
        peer, _, label = cell.partition(" ")
        text.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[peer]}"/><text x="{x + 5:.1f}" y="{y - 4:.1f}" fill="{COLOURS[peer]}">{number}</text>')
        left, down = LEFT + list(COLOURS).index(peer) * 290, HEIGHT + 10 + 13 * lines[peer]
        text.append(f'<text x="{left}" y="{down}" font-size="10" fill="{COLOURS[peer]}">{number}  {peer} {label}: {memory:.2f} GiB, {ms:.1f} ms</text>')
        lines[peer] += 1
    return text + ["</g>"]


def curves(models, origin):
    """A panel a model, and below them where the numbers are from."""
    parts = [line for at, (name, rows) in enumerate(models.items()) for line in panel(name, rows, at * WIDTH)]
    width = WIDTH * max(1, len(models))
    longest = max((sum(cell.startswith(peer) for cell in rows) for rows in models.values() for peer in COLOURS), default=0)
    height = HEIGHT + 13 * longest + 30
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">'
    below = f'<text x="{LEFT}" y="{height - 8}" fill="#666" font-size="8">{html.escape(origin)}</text>'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *parts, below, "</svg>"]) + "\n"

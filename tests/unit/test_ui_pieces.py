"""What the page shows of strangers' texts: escaped, and in frames that ask for nothing."""

from __future__ import annotations

import re
from html import unescape

from esd_lora.ui.markup import Cell, Shown, figures, frame, heat_map, picture_rows, table

EVIL = '<script>alert("1")</script>\u202e&'
SHOWN = "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;\\u202e&amp;"


def test_table_escapes_what_is_in_it() -> None:
    html = table(EVIL, [EVIL], [[EVIL], [Cell(EVIL, "bad")]])
    assert "<script" not in html
    assert html.count(SHOWN) == 5  # read out as the name of what scrolls, caption, head, two cells
    assert f'<td class="bad">{SHOWN}</td>' in html


def test_heat_map_is_white_at_zero_and_red_from_one_on() -> None:
    html = heat_map("Cosine", EVIL, [EVIL, "b"], [[0, 1, 7], [-0.5, 0.25, -1]], last_column="all")
    assert "<script" not in html
    colours = re.findall(r'style="background: (rgb\([\d ]+\))">(-?[\d.]+)<', html)
    assert colours == [
        *[("rgb(255 255 255)", "0.00"), ("rgb(255 95 95)", "1.00"), ("rgb(255 95 95)", "7.00")],
        *[("rgb(175 175 255)", "-0.50"), ("rgb(255 215 215)", "0.25"), ("rgb(95 95 255)", "-1.00")],
    ]
    assert re.findall(r'<th scope="col">(.*?)</th>', html) == [SHOWN, "b", "all"]
    assert re.findall(r'<th scope="row">(.*?)</th>', html) == [SHOWN, "b"]


def test_pictures_stand_side_by_side_and_behind_a_veil_where_they_have_to() -> None:
    rows = [(EVIL, "seed 1", [Shown("cat", "data:image/png;base64,AA==", EVIL, EVIL, small=True)]), ("", "seed 2", [])]
    html = picture_rows(rows)
    assert "<script" not in html
    assert html.count('class="small"') == 1
    assert "(the empty prompt)" in html
    assert "veil" not in html
    veiled = picture_rows(rows, veiled=True)
    assert f'<input type="checkbox" aria-label="show: {SHOWN}">' in veiled


def test_figures_are_names_and_values() -> None:
    html = figures({EVIL: "1", "b": Cell("2", "good")})
    assert f"<dt>{SHOWN}</dt><dd>1</dd>" in html
    assert '<dt>b</dt><dd class="good">2</dd>' in html


def test_frame_runs_no_script_and_fetches_nothing() -> None:
    document = "<!doctype html><h1>It's</h1><script>1</script><img src='https://example.org/x.png'>"
    html = frame(document, '"><script>')
    assert html.count("<") == 2  # the frame's own; the document is text
    assert 'sandbox=""' in html
    inside = unescape(re.findall(r'srcdoc="(.*?)"', html, re.DOTALL)[0])
    assert inside.endswith(document)
    policy = (
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
    )
    assert inside.startswith(f"<!doctype html>{policy}")

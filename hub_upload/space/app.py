"""A Space that shows erasers: the tab *Try* of `esd-lora ui`, with these erasers on this base and nothing else.

    pip install -r requirements.txt && python app.py

`ERASERS` (paths or Hub ids, with commas between) and `BASE` in the environment choose what is shown.
"""

from __future__ import annotations

import os

from esd_lora.ui.app import build, look
from esd_lora.ui.trying import try_tab
from esd_lora.ui.workplace import Workplace

ERASERS = os.environ.get("ERASERS", "esd-lora/emoji-no-cat,esd-lora/emoji-no-twemoji")
workplace = Workplace(base=os.environ.get("BASE", "emoji"), erasers=[name.strip() for name in ERASERS.split(",")])
page = build(workplace, {"Try": try_tab})

if __name__ == "__main__":
    page.launch(**look())

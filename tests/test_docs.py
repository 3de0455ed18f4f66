"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from shared.errors import Reason

ROOT = Path(__file__).parents[1]


def test_every_reason_is_documented_with_its_status_and_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert rows == [(reason.name, reason.status.name, reason.meaning) for reason in Reason]


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"

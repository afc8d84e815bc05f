"""The page as a user has it: each tab does its job on the built-in base, in a real browser."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect


def test_every_tab_opens(open_page: Callable[..., Page]) -> None:
    page = open_page("Try")
    expect(page.get_by_role("tab", name="Requests", exact=True)).to_be_attached()

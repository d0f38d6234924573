"""Tests of the chat page's text, which need no browser."""

import re

import pytest

from tests.serving.page.stub import HTML


def test_one_script_and_one_style_without_attributes():
    """The server's Content-Security-Policy allows them by their hashes."""
    assert re.findall("<script.*?>", HTML) == ["<script>"]
    assert re.findall("<style.*?>", HTML) == ["<style>"]
    assert "\r" not in HTML  # browsers hash lines that end in \n


@pytest.mark.parametrize(
    "pattern",
    [
        r"\w+HTML\b|\.write\(|\beval\(|DOMParser|\.srcdoc",  # text to HTML
        r"<[^>]*\s(on\w+|style)=",  # what the policy blocks
        r"https?:|src=|@import|url\(|//\w+\.",  # other files
        "localStorage|indexedDB|cookie",  # what would outlive the tab
    ],
)
def test_what_the_page_does_without(pattern):
    assert re.search(pattern, HTML) is None
